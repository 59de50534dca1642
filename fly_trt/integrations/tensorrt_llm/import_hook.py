"""Puts the rule into a process of TensorRT-LLM when that process comes to load what it belongs to.

`fly_trt_tensorrt_llm.pth`, which lies beside the packages, calls `watch` at the start of every Python process that has
the variable FLY_TRT_TRTLLM set. That is how the rule reaches workers that others start. So that it costs them nothing
it loads nothing that is large before its time; it knows where the rule goes and nothing else.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from fly_trt.integrations.tensorrt_llm.names import INTERFACE


class _Watcher:
    """Finds the one module as the others do, and has the rule installed when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != INTERFACE:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        specs = (finder.find_spec(fullname, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            execute(module)
            from fly_trt.integrations.tensorrt_llm.environment import Acceptance

            # Since this process began it may have been told to accept exactly, as an LLM with such a rule tells it.
            if module.__name__ == INTERFACE and Acceptance.from_environment() is not None:
                from fly_trt.integrations.tensorrt_llm.install import install_into

                install_into(module)

        spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """From now on the import of the interface raises ConfigError where the rule cannot be put there, which is no
    ImportError, so that nobody takes it for a missing module. Once a process."""
    if INTERFACE in sys.modules:
        from fly_trt.integrations.tensorrt_llm.install import install

        install()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
