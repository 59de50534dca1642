"""A package `tensorrt_llm` with as much in it as FLy touches, for processes of its own, and its classes in this one.

The workers' base class is in tests/integrations/tensorrt_llm/stand_in, a file a release. Around it, as in the text of
tensorrt_llm/__init__.py and version.py: the version is in a module of its own, and the package loads its parts first.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FILES = Path(__file__).parent / "integrations" / "tensorrt_llm" / "stand_in"
INTERFACES = {"1.2": FILES / "interface_1_2.py", "main": FILES / "interface_main.py"}
VERSIONS = {"1.2": "1.2.1", "main": "1.3.0rc15"}
PACKAGE = {
    "__init__.py": "from . import _torch\nfrom .version import __version__\n",
    "_torch/__init__.py": "from . import speculative\n",
    "_torch/speculative/__init__.py": "from .interface import SpecWorkerBase\n",
}


def write_package(folder: Path, release: str, *, version: str | None = None, interface: str | None = None) -> None:
    """Writes the package into `folder`; another `version` or text of the interface for what must be refused."""
    texts = PACKAGE | {
        "version.py": f"__version__ = {version or VERSIONS[release]!r}\n",
        "_torch/speculative/interface.py": interface or INTERFACES[release].read_text(encoding="utf-8"),
    }
    for name, text in texts.items():
        path = folder / "tensorrt_llm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@functools.cache
def load_interface(release: str) -> ModuleType:
    """The release's module, for tests that put nothing into it."""
    spec = importlib.util.spec_from_file_location(f"stand_in_{release.replace('.', '_')}", INTERFACES[release])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks there
    spec.loader.exec_module(module)
    return module


def make_worker(interface: ModuleType, max_draft_len: int) -> Any:
    class Worker(interface.SpecWorkerBase):  # type: ignore[name-defined, misc]
        @property
        def max_draft_len(self) -> int:
            return max_draft_len

    return Worker()


def sampled(interface: ModuleType, temperatures: torch.Tensor) -> Any:
    """Metadata of a batch with requests that sample."""
    metadata = interface.SpecMetadata()
    metadata.allow_advanced_sampling, metadata.is_all_greedy_sample = True, False
    metadata.temperatures = temperatures
    return metadata
