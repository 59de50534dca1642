"""Right answers for the demo pair's evaluation prompts (tests/assets/pair/eval.jsonl).

Every prompt carries a check, so that an acceptance policy's accuracy can be measured. Four kinds: `number` (after
####), `json` (an object), `words` (numbers spelled out), `code` (a Python function of integers, run after
its syntax tree was found to hold nothing but integer arithmetic).
"""

import ast
import json
from pathlib import Path
from typing import Any

EVAL_PROMPTS = Path(__file__).resolve().parents[1] / "tests" / "assets" / "pair" / "eval.jsonl"
CODE_INPUTS = (0, 1, 7, -3, 50)
ARITHMETIC = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.Expr),
    *(ast.BinOp, ast.UnaryOp, ast.USub, ast.Add, ast.Sub, ast.Mult, ast.Name, ast.Load, ast.Store, ast.Constant),
)


def load_eval_prompts(path: Path = EVAL_PROMPTS) -> list[dict[str, Any]]:
    """Records with `id`, `family`, `prompt` and `check`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_right(check: dict[str, Any], text: str) -> bool:
    """Whether the answer `text` passes `check`. A malformed answer is a wrong one."""
    try:
        return _CHECKS[check["kind"]](check, text)
    except (ValueError, IndexError, SyntaxError, NameError, TypeError):
        return False


def _number(check: dict[str, Any], text: str) -> bool:
    return int(text.split("####")[1].split()[0]) == check["value"]


def _json(check: dict[str, Any], text: str) -> bool:
    record = text[text.index("{") : text.index("}") + 1]
    return bool(json.loads(record) == check["value"])


def _words(check: dict[str, Any], text: str) -> bool:
    spelled = text.split(":", 1)[1].split(".")[0].strip()
    return spelled == "; ".join(check["value"])


def _code(check: dict[str, Any], text: str) -> bool:
    tree = ast.parse(text.split("```python\n")[1].split("```")[0])
    if not all(isinstance(node, ARITHMETIC) for node in ast.walk(tree)):
        return False
    namespace: dict[str, Any] = {"__builtins__": {}}
    exec(compile(tree, "<answer>", "exec"), namespace)
    function = namespace.get(check["name"])
    return function is not None and all(function(x) == _expected(check["ops"], x) for x in CODE_INPUTS)


def _expected(operations: list[list[Any]], x: int) -> int:
    for operator, operand in operations:
        x = {"+": x + operand, "-": x - operand, "*": x * operand}[operator]
    return x


_CHECKS = {"number": _number, "json": _json, "words": _words, "code": _code}
