"""The text that models are tried on while they are built: the built-in one, or a file of the user's own."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from fly_trt.errors import ConfigError

JSON_LINES = ".jsonl"


def calibration_text(path: str | None) -> str:
    """The built-in text, or that of a file: the prompts of JSON Lines as fly-bench has them, else the text as it is."""
    if path is None:
        return (resources.files("fly_build") / "calibration.txt").read_text(encoding="utf-8")
    text = _read(path)
    return "\n\n".join(_prompts(path, text)) if path.endswith(JSON_LINES) else text


def calibration_prompts(path: str | None) -> list[str]:
    """Texts to go on from: the prompts of JSON Lines, or the first half of each paragraph."""
    if path is not None and path.endswith(JSON_LINES):
        return _prompts(path, _read(path))
    paragraphs = calibration_text(path).split("\n\n")
    return [paragraph[: len(paragraph) // 2] for paragraph in paragraphs if len(paragraph) > 1]


def _read(path: str) -> str:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"calibrate {path}: {reason}: give a text, or prompts as JSON Lines (*.jsonl)") from None
    if not text.strip():
        raise ConfigError(f"calibrate {path}: no text: give some hundred words at least")
    return text


def _prompts(path: str, text: str) -> list[str]:
    return [_prompt(path, line) for line in text.split("\n") if line.strip()]


def _prompt(path: str, line: str) -> str:
    try:
        prompt: Any = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError):
        prompt = None
    if not isinstance(prompt, str):
        raise ConfigError(f'calibrate {path}: {line[:60]!r}: expected an object such as {{"prompt": "Tell me"}}')
    return prompt
