"""What bytes tokens are and how texts are spelt: with tokens that are text, whatever else the tokenizer would do."""

import json

import numpy as np
import pytest
from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from fly_trt import StructuredOutputs
from fly_trt.grammar import GrammarCompiler
from fly_trt.grammar.vocabulary import SPECIAL, Speller
from grammar_tokenizers import KINDS, byte_fallback, demo

NO_TOKENS = np.empty(0, np.int64)
CALL = '<tool_call>{"a":1}</tool_call>'
MARKERS = ("<tool_call>", "</tool_call>")


def with_markers(kind: str, *, is_special: bool) -> Tokenizer:
    tokenizer = KINDS[kind][0]()
    add = tokenizer.add_special_tokens if is_special else tokenizer.add_tokens
    add([AddedToken(marker, special=is_special, normalized=False) for marker in MARKERS])
    return tokenizer


def llama2() -> Tokenizer:
    """A space is put before every text."""
    tokenizer = byte_fallback()
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(parts)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return tokenizer


def prefixed() -> Tokenizer:
    tokenizer = demo()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def composing() -> Tokenizer:
    """As Qwen's, which reads letters and accents as one character."""
    tokenizer = demo()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def tokens_of(tokenizer: Tokenizer, asked: StructuredOutputs) -> list[int]:
    """An output of which each token is the first that may come, the end where it may."""
    end = tokenizer.get_vocab_size()
    matcher = GrammarCompiler(tokenizer, end + 1).compile(asked).new_matcher([end])
    tokens: list[int] = []
    while len(tokens) < 300:
        output = np.array(tokens, np.int64)
        fits = np.flatnonzero(matcher.masks(output, NO_TOKENS).allowed(0))
        if end in fits:
            return tokens
        forced = matcher.forced(output)
        assert not len(forced) or forced[0] in fits
        tokens.append(int(fits[0]))
    raise AssertionError(tokens)


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    before = tokenizer.encode("a", add_special_tokens=False).ids
    num_before = len(tokenizer.decode(before, skip_special_tokens=False))
    return tokenizer.decode(before + tokens, skip_special_tokens=False)[num_before:]


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"choice": [CALL]}, CALL),
        ({"regex": r"<tool_call>\{\}</tool_call>"}, "<tool_call>{}</tool_call>"),
        ({"json": {"enum": [f"x{CALL}y"]}}, json.dumps(f"x{CALL}y")),
        ({"json": {"const": {"<tool_call>": 1}}}, '{"<tool_call>":1}'),
        ({"grammar": 'start: "a<tool_call>" "</tool_call>"'}, "a<tool_call></tool_call>"),
    ],
)
def test_a_text_with_the_name_of_an_added_token_is_spelt_with_others(
    kind: str, is_special: bool, asked: dict, text: str
) -> None:
    tokenizer = with_markers(kind, is_special=is_special)
    if "json" in asked:
        asked = asked | {"disable_any_whitespace": True}
    tokens = tokens_of(tokenizer, StructuredOutputs(**asked))
    assert text_of(tokenizer, tokens) == text
    assert not {tokenizer.token_to_id(marker) for marker in MARKERS} & set(tokens)


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_grammar_that_names_an_added_token_gets_it(kind: str, is_special: bool) -> None:
    tokenizer = with_markers(kind, is_special=is_special)
    tokens = tokens_of(tokenizer, StructuredOutputs(grammar='start: <tool_call> "abc" </tool_call>'))
    begin, end = map(tokenizer.token_to_id, MARKERS)
    assert (tokens[0], tokens[-1]) == (begin, end)
    assert text_of(tokenizer, tokens[1:-1]) == "abc"


@pytest.mark.parametrize("make", [demo, byte_fallback, llama2, metaspace, prefixed, composing])
@pytest.mark.parametrize(
    "text", ["yes", " yes", "abc ab", "no\n\tno", "é e\u0301 \u212b", "😀", "  ", "<unk>", "<0x41>"]
)
def test_the_only_text_that_may_come_comes(make: object, text: str) -> None:
    """Also where the tokenizer by itself would begin it with a space, or compose its characters."""
    tokenizer = make()  # type: ignore[operator]
    assert text_of(tokenizer, tokens_of(tokenizer, StructuredOutputs(choice=[text]))) == text


@pytest.mark.parametrize("make", [demo, byte_fallback, llama2, metaspace])
def test_tokens_and_spellings_are_those_that_llguidance_finds_itself(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    size = tokenizer.get_vocab_size()
    speller, own = Speller(tokenizer, size), LLTokenizer(tokenizer.to_str())
    added = tokenizer.get_added_tokens_decoder()
    assert len(speller.tokens) == size + 1
    for token in range(size):
        if token in added:
            assert speller.tokens[token] == SPECIAL + added[token].content.encode()
        else:
            assert speller.tokens[token] == own.decode_bytes([token]), token  # of a byte that is no text, neither
    for text in ("yes no", "abcab", '{"a": 1}', " no", "zß😀"):
        assert speller(text) == own.tokenize_str(text), text


def test_added_tokens_that_are_text_and_have_no_name_are_used() -> None:
    tokenizer = demo()
    tokenizer.add_tokens([AddedToken("== é ==", special=False, normalized=False)])
    tokens = tokens_of(tokenizer, StructuredOutputs(choice=["a== é ==b"]))
    assert tokenizer.token_to_id("== é ==") in tokens


def test_a_vocabulary_may_have_holes() -> None:
    tokenizer = demo()
    form = json.loads(tokenizer.to_str())
    form["model"]["vocab"]["zzzzz"] = 2000
    tokenizer = Tokenizer.from_str(json.dumps(form))
    matcher = GrammarCompiler(tokenizer, 1500).compile(StructuredOutputs(regex="z{0,5}")).new_matcher([1])
    row = matcher.masks(NO_TOKENS, NO_TOKENS).allowed(0)
    assert len(row) == 1500
    assert row[[tokenizer.token_to_id("z"), 1]].all()
    assert not row[900:].any()
