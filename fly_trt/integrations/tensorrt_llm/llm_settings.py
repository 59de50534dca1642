"""What a directory for TensorRT-LLM's PyTorch backend can be asked for: when it is loaded, and by each request.

It turns the YAML that fly-build wrote into arguments of `tensorrt_llm.LLM` and variables of its processes, and refuses
by name what the backend would leave out without a word. It knows the files and settings, and imports no tensorrt_llm.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fly_trt.acceptance import GUARDS, PRESET_SETTINGS, AcceptanceSettings
from fly_trt.drafting import NO_STOP
from fly_trt.errors import ConfigError, EngineError, RequestError
from fly_trt.integrations.tensorrt_llm.environment import NO_ACCEPTANCE, Acceptance
from fly_trt.integrations.tensorrt_llm.modes import Release, check_mode
from fly_trt.manifest import Manifest
from fly_trt.params import SamplingParams, SpeculativeConfig
from fly_trt.runtime.executor import ExecutorParts
from fly_trt.runtime.request import Request
from fly_trt.verification import AcceptancePolicy, HeadInfo

Arguments = dict[str, Any]
ACCEPTANCE = ("acceptance", "preset", *PRESET_SETTINGS)
"""What is chosen when a directory is loaded: nothing of it was compiled."""
DRAFTING = ("draft_stop", "draft_stop_threshold")
SIZES = ("max_batch_size", "max_seq_len", "max_num_tokens")
ONLY_STEP_BY_STEP = ("logprobs", "prompt_logprobs", "logit_bias", "bad_words")
NEUTRAL = {"min_tokens": 0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
SINGLE_PROCESS = "TLLM_WORKER_USE_SINGLE_PROCESS"
OTHER_BACKENDS = "leave it out, or build for backend tensorrt or onnxruntime"


def read_arguments(directory: Path, manifest: Manifest) -> Arguments:
    """The keyword arguments that fly-build wrote: those of tensorrt_llm.LLM, as trtllm-serve takes them in its YAML.
    Needs PyYAML, which tensorrt_llm has with it. Raises EngineError for a file that is not such a one."""
    import yaml

    path, source = directory / manifest.target.model, manifest.target.source
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise EngineError(f"{path}: not YAML ({error}): rebuild it with fly-build".replace("\n", " ")) from None
    if not isinstance(read, dict):
        raise EngineError(f"{path}: a {type(read).__name__}, expected settings of tensorrt_llm.LLM by name: rebuild it")
    for role, engine in (("target", manifest.target), ("draft", manifest.draft)):
        folder = Path(engine.source.checkpoint) if engine is not None else Path()
        if folder.is_absolute() and not folder.is_dir():  # TensorRT-LLM would take it for a hub id
            raise EngineError(
                f"{directory}: the {role}, {folder}, is no folder here: put it there, or rebuild where it is now"
            )
    model = {"model": source.checkpoint} | ({} if source.revision is None else {"revision": source.revision})
    return model | read


def check_as_built(parts: ExecutorParts) -> None:
    """What may differ from the directory's own settings is how drafts are accepted, and that there are none. Raises
    ConfigError for everything else."""
    config, name = parts.speculative_config, parts.manifest.name
    if config.acceptance not in ("fly", "exact"):
        rule = getattr(config.acceptance, "name", config.acceptance)
        raise ConfigError(f"acceptance {rule!r}: of TensorRT-LLM expected 'fly' or 'exact': {OTHER_BACKENDS}")
    for guard in GUARDS:
        if (value := getattr(config, guard)) is not None:
            raise ConfigError(f"{guard} {value!r}: guards are the host's, TensorRT-LLM has none: {OTHER_BACKENDS}")
    if config.method is None:
        return
    for setting in dataclasses.fields(SpeculativeConfig):
        value, built = getattr(config, setting.name), getattr(parts.as_built, setting.name)
        if setting.name not in ACCEPTANCE and value != built:
            fix = " with --max-draft-len" if setting.name == "num_speculative_tokens" else ""
            raise ConfigError(
                f"{setting.name} {value!r}: {name} was built for {built!r}, and TensorRT-LLM has it from there: leave "
                f"it out, or rebuild{fix}"
            )


def environment_of(parts: ExecutorParts) -> dict[str, str]:
    """The variables that its processes need."""
    config = parts.speculative_config
    if config.method is None or not _policy(parts).is_loose:
        return NO_ACCEPTANCE
    stops = tuple(sorted(parts.manifest.head.stop_token_ids))
    return Acceptance(config.preset, config.fly_entropy_threshold, config.fly_window_size, stops).to_environment()


class ServerSettings:
    """How one directory is served by a release; `check_as_built` has been asked. Raises ConfigError where FLy would
    have no effect on what the YAML says."""

    def __init__(self, parts: ExecutorParts, release: Release, arguments: Arguments) -> None:
        self._config = parts.speculative_config
        self._policy = _policy(parts)
        self.speculates = self._config.method is not None
        self.arguments = _sized(arguments, parts)
        self._samples = True
        if not self.speculates:
            self.arguments.pop("speculative_config", None)
            return
        speculative = self.arguments.get("speculative_config")
        if not isinstance(speculative, Mapping):
            raise EngineError(f"{parts.directory}: built without speculative_config: use method None, or rebuild it")
        if self._policy.is_loose:
            check_mode(speculative, release)
            _check_processes(self.arguments)
        # Before 1.3 a flag of the server, without which one-model modes take the argmax whatever a request says.
        self._samples = release != "1.2" or bool(speculative.get("allow_advanced_sampling"))

    def check(self, request: Request) -> None:
        """Raises RequestError for what no server of TensorRT-LLM can do for one request."""
        params = request.params
        for name in ONLY_STEP_BY_STEP:
            if (value := getattr(params, name)) is not None:
                raise _refused(name, value, "is not to be had of its one-model modes")
        if params.structured_outputs is not None:
            raise RequestError(
                f"structured_outputs: is not to be had of its one-model modes (TensorRT-LLM): {OTHER_BACKENDS}"
            )
        if params.speculation_trace:
            raise _refused("speculation_trace", True, "is not to be had: it says nothing of its rounds")
        for name, neutral in NEUTRAL.items():
            if (value := getattr(params, name)) != neutral:
                raise _refused(name, value, "is not read by its one-model modes")
        if params.temperature > 0:
            self._check_sampling(params)
        if self.speculates:
            self._check_speculation(request)

    def _check_sampling(self, params: SamplingParams) -> None:
        if not self._samples:
            raise RequestError(
                f"temperature {params.temperature}: TensorRT-LLM 1.2 takes the most probable tokens, since its "
                "speculative_config has no allow_advanced_sampling: use 0, or serve it with 1.3"
            )
        for name, neutral in (("seed", None), ("min_p", 0.0)):
            if (value := getattr(params, name)) != neutral:
                raise _refused(name, value, "is not read by its samplers")

    def _check_speculation(self, request: Request) -> None:
        params, config = request.params, self._config
        if params.num_speculative_tokens not in (None, config.num_speculative_tokens):
            raise _refused("num_speculative_tokens", params.num_speculative_tokens, "is the server's for all requests")
        for name in DRAFTING:
            if (value := getattr(params, name)) not in (None, NO_STOP):
                raise _refused(name, value, "is not to be had: its drafts are all of one length")
        asked = params.acceptance_params
        given = {f.name: getattr(asked, f.name) for f in dataclasses.fields(AcceptanceSettings)}
        given = {name: value for name, value in given.items() if value is not None}
        for name in GUARDS:
            if name in given:
                raise _refused(name, given[name], "is not to be had: guards are the host's")
        if request.policy != self._policy:
            name = next((name for name, value in given.items() if value != getattr(config, name)), "acceptance")
            raise RequestError(
                f"{name} {given.get(name)!r}: the server accepts by {config.acceptance!r} for all requests: leave it "
                f"out, or load the directory with speculative_config={{{name!r}: ...}}"
            )


def _refused(name: str, value: object, why: str) -> RequestError:
    return RequestError(f"{name} {value!r}: {why} (TensorRT-LLM): {OTHER_BACKENDS}")


def _check_processes(arguments: Arguments) -> None:
    """FLy is put into processes when Python starts them: it is not in this one."""
    for name, value in (
        (SINGLE_PROCESS, os.environ.get(SINGLE_PROCESS) == "1"),
        ("gather_generation_logits", arguments.get("gather_generation_logits")),
    ):
        if value:
            raise ConfigError(f"{name}: TensorRT-LLM's worker would be in this process, which has no FLy: leave it out")


def _sized(arguments: Arguments, parts: ExecutorParts) -> Arguments:
    """With the sizes that were asked for, where they are smaller than what was built."""
    limits, sizes = parts.manifest.limits, {"max_batch_size": parts.num_slots, "max_seq_len": parts.max_seq_len}
    if parts.max_num_tokens is not None:
        sizes["max_num_tokens"] = parts.max_num_tokens
    changed: Arguments = {name: size for name, size in sizes.items() if size != getattr(limits, name)}
    if not parts.prefix_caching:
        changed["kv_cache_config"] = {**(arguments.get("kv_cache_config") or {}), "enable_block_reuse": False}
    return arguments | changed


def _policy(parts: ExecutorParts) -> AcceptancePolicy:
    head = parts.manifest.head
    info = HeadInfo(parts.manifest.target.vocab_size, head.entropy_top_k, head.top_tokens)
    return parts.speculative_config.policy(info).for_request()
