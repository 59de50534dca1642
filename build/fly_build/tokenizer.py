"""The tokenizer of a checkpoint. The model was trained with its tokenizer.json, so that file wins.

transformers 5 makes a tokenizer of the class or the model type that a checkpoint names, with that class's way to split
text, and takes no more than the vocabulary from the file. Here the file is loaded as it is, and where the class
would have split text otherwise, a warning says so.
"""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from fly_build.tensors import first_line, some
from fly_trt.errors import CheckpointError

logger = logging.getLogger(__name__)

SAMPLES = (
    "A tokenizer check: 3.14159, naïve café\n\n\tdef f(x): return x**2  # déjà-vu 你好 🙂",
    "In 1234567 days, 12 of 345's wouldn't, I'LL and they've",
    " leading,  double,   triple and trailing spaces \n \r\n\t\t\n",
    "The year 2024年に東京で、これはペンです。 한국어 문장입니다. ภาษาไทย",
    "Привет, мир! Γειά σου. שלום עולם مرحبا ١٢٣ नमस्ते १२३",
    "e\u0301 ﬁ Ａ１ ½ ² 👩‍👩‍👧 \u00a0\u200b\u2028",
    "if (a[i]!=b) { x+=1; } // https://example.org/?q=1&r=2 __init__ snake_case CamelCase",
)


def load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerFast:
    """Raises CheckpointError where there is none, or only a slow one that transformers cannot convert."""
    source: dict[str, Any] = {"revision": revision or "main"}
    try:
        made: Any = AutoTokenizer.from_pretrained(name, **source, trust_remote_code=False)
        path = cached_file(name, "tokenizer.json", **source, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: no tokenizer: {first_line(error)}") from None
    except Exception as error:  # whatever a wrong file causes
        raise CheckpointError(
            f"{name}: no usable tokenizer files: {type(error).__name__}: {first_line(error)}"
        ) from None
    _check_chat_template(name, made.chat_template)
    if path is None:
        if not isinstance(made, PreTrainedTokenizerFast):
            raise CheckpointError(f"{name}: no tokenizer.json: convert the slow tokenizer to a fast one first")
        return made
    try:
        file = Tokenizer.from_file(path)
        file.no_truncation()
        file.no_padding()
        names = {f"{kind}_token": getattr(made, f"{kind}_token", None) for kind in ("bos", "eos", "unk", "pad")}
        known = {kind: token for kind, token in names.items() if token and file.token_to_id(str(token)) is not None}
        kept: Any = PreTrainedTokenizerFast.from_pretrained(name, **source, **known)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{name}: no usable tokenizer.json: {first_line(error)}") from None
    if (sample := _first_difference(file, made)) is not None:
        logger.warning(
            "%s: tokenizer.json splits text otherwise than the %s that transformers makes of it, such as %r: the file "
            "is used",
            name,
            type(made).__name__,
            sample,
        )
    return kept


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, and chat templates in files of their own. Raises OSError."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception, with the system's error in its text
        if (code := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from None


def tokens_without_embedding(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[str]:
    """Tokens whose ids lie beyond an embedding table of `vocab_size` rows, in their order."""
    beyond = {token: token_id for token, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size}
    return sorted(beyond, key=beyond.__getitem__)


def warn_of_tokens_without_embedding(name: str, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    if tokens := tokens_without_embedding(tokenizer, vocab_size):
        logger.warning(
            "%s: the tokenizer has tokens that the model has no embedding for (%d rows), and prompts with them are "
            "refused: %s",
            name,
            vocab_size,
            some(repr(token) for token in tokens),
        )


def splits_alike(ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> bool:
    return all(ours(text)["input_ids"] == theirs(text)["input_ids"] for text in SAMPLES)


def _check_chat_template(name: str, template: Any) -> None:
    texts = template.values() if isinstance(template, dict) else [template]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise CheckpointError(f"{name}: no usable tokenizer files: a chat_template is no text: {template!r:.100}")


def _first_difference(file: Tokenizer, made: Any) -> str | None:
    """A short text that the file's tokenizer reads or writes otherwise than the one that transformers made."""
    backend = getattr(made, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    file.encode_special_tokens = backend.encode_special_tokens
    for text in _pieces(file):
        try:
            ids, other = file.encode(text).ids, backend.encode(text).ids
        except Exception:  # such as no unknown token
            return text
        if ids != other or _decode(file, ids) != _decode(backend, ids):
            return text
    return None


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def _pieces(file: Tokenizer) -> Iterable[str]:
    """Texts to compare, short ones first, so that a difference shows in few characters."""
    for text in SAMPLES:
        yield from text.split(" ")
    for token in file.get_added_tokens_decoder().values():
        yield f"a{token.content} b {token.content}c"
    yield from SAMPLES
