"""Text to tokens and back, from the engine directory's tokenizer; no transformers needed.

`Detokenizer` turns tokens into text as they come: what it shows never changes and, with what `finish` adds, is what
decoding all tokens at once gives, whatever the tokenizer's style. It holds back what later tokens could change. With
stop strings it finds the first one even when it spans tokens or ends inside one.
"""

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from fly_trt.errors import EngineError

# How many tokens before the new ones give the decoder its context: some treat the first token of a text differently.
CONTEXT_TOKENS = 6
REPLACEMENT = "\ufffd"  # what an unfinished character decodes to


def load_tokenizer(engine_dir: Path) -> Tokenizer:
    path = engine_dir / "tokenizer" / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise EngineError(f"{path}: not a readable tokenizer ({error}): rebuild the engine with fly-build") from None
    tokenizer.no_truncation()  # a checkpoint's training settings must not cut or pad a prompt
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = _splits_special_tokens(path.with_name("tokenizer_config.json"))
    return tokenizer


def _splits_special_tokens(path: Path) -> bool:
    """Whether special tokens in a text are text like any other, which tokenizer.json has no place for."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("split_special_tokens"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: not readable ({error}): rebuild the engine with fly-build") from None


class _TokenKinds:
    """The tokens of one tokenizer that text is not simply made of.

    `special`: no text unless asked for. `bytes`: stand for bytes where the vocabulary has no word (`<0x0A>`). One of a
    run of them that is no UTF-8 makes replacement characters of the whole run, which so is no text before it has ended.
    """

    _known: ClassVar["WeakKeyDictionary[Tokenizer, _TokenKinds]"] = WeakKeyDictionary()

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        found = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.bytes = frozenset(token_id for token_id in found if token_id is not None)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "_TokenKinds":
        """Found once: a vocabulary may have thousands of special tokens."""
        if tokenizer not in cls._known:
            cls._known[tokenizer] = cls(tokenizer)
        return cls._known[tokenizer]


def piece_reader(tokenizer: Tokenizer) -> Callable[[int], str]:
    """From a token id to its text within a text. A decoder may take away the space that a text begins with, so that a
    token is decoded behind another one. Of a token that is a part of a character it is the replacement character."""
    before: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    num_before = len(tokenizer.decode(before, skip_special_tokens=False))

    def piece(token: int) -> str:
        return tokenizer.decode([*before, token], skip_special_tokens=False)[num_before:]

    return piece


class Detokenizer:
    """The growing text of one sequence: what its tokens add to the prompt's text. `text` never contains a stop string
    unless include_stop_string. shown_special_tokens: those that are text although special tokens are skipped."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        *,
        stop_strings: tuple[str, ...] = (),
        include_stop_string: bool = False,
        skip_special_tokens: bool = True,
        shown_special_tokens: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        kinds = _TokenKinds.of(tokenizer)
        self._bytes = kinds.bytes
        self._skipped = kinds.special if skip_special_tokens else frozenset()
        if shown_special_tokens and self._skipped:
            self._skipped -= {tokenizer.token_to_id(token) for token in shown_special_tokens}
        self._stop_strings = stop_strings
        self._include_stop_string = include_stop_string
        self._longest_stop = max((len(string) for string in stop_strings), default=0)
        self.text = ""
        self.stop_string: str | None = None
        self._window, self._shown = self._beginning(prompt_token_ids)

    def anew(self, prompt_token_ids: list[int]) -> "Detokenizer":
        """Another one with the same settings, at the beginning of an output."""
        other = copy.copy(self)
        other.text, other.stop_string = "", None
        other._window, other._shown = self._beginning(prompt_token_ids)
        return other

    @property
    def has_stop_strings(self) -> bool:
        return bool(self._stop_strings)

    def push(self, token_id: int, *, may_stop: bool = True) -> bool:
        """Adds one token; True when a stop string is now complete, in which case `text` is cut. Stop strings that end
        in a token that may not stop are not looked for."""
        if self._is_left_out(token_id):
            return False
        self._window.append(token_id)
        if token_id in self._bytes:
            return False
        text = self._decode(self._window)
        finished = text.removesuffix(REPLACEMENT)
        piece = _beyond(self._shown, finished)
        if piece:
            self._shown = finished
        if len(self._window) > 2 * CONTEXT_TOKENS:
            held = _beyond(self._shown, text)
            self._window = self._window[-CONTEXT_TOKENS:]
            self._shown = self._decode(self._window).removesuffix(held)
        return self._append(piece, may_stop)

    def finish(self, *, may_stop: bool = True) -> bool:
        """Emits what is still held back, as replacement characters where a character stayed unfinished. True when a
        stop string is complete only now."""
        if self.stop_string is not None:
            return False
        text = self._decode(self._window)
        piece = _beyond(self._shown, text)
        self._shown = text
        return self._append(piece, may_stop)

    @property
    def streamable_length(self) -> int:
        """Characters of `text` that can be shown: what may still become a stop string is held back."""
        if self.stop_string is not None or not self._stop_strings:
            return len(self.text)
        tail = self.text[-(self._longest_stop - 1) :] if self._longest_stop > 1 else ""
        for start in range(len(tail)):
            if any(string.startswith(tail[start:]) for string in self._stop_strings):
                return len(self.text) - len(tail) + start
        return len(self.text)

    def _beginning(self, prompt_token_ids: list[int]) -> tuple[list[int], str]:
        """The last tokens, enough to know what a new one adds, and what of their text is the prompt's or was emitted:
        before an output."""
        window = self._context(prompt_token_ids)
        return window, self._decode(window)

    def _context(self, prompt_token_ids: list[int]) -> list[int]:
        """The prompt's last tokens that have a text, with the whole of a run of bytes."""
        context: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if not self._is_left_out(token_id):
                context.append(token_id)
                if len(context) >= CONTEXT_TOKENS and token_id not in self._bytes:
                    break
        return context[::-1]

    def _decode(self, token_ids: list[int]) -> str:
        """None of them is one that is left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _is_left_out(self, token_id: int) -> bool:
        """Whether decoding passes over it: a special token that is not shown, or an id without a token."""
        return token_id in self._skipped or self._tokenizer.id_to_token(token_id) is None

    def _append(self, piece: str, may_stop: bool) -> bool:
        before = len(self.text)
        self.text += piece
        if not piece or not self._stop_strings or not may_stop:
            return False
        found = [(self.text.find(string, max(0, before - len(string) + 1)), string) for string in self._stop_strings]
        found = [(at, string) for at, string in found if at >= 0]
        if not found:
            return False
        at, self.stop_string = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
        self.text = self.text[: at + len(self.stop_string) if self._include_stop_string else at]
        return True


def _beyond(shown: str, text: str) -> str:
    """What `text` adds to `shown`, which it usually begins with: a prompt may have ended in an unfinished character."""
    if text.startswith(shown):
        return text[len(shown) :]
    return text[len(os.path.commonprefix([shown, text])) :]  # noqa: RUF071 - these are no paths
