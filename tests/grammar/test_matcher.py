"""Masks of drafted rounds, held against what one token after the other says on a matcher of its own."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt import RequestError, StructuredOutputs
from fly_trt.grammar import GrammarMatcher, TokenMasks
from fly_trt.grammar.matcher import MAX_RESTARTS
from grammar_tokenizers import END, KINDS, compiler_of, tokenizer_of

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
REGEXES = ["[ab]{2,5}", "(yes|no)( maybe)?", "[0-9]+(,[0-9]+)*", "a*", "(.|\n){0,8}", "é?[a-é]{1,3}😀?", "abc(abc)*"]
ASKED = [
    *(StructuredOutputs(regex=regex) for regex in REGEXES),
    StructuredOutputs(json=SCHEMA),
    StructuredOutputs(json=SCHEMA, disable_any_whitespace=True),
    StructuredOutputs(choice=["yes", "no", "yes no", 'a "b" \\ c', "\n", "[a-z]+", "a|b"]),
    StructuredOutputs(grammar='start: "a" start "b" | "0"'),
    StructuredOutputs(grammar='root ::= "no" | "yes" ( " yes" )*'),
]
NO_TOKENS = np.empty(0, np.int64)


def matcher_of(kind: str, asked: StructuredOutputs, ends: tuple[int, ...] = ()) -> GrammarMatcher:
    return compiler_of(kind).compile(asked).new_matcher(ends or [END[kind]])


def allowed(matcher: GrammarMatcher, output: list[int], ahead: list[int], first: int = 0) -> np.ndarray:
    masks = matcher.masks(np.array(output, np.int64), np.array(ahead, np.int64), first)
    return np.stack([masks.allowed(row) for row in range(len(masks.words))])


def oracle(kind: str, asked: StructuredOutputs, output: list[int], ahead: list[int]) -> np.ndarray:
    """Each position on a matcher that read its tokens one by one."""
    rows = [allowed(matcher_of(kind, asked), output, [])[0]]
    for i in range(len(ahead)):
        stands = bool(rows[-1][ahead[i]]) and ahead[i] != END[kind]
        text = output + ahead[: i + 1]
        rows.append(allowed(matcher_of(kind, asked), text, [])[0] if stands else np.zeros_like(rows[0]))
    return np.stack(rows)


def random_walk(kind: str, asked: StructuredOutputs, rng: np.random.Generator, length: int, wrong: float) -> list[int]:
    """Tokens of which each is allowed, or with probability `wrong` any."""
    tokens: list[int] = []
    while len(tokens) < length:
        fits = np.flatnonzero(allowed(matcher_of(kind, asked), tokens, [])[0])
        tokens.append(int(rng.choice(fits)) if rng.random() >= wrong else int(rng.integers(KINDS[kind][1])))
        if tokens[-1] not in fits or tokens[-1] == END[kind]:
            break
    return tokens + rng.integers(KINDS[kind][1], size=length - len(tokens)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_of_a_round_is_masked_as_if_it_were_the_next(kind: str) -> None:
    @examples(60)
    @given(
        asked=st.sampled_from(ASKED), seed=st.integers(0, 2**32), cut=st.integers(0, 5), wrong=st.sampled_from([0, 0.2])
    )
    def check(asked: StructuredOutputs, seed: int, cut: int, wrong: float) -> None:
        rng = np.random.default_rng(seed)
        tokens = random_walk(kind, asked, rng, 9, wrong)
        want = oracle(kind, asked, [], tokens)
        matcher = matcher_of(kind, asked)
        assert (allowed(matcher, [], tokens) == want).all()
        assert (allowed(matcher, [], tokens) == want).all(), "what was looked at leaves no trace"
        first = int(rng.integers(len(tokens) + 1))
        assert (allowed(matcher, [], tokens, first) == want[first:]).all(), "what is decided is not masked again"
        stands = 0
        while stands < cut and want[stands][tokens[stands]] and tokens[stands] != END[kind]:
            stands += 1
        ahead = tokens[stands:]
        assert (allowed(matcher, tokens[:stands], ahead) == want[stands:]).all(), "committed tokens are read once"

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regex", REGEXES)
def test_what_a_walk_to_the_end_spells_matches_the_expression(kind: str, regex: str) -> None:
    asked, rng = StructuredOutputs(regex=regex), np.random.default_rng(5)
    for _ in range(4):
        matcher, tokens = matcher_of(kind, asked), []
        for _ in range(40):
            fits = np.flatnonzero(allowed(matcher, tokens, [])[0])
            token = END[kind] if END[kind] in fits and rng.random() < 0.5 else int(rng.choice(fits))
            if token == END[kind]:
                break
            tokens.append(token)
        else:
            continue
        assert re.fullmatch(regex, tokenizer_of(kind).decode(tokens)), tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_output_may_only_end(kind: str) -> None:
    asked = StructuredOutputs(regex="ab")
    tokens = tokenizer_of(kind).encode("ab", add_special_tokens=False).ids
    rows = allowed(matcher_of(kind, asked), [], tokens)
    assert [row[END[kind]] for row in rows] == [False] * len(tokens) + [True]
    assert np.flatnonzero(rows[-1]).tolist() == [END[kind]]


def test_nothing_may_follow_an_end_or_a_token_that_is_forbidden() -> None:
    asked = StructuredOutputs(regex="[a-z]+")
    for bad in (END["byte level"], tokenizer_of("byte level").token_to_id("7")):
        rows = allowed(matcher_of("byte level", asked), [], [tokenizer_of("byte level").token_to_id("a"), bad, bad, 5])
        assert rows[:2].any(axis=1).all()
        assert not rows[2:].any()


def test_a_sequences_own_stop_tokens_end_it_and_are_no_text() -> None:
    tokenizer = tokenizer_of("byte level")
    stop = tokenizer.token_to_id("a")
    row = allowed(matcher_of("byte level", StructuredOutputs(regex="[ab]{2,3}"), (stop,)), [], [])[0]
    assert not row[stop]
    two = tokenizer.encode("bb", add_special_tokens=False).ids
    row = allowed(matcher_of("byte level", StructuredOutputs(regex="[ab]{2,3}"), (stop,)), two, [])[0]
    assert row[stop]
    assert not row[END["byte level"]], "the model's own end is none where the request leaves it out"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_what_is_no_token_are_never_text(kind: str) -> None:
    tokenizer, vocab_size = tokenizer_of(kind), KINDS[kind][1]
    special = [token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special]
    row = allowed(matcher_of(kind, StructuredOutputs(regex="(.|\n)+")), [], [])[0]
    assert not row[special].any()
    assert not row[tokenizer.get_vocab_size() :].any()
    assert len(row) == vocab_size
    assert row.sum() > 200


def test_a_grammar_that_names_a_special_token_gets_it_only_where_it_is_no_end() -> None:
    row = allowed(matcher_of("byte level", StructuredOutputs(grammar="start: <|bos|> | <|eos|>")), [], [])[0]
    assert np.flatnonzero(row).tolist() == [0]


@examples(40)
@given(asked=st.sampled_from(ASKED), seed=st.integers(0, 2**32), wrong=st.sampled_from([0, 0.3]))
def test_the_number_of_allowed_tokens_counts_an_end_and_nothing_behind_it(
    asked: StructuredOutputs, seed: int, wrong: float
) -> None:
    kind = "byte level"
    tokens = random_walk(kind, asked, np.random.default_rng(seed), 8, wrong)
    rows = oracle(kind, asked, [], tokens)
    least = next((i for i, token in enumerate(tokens) if not rows[i][token]), len(tokens))
    matcher = matcher_of(kind, asked)
    count = matcher.follow(NO_TOKENS, NO_TOKENS, np.array(tokens, np.int64))[0]
    assert count >= least
    assert (allowed(matcher, [], tokens) == rows).all()
    ends = [i for i, token in enumerate(tokens) if token == END[kind]]
    assert not ends or count <= ends[0] + 1


def test_forced_tokens_are_allowed_one_after_the_other() -> None:
    asked = StructuredOutputs(json=SCHEMA, disable_any_whitespace=True)
    matcher = matcher_of("byte level", asked)
    forced = matcher.forced(NO_TOKENS)
    assert tokenizer_of("byte level").decode(forced.tolist()).startswith('{"name')
    assert matcher.follow(NO_TOKENS, NO_TOKENS, forced)[0] == len(forced)
    rows = allowed(matcher, [], forced.tolist())
    assert all(row[token] for row, token in zip(rows, forced.tolist(), strict=False))


COSTLY = StructuredOutputs(regex="0|ba{1000000}")  # behind the b


def test_a_grammar_beyond_its_limits_ends_its_request_in_one_line() -> None:
    doubling = "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40))
    with pytest.raises(RequestError, match=r"^structured_outputs\.grammar: at [^\n]*too big[^\n]*: mend it$"):
        compiler_of("byte level").compile(StructuredOutputs(grammar=f'start: A0\n{doubling}\nA40: "a"'))
    matcher = matcher_of("byte level", COSTLY)
    first, more = (tokenizer_of("byte level").token_to_id(text) for text in "ba")
    assert allowed(matcher, [], [first, more])[0].any()

    def go_on() -> None:
        for length in range(MAX_RESTARTS + 2):
            allowed(matcher, [first] + [more] * length, [])

    with pytest.raises(RequestError, match=r"^structured_outputs\.regex: [^\n]*too many[^\n]*: make it simpler$"):
        go_on()


def test_drafts_behind_a_grammar_beyond_its_limits_are_none_and_no_error() -> None:
    """Drafts are made for a whole batch: an error would be everybody's."""
    matcher = matcher_of("byte level", COSTLY)
    first, more = (tokenizer_of("byte level").token_to_id(text) for text in "ba")
    proposed = np.array([more])
    for length in range(2 * MAX_RESTARTS):
        num_allowed, _ = matcher.follow(np.array([first] + [more] * length), NO_TOKENS, proposed)
    assert not num_allowed
    assert not len(matcher.forced(np.array([first] + [more] * length)))
    with pytest.raises(RequestError, match="make it simpler"):
        matcher.masks(np.array([first] + [more] * length), NO_TOKENS)


def test_a_sequence_that_fills_what_others_with_its_grammar_share_disturbs_none_of_them() -> None:
    kind = "byte level"
    first, more, good = (tokenizer_of(kind).token_to_id(text) for text in "ba0")
    begun, late = matcher_of(kind, COSTLY), matcher_of(kind, COSTLY)
    want = allowed(begun, [], [])
    for _ in range(3):
        allowed(matcher_of(kind, COSTLY), [], [first, more, more])
    assert (allowed(begun, [], []) == want).all()
    assert (allowed(late, [], [good]) == allowed(begun, [], [good])).all()
    assert (allowed(matcher_of(kind, COSTLY), [], []) == want).all()


def test_what_a_draft_token_leads_to_costs_the_request_nothing_where_it_may_not_stand() -> None:
    kind = "byte level"
    matcher = matcher_of(kind, COSTLY)
    bad, worse, good = (tokenizer_of(kind).token_to_id(text) for text in "ba0")
    for _ in range(2):
        rows = allowed(matcher, [], [bad, worse, worse, good])
        assert np.flatnonzero(rows[0]).tolist() == sorted([bad, good])
        assert not rows[2:].any()
        assert matcher.follow(NO_TOKENS, NO_TOKENS, np.array([bad, good]))[0] == 1
    assert np.flatnonzero(allowed(matcher, [good], [])[0]).tolist() == [END[kind]]


def test_an_end_must_be_a_token_of_the_model() -> None:
    compiled = compiler_of("byte level").compile(StructuredOutputs(regex="a"))
    for ends in ([], [5000]):
        with pytest.raises(RequestError, match=r"structured_outputs: no token may end the output.*stop_token_ids"):
            compiled.new_matcher(ends)


def test_json_has_no_white_space_for_ever() -> None:
    tokenizer = tokenizer_of("byte level")
    rng = np.random.default_rng(1)
    matcher, tokens = matcher_of("byte level", StructuredOutputs(json=SCHEMA)), []
    blank = {token for token in range(892) if not tokenizer.decode([token]).strip(" \t\r\n")} - {0, 1}
    for _ in range(1000):
        fits = np.flatnonzero(allowed(matcher, tokens, [])[0])
        blanks = [token for token in fits.tolist() if token in blank]
        token = blanks[0] if blanks else int(rng.choice(fits))
        if token == END["byte level"]:
            break
        tokens.append(token)
    text = tokenizer.decode(tokens)
    assert token == END["byte level"], text[-200:]
    assert json.loads(text).keys() >= {"name", "n"}
    indented = json.dumps({"name": "a", "n": 1, "ok": True}, indent=4)
    ids = np.array(tokenizer.encode(indented, add_special_tokens=False).ids)
    assert matcher_of("byte level", StructuredOutputs(json=SCHEMA)).follow(NO_TOKENS, NO_TOKENS, ids)[0] == len(ids)


@given(
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    banned=st.sampled_from([0.0, 0.9, 1.0]),
    size=st.integers(2, 200),
)
def test_the_argmax_under_a_mask_is_that_of_masked_scores(seed: int, share: float, banned: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=(5, size)), 1).astype(np.float32)  # with ties
    scores[rng.random(scores.shape) < banned] = -np.inf
    bits = rng.random((5, 32 * -(-size // 32))) < share
    masks = TokenMasks(np.packbits(bits, axis=1, bitorder="little").view(np.uint32), size)
    masked = np.where(bits[:, :size], scores, -np.inf)
    choices, best = masks.argmax(scores)
    assert (masks.apply(scores) == masked).all()
    assert (best == masked.max(axis=1)).all()
    alive = best > -np.inf
    assert (choices[alive] == masked.argmax(axis=1)[alive]).all()
