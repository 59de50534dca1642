"""The demo pair's evaluation prompts (tests/assets/pair/eval.jsonl), each with a check of its answer."""

import json
from pathlib import Path
from typing import Any

EVAL_PROMPTS = Path(__file__).parent / "assets" / "pair" / "eval.jsonl"


def load_eval_prompts() -> list[dict[str, Any]]:
    """Records with `id`, `family`, `prompt` and `check`."""
    return [json.loads(line) for line in EVAL_PROMPTS.read_text(encoding="utf-8").splitlines()]
