"""Engines of TensorRT-LLM 1.2 behind the engine thread: how target and draft are loaded into two C++ Executors.

An engine of one GPU runs in this process. Those of several (tensor parallelism) run in processes of TensorRT-LLM's own,
which it starts through MPI, a set for each engine: two engines in the same processes would sum over the same GPUs in an
order that nobody keeps. It knows files, sizes and devices; the loop is beside it.
"""

import contextlib
import importlib
import shlex
import tempfile
from pathlib import Path
from typing import Any

from fly_trt.drafting import DRAFTERS, NO_STOP
from fly_trt.engines.tensorrt_library import import_library
from fly_trt.errors import ConfigError, EngineError, one_line
from fly_trt.integrations.tensorrt_llm.executor_client import ExecutorClient, Mailbox
from fly_trt.integrations.tensorrt_llm.executor_loop import ExecutorLoop
from fly_trt.integrations.tensorrt_llm.executor_requests import RequestForms, exact_or, rule_name
from fly_trt.integrations.tensorrt_llm.executor_rounds import RoundSettings
from fly_trt.manifest import Manifest, ModelEngine
from fly_trt.params import SpeculativeConfig
from fly_trt.runtime.executor import ExecutorParts
from fly_trt.verification import AcceptancePolicy, HeadInfo

METHODS = (None, "draft_model", "multi_level", "ngram")
PLUGIN_LIBRARY = "libfly_plugins.so"
WORKER = "bin/executorWorker"  # of the installed package
CACHE_FRACTION = 0.9  # of the memory that is free when the target's cache is made, after all else
STATS_ITERATIONS = 64  # more than a step of the loop lets go by


def load_executor(parts: ExecutorParts) -> ExecutorLoop:
    """Raises ConfigError for settings that the engines were not built for, before they are read, and EngineError for
    what cannot be loaded."""
    config, manifest = parts.speculative_config, parts.manifest
    policy = _check(parts)
    bindings = _import_bindings()
    has_model = config.method is not None and DRAFTERS[config.method].needs_draft_model
    settings = RoundSettings(
        num_draft_tokens=0 if config.method is None else config.num_speculative_tokens,
        max_seq_len=parts.max_seq_len,
        has_model=has_model,
        lookup=_lookup(config),
        max_guess=manifest.limits.max_draft_len,
        target_vocab_size=manifest.target.vocab_size,
        draft_vocab_size=manifest.draft.vocab_size if has_model and manifest.draft else manifest.target.vocab_size,
    )
    forms = RequestForms(bindings, policy, frozenset(manifest.head.stop_token_ids))
    mailbox, clients = Mailbox(), contextlib.ExitStack()
    with clients:
        loader = _Loader(bindings, parts, mailbox, clients)
        # The draft first: its cache has a size, the target's takes what is left.
        draft = loader.load("draft", manifest.draft) if has_model and manifest.draft else None
        target = loader.load("target", manifest.target)
        return ExecutorLoop(
            target,
            draft,
            mailbox,
            forms,
            settings,
            parts.metrics,
            num_slots=parts.num_slots,
            max_queue_size=parts.max_queue_size,
            release=clients.pop_all().close,
        )


class _Loader:
    """Loads engines; `release` ends what they need."""

    def __init__(
        self, bindings: Any, parts: ExecutorParts, mailbox: Mailbox, release: contextlib.ExitStack[bool | None]
    ) -> None:
        self._bindings = bindings
        self._parts = parts
        self._mailbox = mailbox
        self._release = release
        self._plugins = _plugin_library(parts.directory, parts.manifest)
        self._worker: Path | None = None

    def load(self, name: str, model: ModelEngine) -> ExecutorClient:
        """name: target or draft."""
        bindings, directory = self._bindings, (self._parts.directory / model.model).parent
        is_target = name == "target"
        if model.tensor_parallel_size == 1 and is_target and self._plugins is not None:
            import_library("tensorrt").load_plugins(self._plugins)
        config = bindings.ExecutorConfig(
            max_beam_width=1,
            kv_cache_config=self._cache(is_target=is_target),
            max_batch_size=self._parts.num_slots,
            iter_stats_max_iterations=STATS_ITERATIONS,
            parallel_config=self._places(model.tensor_parallel_size),
        )
        try:
            executor = bindings.Executor(
                model_path=directory, model_type=bindings.ModelType.DECODER_ONLY, executor_config=config
            )
        except Exception as error:
            raise EngineError(
                f"{directory}: TensorRT-LLM cannot load the {name} ({one_line(error)}): does it fit the GPU and the "
                "version that it was built for?"
            ) from error
        client = ExecutorClient(name, executor, self._mailbox)
        self._release.callback(client.close)
        return client

    def _cache(self, *, is_target: bool) -> Any:
        """Blocks are reused: a round is a request that begins with the tokens of the one before. The draft's has what
        all slots need; the target's also keeps what others may begin with."""
        if is_target:
            return self._bindings.KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=CACHE_FRACTION)
        num_tokens = self._parts.num_slots * (self._parts.max_seq_len + self._parts.manifest.limits.max_draft_len)
        return self._bindings.KvCacheConfig(enable_block_reuse=True, max_tokens=num_tokens)

    def _places(self, tp_size: int) -> Any:
        """None where the engine runs in this process."""
        if tp_size == 1:
            return None
        bindings = self._bindings
        return bindings.ParallelConfig(
            communication_type=bindings.CommunicationType.MPI,
            communication_mode=bindings.CommunicationMode.ORCHESTRATOR,
            device_ids=list(range(tp_size)),
            orchestrator_config=bindings.OrchestratorConfig(
                is_orchestrator=True, worker_executable_path=str(self._worker_program()), spawn_processes=True
            ),
        )

    def _worker_program(self) -> Path:
        """TensorRT-LLM's worker, which by itself registers no plugins but its own: a script that has it begin with
        these (plugins/library.cpp)."""
        if self._worker is not None:
            return self._worker
        worker = Path(importlib.import_module("tensorrt_llm").__file__ or "").parent / WORKER
        if not worker.is_file():
            raise EngineError(f"{worker}: no such program: TensorRT-LLM 1.2 installs it, for engines of several GPUs")
        if self._plugins is None:
            self._worker = worker
            return worker
        folder = Path(self._release.enter_context(tempfile.TemporaryDirectory(prefix="fly-trt-")))
        library = folder / PLUGIN_LIBRARY  # a path of its own: the variable cannot hold one with a space or a colon
        library.symlink_to(self._plugins.resolve())
        preload = f'"{library}${{LD_PRELOAD:+:$LD_PRELOAD}}"'
        lines = f"export FLY_TRT_REGISTER_PLUGINS=1 LD_PRELOAD={preload}", f'exec {shlex.quote(str(worker))} "$@"'
        self._worker = folder / "worker.sh"
        self._worker.write_text("\n".join(("#!/bin/sh", *lines, "")), encoding="utf-8")
        self._worker.chmod(0o700)
        return self._worker


def _check(parts: ExecutorParts) -> AcceptancePolicy:
    """The rule that the target was built with."""
    config, manifest, limits = parts.speculative_config, parts.manifest, parts.manifest.limits
    if config.method not in METHODS:
        known = ", ".join(str(method) for method in METHODS)
        raise ConfigError(f"method {config.method!r}: TensorRT-LLM engines are served with one of {known}")
    if config.draft_stop not in (None, NO_STOP):
        raise ConfigError(f"draft_stop {config.draft_stop!r}: cannot be had of TensorRT-LLM engines: leave it out")
    if parts.max_seq_len > limits.max_num_tokens:
        raise ConfigError(
            f"max_seq_len {parts.max_seq_len}: each round reads its sequence as one prompt, and {manifest.name} was "
            f"built for prompts of max_num_tokens {limits.max_num_tokens}: serve with a smaller max_seq_len, or "
            f"rebuild with --max-num-tokens {parts.max_seq_len}"
        )
    if not parts.prefix_caching:
        raise ConfigError(
            "enable_prefix_caching False: each round is a prompt that begins with the one before, and would be read "
            "anew: leave it out"
        )
    if parts.max_num_tokens not in (None, limits.max_num_tokens):
        raise ConfigError(
            f"max_num_tokens {parts.max_num_tokens}: TensorRT-LLM's engine has {limits.max_num_tokens}: leave it out, "
            f"or rebuild with --max-num-tokens {parts.max_num_tokens}"
        )
    head = HeadInfo(manifest.target.vocab_size, manifest.head.entropy_top_k, manifest.head.top_tokens)
    built = exact_or(SpeculativeConfig.from_dict(dict(manifest.speculative)).policy(head))
    asked = exact_or(config.policy(head))
    if config.method is not None and asked != built:
        raise ConfigError(
            f"acceptance {rule_name(asked)}: {manifest.name} was built with {rule_name(built)}: leave it out, or "
            "rebuild with that rule"
        )
    if not config.guard_settings().is_empty:
        raise ConfigError(
            "exact_first, exact_token_ids, exact_within, max_loosened_per_100: cannot be had of TensorRT-LLM engines, "
            "whose rule is built in: leave them out"
        )
    return built


def _lookup(config: SpeculativeConfig) -> tuple[int, int, int] | None:
    if config.method not in ("multi_level", "ngram"):
        return None
    return config.prompt_lookup_max, config.prompt_lookup_min, config.prompt_lookup_num_tokens


def _plugin_library(directory: Path, manifest: Manifest) -> Path | None:
    names = [name for name in manifest.files if Path(name).name == PLUGIN_LIBRARY]
    return directory / names[0] if names else None


def _import_bindings() -> Any:
    try:
        return importlib.import_module("tensorrt_llm.bindings.executor")
    except ImportError as error:
        raise EngineError(
            f"TensorRT-LLM's Executor cannot be loaded ({one_line(error)}): install tensorrt_llm 1.2, the last release "
            "that has engines, in an environment of its own"
        ) from error
