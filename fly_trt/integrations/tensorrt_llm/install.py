"""Puts FLy behind the acceptance of TensorRT-LLM's PyTorch backend in this process, and takes it out again.

One method is replaced by one that calls it. Version and signature are looked at first: where they are not those that
were read, nothing is changed and the error names both. It knows TensorRT-LLM's module and class, not the rule.
"""

import atexit
import contextlib
import functools
import inspect
import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from fly_trt.errors import ConfigError
from fly_trt.integrations.tensorrt_llm.acceptance import FlyAcceptance
from fly_trt.integrations.tensorrt_llm.environment import FORM, STOP_TOKENS_VARIABLE, VARIABLE, Acceptance
from fly_trt.integrations.tensorrt_llm.modes import modes_of, release_of
from fly_trt.integrations.tensorrt_llm.names import ACCEPTANCE, INTERFACE, METHOD, WORKER

_CHECK = "hold it against tools/check_tensorrt_llm.py, or unset the variable to decode exactly"


def install(acceptance: Acceptance | None = None) -> None:
    """Installs the rule, or that of FLY_TRT_TRTLLM, in this process. Again the same is nothing. Raises ConfigError for
    a variable that says nothing or what it cannot be, for a version or signature that is not known, and where another
    rule is installed."""
    install_into(import_module(INTERFACE), acceptance)


def install_into(interface: ModuleType, acceptance: Acceptance | None = None) -> None:
    """`install` for the module that has the workers' base class, which may be about to be imported."""
    acceptance = acceptance or Acceptance.from_environment()
    if acceptance is None:
        raise ConfigError(f"{VARIABLE} is not set: expected {FORM}")
    version = import_module("tensorrt_llm.version").__version__
    release = release_of(version)
    worker = getattr(interface, WORKER, None)
    original: Any = getattr(worker, METHOD, None)
    if (installed := _installed(interface)) is not None:
        if installed.acceptance != acceptance:
            raise ConfigError(f"{installed.acceptance} is installed, not {acceptance}: call uninstall() first")
        return
    (parameters,) = (name.parameters for name in ACCEPTANCE if name.name == f"{WORKER}.{METHOD}")
    expected = f"({', '.join(parameters)})"
    found = f"({', '.join(inspect.signature(original).parameters)})" if callable(original) else "no such method"
    if found != expected:
        raise ConfigError(f"tensorrt_llm {version}: expected {WORKER}.{METHOD}{expected}, found {found}: {_CHECK}")
    fly = FlyAcceptance(acceptance, _say)

    @functools.wraps(original)
    def accept_loosely(
        self: Any, logits: Any, draft_tokens: Any, num_contexts: int, batch_size: int, spec_metadata: Any
    ) -> Any:
        return fly(original, self, logits, draft_tokens, num_contexts, batch_size, spec_metadata)

    accept_loosely.fly_acceptance = fly  # type: ignore[attr-defined]
    setattr(worker, METHOD, accept_loosely)
    atexit.register(_say_counts, fly)
    stops = acceptance.stop_token_ids or f"none: set {STOP_TOKENS_VARIABLE}"
    _say(
        f"acceptance of draft tokens is lossy here: {acceptance.to_environment()[VARIABLE]}, never "
        f"loosened: {stops}. Modes that take it: {', '.join(modes_of(release))}; all others stay exact"
    )


def uninstall() -> None:
    """Puts the original method back. Nothing where there is no rule. CUDA graphs that were captured keep it."""
    interface = import_module(INTERFACE)
    if _installed(interface) is not None:
        worker = getattr(interface, WORKER)
        setattr(worker, METHOD, getattr(worker, METHOD).__wrapped__)
        atexit.unregister(_say_counts)


def counts() -> tuple[int, int]:
    """Of this process: accepted draft tokens, and how many of them the target had not chosen; (0, 0) where no rule is
    installed. Waits for the device: not while a graph is captured."""
    fly = _installed(import_module(INTERFACE))
    return (0, 0) if fly is None else fly.counts()


def _installed(interface: ModuleType) -> FlyAcceptance | None:
    fly: FlyAcceptance | None = getattr(getattr(getattr(interface, WORKER, None), METHOD, None), "fly_acceptance", None)
    return fly


def _say_counts(fly: FlyAcceptance) -> None:
    with contextlib.suppress(RuntimeError):  # of a device that has failed
        accepted, loosened = fly.counts()
        if accepted:
            _say(f"{loosened} of {accepted} accepted draft tokens were loosened (warm-up and padding included)")


def _say(text: str) -> None:
    """Not through TensorRT-LLM's logger, which shows errors alone unless it is told otherwise."""
    print(f"[fly-trt] [process {os.getpid()}] {text}", file=sys.stderr, flush=True)
