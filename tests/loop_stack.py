"""A generation loop on table engines, and requests for it: what the tests of the runtime share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models

from fly_trt.drafting import (
    AlignmentDrafter,
    Draft,
    Drafter,
    DraftRow,
    HybridDrafter,
    Lookup,
    ModelDrafter,
    NgramDrafter,
    SuffixDrafter,
)
from fly_trt.drafting.matches import SuffixCorpus
from fly_trt.drafting.suffix import Copies
from fly_trt.params import SamplingParams
from fly_trt.runtime.draft_length import DraftLength
from fly_trt.runtime.invariants import check_invariants
from fly_trt.runtime.loop import GenerationLoop, LoopConfig
from fly_trt.runtime.loosening import StepCosts
from fly_trt.runtime.metrics import PREFIX, Metrics
from fly_trt.runtime.request import Request
from fly_trt.runtime.sampler import Sampler
from fly_trt.text.tokenizer import Detokenizer
from fly_trt.tokens import TokenSequence
from fly_trt.verification import EXACT, AcceptancePolicy, FlyPolicy, LogitsProcessor, UniformStream
from grammar_tokenizers import letter_compiler
from table_engine import STOP_TOKEN, VOCAB_SIZE, Entropy, Logits, NextToken, TableEngine, greedy, sometimes_differs

PROMPT = [3, 4, 5, 3, 4]
NUM_DRAFT_TOKENS = 15
SHORT_WINDOW = FlyPolicy(entropy_threshold=0.1, use_full_entropy=False, window=2, lookahead=2)
DRAFTERS = ("none", "ngram", "alignment", "suffix", "draft_model", "multi_level", "hybrid")
LOOKUP = Lookup(max_n=4, min_n=1, num_tokens=6)


@cache
def letters() -> Tokenizer:
    """Token i is one character, so that text shows tokens."""
    tokenizer = Tokenizer(models.WordLevel({chr(ord("A") + i): i for i in range(VOCAB_SIZE)}, unk_token="A"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def text_of(tokens: list[int]) -> str:
    return "".join(chr(ord("A") + token) for token in tokens)


def make_request(
    prompt: list[int] = PROMPT,
    *,
    policy: AcceptancePolicy = EXACT,
    request_id: str = "0",
    index: int = 0,
    bad_word_ids: Sequence[list[int]] = (),
    grammar: Any = None,
    **settings: object,
) -> Request:
    """A request as the service makes it of `settings`, the fields of SamplingParams; bad words come as tokens, a
    grammar as what is asked for it."""
    params = SamplingParams(**({"max_tokens": 40} | settings))
    own_stops = frozenset(params.stop_token_ids or ())
    ends = own_stops if params.ignore_eos else own_stops | {STOP_TOKEN}
    processor = LogitsProcessor(
        vocab_size=VOCAB_SIZE,
        prompt_token_ids=prompt,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias or {},
        bad_words=bad_word_ids,
        min_tokens=params.min_tokens,
        end_token_ids=ends,
    )
    form = params.output_form
    grammar = grammar if form is None else letter_compiler(VOCAB_SIZE).compile(form).new_matcher(ends)
    sampler = None
    if params.temperature > 0 or processor.changes_scores or grammar is not None:
        uniforms = UniformStream(params.seed or 0, index)
        sampler = Sampler(params, processor, uniforms, policy, entropy_top_k=3, grammar=grammar)
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=params,
        policy=policy,
        max_tokens=params.max_tokens,
        end_token_ids=ends,
        stop_token_ids=own_stops - {STOP_TOKEN},
        detokenizer=Detokenizer(letters(), prompt, stop_strings=params.stop_strings),
        sequence=TokenSequence(prompt),
        sampler=sampler,
        index=index,
    )


class CheckedModelDrafter(ModelDrafter):
    """Asserts that every proposal is the draft model's greedy text, whatever happened to the slots."""

    def __init__(self, draft: NextToken, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._draft = draft

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        drafts = super().propose(rows)
        for row, draft in zip(rows, drafts, strict=True):
            greedy_text = greedy(self._draft, row.tokens.tolist(), row.num_tokens)
            drafted = draft.tokens.tolist()
            assert drafted == greedy_text[: len(drafted)], f"slot {row.slot}"
            assert row.stop is not None or len(drafted) == row.num_tokens, f"slot {row.slot}"
        return drafts


def make_drafter(name: str, draft: NextToken, num_slots: int = 4, *, trim_block: int | None = None) -> Drafter | None:
    """One of DRAFTERS; `draft` is what the draft model says."""
    if name == "none":
        return None
    if name == "ngram":
        return NgramDrafter(LOOKUP.max_n, LOOKUP.min_n)
    if name == "alignment":
        return AlignmentDrafter(LOOKUP.max_n, LOOKUP.min_n, "argmax", 0.5)
    if name == "suffix":
        return SuffixDrafter(Copies(2.0, NUM_DRAFT_TOKENS, SuffixCorpus(500)))
    engine = TableEngine(draft, max_batch_size=num_slots, trim_block=trim_block)
    model = CheckedModelDrafter(draft, engine, VOCAB_SIZE, LOOKUP if name == "multi_level" else None)
    return HybridDrafter(Copies(2.0, NUM_DRAFT_TOKENS, None), model, min_match=2) if name == "hybrid" else model


def drafters(target: NextToken, salt: int = 0) -> dict[str, Drafter | None]:
    return {name: make_drafter(name, sometimes_differs(target, salt)) for name in DRAFTERS}


class DraftLengths(DraftLength):
    """Returns the given numbers of draft tokens one after the other, from the start again after the last."""

    def __init__(self, lengths: Sequence[int], max_draft_tokens: int = NUM_DRAFT_TOKENS) -> None:
        super().__init__(max_draft_tokens, adaptive=True)
        self._given = cycle(lengths)

    def choose(self, rates: Sequence[float], limits: Sequence[int], num_context: int, num_unread: int = 0) -> int:
        return min(next(self._given), self.max_draft_tokens)


@dataclass
class Stack:
    """A loop, its target engine and what it counts."""

    target: TableEngine
    loop: GenerationLoop
    metrics: Metrics

    def run(self, *requests: Request) -> None:
        """Serves the requests and all that were added before to the end."""
        if requests:
            self.loop.add(list(requests))
        while self.loop.has_requests():
            self.step()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.loop.step()
            self.check()

    def counted(self, name: str) -> float:
        return self.metrics.as_dict()[PREFIX + name]

    def check(self) -> None:
        """Asserts what holds between two steps, also of what the target's cache holds."""
        check_invariants(self.loop.scheduler)
        for request in self.loop.scheduler.running:
            tokens = request.sequence.tokens.tolist()
            if request.round is not None:
                tokens[request.round.start :] = request.round.draft.tolist()
            held = self.target.slots[request.slot][: request.num_cached]
            assert held == tokens[: request.num_cached], f"{request.request_id}: the cache holds the sequence"
        table = self.loop.scheduler.slots.table
        for slot, state in zip(self.target.slots[: len(table)], table, strict=True):
            assert slot[: len(state.kept)] == state.kept.tolist(), "the cache holds what is said to be kept"

    def positions_of(self, action: Callable[[], object]) -> list[int]:
        """Positions (rows x tokens) of each target step that the action takes."""
        before = self.target.num_runs
        action()
        return [rows * tokens for _, rows, tokens in self.target.shapes[before:]]


def make_stack(
    target: NextToken,
    drafter: Drafter | None = None,
    *,
    num_slots: int = 1,
    num_draft_tokens: int = NUM_DRAFT_TOKENS,
    max_num_tokens: int = 64,
    max_queue_size: int = 1000,
    max_seq_len: int = 240,
    adaptive_draft_length: bool = False,
    prefix_caching: bool = True,
    draft_lengths: Sequence[int] = (),
    entropy: Entropy = lambda tokens: 0.0,
    logits: Logits | None = None,
    trim_block: int | None = None,
    step_costs: StepCosts | None = None,
    has_spare_slot: bool = False,
    has_windows: bool = False,
) -> Stack:
    """max_seq_len: what is served, where the engine was built for 256. draft_lengths: what the loop's choice of draft
    tokens is, step by step; otherwise it chooses."""
    engine = TableEngine(
        target,
        entropy=entropy,
        logits=logits,
        max_batch_size=num_slots + has_spare_slot,
        trim_block=trim_block,
        has_windows=has_windows,
    )
    config = LoopConfig(
        num_slots=num_slots,
        max_seq_len=max_seq_len,
        num_draft_tokens=num_draft_tokens,
        max_num_tokens=max_num_tokens,
        max_queue_size=max_queue_size,
        adaptive_draft_length=adaptive_draft_length,
        prefix_caching=prefix_caching,
        step_costs=step_costs,
        spare_slot=num_slots if has_spare_slot else None,
    )
    metrics = Metrics()
    loop = GenerationLoop(engine, drafter, config, letters(), metrics)
    if draft_lengths and drafter is not None:
        loop.speculation.draft_length = DraftLengths(draft_lengths, num_draft_tokens)
    return Stack(engine, loop, metrics)


def random_prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, length).tolist()
