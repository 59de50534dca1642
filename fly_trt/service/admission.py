"""From a prompt with SamplingParams to a request that the engine thread takes.

Everything that can be wrong with a prompt and its settings is found here, before it reaches the loop. It knows
the tokenizer, the sizes and what the target's engine is, and nothing of queues, threads or how requests are served.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fly_trt.acceptance import AcceptanceParams
from fly_trt.checks import is_number
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import RequestError
from fly_trt.grammar import CompiledGrammar, GrammarCompiler, StructuredOutputs
from fly_trt.params import RequestOutputKind, SamplingParams, SpeculativeConfig
from fly_trt.runtime.group import RequestGroup, Sink
from fly_trt.runtime.request import Request
from fly_trt.runtime.sampler import Sampler, draw_seed
from fly_trt.service.config import Sizes, head_info
from fly_trt.service.setting_names import setting_name
from fly_trt.text.chat import ChatMessage
from fly_trt.text.prompts import Prompt, PromptReader, TokensPrompt
from fly_trt.text.tokenizer import Detokenizer, piece_reader
from fly_trt.tokens import TokenSequence
from fly_trt.verification import AcceptancePolicy, Guards, make_guards
from fly_trt.verification.sampling import LogitsProcessor, UniformStream

LONG_PROMPT = 20_000  # characters; tokenising as many takes longer than an event loop may stand still


class Admission:
    """Checks requests for the engines of one directory and makes them. Any thread may use it."""

    def __init__(
        self,
        engines: LoadedEngines,
        speculative_config: SpeculativeConfig,
        sizes: Sizes,
        *,
        has_own_drafter: bool = False,
        check: Callable[[Request], None] | None = None,
        names_settings: bool = False,
    ) -> None:
        """check: what the executor has against a request, see OwnExecutor.check. names_settings: requests say which
        setting of acceptance they have, for who judges it."""
        self._info = engines.info
        self._check = check
        self._head = head_info(engines.manifest)
        self._max_draft_len = engines.manifest.limits.max_draft_len
        self._speculative_config = speculative_config
        self._default_rule = speculative_config.policy(self._head) if names_settings else None
        self._has_own_drafter = has_own_drafter
        self._sizes = sizes
        self._tokenizer = engines.tokenizer
        self._prompts = PromptReader(
            engines.tokenizer,
            engines.directory / "tokenizer",
            vocab_size=self._info.vocab_size,
            max_seq_len=sizes.max_seq_len,
        )
        self._grammars = GrammarCompiler(engines.tokenizer, self._info.vocab_size)
        self._request_ids = itertools.count()
        self._piece = piece_reader(engines.tokenizer)

    def new_request_id(self) -> str:
        return str(next(self._request_ids))

    def render_chat(self, /, messages: Sequence[ChatMessage], **variables: Any) -> TokensPrompt:
        return self._prompts.render_chat(messages, **variables)

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        return self._prompts.tokenize(prompt, add_special_tokens=add_special_tokens)

    def compile_grammar(self, wanted: StructuredOutputs) -> None:
        self._grammars.compile(wanted)

    def is_quick(self, prompt: Prompt, params: SamplingParams | None) -> bool:
        """Whether `make_group` takes no longer than an event loop may stand still."""
        form = params.output_form if isinstance(params, SamplingParams) else None
        is_long = isinstance(prompt, str) and len(prompt) > LONG_PROMPT
        return not is_long and (form is None or self._grammars.is_ready(form))

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
        """One prompt with its sequences. output_kind: None is the one of `params`. Raises RequestError when it can
        never be served as asked."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params of type {type(params).__name__}: expected SamplingParams")
        if params.n > self._sizes.max_queue_size:
            raise RequestError(f"n {params.n}: more than max_queue_size {self._sizes.max_queue_size}")
        if queue_timeout is not None and not (is_number(queue_timeout) and queue_timeout > 0):
            raise RequestError(f"queue_timeout {queue_timeout!r}: expected seconds, above 0, or None to wait for ever")
        self._check_num_draft_tokens(params.num_speculative_tokens or 0)
        token_ids = self._prompts.tokenize(prompt)
        room = self._sizes.max_seq_len - len(token_ids)
        if room < 1:
            raise RequestError(
                f"prompt has {len(token_ids)} tokens, max_seq_len is {self._sizes.max_seq_len} with the output: "
                "shorten it, or serve or build with a larger max_seq_len"
            )
        seed = draw_seed() if params.seed is None else params.seed
        bad_words = self._prompts.bad_words(params.bad_words or ())
        wanted = params.output_form
        grammar = None if wanted is None else self._grammars.compile(wanted)
        requests = [
            self._make_request(token_ids, params, bad_words, grammar, request_id, room, seed, i)
            for i in range(params.n)
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
        grammar: CompiledGrammar | None,
        request_id: str,
        room: int,
        seed: int,
        index: int,
    ) -> Request:
        acceptance = params.acceptance_params.over(self._speculative_config)
        rule = acceptance.policy(self._head)
        policy, default_rule = rule.for_request(), self._default_rule
        if not self._has_own_drafter:
            self._speculative_config.check_policy(policy)
        setting = None
        if default_rule is not None:
            setting = setting_name(params, rule, self._speculative_config, default_rule)
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
                self._tokenizer,
                token_ids,
                stop_strings=params.stop_strings,
                include_stop_string=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                shown_special_tokens=params.shown_special_tokens or (),
            ),
            sequence=TokenSequence(token_ids),
            sampler=self._make_sampler(params, bad_words, grammar, policy, token_ids, ends, seed, index),
            guards=self._make_guards(acceptance) if policy.is_loose else None,
            draft_stop=self._speculative_config.make_draft_stop(params.draft_stop, params.draft_stop_threshold),
            index=index,
            setting=setting,
        )
        request.metrics.num_prompt_tokens = len(token_ids)
        if request.guards is not None:
            request.metrics.guards = acceptance.guard_settings().in_force()
        if self._check is not None:
            self._check(request)
        return request

    def _make_guards(self, acceptance: AcceptanceParams) -> Guards | None:
        settings = acceptance.guard_settings()
        self._check_token_ids("exact_token_ids", settings.exact_token_ids)
        return make_guards(settings, self._piece)

    def _make_sampler(
        self,
        params: SamplingParams,
        bad_words: list[list[int]],
        grammar: CompiledGrammar | None,
        policy: AcceptancePolicy,
        token_ids: list[int],
        end_token_ids: frozenset[int],
        seed: int,
        index: int,
    ) -> Sampler | None:
        """None where the engine's argmax is the choice."""
        if not (params.temperature > 0 or params.changes_scores or grammar is not None):
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
        matcher = None if grammar is None else grammar.new_matcher(end_token_ids)
        return Sampler(params, processor, UniformStream(seed, index), policy, self._info.entropy_top_k, matcher)

    def _check_num_draft_tokens(self, asked: int) -> None:
        limit, built_for = self._speculative_config.num_speculative_tokens, self._max_draft_len
        if asked and self._speculative_config.method is None:
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
