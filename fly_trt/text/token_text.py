"""What a token is as text and as bytes, for clients that look at single tokens."""

import re

from tokenizers import Tokenizer

from fly_trt.text.tokenizer import REPLACEMENT, piece_reader

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: Latin-1's printable bytes stand for themselves, the others in their order for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


class TokenReader:
    """Of one tokenizer. Several threads may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = piece_reader(tokenizer)
        self.special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)

    def as_bytes(self, token: int, text: str) -> bytes:
        """Of a token with such a text: its own bytes too where it is only a part of a character."""
        if REPLACEMENT not in text:
            return text.encode()
        name = self._tokenizer.id_to_token(token) or ""
        if match := BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(match[1])
        if name and all(letter in BYTE_ALPHABET for letter in name):
            return bytes(BYTE_ALPHABET[letter] for letter in name)
        return text.encode()
