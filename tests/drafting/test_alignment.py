"""The alignment drafter against a plain reading of ALGORITHMS A.2, and what the loop tells it of prompts."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.drafting import AlignmentDrafter, Draft, DraftRow, FreeDrafter, NgramDrafter, alignment
from fly_trt.params import SpeculativeConfig
from fly_trt.tokens import IntArray
from fly_trt.verification import AcceptancePolicy, DraftSource, TypicalPolicy
from loop_stack import Stack, make_request, make_stack, random_prompt
from table_engine import greedy, most_probable, spread_logits

MAX_N, MIN_N = 4, 1
CHOICES = st.tuples(st.integers(0, 3), st.floats(-6, -0.01), st.floats(-9, -6))  # token, its logprob, the other's


def ngram_start(tokens: list[int]) -> int:
    for n in range(MAX_N, MIN_N - 1, -1):
        for start in range(len(tokens) - n):
            if n <= len(tokens) and tokens[start : start + n] == tokens[len(tokens) - n :]:
                return start + n
    return len(tokens)


def oracle(tokens: list[int], said: dict[int, tuple[int, float]], mode: str, margin: float, count: int) -> list[int]:
    """said: by position of the prompt, the target's token there and its gap."""
    draft = []
    for at in range(ngram_start(tokens), len(tokens))[:count]:
        token = tokens[at]
        if mode != "prompt" and at in said and said[at][0] != token and said[at][1] > margin:
            if mode == "cut":
                break
            token = said[at][0]
        draft.append(token)
    return draft


def made(mode: str, margin: float) -> NgramDrafter:
    return alignment(SpeculativeConfig(method="alignment", alignment_mode=mode, alignment_margin=margin), None)


def propose(drafter: Any, tokens: list[int], count: int = 8, slot: int = 0, **row: Any) -> list[int]:
    (draft,) = drafter.propose([DraftRow(slot, np.array(tokens), count, **row)])
    assert set(draft.sources) <= {DraftSource.LOOKUP}
    return draft.tokens.tolist()


def read(drafter: Any, tokens: list[int], start: int, said: list[tuple[int, float, float]], slot: int = 0) -> None:
    columns = [np.array(column) for column in zip(*said, strict=True)]
    drafter.read_prompt(slot, np.array(tokens), start, columns[0], *(c.astype(np.float32) for c in columns[1:]))


def least_gap(logprob: float) -> float:
    return logprob - math.log(1 - math.exp(logprob))


@examples(200)
@given(
    prompt=st.lists(st.tuples(st.integers(0, 3), CHOICES), min_size=2, max_size=20),
    output=st.lists(st.integers(0, 3), max_size=10),
    cuts=st.sets(st.integers(1, 18)),
    mode=st.sampled_from(["prompt", "argmax", "cut"]),
    margin=st.sampled_from([0, 0.5, 2.3, 4, 7]),
    is_private=st.booleans(),
)
def test_what_is_badly_aligned_is_cut_or_replaced(
    prompt: list, output: list[int], cuts: set[int], mode: str, margin: float, is_private: bool
) -> None:
    """However the prompt is cut into chunks; a private row does as if it were cut everywhere."""
    tokens = [token for token, _ in prompt]
    drafter, said = made(mode, margin), {}
    ends = [*sorted(cut for cut in cuts if cut < len(tokens) - 1), len(tokens) - 1]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        heard = []
        for at in range(start + 1, end + 1):
            choice, logprob, other = prompt[at][1]
            is_last = at == end < len(tokens) - 1
            of_token = math.nan if is_last else logprob if choice == tokens[at] else other
            heard.append((choice, logprob, of_token))
            bound = np.float32(least_gap(np.float32(logprob)))
            said[at] = choice, bound if is_private or is_last else np.float32(logprob) - np.float32(of_token)
        if mode != "prompt":
            read(drafter, tokens, start, heard)
    row = {"is_private": is_private, "num_prompt": len(tokens)}
    is_blind = is_private and not output
    want = oracle(tokens + output, {} if is_blind else said, mode, margin, 8)
    assert propose(drafter, tokens + output, **row) == want


def test_mode_prompt_is_plain_lookup() -> None:
    drafter = made("prompt", 0)
    assert type(drafter) is NgramDrafter


PROMPT = [5, 6, 7, 8, 5]
SAID = [(6, -0.1, -0.1), (9, -0.1, -9.0), (8, -0.1, -0.1), (5, -0.1, -0.1)]  # 9 rather than 7


@pytest.mark.parametrize(("mode", "want"), [("cut", [6]), ("argmax", [6, 9, 8, 5])])
def test_what_is_known_goes_where_the_sequence_goes(mode: str, want: list[int]) -> None:
    drafter = made(mode, 2.3)
    read(drafter, PROMPT, 0, SAID)
    assert propose(drafter, PROMPT) == want
    drafter.swap(0, 2)
    assert propose(drafter, PROMPT, slot=2) == want
    drafter.copy(2, 1, 4)
    assert propose(drafter, [*PROMPT[:4], 3, 5], slot=1)[:2] == want[:2]
    drafter.release(2)
    assert propose(drafter, [*PROMPT[:4], 1, 5], slot=2)[:2] == want[:2], "the slot's own cache may be used again"
    drafter.release(2)
    assert propose(drafter, [5, 6, 3, 8, 5], slot=2) == [6, 3, 8, 5], "and no more than that"
    drafter.reset()
    assert propose(drafter, PROMPT, slot=1) == PROMPT[1:]


def test_a_prompt_that_began_with_a_cache_counts_as_well_aligned_there() -> None:
    drafter = made("cut", 2.3)
    read(drafter, PROMPT, 2, SAID[2:])
    assert propose(drafter, PROMPT) == PROMPT[1:]


# --- in the loop ------------------------------------------------------------------------------------------------------


class Reader(FreeDrafter):
    """Drafts nothing and keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[dict[int, tuple[int, float, float]]] = []

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        return [Draft.of(np.zeros(0, np.int64), DraftSource.LOOKUP) for _ in rows]

    def read_prompt(self, slot: int, tokens: IntArray, start: int, *said: Any) -> None:
        rows = zip(*(array.tolist() for array in said), strict=True)
        self.heard.append({start + 1 + at: row for at, row in enumerate(rows)})


@pytest.mark.parametrize("max_num_tokens", [5, 16, 64])
def test_the_loop_tells_of_every_position_of_a_prompt_once(max_num_tokens: int) -> None:
    logits, reader = spread_logits(3), Reader()
    stack = make_stack(most_probable(logits), reader, logits=logits, num_slots=2, max_num_tokens=max_num_tokens)
    prompt = random_prompt(1, 23)
    stack.run(make_request(prompt, max_tokens=3, ignore_eos=True))
    assert [at for part in reader.heard for at in part] == list(range(1, 23))
    for part in reader.heard:
        for at, (choice, of_choice, of_token) in part.items():
            row = logits(tuple(prompt[:at]))
            logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
            assert choice == int(row.argmax())
            assert of_choice == pytest.approx(logprobs.max(), abs=1e-5)
            is_last = at == max(part) < 22
            assert math.isnan(of_token) if is_last else of_token == pytest.approx(logprobs[prompt[at]], abs=1e-4)


@pytest.mark.parametrize("policy", [None, TypicalPolicy()])
def test_a_loose_request_hears_of_its_whole_prompt_though_a_cache_has_it(policy: AcceptancePolicy | None) -> None:
    logits, reader = spread_logits(3), Reader()
    stack = make_stack(most_probable(logits), reader, logits=logits)
    prompt, settings = random_prompt(1, 23), {"max_tokens": 3, "ignore_eos": True}
    stack.run(make_request(prompt, **settings))
    reader.heard.clear()
    request = make_request(prompt, **settings, **({"policy": policy} if policy else {}))
    stack.run(request)
    assert (len(reader.heard) > 0, request.num_prefix_hits > 0) == ((True, False) if policy else (False, True))


@pytest.mark.parametrize("mode", ["argmax", "cut"])
@pytest.mark.parametrize("salt", range(10))
def test_in_any_company_a_request_has_its_own_text(salt: int, mode: str) -> None:
    """Plain decoding's under exact; under a loose rule what it has alone, in one chunk."""
    logits = spread_logits(salt, 3)
    target = most_probable(logits)
    prompt = np.random.default_rng(salt).integers(2, 5, 30).tolist()

    def served(policy: AcceptancePolicy | None, others: Sequence[int] = (), **settings: Any) -> list[int]:
        drafter = AlignmentDrafter(MAX_N, MIN_N, mode, 0.5)
        stack: Stack = make_stack(target, drafter, logits=logits, num_slots=4, num_draft_tokens=6, **settings)
        asked = {} if policy is None else {"policy": policy}
        neighbours = [
            make_request(prompt[:length], request_id=str(length), max_tokens=9, ignore_eos=True, **asked)
            for length in others
        ]
        if neighbours:
            stack.loop.add(neighbours)
            stack.step(salt % 5)
        request = make_request(prompt, ignore_eos=True, max_tokens=12, **asked)
        stack.run(request)
        return request.output_token_ids

    loose = TypicalPolicy(use_full_entropy=True, threshold=0.02)
    alone = served(loose)
    for others, lengths, max_num_tokens in (((), [6], 16), ((30, 17), [2, 0], 16), ((29, 25, 3), [5, 1], 8)):
        company = {"others": others, "draft_lengths": lengths, "max_num_tokens": max_num_tokens}
        assert served(None, **company) == greedy(target, prompt, 12)
        assert served(loose, **company) == alone
