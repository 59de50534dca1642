"""What the runtime needs of a drafter, and what the table of drafters says of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from fly_trt.drafting.stops import DraftStop
from fly_trt.engines.base import Engine
from fly_trt.errors import EngineError
from fly_trt.tokens import FloatArray, IntArray
from fly_trt.verification import NO_DRAFT_SCORES, DraftScores, DraftSource

State = TypeVar("State")


class DraftRow(NamedTuple):
    """Asks for `num_tokens` draft tokens to follow the committed `tokens` int64 [length] of the sequence in `slot`.

    stop: where a draft model's tokens end. wants_scores: what it says of them is wanted. is_private: the draft must
    rest on the sequence alone, because tokens may depend on it. round_start: the length of the sequence when the round
    began that the draft is for, None where it begins now. num_prompt: of the tokens, how many are the prompt.
    num_ahead: how many of the last tokens are not committed: a draft already, which the target may not take."""

    slot: int
    tokens: IntArray
    num_tokens: int
    stop: DraftStop | None = None
    wants_scores: bool = False
    is_private: bool = False
    round_start: int | None = None
    num_prompt: int = 0
    num_ahead: int = 0

    @property
    def num_committed(self) -> int:
        return len(self.tokens) - self.num_ahead

    @property
    def is_scored(self) -> bool:
        """Whether anybody looks at what a draft model says of its tokens."""
        return self.wants_scores or self.stop is not None

    @property
    def begins_at(self) -> int:
        """Tokens of the sequence when the round began."""
        return self.num_committed if self.round_start is None else self.round_start


OF_ONE_SOURCE = {source: np.full(64, source, np.uint8) for source in DraftSource}  # enough for most drafts
for _sources in OF_ONE_SOURCE.values():
    _sources.flags.writeable = False


class Draft(NamedTuple):
    """Draft tokens int64 [n], in arrays that stay as they are, with the DraftSource of each, uint8 [n], and what a
    draft model said of them: DraftScores of n tokens, or none of any where nobody wants them. is_whole: it was made as
    a whole, before any of it was needed, so that fewer tokens than were asked for are a shorter round."""

    tokens: IntArray
    sources: npt.NDArray[np.uint8]
    scores: DraftScores = NO_DRAFT_SCORES
    is_whole: bool = True

    @classmethod
    def of(
        cls, tokens: IntArray, source: DraftSource, scores: DraftScores = NO_DRAFT_SCORES, *, is_whole: bool = True
    ) -> "Draft":
        """Tokens of one source."""
        sources = OF_ONE_SOURCE[source][: len(tokens)]
        if len(sources) < len(tokens):
            sources = np.full(len(tokens), source, np.uint8)
        return cls(tokens, sources, scores, is_whole)


@runtime_checkable
class Drafter(Protocol):
    """Proposes draft tokens for the sequences in the slots. It finds out by itself which of its earlier proposals
    became part of a sequence, so nothing has to be reported back."""

    is_free: bool
    """A proposal costs nothing worth saving, so that a whole draft may be asked for before any of it is needed."""
    has_exact_copies: bool
    """Copied draft tokens stand only where they are the target's choice, unless the policy is meant for copies: a
    drafter that has a model too."""

    @property
    def num_preparations(self) -> int:
        """That of its engine, or 0 without one."""
        ...

    def num_unread(self, slot: int, length: int) -> int:
        """Tokens of the slot's sequence, of `length` tokens, that the drafter would read before it proposes any. What
        it has of a former sequence in the slot does not count."""
        ...

    def prepare(self, rows: Sequence[DraftRow]) -> None:
        """Reads what the rows' sequences have that the drafter has not seen, so that `propose` costs what drafting
        costs. Optional: `propose` does it too."""
        ...

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        """For each row at most `num_tokens` draft tokens. Fewer mean that there is nothing more to propose. Asking
        again for more, or after a part was committed, goes on with the same draft."""
        ...

    def release(self, slot: int) -> None:
        """The sequence in the slot ended; the next one is another."""
        ...

    def swap(self, first: int, second: int) -> None:
        """The sequences of two slots change places."""
        ...

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """A new sequence in slot `target` begins with the first `num_tokens` tokens of the one in slot `source`."""
        ...

    def reset(self) -> None:
        """Nobody knows what the caches hold: every sequence that follows is a new one. Runs nothing."""
        ...

    def trim(self, num_tokens: int) -> None:
        """No sequence is longer than `num_tokens` any more."""
        ...


@runtime_checkable
class ReadsPrompts(Protocol):
    """A drafter that wants to know what the target says of prompts. A loose request then reads its whole prompt, also
    where a cache has the beginning, so that what is known of it does not depend on other requests."""

    def read_prompt(
        self,
        slot: int,
        tokens: IntArray,
        start: int,
        choices: IntArray,
        choice_logprobs: FloatArray,
        token_logprobs: FloatArray,
    ) -> None:
        """What the target said after the m prompt tokens from position `start` on of the slot's sequence `tokens` int64
        [length]: its most probable next tokens `choices` int64 [m], their log-probabilities, and those of the tokens
        that do follow, float32 [m] in nats; of the last one NaN where the target has not read that yet. Buffers are
        used again. The prompt's last position is left out; so are positions that came with a cache."""
        ...


@runtime_checkable
class ReadsOutputs(Protocol):
    """A drafter that wants to know what sequences emitted."""

    def read_output(self, slot: int, tokens: IntArray) -> None:
        """The sequence in the slot ended, with these output tokens int64 [n]; `release` follows."""
        ...


class FreeDrafter:
    """A drafter without a model that keeps nothing by slot: it only has to `propose`."""

    is_free = True
    has_exact_copies = False
    num_preparations = 0

    def num_unread(self, slot: int, length: int) -> int:
        return 0

    def prepare(self, rows: Sequence[DraftRow]) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def swap(self, first: int, second: int) -> None:
        pass

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        pass

    def reset(self) -> None:
        pass

    def trim(self, num_tokens: int) -> None:
        pass


class DraftSettings(Protocol):
    """What drafters are set by: fields of SpeculativeConfig."""

    @property
    def num_speculative_tokens(self) -> int: ...
    @property
    def prompt_lookup_max(self) -> int: ...
    @property
    def prompt_lookup_min(self) -> int: ...
    @property
    def prompt_lookup_num_tokens(self) -> int: ...
    @property
    def suffix_corpus_tokens(self) -> int: ...
    @property
    def suffix_max_spec_factor(self) -> float: ...
    @property
    def hybrid_min_match(self) -> int: ...
    @property
    def alignment_mode(self) -> str: ...
    @property
    def alignment_margin(self) -> float: ...
    @property
    def inner_num_tokens(self) -> int: ...
    @property
    def inner_acceptance(self) -> str: ...


def _not_built() -> Engine:
    raise EngineError("no inner draft model was built: rebuild with --inner-draft")


@dataclass(frozen=True, slots=True)
class DraftParts:
    """What a drafter can be made of. load_draft_model: the engine of the draft model, loaded at the first call; raises
    EngineError where none was built. target_vocab_size: rows of the target's embedding table. reuse_cache: a sequence
    may start from what a slot's cache still holds of its prefix. load_self_drafts: the same for drafts made of the
    target, each with the length of sequence from which on it is used; the first one's is 0. load_inner_draft_model: the
    same for the smaller one that guesses for the draft model. Engines are loaded while the drafter is made: later, in
    the engine thread, one of several ranks would wait for the turn that this thread has."""

    load_draft_model: Callable[[], Engine]
    target_vocab_size: int
    reuse_cache: bool
    load_self_drafts: Callable[[], Sequence[tuple[int, Engine]]] = tuple
    load_inner_draft_model: Callable[[], Engine] = _not_built


MakeDrafter = Callable[[DraftSettings, DraftParts], Drafter]


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """A line of the table of drafters. needs_draft_model, needs_self_draft, needs_inner_draft: engines that must have
    been built. acceptance: which policy its drafts get where nobody says. has_scores: a model chooses its drafts, or
    some of them, so that they may be ended by what it says of them; draft_stop: by which rule where nobody says.
    has_copies: some of them are copied from the sequence's own text. search: settings of its own, with values that
    fly-tune tries beside their defaults."""

    make: MakeDrafter
    needs_draft_model: bool
    acceptance: str
    has_scores: bool = False
    needs_self_draft: bool = False
    needs_inner_draft: bool = False
    draft_stop: str | None = None
    has_copies: bool = False
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def sources(self) -> frozenset[DraftSource]:
        """Where its draft tokens come from that a rule may loosen."""
        model = (DraftSource.MODEL,) if self.has_scores else ()
        return frozenset((*model, DraftSource.LOOKUP) if self.has_copies else model)


def common_prefix(held: IntArray, tokens: IntArray, known: int = 0) -> int:
    """Length of the common prefix of two sequences whose first `known` tokens are known to agree."""
    end = min(len(held), len(tokens))
    differs = (held[known:end] != tokens[known:end]).nonzero()[0]
    return known + int(differs[0]) if len(differs) else end


def exchange(by_slot: dict[int, State], first: int, second: int) -> None:
    """Swaps what two slots have, where they have something."""
    held = {second: by_slot.pop(first, None), first: by_slot.pop(second, None)}
    by_slot.update({slot: state for slot, state in held.items() if state is not None})
