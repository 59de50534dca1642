"""What a caller may ask for: SamplingParams per request, SpeculativeConfig per engine, and AcceptanceParams for both.

Names follow vLLM. SpeculativeConfig has the same fields in recipe YAML and in Python; the command line has the
most used ones. Unknown names and values that cannot be honoured are refused; nothing is ignored.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self

from fly_trt.acceptance import DEFAULT_ACCEPTANCE, AcceptanceParams, AcceptanceSettings
from fly_trt.checks import check_at_least, check_choice, check_flag, is_number, is_whole
from fly_trt.drafting import ALIGNMENT_MODES, DRAFT_STOPS, DRAFTERS, INNER_ACCEPTANCE, NO_STOP, DraftStop
from fly_trt.errors import ConfigError, RequestError
from fly_trt.grammar import StructuredOutputs
from fly_trt.settings import Setting, check_settings, setting, settings_of
from fly_trt.text.surrogates import check_text
from fly_trt.verification import DEFAULT_PRESET, PRESETS, AcceptancePolicy, DraftSource

DEFAULT_MAX_TOKENS = 256
MAX_LOGIT_BIAS = 100
# What one request may cost the others: completions, words that are looked for after every token, and tokens that are
# looked up or reported at every position. 20 is OpenAI's limit and vLLM's default, 1024 vLLM's of logit_bias; its 128
# of stop_token_ids would shut out the reserved tokens of one tokenizer (Llama 3 has 256).
MAX_COMPLETIONS = 128
MAX_WORDS = 256
MAX_WORD_CHARACTERS = 1000
MAX_LOGPROBS = 20
MAX_TOKEN_IDS = 1024
TOLD = ("speculation_trace", "detailed_metrics")  # what a request wants to know of its speculation


def _draft_stop() -> Any:
    return setting(str, "Ends a draft model's draft early: where it is unsure. [as built]", choices=DRAFT_STOPS)


def _draft_stop_threshold() -> Any:
    return setting(float, "Where: nats for adasd, a probability for confidence. [the rule's]", metavar="X")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeConfig(AcceptanceSettings):
    """How draft tokens are made, and by default accepted: the fields of AcceptanceParams are the requests' defaults.

    method: with a draft model "multi_level" (itself accelerated by n-gram lookup), "draft_model", "hybrid" (copies
    where there is a match) or "chain" (a smaller draft model guesses for it); without one "ngram", "alignment" or
    "suffix", or "self" (a draft made of the target when it was built); None for plain decoding.
    num_speculative_tokens: draft tokens per round; a request may ask for fewer.
    prompt_lookup_max and _min: longest and shortest n-gram to match; prompt_lookup_num_tokens: tokens that a match
    proposes to the draft model under "multi_level" (under "ngram" it proposes up to num_speculative_tokens).
    suffix_corpus_tokens: how many tokens of earlier outputs "suffix" keeps to copy from, for all requests of an engine,
    in 36 bytes each; 0 keeps none, so that no request's speed depends on what others emitted. suffix_max_spec_factor:
    draft tokens for each token of a match of "suffix" and "hybrid". hybrid_min_match: tokens that a match must have for
    "hybrid" to copy instead of asking the draft model.
    alignment_mode: what "alignment" does where its copy of the prompt is not what the target would have said there:
    "cut" ends the draft, "argmax" takes the target's token, "prompt" nothing (as "ngram"). alignment_margin: by how
    many nats the target's choice must be the more probable one.
    inner_num_tokens, inner_acceptance: of "chain", how many tokens the inner draft model guesses at a time and by which
    rule the draft model takes them, "exact" or "fly" (the reference preset). That changes drafts, and never what is
    emitted with acceptance "exact"; under a loose one, where tokens depend on the draft, the inner rule is exact.
    adaptive_draft_length: draft as many tokens as pay, by each request's recent acceptance and the measured cost of
    a step at the current load; num_speculative_tokens is then the most. The tokens are the same either way.
    adaptive_acceptance: with "fly" and a draft model, a request opens FLy's windows where its own windows pay, and is
    decoded exactly for a while where they do not; False is the published rule, which always opens them.
    draft_stop: the rule that ends a draft model's draft early, "adasd", "confidence", "adaedl", or "none", with its
    draft_stop_threshold: see drafting.stops. It comes on top of adaptive_draft_length; None means "confidence" for
    "self", and "none" otherwise.
    draft_token_cost, verification_token_cost: what windows are decided by, a draft token and each further token of a
    target step, in target steps of one token; None means as measured when the engine was built.
    acceptance None: "fly" with a draft model; "exact" for n-gram drafts, of which a loosened one costs accuracy, and
    for drafts made of the target.
    """

    method: str | None = "multi_level"
    num_speculative_tokens: int = 15
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 1
    prompt_lookup_num_tokens: int = 6
    suffix_corpus_tokens: int = 65_536
    suffix_max_spec_factor: float = 2.0
    hybrid_min_match: int = 3
    alignment_mode: str = "cut"
    alignment_margin: float = 4.0
    inner_num_tokens: int = 4
    inner_acceptance: str = "exact"
    adaptive_draft_length: bool = True
    draft_stop: str | None = _draft_stop()
    draft_stop_threshold: float | None = _draft_stop_threshold()
    adaptive_acceptance: bool = True
    draft_token_cost: float | None = None
    verification_token_cost: float | None = None
    preset: str = DEFAULT_PRESET  # here it is always one of them

    def __post_init__(self) -> None:
        check_choice("method", self.method, (None, *DRAFTERS))
        check_choice("preset", self.preset, PRESETS)
        AcceptanceSettings.__post_init__(self)
        if self.acceptance is None:
            usual = DEFAULT_ACCEPTANCE if self.method is None else DRAFTERS[self.method].acceptance
            object.__setattr__(self, "acceptance", usual)
        if self.draft_stop is None and self.method is not None:
            object.__setattr__(self, "draft_stop", DRAFTERS[self.method].draft_stop)
        for name in (
            "num_speculative_tokens",
            "prompt_lookup_min",
            "prompt_lookup_num_tokens",
            "hybrid_min_match",
            "inner_num_tokens",
        ):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("prompt_lookup_max", self.prompt_lookup_max, self.prompt_lookup_min)
        check_at_least("suffix_corpus_tokens", self.suffix_corpus_tokens, 0)
        check_choice("alignment_mode", self.alignment_mode, ALIGNMENT_MODES)
        if not (is_number(self.alignment_margin) and self.alignment_margin >= 0):
            raise ConfigError(f"alignment_margin {self.alignment_margin!r}: expected a number >= 0, in nats")
        if not (is_number(self.suffix_max_spec_factor) and 0 < self.suffix_max_spec_factor < math.inf):
            raise ConfigError(f"suffix_max_spec_factor {self.suffix_max_spec_factor!r}: expected a number above 0")
        check_choice("inner_acceptance", self.inner_acceptance, INNER_ACCEPTANCE)
        self.make_draft_stop(self.draft_stop, self.draft_stop_threshold)
        for name in ("adaptive_draft_length", "adaptive_acceptance"):
            check_flag(name, getattr(self, name))
        for name in ("draft_token_cost", "verification_token_cost"):
            cost = getattr(self, name)
            if cost is not None and not (is_number(cost) and 0 <= cost < math.inf):
                raise ConfigError(f"{name} {cost!r}: expected a number >= 0, in target steps of one token, or None")

    def check_policy(self, policy: AcceptancePolicy) -> None:
        """Raises ConfigError where a loose policy could loosen none of the drafts that `method` makes."""
        if self.method is None or not policy.is_loose:
            return
        sources = DRAFTERS[self.method].sources
        if sources and policy.loosens.isdisjoint(sources):
            kinds, fix = "a draft model's", "method hybrid or draft_model"
            if DraftSource.LOOKUP in policy.loosens:
                kinds, fix = "copied", "method alignment, ngram or hybrid, or conditional_apply_to='all'"
            raise ConfigError(
                f"acceptance {policy.name!r}: loosens {kinds} draft tokens, and method {self.method!r} makes none of "
                f"them: use {fix}"
            )

    def make_draft_stop(self, asked: str | None = None, threshold: float | None = None) -> DraftStop | None:
        """The rule of a sequence, which may ask for another one or for another threshold. Raises ConfigError for what
        would have no effect."""
        name = asked or self.draft_stop or NO_STOP
        rule, given = DRAFT_STOPS[name], threshold
        if given is None and name == self.draft_stop:
            given = self.draft_stop_threshold
        if rule is None and given is not None:
            known = ", ".join(stop for stop in DRAFT_STOPS if stop != NO_STOP)
            raise ConfigError(f"draft_stop_threshold {given!r}: has no effect without draft_stop: add one of {known}")
        if rule is None:
            return None
        if self.method is None or not DRAFTERS[self.method].has_scores:
            able = ", ".join(method for method, kind in DRAFTERS.items() if kind.has_scores)
            raise ConfigError(
                f"draft_stop {name!r}: has no effect with method {self.method!r}, whose drafts no model chooses: leave "
                f"it out, or serve with method {able}"
            )
        if given is not None and rule.most is not None and given > rule.most:
            raise ConfigError(f"draft_stop_threshold {given!r}: of {name} expected at most {rule.most:g}")
        return rule(given)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """From YAML or the manifest. Raises ConfigError on an unknown field."""
        shared = [f.name for f in dataclasses.fields(AcceptanceSettings)]
        known = [f.name for f in dataclasses.fields(cls) if f.name not in shared] + shared
        unknown = settings.keys() - set(known)
        if unknown:
            raise ConfigError(f"speculative: unknown field {sorted(unknown)[0]!r}: expected one of {', '.join(known)}")
        return cls(**settings)


class RequestOutputKind(Enum):
    """What each output of a streamed request holds: everything so far, only what is new, or nothing until the end."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """One request's decoding settings; names and meanings are vLLM's, the default is greedy.

    temperature: 0 takes the most probable token, anything else samples. top_k (0 or -1: all), top_p, min_p: what is
    left of the distribution. seed: the same seed gives the same tokens, whatever else is served; None draws one. n:
    completions of the same prompt; completion i samples with (seed, i). presence_penalty, frequency_penalty: of output
    tokens; repetition_penalty: of prompt and output tokens. logit_bias: added by token id. bad_words: not generated as
    the tokens that a word has at the start of a text and after a space, as in vLLM; the same letters in other tokens,
    as within a longer word, may still come. min_tokens: output tokens before any end. All of them also decide which
    draft tokens stand. logprobs: most probable tokens to report for each output token, besides the token itself; of the
    model's own distribution. prompt_logprobs: the same for prompt tokens. max_tokens: output tokens at most, exactly
    kept; None means up to the engine's max_seq_len. stop: strings that end the text; it is cut before the string unless
    include_stop_str_in_output. stop_token_ids: tokens that end the sequence besides the model's own. ignore_eos: the
    model's own end tokens do not end it. shown_special_tokens: special tokens, as the tokenizer writes them, that are
    text even though skip_special_tokens leaves out the others. acceptance: overrides the engine's SpeculativeConfig for
    this request; a policy of your own may stand for AcceptanceParams(acceptance=policy).
    num_speculative_tokens: draft tokens per round of this request, at most the SpeculativeConfig's, which None means; 0
    decodes without drafts. With "fly" it is part of the rule: a token is loosened only where its window lies inside the
    round, so that other numbers may give other tokens. draft_stop, draft_stop_threshold: as in SpeculativeConfig, for
    this request; "none" for no rule. speculation_trace: outputs say of each token how it came to be, see TokenTrace; it
    changes none. detailed_metrics: the metrics also list what each round drafted and accepted. output_kind: what a
    stream yields.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    shown_special_tokens: Sequence[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    acceptance: AcceptanceParams | AcceptancePolicy | None = None
    num_speculative_tokens: int | None = None
    draft_stop: str | None = _draft_stop()
    draft_stop_threshold: float | None = _draft_stop_threshold()
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    speculation_trace: bool = False
    detailed_metrics: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stop_strings: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not _are_strings(stop):
            raise RequestError(f"stop {self.stop!r}: expected non-empty strings")
        object.__setattr__(self, "stop_strings", tuple(stop or ()))
        if not _are_strings(self.bad_words):
            raise RequestError(f"bad_words {self.bad_words!r}: expected a list of non-empty strings")
        if not _are_strings(self.shown_special_tokens):
            raise RequestError(
                f"shown_special_tokens {self.shown_special_tokens!r}: expected a list of non-empty strings"
            )
        for name, words in (("stop", self.stop_strings), ("bad_words", self.bad_words or ())):
            _check_words(name, words)
        if self.max_tokens is not None:
            self._check_whole("max_tokens", 1, "or None")
        self._check_whole("n", 1)
        if self.n > MAX_COMPLETIONS:
            raise RequestError(f"n {self.n}: at most {MAX_COMPLETIONS}: send several requests")
        self._check_whole("min_tokens", 0)
        self._check_whole("top_k", -1)
        for name in ("logprobs", "prompt_logprobs", "num_speculative_tokens"):
            if getattr(self, name) is not None:
                self._check_whole(name, 0, "or None")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > MAX_LOGPROBS:
                raise RequestError(f"{name} {getattr(self, name)}: at most {MAX_LOGPROBS}: ask for fewer")
        if self.seed is not None and not is_whole(self.seed):
            raise RequestError(f"seed {self.seed!r}: expected a whole number or None")
        self._check_number("temperature", 0, math.inf)
        self._check_number("top_p", 0, 1, above=True)
        self._check_number("min_p", 0, 1)
        self._check_number("presence_penalty", -2, 2)
        self._check_number("frequency_penalty", -2, 2)
        self._check_number("repetition_penalty", 0, math.inf, above=True)
        token_ids = self.stop_token_ids
        if isinstance(token_ids, Sequence) and len(token_ids) > MAX_TOKEN_IDS:
            raise RequestError(f"stop_token_ids: {len(token_ids)} tokens, at most {MAX_TOKEN_IDS}: leave some out")
        if token_ids is not None and not (isinstance(token_ids, Sequence) and all(map(is_whole, token_ids))):
            raise RequestError(f"stop_token_ids {token_ids!r}: expected a list of token ids")
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", *TOLD):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} {getattr(self, name)!r}: expected True or False")
        if self.acceptance is not None and not isinstance(self.acceptance, (AcceptanceParams, AcceptancePolicy)):
            raise RequestError(f"acceptance {self.acceptance!r}: expected AcceptanceParams, a policy or None")
        try:
            check_settings(self)
        except ConfigError as error:
            raise RequestError(str(error)) from None
        self._read_structured_outputs()
        if not isinstance(self.output_kind, RequestOutputKind):
            raise RequestError(f"output_kind {self.output_kind!r}: expected a RequestOutputKind")
        self._check_logit_bias()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens}: more than max_tokens {self.max_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise RequestError(f"n {self.n}: greedy completions are all the same: use n=1 or a temperature above 0")

    @property
    def acceptance_params(self) -> AcceptanceParams:
        """What the request says of acceptance."""
        if isinstance(self.acceptance, AcceptancePolicy):
            return AcceptanceParams(acceptance=self.acceptance)
        return self.acceptance or AcceptanceParams()

    @property
    def output_form(self) -> StructuredOutputs | None:
        """`structured_outputs`, as read."""
        assert self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputs)
        return self.structured_outputs

    @property
    def changes_scores(self) -> bool:
        """Whether anything but temperature and truncation changes which token is the most probable."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias or self.bad_words or self.min_tokens)

    def _read_structured_outputs(self) -> None:
        asked = self.structured_outputs
        if isinstance(asked, Mapping):
            object.__setattr__(self, "structured_outputs", StructuredOutputs.from_dict(asked))
        elif asked is not None and not isinstance(asked, StructuredOutputs):
            raise RequestError(f"structured_outputs {asked!r}: expected StructuredOutputs, a mapping or None")
        if asked is not None and self.min_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens}: an output of structured_outputs ends where its form does: leave it out"
            )

    def _check_whole(self, name: str, least: int, or_else: str = "") -> None:
        value = getattr(self, name)
        if not (is_whole(value) and value >= least):
            raise RequestError(f"{name} {value!r}: expected a whole number, at least {least} {or_else}".rstrip())

    def _check_number(self, name: str, least: float, most: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        if not (
            is_number(value) and least <= value <= most and math.isfinite(value) and not (above and value == least)
        ):
            relation = "above" if above else "at least"
            limit = f" and at most {most}" if math.isfinite(most) else ""
            raise RequestError(f"{name} {value!r}: expected a number {relation} {least}{limit}")

    def _check_logit_bias(self) -> None:
        bias = self.logit_bias
        if bias is None:
            return
        if isinstance(bias, Mapping) and len(bias) > MAX_TOKEN_IDS:
            raise RequestError(f"logit_bias: {len(bias)} tokens, at most {MAX_TOKEN_IDS}: leave some out")
        if not isinstance(bias, Mapping) or not all(
            is_whole(token) and is_number(value) and abs(value) <= MAX_LOGIT_BIAS for token, value in bias.items()
        ):
            raise RequestError(f"logit_bias {bias!r}: expected token ids with numbers of at most {MAX_LOGIT_BIAS}")


def request_settings() -> dict[str, Setting]:
    """What a request may say of acceptance and of drafting, by name."""
    return settings_of(AcceptanceParams) | settings_of(SamplingParams)


def _are_strings(value: Any) -> bool:
    """Whether it is None or a list of non-empty strings."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return value is None or (is_list and all(isinstance(string, str) and string for string in value))


def _check_words(name: str, words: Sequence[str]) -> None:
    if len(words) > MAX_WORDS:
        raise RequestError(f"{name}: {len(words)} strings, at most {MAX_WORDS}: leave some out")
    if (longest := max(map(len, words), default=0)) > MAX_WORD_CHARACTERS:
        raise RequestError(f"{name}: a string of {longest} characters, at most {MAX_WORD_CHARACTERS}: shorten it")
    for word in words:
        check_text(name, word)
