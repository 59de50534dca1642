"""The law of sampled speculation: a toy model's tokens are distributed as without a draft, and are the same tokens."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from fly_trt.verification import (
    EXACT,
    AcceptancePolicy,
    FlyPolicy,
    LogitsProcessor,
    UniformStream,
    accept,
    distribution,
    gate_entropy,
    sample,
)
from sampling_definitions import follows, processed_row, random_scores, truncated_softmax

TOY_SIZE = 12
NUM_DRAFT = 4
NUM_SEQUENCES = 20_000
TOY_PROMPT = (3, 7)
TOY_TARGET = random_scores(np.random.default_rng(10), TOY_SIZE * TOY_SIZE, TOY_SIZE, 1.5)
TOY_DRAFTER = TOY_TARGET + random_scores(np.random.default_rng(11), TOY_SIZE * TOY_SIZE, TOY_SIZE, 1.0)
TOY_SETTINGS: dict[str, Any] = {"frequency_penalty": 0.5, "logit_bias": {2: 0.5}}
ACCEPT_ALL = FlyPolicy(0.0, use_full_entropy=True, window=0, lookahead=0)


def toy_row(table: np.ndarray, output: tuple[int, ...]) -> np.ndarray:
    """The next token depends on the last two."""
    before, last = (*TOY_PROMPT, *output)[-2:]
    return table[before * TOY_SIZE + last]


def toy_draft(output: tuple[int, ...], num_draft: int) -> tuple[int, ...]:
    draft = output
    for _ in range(num_draft):
        draft = (*draft, int(toy_row(TOY_DRAFTER, draft).argmax()))
    return draft[len(output) :]


@cache
def toy_step(output: tuple[int, ...], num_draft: int, **truncation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What does not depend on the seed: the draft after `output`, the target's distributions, and the gate."""
    draft = toy_draft(output, num_draft)
    logits = np.array([toy_row(TOY_TARGET, output + draft[:i]) for i in range(num_draft + 1)])
    scores = LogitsProcessor(TOY_SIZE, TOY_PROMPT, **TOY_SETTINGS).process(
        logits, np.array(output, np.int64), np.array(draft, np.int64)
    )
    probabilities = distribution(scores, **truncation)
    return np.array(draft, np.int64), probabilities, gate_entropy(probabilities, 3)[0]


def toy_round(
    output: tuple[int, ...],
    seeds: Sequence[int],
    truncation: dict[str, float],
    num_draft: int = NUM_DRAFT,
    policy: AcceptancePolicy = EXACT,
) -> list[tuple[int, ...]]:
    """One step of sequences that have the same output and different seeds: their outputs after it."""
    draft, probabilities, gate = toy_step(output, num_draft, **truncation)
    uniforms = [UniformStream(seed, 0).at(len(output), num_draft + 1) for seed in seeds]
    choices = sample(np.tile(probabilities, (len(seeds), 1)), np.concatenate(uniforms))
    outputs = []
    for choice in choices.reshape(len(seeds), num_draft + 1):
        verdict = accept(draft, choice, gate, policy, frozenset())
        assert verdict.next_token is not None
        outputs.append((*output, *draft[: verdict.num_accepted].tolist(), verdict.next_token))
    return outputs


def toy_decode(seed: int, length: int, truncation: dict[str, float], num_draft: int) -> tuple[int, ...]:
    output: tuple[int, ...] = ()
    while len(output) < length:
        (output,) = toy_round(output, [seed], truncation, num_draft)
    return output[:length]


def toy_law(output: tuple[int, ...], truncation: dict[str, float]) -> np.ndarray:
    scores = processed_row(toy_row(TOY_TARGET, output), list(TOY_PROMPT), list(output), TOY_SETTINGS)
    return truncated_softmax(np.array(scores), **truncation)


def first_and_second(truncation: dict[str, float], num: int, policy: AcceptancePolicy = EXACT) -> tuple[bool, bool]:
    """Whether the first token, and the second after the most frequent first one, follow the target's law."""
    outputs = toy_round((), range(num), truncation, policy=policy)
    first = Counter(output[0] for output in outputs)
    ((most_frequent, _),) = first.most_common(1)
    unfinished = [seed for seed, output in enumerate(outputs) if output == (most_frequent,)]
    outputs += toy_round((most_frequent,), unfinished, truncation, policy=policy) if unfinished else []
    second = Counter(output[1] for output in outputs if output[0] == most_frequent and len(output) > 1)
    return follows(first, toy_law((), truncation)), follows(second, toy_law((most_frequent,), truncation))


TRUNCATIONS = [{"temperature": 0.7}, {"temperature": 1.3}, {"top_p": 0.8}]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_speculation_samples_from_the_targets_distribution(truncation: dict[str, float]) -> None:
    assert first_and_second(truncation, NUM_SEQUENCES) == (True, True)


def test_a_draft_that_is_always_accepted_does_not_follow_that_distribution() -> None:
    assert first_and_second({"temperature": 1.3}, 1000, ACCEPT_ALL) == (False, False)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_the_tokens_are_the_same_with_and_without_a_draft(truncation: dict[str, float]) -> None:
    for seed in range(30):
        plain = toy_decode(seed, 12, truncation, 0)
        assert toy_decode(seed, 12, truncation, 1) == plain
        assert toy_decode(seed, 12, truncation, NUM_DRAFT) == plain
