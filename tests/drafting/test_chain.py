"""Chains of draft models on table engines: the text is that of the model next to the target, whatever guesses."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.drafting import INNER_ACCEPTANCE, Draft, DraftParts, DraftRow, Level, Lookup, ModelDrafter
from fly_trt.drafting.model import chain
from fly_trt.drafting.stops import AdaSDStop, ConfidenceStop
from fly_trt.params import SpeculativeConfig
from fly_trt.verification import FlyPolicy
from loop_stack import PROMPT, CheckedModelDrafter, make_request, make_stack
from table_engine import (
    VOCAB_SIZE,
    Entropy,
    NextToken,
    TableEngine,
    greedy,
    hashed,
    one_hot_logits,
    sometimes_differs,
    sometimes_uncertain,
)

LOOKUP = Lookup(max_n=4, min_n=1, num_tokens=6)
FLY = INNER_ACCEPTANCE["fly"]
LANGUAGE = hashed(8, 1, order=30)
# Whatever it can loosen it does.
EAGER = FlyPolicy(entropy_threshold=0.0)


class Chain:
    """Lookup, a small draft model and a middle one, with their engines."""

    def __init__(
        self,
        middle: NextToken = LANGUAGE,
        small: NextToken | None = None,
        num_tokens: int = 4,
        policy: FlyPolicy | None = None,
        entropy: Entropy = lambda tokens: 0.0,
        vocab_sizes: tuple[int, int] = (VOCAB_SIZE, VOCAB_SIZE),
        lookup: Lookup | None = LOOKUP,
        reuse_cache: bool = True,
    ) -> None:
        small = small or middle
        self.small = TableEngine(small, max_num_tokens=64, vocab_size=vocab_sizes[0])
        self.middle = TableEngine(middle, entropy=entropy, max_num_tokens=64, vocab_size=vocab_sizes[1])
        inner = CheckedModelDrafter(small, self.small, vocab_sizes[1], lookup, reuse_cache=reuse_cache)
        level = Level(inner, num_tokens) if policy is None else Level(inner, num_tokens, policy)
        self.drafter = ModelDrafter(self.middle, vocab_sizes[1], level, reuse_cache=reuse_cache)

    def propose(self, tokens: list[int], num_tokens: int, slot: int = 0, **row: object) -> list[int]:
        (draft,) = self.drafter.propose([DraftRow(slot, np.array(tokens), num_tokens, **row)])
        return draft.tokens.tolist()

    def runs_of(self, action: Callable[[], object]) -> tuple[int, int]:
        """Steps of the small model and of the middle one."""
        before = self.small.num_runs, self.middle.num_runs
        action()
        return self.small.num_runs - before[0], self.middle.num_runs - before[1]


def test_the_middle_model_verifies_the_small_ones_guesses_in_one_step() -> None:
    chain = Chain(lookup=None)
    assert chain.runs_of(lambda: chain.propose(PROMPT, 15)) == (12, 3)
    assert [tokens for _, _, tokens in chain.middle.shapes] == [len(PROMPT) + 4, 5, 5]


def test_a_wrong_guess_costs_no_more_than_the_tokens_after_it() -> None:
    wrong_once = greedy(LANGUAGE, PROMPT, 2)

    def small(tokens: tuple[int, ...]) -> int:
        token = LANGUAGE(tokens)
        return token if list(tokens[len(PROMPT) :]) != wrong_once else 2 + (token - 1) % 6

    chain = Chain(small=small)
    assert chain.propose(PROMPT, 3 + 5) == greedy(LANGUAGE, PROMPT, 8)
    assert chain.middle.num_runs == 2


def test_what_the_small_model_guessed_beyond_the_draft_is_its_next_guess() -> None:
    """Its fourth token is the one that the target takes in place of the draft's, which it goes on after."""

    def middle(tokens: tuple[int, ...]) -> int:
        token = LANGUAGE(tokens)
        return token if len(tokens) != len(PROMPT) + 3 else 2 + (token - 1) % 6

    chain = Chain(middle=middle, small=LANGUAGE)
    draft = chain.propose(PROMPT, 5)
    corrected = [*PROMPT, *draft[:3], LANGUAGE((*PROMPT, *draft[:3]))]
    assert draft[3] != corrected[-1]
    small_runs, _ = chain.runs_of(lambda: chain.propose(corrected, 2))
    assert small_runs == 1


def test_rows_share_the_steps_of_both_models() -> None:
    chain = Chain(lookup=None)
    rows = [DraftRow(slot, np.array([slot + 2, 3, 4]), 8) for slot in range(4)]
    drafts: list[Draft] = []
    assert chain.runs_of(lambda: drafts.extend(chain.drafter.propose(rows))) == (6, 2), "three guesses in a row of four"
    for row, draft in zip(rows, drafts, strict=True):
        assert draft.tokens.tolist() == greedy(LANGUAGE, row.tokens.tolist(), 8)


@pytest.mark.parametrize("reuse_cache", [False, True])
def test_what_becomes_of_the_slots_goes_down_the_chain(reuse_cache: bool) -> None:
    """The small model checks that its guesses are its own greedy text after what the slot now holds."""
    chain = Chain(small=sometimes_differs(LANGUAGE, 1), reuse_cache=reuse_cache)
    drafter, texts = chain.drafter, {slot: [slot + 2, 5, 4, 3 + slot] * 3 for slot in range(3)}

    def check() -> None:
        drafts = drafter.propose([DraftRow(slot, np.array(text), 6) for slot, text in sorted(texts.items())])
        for (_, text), draft in zip(sorted(texts.items()), drafts, strict=True):
            assert draft.tokens.tolist() == greedy(LANGUAGE, text, 6)
            text += [*draft.tokens[:2].tolist(), 7]

    check()
    drafter.swap(0, 2)
    texts[0], texts[2] = texts[2], texts[0]
    check()
    drafter.swap(2, 3)
    texts[3] = texts.pop(2)
    check()
    drafter.copy(0, 2, 10)
    texts[2] = [*texts[0][:10], 6, 6]
    check()
    drafter.release(1)
    texts[1] = [*texts[1][:3], 2, 2, 2, 2]
    check()
    drafter.trim(max(map(len, texts.values())))
    assert chain.small.trims == chain.middle.trims
    drafter.reset()
    texts[1] = [4] * 30
    check()


def test_a_copied_beginning_is_read_again_by_neither_model() -> None:
    chain = Chain()
    prompt = [2 + i % 6 for i in range(40)]
    chain.propose(prompt, 6, slot=2)
    chain.drafter.copy(2, 0, 30)
    before = len(chain.small.shapes), len(chain.middle.shapes)
    chain.propose([*prompt[:30], 7, 7], 6)
    read = [shapes[start:] for shapes, start in zip((chain.small.shapes, chain.middle.shapes), before, strict=True)]
    assert max(tokens for shapes in read for _, _, tokens in shapes) <= 2 + LOOKUP.num_tokens


@pytest.mark.parametrize("reuse_cache", [False, True])
def test_the_text_of_a_sequence_that_ended_is_no_guess(reuse_cache: bool) -> None:
    chain = Chain(reuse_cache=reuse_cache)
    answer = [2 + (token - 1) % 6 for token in greedy(LANGUAGE, PROMPT, 12)]
    chain.propose([*PROMPT, *answer], 4)
    chain.drafter.release(0)
    assert chain.propose(PROMPT, 9) == greedy(LANGUAGE, PROMPT, 9)


def test_after_a_reset_both_models_read_everything_again() -> None:
    chain = Chain()
    chain.propose([3] * 30, 4)
    chain.drafter.reset()
    before = len(chain.small.shapes), len(chain.middle.shapes)
    chain.propose([3] * 30, 4)
    for engine, start in zip((chain.small, chain.middle), before, strict=True):
        assert engine.shapes[start][2] >= 30


# --- what a model cannot say ------------------------------------------------------------------------------------------


def test_a_small_model_that_comes_to_no_number_leaves_the_middle_one_alone() -> None:
    small, middle = TableEngine(LANGUAGE, entropy=lambda tokens: np.nan), TableEngine(LANGUAGE)
    drafter = ModelDrafter(middle, VOCAB_SIZE, Level(ModelDrafter(small, VOCAB_SIZE), 4))
    (draft,) = drafter.propose([DraftRow(0, np.array(PROMPT), 9)])
    assert draft.tokens.tolist() == greedy(LANGUAGE, PROMPT, 9)
    assert (small.num_runs, middle.num_runs) == (1, 9)


def test_a_guess_that_comes_to_no_number_is_not_made_twice() -> None:
    wrong = lambda tokens: 9 if len(tokens) == len(PROMPT) + 2 else LANGUAGE(tokens)  # noqa: E731
    chain = Chain(small=wrong, entropy=lambda tokens: np.nan if 9 in tokens else 0.0)
    assert chain.propose(PROMPT, 9) == greedy(LANGUAGE, PROMPT, 9)


def test_nothing_follows_a_text_that_the_middle_model_cannot_read() -> None:
    chain = Chain(entropy=lambda tokens: np.nan if 31 in tokens else 0.0)
    assert chain.propose([*PROMPT, 31, 4], 5) == []
    chain.drafter.release(0)
    assert chain.propose([*PROMPT, 4], 5) == greedy(LANGUAGE, [*PROMPT, 4], 5)


@pytest.mark.parametrize("vocab_sizes", [(12, 24), (24, 12)])
def test_vocabularies_of_different_sizes_meet(vocab_sizes: tuple[int, int]) -> None:
    small_size, middle_size = vocab_sizes
    small, middle = hashed(small_size, 0), hashed(middle_size, 3)
    engines = TableEngine(small, vocab_size=small_size), TableEngine(middle, vocab_size=middle_size)
    inner = ModelDrafter(engines[0], middle_size, LOOKUP)
    drafter = ModelDrafter(engines[1], 24, Level(inner, 4))
    (draft,) = drafter.propose([DraftRow(0, np.array([3, 11, 4, 3]), 12)])
    assert draft.tokens.tolist() == greedy(middle, [3, 11, 4, 3], 12)


# --- a loose inner level ----------------------------------------------------------------------------------------------


def test_a_loose_level_drafts_what_it_lets_pass_in_fewer_steps() -> None:
    small = sometimes_differs(LANGUAGE, 1, out_of=2)
    exact, loose = Chain(small=small), Chain(small=small, policy=EAGER)
    assert exact.propose(PROMPT, 15) == greedy(LANGUAGE, PROMPT, 15)
    assert loose.propose(PROMPT, 15) != greedy(LANGUAGE, PROMPT, 15)
    assert exact.middle.num_runs > loose.middle.num_runs == 3


def test_a_stop_token_is_never_let_pass() -> None:
    chain = Chain(small=lambda tokens: 1, policy=EAGER)
    assert chain.propose(PROMPT, 9) == greedy(LANGUAGE, PROMPT, 9)


def test_a_private_draft_is_the_middle_models_own_text_and_forgets_what_was_let_pass() -> None:
    chain = Chain(small=sometimes_differs(LANGUAGE, 1, out_of=2), policy=EAGER)
    assert chain.propose(PROMPT, 9, is_private=True) == greedy(LANGUAGE, PROMPT, 9)
    other = [*PROMPT, 7]
    draft = chain.propose(other, 9)
    assert draft != greedy(LANGUAGE, other, 9)
    committed = [*other, *draft[:2]]
    assert chain.propose(committed, 9, is_private=True) == greedy(LANGUAGE, committed, 9)


@pytest.mark.parametrize("policy", [None, FLY, EAGER])
@pytest.mark.parametrize("stop", [ConfidenceStop(0.5), AdaSDStop(1.5)])
def test_stop_rules_and_scores_are_of_the_middle_model(policy: FlyPolicy | None, stop: ConfidenceStop) -> None:
    """It is unsure where it was uncertain of the token that it drafts itself; what only passed it, it gave little."""
    uncertain = sometimes_uncertain(3)
    chain = Chain(policy=policy, entropy=uncertain, small=sometimes_differs(LANGUAGE, 1))
    chain.middle._logits = one_hot_logits(LANGUAGE)
    (draft,) = chain.drafter.propose([DraftRow(0, np.array(PROMPT), 15, stop=stop, wants_scores=True)])
    tokens = draft.tokens.tolist()
    assert len(draft.scores.entropy) == len(tokens)
    for at, token in enumerate(tokens):
        prefix = (*PROMPT, *tokens[:at])
        assert draft.scores.top_ids[at, 0] == LANGUAGE(prefix)
        assert (draft.scores.logprob[at] > -0.1) == (token == LANGUAGE(prefix))
        assert stop.ends(2 * uncertain(prefix), float(draft.scores.logprob[at])) == (at == len(tokens) - 1 < 14)


@examples(40)
@given(
    salt=st.integers(0, 5),
    out_of=st.integers(2, 6),
    num_tokens=st.sampled_from([1, 3, 8]),
    policy=st.sampled_from([None, FLY, EAGER]),
    num_slots=st.sampled_from([1, 3]),
)
def test_an_exact_target_emits_plain_decodings_tokens_whatever_guesses(
    salt: int, out_of: int, num_tokens: int, policy: FlyPolicy | None, num_slots: int
) -> None:
    language = hashed(12, salt, order=9)
    middle = sometimes_differs(language, salt, out_of=4)
    chain = Chain(middle, sometimes_differs(middle, salt + 1, out_of), num_tokens, policy, sometimes_uncertain(salt))
    prompts = [PROMPT, [*PROMPT, 6, 3], [*PROMPT, 6, 4], [2, 9]]
    requests = [make_request(prompt, request_id=str(at), max_tokens=30) for at, prompt in enumerate(prompts)]
    make_stack(language, chain.drafter, num_slots=num_slots).run(*requests)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_token_ids == greedy(language, prompt, 30)


def test_a_token_that_no_draft_model_knows_is_read_as_another_one() -> None:
    """A target whose table is padded further: its ids come with prompts."""
    small, middle = (TableEngine(hashed(12, 1), max_num_tokens=64, vocab_size=12) for _ in range(2))
    engines = {"draft": middle, "inner": small}
    parts = DraftParts(lambda: engines["draft"], 24, reuse_cache=True, load_inner_draft_model=lambda: engines["inner"])
    drafter = chain(SpeculativeConfig(method="chain"), parts)
    (draft,) = drafter.propose([DraftRow(0, np.array([3, 4, 23, 5]), 4)])
    assert draft.tokens.tolist() == greedy(hashed(12, 1), [3, 4, 11, 5], 4)
