"""What a benchmark asks: the built-in prompts, a file of the user's own, or random tokens.

It knows prompts and their checks, and nothing of engines but the tokenizer that random tokens are drawn from.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fly_trt.benchmark.checks import Check, problem_with
from fly_trt.errors import ConfigError
from fly_trt.text.chat import ChatMessage
from fly_trt.text.prompts import Prompt

# The frame around the built-in prompts. A chat template brings its own, so that this one is taken off.
FRAME = ("### Instruction:\n", "\n### Response:\n")
EXAMPLE = '{"prompt": "Tell me"}'


@dataclass(frozen=True, slots=True)
class BenchmarkPrompt:
    """A text, or token ids; `check` says what a right answer is, `reference` is one, where they are known."""

    prompt: Prompt
    check: Check | None = None
    reference: str | None = None

    def as_messages(self) -> list[ChatMessage]:
        """The text as a user's message. Raises ConfigError for token ids."""
        if not isinstance(self.prompt, str):
            raise ConfigError("chat: random tokens are no message: leave out --chat or --random-tokens")
        return [{"role": "user", "content": self.prompt.removeprefix(FRAME[0]).removesuffix(FRAME[1])}]


def built_in_prompts() -> list[BenchmarkPrompt]:
    """Word problems, extraction, rewriting, code, translation and explanation, by turns."""
    file = resources.files("fly_trt.benchmark") / "prompts.jsonl"
    return _parse("the built-in prompts", file.read_text(encoding="utf-8"))


def read_prompts(path: Path) -> list[BenchmarkPrompt]:
    """The prompts of a JSON Lines file: an object a line with `prompt`, perhaps `check`, perhaps `reference`, which may
    also be called `answer`, and any other keys.

    Raises ConfigError, which names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte-order mark first
    except UnicodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}): convert the file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give a JSON Lines file with a prompt on each line") from None
    return _parse(str(path), text)


def random_prompts(tokenizer: Tokenizer, vocab_size: int, length: int, count: int, seed: int) -> list[BenchmarkPrompt]:
    """`count` prompts of `length` token ids that text can have: no special tokens, and none beyond the tokenizer's
    or the model's `vocab_size`. The same seed gives the same ones."""
    if length < 1:
        raise ConfigError(f"random_tokens {length}: expected a prompt of at least 1 token")
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    known = [token for token in tokenizer.get_vocab().values() if token < vocab_size and token not in special]
    drawn = np.random.default_rng(seed).choice(np.sort(known), (count, length))
    return [BenchmarkPrompt({"prompt_token_ids": tokens}) for tokens in drawn.tolist()]


def repeated(prompts: list[BenchmarkPrompt], count: int) -> list[BenchmarkPrompt]:
    """The first `count` prompts; where there are fewer, they start again."""
    return list(itertools.islice(itertools.cycle(prompts), count))


def _parse(name: str, text: str) -> list[BenchmarkPrompt]:
    lines = enumerate(text.split("\n"), start=1)  # splitlines would also split at what JSON allows in a string
    prompts = [_prompt(f"{name}:{number}", line) for number, line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{name}: no prompts: give one on each line, such as {EXAMPLE}")
    return prompts


def _prompt(place: str, line: str) -> BenchmarkPrompt:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON ({error}): expected one object on each line") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{place}: {type(record).__name__}, expected an object such as {EXAMPLE}")
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"{place}: prompt {prompt!r}, expected a non-empty text under the key prompt")
    check = record.get("check")
    if check is not None and (problem := problem_with(check)) is not None:
        raise ConfigError(f"{place}: {problem}: mend the check or leave it out")
    return BenchmarkPrompt(prompt, check, _reference(place, record))


def _reference(place: str, record: Mapping[str, Any]) -> str | None:
    """A text, or a number as it is written. Others have a use of their own for the key `answer`."""
    reference = record.get("reference")
    if reference is None:
        reference = answer if _is_text_or_number(answer := record.get("answer")) else None
    elif not _is_text_or_number(reference):
        raise ConfigError(f"{place}: reference {reference!r}, expected a non-empty text or a number, or leave it out")
    return None if reference is None else str(reference)


def _is_text_or_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number or (isinstance(value, str) and bool(value.strip()))
