"""Whether an answer is right: the `check` that a benchmark prompt may carry.

A check is an object with a `kind` and what the kind wants:

    {"kind": "contains", "value": "Paris"}      this text, as it is written
    {"kind": "regex", "value": "(?i)\\bparis"}   a match anywhere, in Python's syntax
    {"kind": "number", "value": 42}             this whole number after ####
    {"kind": "json", "value": {"age": 33}}      this flat object, anywhere in the text
    {"kind": "words", "value": ["two", "ten"]}  these after the first colon, between semicolons, up to a full stop
    {"kind": "code", "name": "f", "ops": [["+", 3]]}  a Python function of one integer that does the same as `ops`

Answers come from a model: a malformed one is a wrong one, and of code only integer arithmetic is ever run.
"""

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Check = Mapping[str, Any]

CODE_INPUTS = (0, 1, 7, -3, 50)
OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
MAX_INTEGER = 10**100  # an answer that squares its way past it would never end


def is_right(check: Check, text: str) -> bool:
    """Whether the answer `text` passes `check`, which `problem_with` found nothing wrong with."""
    try:
        return KINDS[check["kind"]].is_right(check, text)
    except (ValueError, LookupError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False  # the last two are what parsers raise of deep nesting


def problem_with(check: Any) -> str | None:
    """What is wrong with a check that a user wrote, in words, or None."""
    if not isinstance(check, dict):
        return f"check of type {type(check).__name__}, expected an object such as {EXAMPLE}"
    kind = check.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        return f"check of kind {kind!r}, expected one of {', '.join(KINDS)}"
    wants = KINDS[kind].wants
    if unknown := sorted(check.keys() - {"kind", *wants}):
        return f"check of kind {kind} has an unknown key {unknown[0]!r}, expected {' and '.join(wants)}"
    for name, (is_fit, meaning) in wants.items():
        if name not in check:
            return f"check of kind {kind} has no {name!r}, expected {meaning}"
        if not is_fit(check[name]):
            return f"check of kind {kind} has {name} {check[name]!r}, expected {meaning}"
    return None


def _number(check: Check, text: str) -> bool:
    return bool(int(text.split("####")[1].split()[0]) == check["value"])


def _json(check: Check, text: str) -> bool:
    record = text[text.index("{") : text.index("}") + 1]
    return bool(json.loads(record) == check["value"])


def _words(check: Check, text: str) -> bool:
    spelled = text.split(":", 1)[1].split(".")[0].strip()
    return spelled == "; ".join(check["value"])


def _code(check: Check, text: str) -> bool:
    tree = ast.parse(text.split("```python\n")[1].split("```")[0])
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    names: dict[str, int] = {}
    _run([node for node in tree.body if not isinstance(node, ast.FunctionDef)], names)
    function = functions[check["name"]]
    (argument,) = function.args.args
    return all(_run(function.body, names | {argument.arg: x}) == _expected(check["ops"], x) for x in CODE_INPUTS)


def _run(statements: list[ast.stmt], names: dict[str, int]) -> int | None:
    """What the statements return, with the values of `names`, which they change. Raises ValueError for a statement
    that is none of integer arithmetic, and KeyError for an unknown name."""
    for statement in statements:
        match statement:
            case ast.Return(value=ast.expr() as value):
                return _value(value, names)
            case ast.Assign(targets=targets, value=value):
                result = _value(value, names)
                names.update((_name(target), result) for target in targets)
            case ast.AugAssign(target=target, op=op, value=value):
                names[_name(target)] = _value(ast.BinOp(ast.Name(_name(target)), op, value), names)
            case ast.Expr(value=ast.Constant()):  # a docstring
                pass
            case _:
                raise ValueError(f"no arithmetic: {type(statement).__name__}")
    return None


def _name(target: ast.expr) -> str:
    if not isinstance(target, ast.Name):
        raise ValueError(f"no name: {type(target).__name__}")
    return target.id


def _value(expression: ast.expr, names: Mapping[str, int]) -> int:
    match expression:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.BinOp(left=left, op=op, right=right):
            result = OPERATORS[type(op)](_value(left, names), _value(right, names))
            if abs(result) <= MAX_INTEGER:
                return result
    raise ValueError(f"no arithmetic of usual integers: {type(expression).__name__}")


def _expected(operations: list[list[Any]], x: int) -> int:
    for sign, operand in operations:
        x = {"+": x + operand, "-": x - operand, "*": x * operand}[sign]
    return x


def _contains(check: Check, text: str) -> bool:
    return str(check["value"]) in text


def _regex(check: Check, text: str) -> bool:
    return re.search(check["value"], text) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    try:
        return _is_text(value) and re.compile(value) is not None
    except re.error:
        return False


def _are_operations(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and pair[0] in ("+", "-", "*") and _is_whole(pair[1])
        for pair in value
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """`wants`: the keys of a check, each with what is fit for it, as a predicate and in words."""

    is_right: Callable[[Check, str], bool]
    wants: Mapping[str, tuple[Callable[[Any], bool], str]]


KINDS: Mapping[str, _Kind] = {
    "contains": _Kind(_contains, {"value": (_is_text, "a non-empty text")}),
    "regex": _Kind(_regex, {"value": (_is_pattern, "a regular expression")}),
    "number": _Kind(_number, {"value": (_is_whole, "a whole number")}),
    "json": _Kind(_json, {"value": (lambda value: isinstance(value, dict), "an object")}),
    "words": _Kind(
        _words, {"value": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts")}
    ),
    "code": _Kind(
        _code, {"name": (_is_text, "a function's name"), "ops": (_are_operations, 'a list such as [["+", 3]]')}
    ),
}
EXAMPLE = '{"kind": "contains", "value": "Paris"}'
