"""The loop uses what an engine promises and no more: NaN where a value is not promised reaches no verdict."""

from typing import Any

import numpy as np
import pytest

from fly_trt.drafting import Lookup, ModelDrafter
from fly_trt.errors import EngineError
from fly_trt.runtime.request import Request
from fly_trt.runtime.scheduler import MAX_LOGITS_CHUNK
from fly_trt.verification import FlyPolicy
from loop_stack import DRAFTERS, LOOKUP, PROMPT, make_drafter, make_request, make_stack, random_prompt
from table_engine import (
    FULL_ENTROPY,
    VOCAB_SIZE,
    TableEngine,
    greedy,
    hashed,
    sometimes_differs,
    sometimes_uncertain,
)

# Half of the positions that `sometimes_uncertain` has are above it, by the full entropy only.
FULL_GATE = FlyPolicy(entropy_threshold=1.0 + 1e-6, use_full_entropy=True, window=2, lookahead=2)
LANGUAGE = hashed(12, 5)


def full_gate_tokens(cut: tuple[int, ...] = (), neighbours: int = 0) -> Request:
    request = make_request(policy=FULL_GATE, request_id="paper")
    others = [make_request(random_prompt(i, 9), request_id=str(i)) for i in range(neighbours)]
    drafter = make_drafter("draft_model", sometimes_differs(LANGUAGE, 1))
    uncertain = sometimes_uncertain(2)
    stack = make_stack(LANGUAGE, drafter, num_slots=1 + neighbours, draft_lengths=cut, entropy=uncertain)
    stack.run(request, *others)
    return request


@pytest.mark.parametrize("cut", [(0,), (1,), (2,), (5,), (0, 7), (3, 0, 1)])
@pytest.mark.parametrize("neighbours", [0, 2])
def test_the_full_entropy_decides_however_a_round_is_cut(cut: tuple[int, ...], neighbours: int) -> None:
    whole = full_gate_tokens()
    assert whole.metrics.num_loosened_tokens > 1
    assert 1.0 < FULL_GATE.entropy_threshold < FULL_ENTROPY
    request = full_gate_tokens(cut, neighbours)
    assert request.output_token_ids == whole.output_token_ids
    assert request.metrics.num_loosened_tokens == whole.metrics.num_loosened_tokens


@pytest.mark.parametrize("setting", [{"temperature": 1.0}, {"logprobs": 2}])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_prompt_is_read_without_logits_but_for_its_end(setting: dict[str, Any], num_slots: int) -> None:
    lengths = [1, MAX_LOGITS_CHUNK, MAX_LOGITS_CHUNK + 1, 150]
    requests = [
        make_request(random_prompt(i, length), request_id=str(i), max_tokens=4, **setting)
        for i, length in enumerate(lengths)
    ]
    stack = make_stack(LANGUAGE, num_slots=num_slots, max_num_tokens=200)
    stack.run(*requests)
    assert all(len(request.output_token_ids) == 4 for request in requests)
    assert max(rows * tokens for rows, tokens in stack.target.logits_shapes) <= MAX_LOGITS_CHUNK * num_slots
    assert sum(tokens for _, tokens in stack.target.logits_shapes) < sum(lengths) / 2


def broken_after(tokens: tuple[int, ...], broken: int) -> float:
    return np.nan if len(tokens) > broken else 0.0


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.5, "seed": 3}])
@pytest.mark.parametrize("cut", [(), (2,), (0, 5)])
def test_what_is_no_number_behind_a_rejected_draft_token_harms_nobody(
    setting: dict[str, Any], cut: tuple[int, ...]
) -> None:
    """The draft is wrong at its third token, and the target breaks only on what follows that token."""
    wrong = 30

    def draft(tokens: tuple[int, ...]) -> int:
        return wrong if len(tokens) == len(PROMPT) + 2 else LANGUAGE(tokens)

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        return np.full(VOCAB_SIZE, np.nan) if wrong in tokens else 50.0 * (np.arange(VOCAB_SIZE) == LANGUAGE(tokens))

    def entropy(tokens: tuple[int, ...]) -> float:
        return np.nan if wrong in tokens else 0.0

    request = make_request(max_tokens=6, **setting)
    drafter = ModelDrafter(TableEngine(draft), VOCAB_SIZE)
    make_stack(LANGUAGE, drafter, draft_lengths=cut, entropy=entropy, logits=logits).run(request)
    assert request.error is None
    plain = make_request(max_tokens=6, **setting)
    make_stack(LANGUAGE, entropy=entropy, logits=logits).run(plain)
    assert request.output_token_ids == plain.output_token_ids


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.5}])
@pytest.mark.parametrize("cut", [(), (1,), (0, 5)])
def test_a_token_that_would_be_kept_and_is_no_number_ends_its_request(
    setting: dict[str, Any], cut: tuple[int, ...]
) -> None:
    last = len(PROMPT) + 3

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        if len(tokens) > last:
            return np.full(VOCAB_SIZE, np.nan)
        return 50.0 * (np.arange(VOCAB_SIZE) == LANGUAGE(tokens))

    request = make_request(max_tokens=8, **setting)
    drafter = make_drafter("draft_model", LANGUAGE)
    stack = make_stack(
        LANGUAGE,
        drafter,
        draft_lengths=cut,
        entropy=lambda tokens: broken_after(tokens, last),
        logits=logits,
    )
    stack.run(request)
    assert isinstance(request.error, EngineError)
    assert request.finish_reason == "abort"


# --- what is no number stays with the request that it belongs to ------------------------------------------------------

BAD = 31  # a token that the models overflow on
LOOSE = FlyPolicy(entropy_threshold=0.1, use_full_entropy=False, window=2, lookahead=2)
uncertain = sometimes_uncertain(4)


def overflows(tokens: tuple[int, ...]) -> float:
    return np.nan if BAD in tokens else uncertain(tokens)


def overflows_in_logits(tokens: tuple[int, ...]) -> np.ndarray:
    return np.full(VOCAB_SIZE, np.nan) if BAD in tokens else 8.0 * (np.arange(VOCAB_SIZE) == LANGUAGE(tokens))


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7, "seed": 1}, {"prompt_logprobs": 1}])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("length", [8, 60, 150])
def test_a_prompt_that_overflows_harms_neither_its_neighbours_nor_the_next_in_its_slot(
    setting: dict[str, Any], drafter: str, length: int
) -> None:
    bad = make_request([*random_prompt(3, length), BAD, 5], request_id="bad", **setting)
    after = [make_request(random_prompt(i, 9), request_id=f"after {i}", max_tokens=30) for i in range(2)]
    beside = make_request([7, 8, 9], request_id="beside", max_tokens=60)
    draft = make_drafter(drafter, LANGUAGE, 2)
    stack = make_stack(
        LANGUAGE, draft, num_slots=2, entropy=overflows, logits=overflows_in_logits, max_num_tokens=70, max_seq_len=200
    )
    stack.run(beside, bad, *after)
    assert isinstance(bad.error, EngineError)
    assert "are not numbers" in str(bad.error)
    for request in (beside, *after):
        assert request.error is None
        assert request.output_token_ids == greedy(LANGUAGE, request.prompt_token_ids, request.max_tokens)


@pytest.mark.parametrize("place", range(2, 9))
@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7, "seed": 1}, {"logit_bias": {1: -5.0}}])
def test_a_draft_token_that_overflows_spoils_no_token_before_it(place: int, setting: dict[str, Any]) -> None:
    def draft(tokens: tuple[int, ...]) -> int:
        return BAD if len(tokens) == len(PROMPT) + place else sometimes_differs(LANGUAGE, 3, 3)(tokens)

    outputs = []
    for cut in ((), (0,), (2,), (5,), (0, 7), (3, 0, 1)):
        request = make_request(policy=LOOSE, max_tokens=12, **setting)
        drafter = ModelDrafter(TableEngine(draft), VOCAB_SIZE)
        make_stack(
            LANGUAGE, drafter, draft_lengths=cut, entropy=overflows, logits=overflows_in_logits, num_slots=1
        ).run(request)
        assert request.error is None
        outputs.append((request.output_token_ids, request.metrics.num_loosened_tokens))
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("setting", [{}, {"logit_bias": {1: -5.0}}])
def test_a_window_that_ends_where_no_token_is_left_is_closed(setting: dict[str, Any]) -> None:
    """The first draft token differs at an open gate and the second agrees, after which the target breaks."""
    language = lambda tokens: 2 + (len(tokens) * 3) % 20  # noqa: E731
    first = len(PROMPT)

    def draft(tokens: tuple[int, ...]) -> int:
        return 25 if len(tokens) == first else language(tokens)

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        breaks = len(tokens) > first + 1 and tokens[first] == 25
        return np.full(VOCAB_SIZE, np.nan) if breaks else 3.0 * (np.arange(VOCAB_SIZE) == language(tokens))

    for cut in ((), (0,), (1,), (2,)):
        request = make_request(policy=LOOSE, max_tokens=6, **setting)
        drafter = ModelDrafter(TableEngine(draft), VOCAB_SIZE)
        make_stack(language, drafter, draft_lengths=cut, entropy=lambda tokens: 1.0, logits=logits).run(request)
        assert request.error is None
        assert request.output_token_ids == greedy(language, PROMPT, 6)


@pytest.mark.parametrize("lookup", [None, LOOKUP])
def test_a_draft_model_that_overflows_drafts_nothing_more_and_harms_no_other_request(lookup: Lookup | None) -> None:
    model = sometimes_differs(LANGUAGE, 3, 3)

    def run(*requests: Request) -> None:
        entropy = lambda tokens: np.nan if BAD in tokens else 0.0  # noqa: E731
        drafter = ModelDrafter(TableEngine(model, entropy=entropy), VOCAB_SIZE, lookup)
        make_stack(LANGUAGE, drafter, num_slots=1, entropy=uncertain).run(*requests)

    def good() -> Request:
        return make_request(policy=LOOSE, max_tokens=30)

    alone, after = good(), good()
    bad = make_request([*random_prompt(3, 40), BAD, 5], policy=LOOSE, max_tokens=20)
    run(alone)
    run(bad, after)
    assert bad.output_token_ids == greedy(LANGUAGE, bad.prompt_token_ids, 20)
    assert bad.metrics.num_draft_tokens == 0
    assert alone.metrics.num_loosened_tokens > 0
    assert after.output_token_ids == alone.output_token_ids
    assert after.metrics.num_draft_tokens == alone.metrics.num_draft_tokens


@pytest.mark.parametrize(("place", "is_lost"), [(3, False), (40, False), (48, True), (53, True)])
@pytest.mark.parametrize("has_windows", [True, False])
def test_where_a_prompt_is_cut_does_not_say_whether_its_request_ends(
    place: int, *, is_lost: bool, has_windows: bool
) -> None:
    """What is no number is seen by the next six tokens, or by all, and the prompt's end is one of them or not."""
    prompt = random_prompt(5, 54)
    is_seen = lambda count: place < count <= (place + 7 if has_windows else 60)  # noqa: E731
    entropy = lambda tokens: np.nan if tokens[0] == prompt[0] and is_seen(len(tokens)) else 0.0  # noqa: E731
    for budget in range(4, 60):
        stack = make_stack(LANGUAGE, entropy=entropy, has_windows=has_windows, max_num_tokens=budget)
        request, after = make_request(prompt, max_tokens=5), make_request([7, 8, 9], max_tokens=5)
        stack.run(request, after)
        is_over = request.error is not None
        assert is_over == (is_lost or not has_windows), budget
        assert request.output_token_ids == ([] if is_over else greedy(LANGUAGE, prompt, 5))
        assert after.output_token_ids == greedy(LANGUAGE, [7, 8, 9], 5), budget
