"""An engine directory at work: what `LLM` and `AsyncLLM` share.

Has the engines loaded, checks settings and requests, and starts the engine thread. Everything that can be wrong with a
request is found here, before it reaches the loop.
"""

import itertools
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fly_trt.checks import is_number
from fly_trt.drafting import Drafter, Lookup, ModelDrafter, NgramDrafter
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import RequestError
from fly_trt.manifest import Manifest
from fly_trt.params import AcceptanceParams, RequestOutputKind, SamplingParams, SpeculativeConfig
from fly_trt.runtime.group import RequestGroup, Sink
from fly_trt.runtime.loop import GenerationLoop, LoopConfig
from fly_trt.runtime.metrics import Metrics
from fly_trt.runtime.request import Request
from fly_trt.runtime.sampler import Sampler, draw_seed
from fly_trt.runtime.thread import EngineThread
from fly_trt.service.config import ServiceConfig, fit_to_shared, resolve_sizes, resolve_speculative_config, step_costs
from fly_trt.text.chat import ChatMessage
from fly_trt.text.prompts import Prompt, PromptReader, TokensPrompt
from fly_trt.text.tokenizer import Detokenizer
from fly_trt.tokens import TokenSequence
from fly_trt.verification.policy import AcceptancePolicy
from fly_trt.verification.sampling import LogitsProcessor, UniformStream


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
            config = fit_to_shared(config, engines)
        else:
            engines = LoadedEngines(engine_dir, **config.engine_settings())
            release = engines.close
        self.manifest: Manifest = engines.manifest
        if not isinstance(speculative_config, SpeculativeConfig):
            speculative_config = resolve_speculative_config(self.manifest, speculative_config or {})
        self.speculative_config: SpeculativeConfig = speculative_config
        self.sizes = resolve_sizes(config, speculative_config, self.manifest)
        self.tokenizer = engines.tokenizer
        self.metrics = Metrics()
        self._request_ids = itertools.count()
        target = engines.target
        self._info = target.info
        self._prompts = PromptReader(
            self.tokenizer,
            engines.directory / "tokenizer",
            vocab_size=self._info.vocab_size,
            max_seq_len=self.sizes.max_seq_len,
        )
        drafter = self._make_drafter(engines, config.enable_prefix_caching)
        loop_config = LoopConfig(
            num_slots=self.sizes.max_batch_size,
            max_seq_len=self.sizes.max_seq_len,
            num_draft_tokens=speculative_config.num_speculative_tokens,
            max_num_tokens=self.sizes.max_num_tokens,
            max_queue_size=self.sizes.max_queue_size,
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
        queue_timeout: float | None = None,
    ) -> RequestGroup:
        """A request as the engine thread takes it. Raises RequestError when it can never be served as asked, and what
        `EngineThread.check_running` raises."""
        self.thread.check_running()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params of type {type(params).__name__}: expected SamplingParams")
        if params.n > self.sizes.max_queue_size:
            raise RequestError(f"n {params.n}: more than max_queue_size {self.sizes.max_queue_size}")
        if queue_timeout is not None and not (is_number(queue_timeout) and queue_timeout > 0):
            raise RequestError(f"queue_timeout {queue_timeout!r}: expected seconds, above 0, or None to wait for ever")
        self._check_num_draft_tokens(params.num_speculative_tokens or 0)
        token_ids = self._prompts.tokenize(prompt)
        room = self.sizes.max_seq_len - len(token_ids)
        if room < 1:
            raise RequestError(
                f"prompt has {len(token_ids)} tokens, max_seq_len is {self.sizes.max_seq_len} with the output: "
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
            queue_timeout=queue_timeout,
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

    def _make_drafter(self, engines: LoadedEngines, reuse_cache: bool) -> Drafter | None:
        config = self.speculative_config
        if config.method is None:
            return None
        if config.method == "ngram":
            return NgramDrafter(config.prompt_lookup_max, config.prompt_lookup_min)
        lookup = None
        if config.method == "multi_level":
            lookup = Lookup(config.prompt_lookup_max, config.prompt_lookup_min, config.prompt_lookup_num_tokens)
        vocab_size = self.manifest.target.vocab_size
        return ModelDrafter(engines.draft, vocab_size, lookup, reuse_cache=reuse_cache)


def _leave_to_the_others() -> None:
    """Engines that are shared stay open."""
