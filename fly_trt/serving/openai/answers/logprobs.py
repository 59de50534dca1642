"""Log-probabilities in OpenAI's two forms: the lists of /v1/completions and the records of /v1/chat/completions; and
vLLM's prompt_logprobs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from fly_trt.outputs import Logprob, TokenLogprobs
from fly_trt.text.token_text import TokenReader

LEAST = -9999.0  # JSON has no infinity


def finite(logprob: float) -> float:
    return max(logprob, LEAST)


def best(entry: TokenLogprobs, count: int) -> Iterator[tuple[int, Logprob]]:
    """The `count` most probable tokens, the first one first. The token itself may be there besides."""
    yield from sorted(entry.items(), key=lambda item: item[1].rank)[:count]


def prompt_logprobs_object(entries: Sequence[TokenLogprobs | None] | None) -> list[Any] | None:
    """As vLLM has them: by token id, None for the first token."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}
            for token, found in entry.items()
        }
        for entry in entries
    ]


class CompletionLogprobs:
    """Of one text, from its first token on. Offsets are in characters of it; a token within a character has that
    character's."""

    def __init__(self, reader: TokenReader, num_top: int, *, as_token_ids: bool, skips_special: bool) -> None:
        self._reader = reader
        self._num_top = num_top
        self._as_token_ids = as_token_ids
        self._skipped = reader.special if skips_special else frozenset()
        self._offset = 0  # characters that have begun

    def begin_at(self, offset: int) -> None:
        self._offset = offset

    def of(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Of the next tokens. None stands for a prompt's first token, of which nothing is known."""
        names, values, top, offsets = [], [], [], []
        for token, entry in zip(token_ids, entries, strict=True):
            text = self._reader.text(token) if entry is None else entry[token].decoded_token
            names.append(self._name(token, text))
            offsets.append(self._advance(token, text))
            values.append(None if entry is None else finite(entry[token].logprob))
            top.append(None if entry is None else self._top(token, entry))
        return {"tokens": names, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _top(self, token: int, entry: TokenLogprobs) -> dict[str, float]:
        """The token itself is always there, as OpenAI says of `logprobs`."""
        kept = dict(best(entry, self._num_top)) | {token: entry[token]}
        return {self._name(each, found.decoded_token): finite(found.logprob) for each, found in kept.items()}

    def _name(self, token: int, text: str) -> str:
        if self._as_token_ids:
            return f"token_id:{token}"
        raw = self._reader.as_bytes(token, text)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # two parts of characters must not have the same name
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _advance(self, token: int, text: str) -> int:
        begun = self._offset
        if token in self._skipped:
            return begun
        raw = self._reader.as_bytes(token, text)
        self._offset += sum(byte & 0xC0 != 0x80 for byte in raw)  # bytes that begin a character
        return begun - 1 if raw and raw[0] & 0xC0 == 0x80 and begun else begun


class ChatLogprobs:
    """Of one answer."""

    def __init__(self, reader: TokenReader, num_top: int, *, as_token_ids: bool) -> None:
        self._reader = reader
        self._num_top = num_top
        self._as_token_ids = as_token_ids

    def of(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        content = []
        for token, entry in zip(token_ids, entries, strict=True):
            top = [self._record(each, found) for each, found in best(entry, self._num_top)]
            content.append({**self._record(token, entry[token]), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _record(self, token: int, found: Logprob) -> dict[str, Any]:
        text = found.decoded_token
        return {
            "token": f"token_id:{token}" if self._as_token_ids else text,
            "logprob": finite(found.logprob),
            "bytes": list(self._reader.as_bytes(token, text)),
        }
