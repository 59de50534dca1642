"""Streaming text: characters that span tokens, and stop strings that span tokens or end inside one."""

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from examples import examples
from fly_trt.errors import EngineError
from fly_trt.text.tokenizer import Detokenizer, load_tokenizer, piece_reader


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's table: printable bytes are themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
END = len(ALPHABET)
BYTE_CHARACTERS = bytes_to_unicode()
"""The character that stands for each byte in a byte-level vocabulary."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level: every byte of UTF-8 is a token of its own."""
    byte_tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[]))
    byte_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_tokenizer.decoder = decoders.ByteLevel()
    byte_tokenizer.add_special_tokens(["<end>"])
    return byte_tokenizer


def stream(tokenizer: Tokenizer, text: str, *stop: str, include: bool = False) -> tuple[Detokenizer, list[str]]:
    """What a caller sees after each token, up to the one that completes a stop string."""
    detokenizer = Detokenizer(tokenizer, [], stop_strings=stop, include_stop_string=include)
    seen = []
    for token in tokenizer.encode(text).ids:
        stopped = detokenizer.push(token)
        seen.append(detokenizer.text[: detokenizer.streamable_length])
        if stopped:
            return detokenizer, seen
    detokenizer.finish()
    return detokenizer, seen


@given(text=st.text(max_size=30))
def test_the_streamed_text_is_the_decoded_text_and_only_grows(tokenizer: Tokenizer, text: str) -> None:
    detokenizer, seen = stream(tokenizer, text)
    assert detokenizer.text == text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    assert all("�" not in piece for piece in seen) or "�" in text


def test_an_unfinished_character_is_held_back_and_shown_as_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    for token in tokenizer.encode("a🙂").ids[:-1]:
        detokenizer.push(token)
    assert detokenizer.text == "a"
    detokenizer.finish()
    assert detokenizer.text.startswith("a�")


@given(tokens=st.lists(st.integers(0, 258), max_size=16))
def test_bytes_that_are_no_text_are_replaced_and_never_an_error(tokens: list[int]) -> None:
    tokenizer = byte_fallback_tokenizer()
    detokenizer, length = Detokenizer(tokenizer, []), 0
    for token in tokens:
        detokenizer.push(token)
        assert len(detokenizer.text) >= length
        length = len(detokenizer.text)
    detokenizer.finish()
    assert detokenizer.text.count("b") >= tokens.count(257)


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: words, and bytes as tokens of their own where there is no word."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "b": 257, "▁": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


BYTES = st.one_of(
    st.text("aé你🙂", max_size=8).map(lambda text: list(text.encode())),
    st.lists(st.integers(0, 255), max_size=10),
    st.lists(st.sampled_from([0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82, 0x61]), max_size=10),
)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@given(data=BYTES, stop=st.sampled_from(["", "a", "é", "a你", "🙂a"]))
def test_what_a_stream_has_shown_never_changes(tokenizer: Tokenizer, kind: str, data: list[int], stop: str) -> None:
    """A client of deltas cannot take back a replacement character that became a letter."""
    if kind == "byte level":
        ids, decoder = [ALPHABET.index(BYTE_CHARACTERS[byte]) for byte in data], tokenizer
    else:
        ids, decoder = data, byte_fallback_tokenizer()
    detokenizer = Detokenizer(decoder, [], stop_strings=(stop,) if stop else ())
    shown = ""
    for token in ids:
        stopped = detokenizer.push(token)
        seen = detokenizer.text[: detokenizer.streamable_length]
        assert seen.startswith(shown)
        shown = seen
        if stopped:
            break
    detokenizer.finish()
    assert detokenizer.text.startswith(shown)
    text = bytes(data).decode(errors="replace")
    if "�" not in text:
        assert detokenizer.text == (text[: text.index(stop)] if stop and stop in text else text)
        assert "�" not in shown


WORDS = ("▁hello", "▁world", "▁", "lo", "é", "�")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
LLAMA_2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
STYLES = {
    "byte level": (decoders.ByteLevel(), (*ALPHABET, "Ġhello", "lo", "Ã©ï", "¿½")),
    "Llama 2": (decoders.Sequence(LLAMA_2), (*BYTE_TOKENS, *WORDS)),
    "Gemma": (decoders.Sequence(LLAMA_2[:-1]), (*BYTE_TOKENS, *WORDS)),
    "Metaspace": (decoders.Metaspace(), WORDS),
    "Metaspace with bytes": (
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        (*BYTE_TOKENS, *WORDS),
    ),
    "WordPiece": (decoders.WordPiece(), ("hello", "##lo", ".", "'", "##s", "[UNK]")),
    "end of word": (decoders.BPEDecoder(), ("hel", "lo</w>", "a</w>", "</w>")),
    "no decoder": (None, ("hello", "lo", "�")),
}
"""Decoders of the kinds that checkpoints have, each with a small vocabulary."""
NUM_SPECIAL = 2


def make_styled(name: str) -> Tokenizer:
    """Its last tokens are NUM_SPECIAL special ones."""
    decoder, words = STYLES[name]
    styled = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    if decoder is not None:
        styled.decoder = decoder
    styled.add_tokens([AddedToken("<begin>", special=True), AddedToken("<end>", special=True)])
    return styled


STYLED = {name: make_styled(name) for name in STYLES}


@st.composite
def runs(draw: st.DrawFn) -> tuple[str, list[int], list[int]]:
    """A style, the tokens of a prompt, and those of an output: words, specials, and bytes that are text or none."""
    name = draw(st.sampled_from(list(STYLES)))
    ids = {word: i for i, word in enumerate(STYLES[name][1])}
    size = STYLED[name].get_vocab_size()
    kinds = [
        st.lists(st.integers(max(0, size - 8), size), max_size=8),  # the last one stands for nothing
        st.lists(st.sampled_from([size - 2, size - 1]), min_size=8, max_size=20),
    ]
    alphabet = BYTE_TOKENS if "<0x00>" in ids else [BYTE_CHARACTERS[byte] for byte in range(256)]
    if alphabet[0] in ids:
        texts = st.text("aé你🙂�", max_size=6).map(lambda text: list(text.encode()))
        loose = st.lists(st.sampled_from([0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82, 0xFF, 0x61]), max_size=9)
        kinds += [data.map(lambda data: [ids[alphabet[byte]] for byte in data]) for data in (texts, loose)]
    parts = st.lists(st.one_of(kinds), max_size=6).map(lambda parts: [token for part in parts for token in part])
    return name, draw(parts), draw(parts)


def text_after(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip_special_tokens: bool = True) -> str:
    """What decoding all tokens at once adds to the prompt's text."""
    before = tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode(prompt + output, skip_special_tokens=skip_special_tokens)
    return whole[len(os.path.commonprefix([before, whole])) :]  # noqa: RUF071 - these are no paths


@examples(300)
@given(run=runs(), skip_special_tokens=st.booleans())
def test_the_streamed_text_is_what_all_tokens_decode_to(
    run: tuple[str, list[int], list[int]], skip_special_tokens: bool
) -> None:
    name, prompt, output = run
    detokenizer = Detokenizer(STYLED[name], prompt, skip_special_tokens=skip_special_tokens)
    shown = ""
    for token in output:
        detokenizer.push(token)
        assert detokenizer.text.startswith(shown)
        shown = detokenizer.text
    detokenizer.finish()
    assert detokenizer.text.startswith(shown)
    assert detokenizer.text == text_after(STYLED[name], prompt, output, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("prompt", [[], ["<end>"], ["<begin>"] * 20])
def test_a_special_token_can_be_shown_where_others_are_skipped(name: str, prompt: list[str]) -> None:
    styled = STYLED[name]
    word = STYLES[name][1][-2]
    output = ["<begin>", word, "<end>", word, "<begin>", "<end>", "<end>", word]
    ids, shown = (
        [styled.token_to_id(token) for token in tokens if keep(token)]
        for tokens, keep in ((output, lambda token: True), (output, lambda token: token != "<begin>"))
    )
    detokenizer = Detokenizer(styled, [styled.token_to_id(token) for token in prompt], shown_special_tokens=["<end>"])
    for token in ids:
        detokenizer.push(token)
    detokenizer.finish()
    before = [styled.token_to_id(token) for token in prompt if token != "<begin>"]
    assert detokenizer.text == text_after(styled, before, shown, skip_special_tokens=False)
    assert detokenizer.text.count("<end>") == 3


def test_a_word_after_bytes_that_are_no_text_keeps_its_space() -> None:
    styled = STYLED["Llama 2"]
    output = [styled.token_to_id(token) for token in ("<0xC3>", "<0xA9>", "<0xFF>", "▁hello", "▁world")]
    prompt = [styled.token_to_id("▁hello")]
    detokenizer = Detokenizer(styled, prompt, stop_strings=(" hello",))
    stopped = [detokenizer.push(token) for token in output[:4]]
    assert stopped == [False, False, False, True]
    assert (detokenizer.text, detokenizer.stop_string) == ("���", " hello")
    unstopped = Detokenizer(styled, prompt)
    for token in output:
        unstopped.push(token)
    assert unstopped.text == "��� hello world"


@pytest.mark.parametrize("name", ["byte level", "Llama 2"])
def test_an_output_may_finish_the_character_that_its_prompt_began(name: str) -> None:
    styled = STYLED[name]
    alphabet = [BYTE_CHARACTERS[byte] for byte in range(256)] if name == "byte level" else BYTE_TOKENS
    *prompt, last = (styled.token_to_id(alphabet[byte]) for byte in "🙂".encode())
    detokenizer = Detokenizer(styled, prompt)
    detokenizer.push(last)
    detokenizer.finish()
    assert detokenizer.text == "🙂"


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(
    ("name", "token"), [("byte level", ALPHABET[0]), ("byte level", BYTE_CHARACTERS[0x99]), ("Llama 2", "<0x99>"),
                        ("byte level", "<end>"), ("Llama 2", "▁"), ("Metaspace", "�")]
)  # fmt: skip
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_a_long_output_costs_as_much_by_token_as_a_short_one(name: str, token: str, skip_special_tokens: bool) -> None:
    counting = CountingTokenizer(STYLED[name])
    ids = [STYLED[name].token_to_id(token)] * 2000
    detokenizer = Detokenizer(counting, [], skip_special_tokens=skip_special_tokens)
    for one in ids:
        detokenizer.push(one)
    detokenizer.finish()
    assert detokenizer.text == STYLED[name].decode(ids, skip_special_tokens=skip_special_tokens)
    assert counting.num_decoded <= 30 * len(ids)


def test_an_unfinished_character_of_the_prompt_is_not_part_of_the_output(tokenizer: Tokenizer) -> None:
    for prompt in ("one two é", "one two �"):
        detokenizer = Detokenizer(tokenizer, tokenizer.encode(prompt).ids[:-1])
        for token in tokenizer.encode(" and").ids:
            detokenizer.push(token)
        detokenizer.finish()
        assert detokenizer.text.endswith(" and")
        assert "two" not in detokenizer.text


def test_truncation_and_padding_of_training_do_not_change_prompts(tokenizer: Tokenizer, tmp_path) -> None:
    trained = Tokenizer.from_str(tokenizer.to_str())
    trained.enable_truncation(max_length=4)
    trained.enable_padding(length=8)
    (tmp_path / "tokenizer").mkdir()
    trained.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    for text in ("a long prompt", "ab"):
        assert load_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids


def test_special_tokens_have_no_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    for skip, want in ((True, "ab"), (False, "a<end>b")):
        detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=skip)
        for token in (ALPHABET.index("a"), END, ALPHABET.index("b")):
            detokenizer.push(token)
        assert detokenizer.text == want


@given(head=st.text("ab", max_size=8), stop=st.text("abc", min_size=1, max_size=4), tail=st.text("abc", max_size=4))
def test_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, head: str, stop: str, tail: str) -> None:
    text = head + stop + tail
    detokenizer, seen = stream(tokenizer, text, stop)
    assert detokenizer.text == text[: text.index(stop)]
    assert detokenizer.stop_string == stop
    assert all(detokenizer.text.startswith(piece) for piece in seen), "nothing of the stop string was ever shown"


def test_the_stop_string_can_be_kept(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, "one two three", "two", include=True)[0].text == "one two"


def test_of_several_stop_strings_the_one_that_is_complete_first_wins(tokenizer: Tokenizer) -> None:
    detokenizer, _ = stream(tokenizer, "abcdef", "bcde", "cd")
    assert (detokenizer.stop_string, detokenizer.text) == ("cd", "ab")


@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "want"),
    [
        ("xxSTOPyySTOPzz", "STOP", 0, "xx"),
        ("xxSTOPyySTOPzz", "STOP", 5, "xx"),
        ("xxSTOPyySTOPzz", "STOP", 6, "xxSTOPyy"),
        ("xxSTOPyySTOPzz", "STOP", 11, "xxSTOPyy"),
        ("xxSTOPyySTOPzz", "STOP", 12, "xxSTOPyySTOPzz"),
        ("aaaa", "a", 2, "aa"),
        ("aaaa", "aa", 2, "a"),
    ],
)
def test_a_stop_string_counts_from_the_first_token_that_may_end_it(
    tokenizer: Tokenizer, text: str, stop: str, min_tokens: int, want: str
) -> None:
    """min_tokens: the token that completes the string is the one that counts, wherever the string began."""
    detokenizer = Detokenizer(tokenizer, [], stop_strings=(stop,))
    for count, token in enumerate(tokenizer.encode(text).ids, start=1):
        if detokenizer.push(token, may_stop=count > min_tokens):
            break
    detokenizer.finish()
    assert detokenizer.text == want
    assert detokenizer.stop_string == (None if want == text else stop)


def test_a_short_stop_string_that_was_passed_over_is_not_found_beside_a_long_one(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [], stop_strings=("b", "LONGER"))
    for count, token in enumerate(tokenizer.encode("abcd").ids):
        assert not detokenizer.push(token, may_stop=count > 1)
    assert detokenizer.text == "abcd"


def test_text_that_only_begins_like_a_stop_string_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer, seen = stream(tokenizer, "abcST", "STOP")
    assert seen[-1] == "abc"
    assert detokenizer.text == "abcST"


def test_a_broken_tokenizer_is_named(tmp_path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_piece_keeps_the_space_that_it_begins_with() -> None:
    """Also where a decoder takes it away at the start of a text."""
    words = ["▁w0", "▁a", "▁Final", "▁answer", ":", "ing"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="▁w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([3]) == "answer"
    piece = piece_reader(tokenizer)
    assert [piece(token) for token in (2, 3, 4, 5)] == [" Final", " answer", ":", "ing"]
