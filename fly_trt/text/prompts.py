"""What callers give to be completed, as token ids of one engine: text, tokens, conversations; and bad words.

Everything that can be wrong with a prompt is found here. This module knows the tokenizer, the chat template and two
limits; it knows nothing of engines, requests or threads.
"""

import itertools
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from tokenizers import Tokenizer

from fly_trt.errors import RequestError
from fly_trt.text.chat import ChatMessage, ChatTemplate
from fly_trt.text.surrogates import check_text


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


Prompt = str | TokensPrompt


class PromptReader:
    """Reads prompts for a target with an embedding table of `vocab_size` rows, served with `max_seq_len` tokens.

    Raises EngineError for a tokenizer folder that is not readable. All methods raise RequestError for what cannot be
    read.
    """

    def __init__(self, tokenizer: Tokenizer, tokenizer_dir: Path, *, vocab_size: int, max_seq_len: int) -> None:
        self._tokenizer = tokenizer
        self._chat_template = ChatTemplate(tokenizer_dir)
        self._vocab_size = vocab_size
        self._max_seq_len = max_seq_len
        self._longest_token = max(map(len, tokenizer.get_vocab()))  # in characters

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt, each one a row of the embedding table.

        The tokenizer adds its special tokens to a text, but none that the text begins with already: a conversation
        that was rendered elsewhere gets no second beginning-of-sequence token. Ids stay as they are.
        """
        if isinstance(prompt, str):
            token_ids = self._encode("the prompt", prompt, add_special_tokens=add_special_tokens)
        else:
            token_ids = _given_ids(prompt)
        _check_not_empty("the prompt", token_ids)
        self._check_ids(token_ids)
        return token_ids

    def render_chat(self, /, messages: Sequence[ChatMessage], **variables: Any) -> TokensPrompt:
        """The messages as a prompt. The template writes the special tokens, so that none is added."""
        text = self._chat_template.render(messages, **variables)
        return {"prompt_token_ids": self._encode("the rendered chat", text, add_special_tokens=False)}

    def bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """The tokens of each word at the start of a text and after a space, as in vLLM; what the target has no row for
        it cannot generate."""
        found = []
        for word in words:
            plain, spaced = (
                self._tokenizer.encode(text, add_special_tokens=False).ids
                for text in (word.lstrip(), " " + word.lstrip())
            )
            if not plain:
                raise RequestError(f"bad_words: {word!r} has no tokens of its own: leave it out")
            found += [plain] if plain == spaced else [plain, spaced]
        return [ids for ids in found if max(ids) < self._vocab_size]

    def _encode(self, name: str, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Refuses what is too long by far before it is tokenised, which takes a second for a megabyte."""
        _check_not_empty(name, text)
        if len(text) > self._max_seq_len * self._longest_token:
            raise RequestError(
                f"{name} has {len(text)} characters, max_seq_len is {self._max_seq_len} tokens of up to "
                f"{self._longest_token}: shorten it, or serve or build with a larger max_seq_len"
            )
        check_text(name, text)
        # encode would keep Python's lock
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        token_ids: list[int] = encoding.ids
        num_added = len(list(itertools.takewhile(bool, encoding.special_tokens_mask)))  # 0 stands for the text's own
        if token_ids[:num_added] == token_ids[num_added : 2 * num_added]:
            del token_ids[:num_added]
        return token_ids

    def _check_ids(self, token_ids: list[int]) -> None:
        outside = next((token for token in token_ids if not 0 <= token < self._vocab_size), None)
        if outside is None:
            return
        token = self._tokenizer.id_to_token(outside) if 0 <= outside < 2**32 else None
        if token is None:
            raise RequestError(f"prompt_token_ids: {outside} is not a token id, expected 0 to {self._vocab_size - 1}")
        raise RequestError(
            f"the prompt: the tokenizer's token {token!r} has the id {outside}, and the target's embedding table has "
            f"only {self._vocab_size} rows: leave it out, or give the checkpoint a row for it "
            "(resize_token_embeddings) and rebuild the engine"
        )


def _check_not_empty(name: str, given: Sized) -> None:
    if not given:
        raise RequestError(f"{name} is empty: give at least one character or token")


def _given_ids(prompt: Any) -> list[int]:
    token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if token_ids is None:
        raise RequestError(f"prompt of type {type(prompt).__name__}: expected text or {{'prompt_token_ids': [...]}}")
    try:
        array = np.asarray(token_ids)
    except ValueError:
        array = np.empty(1, object)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise RequestError("prompt_token_ids: expected a flat list of whole numbers")
    return [int(token) for token in array.reshape(-1)]
