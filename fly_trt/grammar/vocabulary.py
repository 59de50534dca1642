"""A tokenizer as llguidance knows it: what bytes each token is, and how a text is spelt.

A text is spelt with tokens that are text. An added token with a name, as `<tool_call>`, is none, also where a text has
its name in it: it comes only where a grammar names the token. And where the tokenizer would change a text, as one that
normalizes characters does, the text is spelt as it is, with the longest tokens that fit.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, models

from fly_trt.errors import ConfigError

SPECIAL = b"\xff"  # what llguidance marks a token with that is no text, before its name
END_OF_TEXT = SPECIAL + b"the end of a grammar's text"


class Vocabulary(NamedTuple):
    """`tokens`: llguidance's LLTokenizer. `size`: its tokens, at least those of the model. `end_id`: the one of them
    that ends a text and that no text or model has."""

    tokens: Any
    size: int
    end_id: int


def make_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Of a tokenizer and a model over `vocab_size` tokens. Raises ConfigError for one that cannot be read."""
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise ConfigError("structured_outputs: needs llguidance: pip install 'fly-trt[structured]'") from None
    speller: Any = Speller(tokenizer, vocab_size)
    return Vocabulary(LLTokenizer(speller), len(speller.tokens), speller.eos_token_id)


class Speller:
    """What llguidance asks of a tokenizer. `tokens`: the bytes of each, none of what is no token; the last one ends a
    text and is not the model's."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        form = _read_form(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        names = {token: name for name, token in tokenizer.get_vocab(with_added_tokens=True).items()}
        self.tokens = [b""] * max(vocab_size, max(names, default=-1) + 1)
        to_bytes = _ToBytes(form["decoder"])
        for token, name in names.items():
            word = to_bytes(name)
            self.tokens[token] = b"" if word.startswith(SPECIAL) else word  # no text has that byte
        for token, content in added.items():
            text = content.content.encode()
            self.tokens[token] = SPECIAL + text if _has_a_name(content) else text
        self.eos_token_id = len(self.tokens)
        self.tokens.append(END_OF_TEXT)
        self._tokenizer = own = Tokenizer.from_str(json.dumps(form))
        own.model = tokenizer.model
        texts = {token: content for token, content in added.items() if not _has_a_name(content)}
        own.add_tokens(list(texts.values()))
        # It numbers added tokens itself.
        self._ids = {own.token_to_id(content.content): token for token, content in texts.items()}

    def __call__(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._ids:
            ids = [self._ids.get(token, token) for token in ids]
        spelt = b"".join(self.tokens[token] for token in ids)
        return ids if spelt == (wanted := text.encode()) else list(self._longest(wanted))

    def _longest(self, text: bytes) -> Iterator[int]:
        """Up to a byte that no token begins with."""
        start = 0
        while start < len(text):
            lengths = *self._lengths.get(text[start : start + 2], ()), 1
            words = (text[start : start + length] for length in lengths)
            if (word := next((word for word in words if word in self._by_bytes), None)) is None:
                return
            yield self._by_bytes[word]
            start += len(word)

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        """Of equal ones the first."""
        return {word: token for token, word in reversed([*enumerate(self.tokens)]) if word[:1] not in (b"", SPECIAL)}

    @cached_property
    def _lengths(self) -> dict[bytes, list[int]]:
        """Of the words that begin with two bytes, the longest first."""
        found: dict[bytes, set[int]] = {}
        for word in self._by_bytes:
            found.setdefault(word[:2], set()).add(len(word))
        return {start: sorted(lengths, reverse=True) for start, lengths in found.items()}


def _has_a_name(token: AddedToken) -> bool:
    """Also where a tokenizer counts it as text, so that a grammar can name it."""
    return token.special or (token.content.startswith("<") and token.content.endswith(">"))


def _read_form(tokenizer: Tokenizer) -> dict[str, Any]:
    """All but its vocabulary, as tokenizer.json has it, without what puts a space before a text: that is where an
    output goes on."""
    shell = Tokenizer(models.BPE())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(tokenizer, part)) is not None:
            setattr(shell, part, value)
    form: dict[str, Any] = json.loads(shell.to_str())
    form["normalizer"] = _without_prefix(form["normalizer"])
    form["pre_tokenizer"] = _without_prefix(form["pre_tokenizer"])
    return form


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and "add_prefix_space" in part:
        return part | {"add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            return part | {name: [kept for each in part[name] if (kept := _without_prefix(each)) is not None]}
    return part


class _ToBytes:
    """From a token of the model's vocabulary to its bytes, by the tokenizer's decoder. Raises ConfigError for one whose
    texts are not simply those of their tokens."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        parts = {part["type"]: part for part in _flat(decoder)}
        self._is_byte_level, self._has_bytes = "ByteLevel" in parts, "ByteFallback" in parts
        if not (self._is_byte_level or self._has_bytes):
            kinds = ", ".join(parts) or "none"
            raise ConfigError(
                f"structured_outputs: llguidance cannot read this tokenizer (decoder {kinds}: neither ByteLevel "
                "nor ByteFallback): leave it out"
            )
        self._spaces = [part["replacement"] for part in parts.values() if part["type"] == "Metaspace"]
        for part in _flat(decoder):
            if part["type"] == "Replace" and part["content"] == " " and (text := part["pattern"].get("String")):
                self._spaces.append(text)
        self._byte_of = _bytes_by_letter() if self._is_byte_level else {}

    def __call__(self, name: str) -> bytes:
        if self._is_byte_level:
            try:
                return bytes(map(self._byte_of.__getitem__, name))
            except KeyError:
                return b""  # no text decodes to it
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        for space in self._spaces:
            name = name.replace(space, " ")
        return name.encode()


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for each in decoder["decoders"] for part in _flat(each)]
    return [decoder]


def _bytes_by_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: themselves where they can be seen in Latin-1, and others from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
