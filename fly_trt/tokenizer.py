"""Text to tokens and back, from the engine directory's tokenizer; no transformers needed.

`Detokenizer` turns tokens into text as they come: it holds back bytes of an unfinished character, and with stop strings
it finds the first one even when it spans tokens or ends inside one.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from fly_trt.errors import EngineError

# How many prompt tokens give the decoder its context: some decoders treat the first token of a text differently.
CONTEXT_TOKENS = 6


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


class Detokenizer:
    """The growing text of one sequence. `text` never contains a stop string unless include_stop_string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        *,
        stop_strings: tuple[str, ...] = (),
        include_stop_string: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self.text = ""
        self.stop_string: str | None = None
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        context = _context(tokenizer, prompt_token_ids)
        self._stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)
        self._stop_strings = stop_strings
        self._include_stop_string = include_stop_string
        self._longest_stop = max((len(string) for string in stop_strings), default=0)
        self._pending: list[int] = []

    def push(self, token_id: int, *, may_stop: bool = True) -> bool:
        """Adds one token; True when a stop string is now complete, in which case `text` is cut. Stop strings that end
        in a token that may not stop are not looked for."""
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception:  # tokenizers gives up on bytes that are no UTF-8 ("Invalid prefix encountered")
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            piece = self._decode_pending()
        if not piece:
            return False
        self._pending.clear()
        return self._append(piece, may_stop)

    def finish(self) -> None:
        """Emits what is still held back, as replacement characters where a character stayed unfinished."""
        if self._pending and self.stop_string is None:
            self._append(self._decode_pending())
            self._pending.clear()

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

    def _decode_pending(self) -> str:
        return self._tokenizer.decode(self._pending, skip_special_tokens=self._skip_special_tokens)

    def _append(self, piece: str, may_stop: bool = True) -> bool:
        before = len(self.text)
        self.text += piece
        if not self._stop_strings or not may_stop:
            return False
        found = [(self.text.find(string, max(0, before - len(string) + 1)), string) for string in self._stop_strings]
        found = [(at, string) for at, string in found if at >= 0]
        if not found:
            return False
        at, self.stop_string = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
        self.text = self.text[: at + len(self.stop_string) if self._include_stop_string else at]
        return True


def _context(tokenizer: Tokenizer, prompt_token_ids: list[int]) -> list[int]:
    """The prompt's last tokens up to a complete character: the decoder would emit an unfinished one as output."""
    context = prompt_token_ids[-CONTEXT_TOKENS:]
    while context and tokenizer.decode(context, skip_special_tokens=False).endswith("\ufffd"):
        context.pop()
    return context
