"""The engine contract: one decoder step with an in-place KV cache and the verification head.

Row b of a step holds `[c context tokens][n draft tokens][padding]`: context tokens are committed tokens that the cache
does not hold yet, draft tokens are proposals to verify. Rewinding a sequence is only a smaller write index. What a
step says it says of L consecutive positions of each row, from a first one on: the vocabulary is not looked at for the
others, which most of a prompt's are. An engine knows slots and tokens; it knows nothing of requests, text or drafters.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fly_trt.errors import EngineError
from fly_trt.manifest import Manifest, ModelEngine
from fly_trt.tokens import NO_TOKENS, FloatArray, IntArray
from fly_trt.verification.exact import EXACT
from fly_trt.verification.policy import AcceptancePolicy, Positions

# The tensors of a step and their types: per row [B], per position that the step speaks of [B, L], and of the
# verification head also per position and rank [B, L, k].
POSITIONS_INPUT = "logits_positions"
POSITION_INPUTS: dict[str, type[np.generic]] = {POSITIONS_INPUT: np.int64, "next_tokens": np.int64}
ROW_INPUTS: dict[str, type[np.generic]] = {
    "write_indices": np.int64,
    "num_context": np.int64,
    "num_draft": np.int64,
    "entropy_threshold": np.float32,
    "use_full_entropy": np.bool_,
    "window": np.int64,
    "lookahead": np.int64,
}
TOKEN_OUTPUTS: dict[str, type[np.generic]] = {
    "argmax": np.int64,
    "entropy": np.float32,
    "entropy_topk": np.float32,
    "argmax_logprob": np.float32,
    "token_logprob": np.float32,
}
TOP_OUTPUTS: dict[str, type[np.generic]] = {"top_ids": np.int64, "top_logprobs": np.float32}
IDLE_CONTEXT: IntArray = np.zeros(1, np.int64)
# What each rank of a sharded engine says besides: the first channels of the last hidden state, by which a sum that was
# not made is found. Logits do not show it where they are summed themselves: they are then the same on all ranks.
RANK_OUTPUT, RANK_CHANNELS = "rank_hidden", 16
# Of the operators of plugins/cpu: their domain, and the tokens whose keys lie together in a cache of CacheAttention.
CPU_DOMAIN, KEY_BLOCK_TOKENS = "fly.cpu", 16


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine can do: sizes in rows, tokens and vocabulary entries, and the head's constants.

    has_top_tokens: the head says which are the entropy_top_k most probable tokens; has_positions: a step may speak of
    some positions of its rows only. Engines built by older versions of fly-build cannot."""

    max_batch_size: int
    max_seq_len: int
    max_draft_len: int
    max_num_tokens: int
    vocab_size: int
    entropy_top_k: int
    stop_token_ids: frozenset[int]
    has_top_tokens: bool
    has_positions: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSettings:
    """How one engine is loaded: slots of its caches; CPU threads, None for all cores that the process may use; CUDA
    device, None for the calling thread's current one; which of its ranks, where it has several."""

    num_slots: int
    num_threads: int | None = None
    device_id: int | None = None
    rank: int = 0


@dataclass(slots=True)
class Step:
    """The buffers of one step shape: B consecutive slots of T tokens. Callers fill the inputs, `Engine.run` fills the
    outputs, and both stay valid until the same shape runs again; but `logits` is a view of one buffer that all steps of
    the engine share, and valid until the next step with logits is asked for.

    Row b's outputs begin at position first_position[b]: [b, i] is what the step says of position first_position[b] + i,
    and `at` is where to look. There is nothing of other positions, and of padding and `idle_rows` nothing is promised.

    Inputs: input_ids int64 [B, T]; write_indices, num_context, num_draft, window, lookahead int64 [B], of which
    num_context begins at first_position; entropy_threshold float32 [B] in nats; use_full_entropy bool [B]; next_tokens
    int64 [B, L], the token of the row that follows each position; logits_positions int64 [B, L or more], the positions,
    counted through all rows. The last two are None where the engine has no such inputs (EngineInfo.has_positions), and
    then L is T and every first_position 0.
    Outputs: num_accepted, next_token int64 [B]; argmax int64 [B, L]; the others float32 [B, L], in nats; logits
    float32 [B, L, V], or None unless asked for. Where a position's logits hold NaN or +inf its entropies are NaN;
    `entropy` may be NaN everywhere in a step in which no row's use_full_entropy is set.

    top_ids int64 and top_logprobs float32 [B, L, k], or None unless asked for: the engine's entropy_top_k most probable
    tokens of each position, most probable first and the lowest id first among equals, and their log probabilities under
    the full softmax, in nats: -inf where a token's logit is, NaN where the position's entropies are, and then the ids
    mean nothing.
    """

    first_slot: int
    input_ids: IntArray
    write_indices: IntArray
    num_context: IntArray
    num_draft: IntArray
    entropy_threshold: FloatArray
    use_full_entropy: npt.NDArray[np.bool_]
    window: IntArray
    lookahead: IntArray
    num_accepted: IntArray
    next_token: IntArray
    argmax: IntArray
    entropy: FloatArray
    entropy_topk: FloatArray
    argmax_logprob: FloatArray
    token_logprob: FloatArray
    logits: FloatArray | None
    top_ids: IntArray | None = None
    top_logprobs: FloatArray | None = None
    next_tokens: IntArray | None = None
    logits_positions: IntArray | None = None
    row_tokens: int = 0  # of a row with the padding that its engine adds, by which logits_positions count; 0 means T
    binding: Any = None
    first_position: list[int] = field(init=False)
    idle_rows: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.row_tokens = self.row_tokens or self.input_ids.shape[1]
        self.first_position = [0] * len(self.input_ids)
        if self.logits_positions is not None:
            for row in range(len(self.input_ids)):
                self._write_positions(self.logits_positions, row, 0)

    @property
    def num_positions(self) -> int:
        """L."""
        return int(self.argmax.shape[1])

    def set_row(
        self,
        row: int,
        cached: int,
        context: IntArray,
        draft: IntArray = NO_TOKENS,
        policy: AcceptancePolicy = EXACT,
        *,
        first: int = 0,
    ) -> None:
        """Fills row `row`: `cached` tokens lie in the slot, `context` [c] and `draft` [n] are to be processed. `first`,
        0 .. c - 1: the position from which on the caller wants to hear, with the last of the tokens among L positions.
        """
        self.idle_rows.discard(row)
        num_context, num_draft = len(context), len(draft)
        assert num_context + num_draft - first <= self.num_positions, "the step speaks of the last tokens, too"
        ids = self.input_ids[row]
        ids[:num_context] = context
        ids[num_context : num_context + num_draft] = draft
        ids[num_context + num_draft :] = 0
        if self.next_tokens is None or self.logits_positions is None:
            first = 0
        else:
            following = ids[first + 1 : first + 1 + self.num_positions]
            self.next_tokens[row, : len(following)] = following
            self.next_tokens[row, len(following) :] = 0
            self.speak_from(row, first)
        self.write_indices[row] = cached
        self.num_context[row] = num_context - first
        self.num_draft[row] = num_draft
        self.entropy_threshold[row] = policy.entropy_threshold
        self.use_full_entropy[row] = policy.use_full_entropy
        self.window[row] = policy.window
        self.lookahead[row] = policy.lookahead

    def set_idle(self, row: int, cached: int) -> None:
        """Fills row `row`, of which nobody wants anything: it writes behind `cached` tokens, where nothing is held."""
        self.set_row(row, cached, IDLE_CONTEXT)
        self.idle_rows.add(row)

    def speak_from(self, row: int, first: int) -> None:
        """What the step says of row `row` begins at this position."""
        self.first_position[row] = first
        # Asked of the array, which steps of other lengths may share.
        if self.logits_positions is not None and self.logits_positions[row, 0] != row * self.row_tokens + first:
            self._write_positions(self.logits_positions, row, first)

    def at(self, row: int, begin: int, end: int) -> slice:
        """Where the outputs of row `row` have its positions begin .. end - 1, which the step must speak of."""
        first = self.first_position[row]
        assert first <= begin, "what was asked for begins later"
        assert end - first <= self.num_positions, "fewer positions were asked for"
        return slice(begin - first, end - first)

    def said(self, row: int, at: slice) -> Positions:
        """Of a row's positions, as `at` found them, what every rule is told; views of the outputs."""
        return Positions(
            self.argmax[row, at],
            self.entropy[row, at],
            self.entropy_topk[row, at],
            self.argmax_logprob[row, at],
            self.token_logprob[row, at],
        )

    def _write_positions(self, positions: IntArray, row: int, first: int) -> None:
        """Those behind the row's last one are the last one."""
        wanted = np.minimum(np.arange(first, first + positions.shape[1]), self.row_tokens - 1)
        positions[row] = row * self.row_tokens + wanted


class LogitsBuffer:
    """The logits of one step at a time: room for the largest step so far, whatever the number of step shapes. With a
    vocabulary of 150 k a step of 16 tokens has 10 MB of them."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._values: FloatArray = np.empty(0, np.float32)

    def view(self, batch_size: int, num_positions: int) -> tuple[FloatArray, bool]:
        """float32 [B, L, V], and whether the buffer had to grow: views from before are then of another buffer, which
        lives for as long as one of them does."""
        count = batch_size * num_positions
        size = count * self._vocab_size
        if has_grown := size > len(self._values):  # to a power of two, so that growing stays rare
            self._values = np.empty((1 << (count - 1).bit_length()) * self._vocab_size, np.float32)
        return self._values[:size].reshape(batch_size, num_positions, self._vocab_size), has_grown

    def clear(self) -> None:
        self._values = np.empty(0, np.float32)


class StepShape(NamedTuple):
    """What a step is asked for with: rows from a first slot on, tokens and positions of a row, and which outputs
    besides the usual."""

    first_slot: int
    batch_size: int
    num_tokens: int
    num_positions: int
    with_logits: bool
    with_top: bool

    @classmethod
    def of(
        cls,
        info: EngineInfo,
        first_slot: int,
        batch_size: int,
        num_tokens: int,
        num_positions: int | None,
        with_logits: bool,
        with_top: bool,
    ) -> "StepShape":
        """With the positions that were asked for or more, None being all: few different numbers, so that few shapes are
        bound. That is one, those of a verification, or all."""
        num_verified = info.max_draft_len + 1
        found = num_tokens
        if info.has_positions and num_positions is not None:
            if num_positions <= 1:
                found = 1
            elif num_positions <= num_verified < num_tokens:
                found = num_verified
        return cls(first_slot, batch_size, num_tokens, found, with_logits, with_top)


def check_slots(first_slot: int, batch_size: int, num_slots: int) -> None:
    """Raises EngineError for slots that do not exist."""
    last_slot = first_slot + batch_size - 1
    if last_slot >= num_slots:
        raise EngineError(f"slots {first_slot} to {last_slot}: the engine has {num_slots}")


class StepCache:
    """The steps of an engine with `num_slots` slots, by shape. Of more than `max_steps` the one that was asked for
    longest ago is dropped. Raises EngineError for a step that the engine cannot have."""

    def __init__(self, info: EngineInfo, num_slots: int, max_steps: int) -> None:
        self._info = info
        self._num_slots = num_slots
        self._max_steps = max_steps
        self._steps: OrderedDict[StepShape, Step] = OrderedDict()

    def get(self, shape: StepShape, make: Callable[[StepShape], Step]) -> Step:
        step = self._steps.get(shape)
        if step is not None:
            self._steps.move_to_end(shape)
            return step
        check_slots(shape.first_slot, shape.batch_size, self._num_slots)
        if shape.with_top and not self._info.has_top_tokens:
            raise EngineError(
                "asked for the most probable tokens, but the engine was built by a version of fly-build whose "
                "verification head does not give them: rebuild it with fly-build"
            )
        step = self._steps[shape] = make(shape)
        if len(self._steps) > self._max_steps:
            self._steps.popitem(last=False)
        return step

    def drop_with_logits(self) -> None:
        """Forgets the steps with logits: they are views of a buffer that was replaced."""
        for shape in [shape for shape in self._steps if shape.with_logits]:
            del self._steps[shape]

    def clear(self) -> None:
        self._steps.clear()


class Engine(Protocol):
    """A target or a draft model. Not thread-safe: one loop owns it."""

    info: EngineInfo

    @property
    def num_preparations(self) -> int:
        """One-time work done so far: shapes bound, graphs captured, caches resized. The time of a step in which this
        rises says nothing of the next ones."""
        ...

    def step(
        self,
        first_slot: int,
        batch_size: int,
        num_tokens: int,
        *,
        num_positions: int | None = None,
        with_logits: bool = False,
        with_top: bool = False,
    ) -> Step:
        """The buffers for slots first_slot .. first_slot + batch_size - 1 and T = num_tokens; made once per shape.
        `num_positions`: how many positions of a row the step has to speak of at least, all where it is None. `with_top`
        asks for top_ids and top_logprobs. Raises EngineError for slots that do not exist, and for `with_top`
        where the engine has no such outputs (EngineInfo.has_top_tokens)."""
        ...

    def run(self, step: Step) -> None:
        """Runs the step and waits for its outputs. Grows the KV cache when a row would outgrow it. After a step that
        raised nobody knows what the slots hold, and later steps on new sequences are right or raise too."""
        ...

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copies the first `num_tokens` cached tokens of slot `source` into slot `target`."""
        ...

    def swap_slots(self, first: int, second: int, num_tokens: int) -> None:
        """Exchanges the first `num_tokens` cached tokens of two slots."""
        ...

    def clear_slot(self, slot: int, start: int) -> None:
        """Zeroes what the slot holds from token `start` on. Due wherever a position of a step came to something that is
        not a number: a masked key counts nothing only while it is one, so from the slot it would reach positions before
        it and sequences after it."""
        ...

    def trim(self, num_tokens: int) -> int:
        """Says that no slot needs more than `num_tokens` tokens any more, so that an engine whose cost follows the
        allocated length may shrink. Returns how many tokens of each slot are still held at most."""
        ...

    def close(self) -> None:
        """Releases sessions and caches. The engine must not be used afterwards."""
        ...


class LoadEngine(Protocol):
    """What a backend's module offers as `load`."""

    def __call__(
        self, directory: Path, manifest: Manifest, model: ModelEngine, info: EngineInfo, settings: LoadSettings
    ) -> Engine:
        """Loads `model`, one of those of `manifest`, from `directory`. Raises EngineError for what cannot be loaded
        here and ConfigError for a setting that cannot be met or would have no effect."""
        ...
