"""An engine directory at work: what `LLM` and `AsyncLLM` share.

Has the engines loaded, checks settings and requests, and starts the engine thread. Everything that can be wrong with a
request is found here, before it reaches the loop.
"""

import dataclasses
import itertools
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from fly_trt.chat import ChatMessage
from fly_trt.drafting import Drafter, Lookup, ModelDrafter, NgramDrafter
from fly_trt.engines.base import AcceptancePolicy
from fly_trt.errors import ConfigError, RequestError
from fly_trt.loaded import LoadedEngines
from fly_trt.manifest import Manifest
from fly_trt.metrics import Metrics
from fly_trt.params import AcceptanceParams, RequestOutputKind, SamplingParams, SpeculativeConfig
from fly_trt.prompts import Prompt, PromptReader, TokensPrompt
from fly_trt.runtime.group import RequestGroup, Sink
from fly_trt.runtime.loop import GenerationLoop, LoopConfig
from fly_trt.runtime.loosening import DRAFT_TOKEN_COST, VERIFICATION_TOKEN_COST, StepCosts
from fly_trt.runtime.request import Request
from fly_trt.runtime.sampler import Sampler, draw_seed
from fly_trt.runtime.thread import EngineThread
from fly_trt.sequence import TokenSequence
from fly_trt.tokenizer import Detokenizer
from fly_trt.verification.sampling import LogitsProcessor, UniformStream

DEFAULT_MAX_QUEUE_SIZE = 1024
ALIASES = {"max_num_seqs": "max_batch_size", "max_model_len": "max_seq_len"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """How an engine directory is served. None means: as it was built.

    max_batch_size: requests in flight. max_seq_len: tokens of a sequence, prompt and output. max_num_tokens: prompt
    tokens that one iteration reads, and tokens that its verification step has; less keeps the pauses of running
    requests short while a long prompt is read, more reads it faster. max_queue_size: requests that may wait.
    enable_prefix_caching: a prompt starts from the cache of another that begins alike. num_threads: CPU threads, shared
    by all engines of the process; None means all cores that it may use, within its container's quota. device_id: CUDA
    device of the engines, for TensorRT; None means the calling thread's current one, and the thread is left with theirs
    as its current one. verify_hashes: check every file against the manifest's sha256 first.
    """

    max_batch_size: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    max_queue_size: int = DEFAULT_MAX_QUEUE_SIZE
    enable_prefix_caching: bool = True
    num_threads: int | None = None
    device_id: int | None = None
    verify_hashes: bool = False

    def __post_init__(self) -> None:
        sizes = ("max_batch_size", "max_seq_len", "max_num_tokens", "max_queue_size", "num_threads")
        for name, least in (*((size, 1) for size in sizes), ("device_id", 0)):
            value = getattr(self, name)
            is_default = value is None and name != "max_queue_size"
            if not is_default and not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
                raise ConfigError(f"{name} {value!r}: expected a whole number, at least {least}")
        for name in ("enable_prefix_caching", "verify_hashes"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} {getattr(self, name)!r}: expected True or False")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Raises ConfigError for an unknown name; vLLM's max_num_seqs and max_model_len are known too."""
        known = [f.name for f in dataclasses.fields(cls)]
        given: dict[str, Any] = {}
        for name, value in settings.items():
            field = ALIASES.get(name, name)
            if field not in known:
                raise ConfigError(f"unknown setting {name!r}: expected one of {', '.join([*known, *ALIASES])}")
            if field in given:
                raise ConfigError(f"{name}: the same setting as {field}: give one of them")
            given[field] = value
        return cls(**given)


class Service:
    """Engines, tokenizer and engine thread of one engine directory, or of one that was loaded to be shared.

    Raises EngineError for a directory that cannot be used and ConfigError for settings that do not fit it.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str] | LoadedEngines,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None,
        config: ServiceConfig,
    ) -> None:
        if isinstance(engine_dir, LoadedEngines):
            engines, release = engine_dir, _leave_to_the_others
            config = engines.fitted(config)
        else:
            engines = _load(engine_dir, config)
            release = engines.close
        self.manifest: Manifest = engines.manifest
        if not isinstance(speculative_config, SpeculativeConfig):
            speculative_config = resolve_speculative_config(self.manifest, speculative_config or {})
        self.speculative_config: SpeculativeConfig = speculative_config
        self.config = check_limits(config, speculative_config, self.manifest)
        self.tokenizer = engines.tokenizer
        self.metrics = Metrics()
        self._request_ids = itertools.count()
        target = engines.target
        self._info = target.info
        self._prompts = PromptReader(
            self.tokenizer,
            engines.directory / "tokenizer",
            vocab_size=self._info.vocab_size,
            max_seq_len=self.config.max_seq_len or 0,
        )
        drafter = self._make_drafter(engines)
        loop_config = LoopConfig(
            num_slots=self.config.max_batch_size or 1,
            max_seq_len=self.config.max_seq_len or 1,
            num_draft_tokens=speculative_config.num_speculative_tokens,
            max_num_tokens=self.config.max_num_tokens or 1,
            max_queue_size=config.max_queue_size,
            adaptive_draft_length=speculative_config.adaptive_draft_length,
            prefix_caching=config.enable_prefix_caching,
            step_costs=step_costs(self.manifest, speculative_config),
        )
        loop = GenerationLoop(target, drafter, loop_config, self.tokenizer, self.metrics)
        if drafter is not None and speculative_config.adaptive_draft_length:
            with engines.turn.held():
                loop.warm_up()
        self.thread = EngineThread(loop, release, engines.turn)
        # Also when the interpreter ends without a shutdown(): the thread must not run into a library's teardown.
        self._finalizer = weakref.finalize(self, self.thread.shutdown)

    def shutdown(self) -> None:
        """Aborts what is served and releases the engines, unless they are shared. Safe to call twice. Raises
        EngineError when a step does not end."""
        self.thread.shutdown()
        self._finalizer.detach()

    def new_request_id(self) -> str:
        return str(next(self._request_ids))

    def render_chat(self, messages: Sequence[ChatMessage], **variables: Any) -> TokensPrompt:
        return self._prompts.render_chat(messages, **variables)

    def make_group(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str,
        sink: Sink,
        *,
        output_kind: RequestOutputKind | None = None,
    ) -> RequestGroup:
        """A request as the engine thread takes it. Raises RequestError when it can never be served as asked, and what
        `EngineThread.check_running` raises."""
        self.thread.check_running()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params of type {type(params).__name__}: expected SamplingParams")
        if params.n > self.config.max_queue_size:
            raise RequestError(f"n {params.n}: more than max_queue_size {self.config.max_queue_size}")
        self._check_num_draft_tokens(params.num_speculative_tokens or 0)
        token_ids = self._prompts.tokenize(prompt)
        room = (self.config.max_seq_len or 0) - len(token_ids)
        if room < 1:
            raise RequestError(
                f"prompt has {len(token_ids)} tokens, max_seq_len is {self.config.max_seq_len} with the output: "
                "shorten it, or serve or build with a larger max_seq_len"
            )
        seed = draw_seed() if params.seed is None else params.seed
        bad_words = self._prompts.bad_words(params.bad_words or ())
        requests = [
            self._make_request(token_ids, params, bad_words, request_id, room, seed, i) for i in range(params.n)
        ]
        return RequestGroup(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            output_kind=output_kind or params.output_kind,
            requests=requests,
            sink=sink,
        )

    def _make_request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        bad_words: list[list[int]],
        request_id: str,
        room: int,
        seed: int,
        index: int,
    ) -> Request:
        acceptance = (params.acceptance or AcceptanceParams()).over(self.speculative_config.acceptance_params())
        policy = acceptance.policy(self._info.vocab_size, self._info.entropy_top_k)
        own_stops = frozenset(params.stop_token_ids or ())
        self._check_token_ids("stop_token_ids", own_stops)
        self._check_token_ids("logit_bias", params.logit_bias or ())
        ends = own_stops if params.ignore_eos else own_stops | self._info.stop_token_ids
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            policy=policy,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            end_token_ids=ends,
            stop_token_ids=own_stops - self._info.stop_token_ids,
            detokenizer=Detokenizer(
                self.tokenizer,
                token_ids,
                stop_strings=params.stop_strings,
                include_stop_string=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
            ),
            sequence=TokenSequence(token_ids),
            sampler=self._make_sampler(params, bad_words, policy, token_ids, ends, seed, index),
            index=index,
        )
        request.metrics.num_prompt_tokens = len(token_ids)
        return request

    def _make_sampler(
        self,
        params: SamplingParams,
        bad_words: list[list[int]],
        policy: AcceptancePolicy,
        token_ids: list[int],
        end_token_ids: frozenset[int],
        seed: int,
        index: int,
    ) -> Sampler | None:
        """None where the engine's argmax is the choice."""
        if not (params.temperature > 0 or params.changes_scores):
            return None
        processor = LogitsProcessor(
            vocab_size=self._info.vocab_size,
            prompt_token_ids=token_ids,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=params.logit_bias or {},
            bad_words=bad_words,
            min_tokens=params.min_tokens,
            end_token_ids=end_token_ids,
        )
        return Sampler(params, processor, UniformStream(seed, index), policy, self._info.entropy_top_k)

    def _check_num_draft_tokens(self, asked: int) -> None:
        limit, built_for = self.speculative_config.num_speculative_tokens, self.manifest.limits.max_draft_len
        if asked and self.speculative_config.method is None:
            raise RequestError(
                f"num_speculative_tokens {asked}: served with method None, which makes no drafts: leave it out, or "
                "serve with another method"
            )
        if asked > limit:
            raise RequestError(
                f"num_speculative_tokens {asked}: served with {limit}: ask for at most {limit}, or serve with a larger "
                f"num_speculative_tokens, which is at most the engine's max_draft_len, {built_for}"
            )

    def _check_token_ids(self, name: str, token_ids: Iterable[int]) -> None:
        unknown = sorted(token for token in token_ids if not 0 <= token < self._info.vocab_size)
        if unknown:
            raise RequestError(f"{name}: {unknown[0]} is not a token id, expected 0 to {self._info.vocab_size - 1}")

    def _make_drafter(self, engines: LoadedEngines) -> Drafter | None:
        config = self.speculative_config
        if config.method is None:
            return None
        if config.method == "ngram":
            return NgramDrafter(config.prompt_lookup_max, config.prompt_lookup_min)
        lookup = None
        if config.method == "multi_level":
            lookup = Lookup(config.prompt_lookup_max, config.prompt_lookup_min, config.prompt_lookup_num_tokens)
        vocab_size = self.manifest.target.vocab_size
        return ModelDrafter(engines.draft, vocab_size, lookup, reuse_cache=self.config.enable_prefix_caching)


def check_limits(config: ServiceConfig, speculative_config: SpeculativeConfig, manifest: Manifest) -> ServiceConfig:
    """The settings with the engine's limits where nothing was asked for. Raises ConfigError for more than was built."""
    _check_speculative_limits(speculative_config, manifest)
    limits = manifest.limits
    sizes = {}
    for name in ("max_batch_size", "max_seq_len", "max_num_tokens"):
        limit, asked = getattr(limits, name), getattr(config, name)
        if asked is not None and asked > limit:
            flag = name.replace("_", "-")
            raise ConfigError(f"{name} {asked}: {manifest.name} was built for {limit}: rebuild with --{flag} {asked}")
        sizes[name] = limit if asked is None else asked
    if sizes["max_num_tokens"] < sizes["max_batch_size"]:
        raise ConfigError(
            f"max_num_tokens {sizes['max_num_tokens']}: less than one token for each of max_batch_size "
            f"{sizes['max_batch_size']} requests: raise it, or lower max_batch_size"
        )
    return dataclasses.replace(config, **sizes)


def _check_speculative_limits(config: SpeculativeConfig, manifest: Manifest) -> None:
    if config.method in ("multi_level", "draft_model") and manifest.draft is None:
        raise ConfigError(
            f"method {config.method!r} needs a draft model and {manifest.name} was built without one: "
            "use method='ngram' or rebuild with --draft"
        )
    if config.method is not None and config.num_speculative_tokens > manifest.limits.max_draft_len:
        raise ConfigError(
            f"num_speculative_tokens {config.num_speculative_tokens}: built for max_draft_len "
            f"{manifest.limits.max_draft_len}: rebuild with --max-draft-len {config.num_speculative_tokens}"
        )
    config.acceptance_params().policy(manifest.target.vocab_size, manifest.head.entropy_top_k)


def _load(engine_dir: str | os.PathLike[str], config: ServiceConfig) -> LoadedEngines:
    settings = ("max_batch_size", "num_threads", "device_id", "verify_hashes")
    return LoadedEngines(engine_dir, **{name: getattr(config, name) for name in settings})


def _leave_to_the_others() -> None:
    """Engines that are shared stay open."""


def step_costs(manifest: Manifest, config: SpeculativeConfig) -> StepCosts | None:
    """What windows are decided by: as configured, as measured when the engine was built, or as is usual. None where
    they are always opened."""
    if not config.adaptive_acceptance:
        return None
    usual = {"draft_token_cost": DRAFT_TOKEN_COST, "verification_token_cost": VERIFICATION_TOKEN_COST}
    costs = []
    for name, cost in usual.items():
        given = [value for value in (getattr(config, name), manifest.speculative.get(name)) if value is not None]
        costs.append(given[0] if given else cost)
    return StepCosts(*costs)


def resolve_speculative_config(manifest: Manifest, overrides: Mapping[str, Any]) -> SpeculativeConfig:
    """The engine's defaults with `overrides` on top. Without a draft model the default is n-gram lookup, and the
    default number of draft tokens is at most the engine's max_draft_len."""
    limit = manifest.limits.max_draft_len
    settings = dict(manifest.speculative)
    if overrides.get("preset") not in (None, settings.get("preset", "reference")):
        for name in ("fly_window_size", "fly_entropy_threshold"):  # in the unit of the other preset
            settings.pop(name, None)
    if manifest.draft is None and settings.get("method", "multi_level") in ("multi_level", "draft_model"):
        settings["method"] = "ngram"
    if limit == 0:
        settings["method"] = None
    wanted = settings.get("num_speculative_tokens", SpeculativeConfig().num_speculative_tokens)
    settings["num_speculative_tokens"] = max(1, min(wanted, limit))
    config = SpeculativeConfig.from_dict(settings | dict(overrides))
    names = [f.name for f in dataclasses.fields(AcceptanceParams)]
    asked = AcceptanceParams(**{name: overrides[name] for name in names if name in overrides})
    asked.over(config.acceptance_params())  # refuses a FLy setting that would have no effect
    return config
