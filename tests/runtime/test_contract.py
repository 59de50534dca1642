"""The loop uses what an engine promises and no more: NaN where a value is not promised reaches no verdict."""

from typing import Any

import numpy as np
import pytest

from fly_trt.drafting import ModelDrafter
from fly_trt.engines.base import AcceptancePolicy
from fly_trt.errors import EngineError, RequestError
from fly_trt.runtime.loop import MAX_LOGITS_CHUNK
from fly_trt.runtime.request import Request
from loop_stack import PROMPT, make_drafter, make_request, make_stack, random_prompt
from table_engine import FULL_ENTROPY, VOCAB_SIZE, TableEngine, hashed, sometimes_differs, sometimes_uncertain

# Half of the positions that `sometimes_uncertain` has are above it, by the full entropy only.
FULL_GATE = AcceptancePolicy(entropy_threshold=1.0 + 1e-6, use_full_entropy=True, window=2, lookahead=2)
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


@pytest.mark.parametrize(("setting", "error"), [({}, EngineError), ({"temperature": 0.5}, RequestError)])
@pytest.mark.parametrize("cut", [(), (1,), (0, 5)])
def test_a_token_that_would_be_kept_and_is_no_number_ends_its_request(
    setting: dict[str, Any], error: type[Exception], cut: tuple[int, ...]
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
    assert isinstance(request.error, error)
    assert request.finish_reason == "abort"
