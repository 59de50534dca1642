"""Which answers a check takes for right, and which checks are none."""

from typing import Any

import pytest

from fly_trt.benchmark.checks import KINDS, is_right, problem_with

CASES = [
    ({"kind": "contains", "value": "Paris"}, "It is Paris.", "It is paris."),
    ({"kind": "regex", "value": r"\b4[23]\b"}, "So 43 are left.", "So 433 are left."),
    ({"kind": "number", "value": -7}, "5 - 12\n#### -7", "-7"),
    ({"kind": "json", "value": {"age": 33}}, 'Result:\n{"age": 33}\nDone', '{"age": "33"}'),
    ({"kind": "words", "value": ["two", "ten"]}, "In English: two; ten.", "In English: two, ten."),
    (
        {"kind": "code", "name": "f", "ops": [["+", 3], ["*", 2]]},
        "```python\ndef f(x):\n    return 2 * x + 6\n```",
        "```python\ndef f(x):\n    return x + 6\n```",
    ),
]


@pytest.mark.parametrize(("check", "right", "wrong"), CASES, ids=[case[0]["kind"] for case in CASES])
def test_each_kind_tells_right_from_wrong(check: dict[str, Any], right: str, wrong: str) -> None:
    assert problem_with(check) is None
    assert is_right(check, right)
    assert not is_right(check, wrong)
    assert not is_right(check, "")


def test_every_kind_has_a_case() -> None:
    assert [case[0]["kind"] for case in CASES] == list(KINDS)


def test_code_that_is_no_arithmetic_is_not_run() -> None:
    answer = "```python\ndef f(x):\n    return __import__('os').getpid()\n```"
    assert not is_right({"kind": "code", "name": "f", "ops": []}, answer)


CODE = {"kind": "code", "name": "f", "ops": [["*", 2], ["+", 3]]}


def python(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


@pytest.mark.parametrize(
    "code",
    [
        "def f(x):\n    return x + x + 3",
        "def f(n: int) -> int:\n    'Doubles.'\n    y = z = n * 2\n    y += 3\n    return y",
        "c = 3\ndef g(x):\n    return x\ndef f(x):\n    x -= -x\n    return x + c\n    return 0",
        "def f(x):\n    return 0\ndef f(x):\n    return 2 * x + 3",
    ],
)
def test_code_that_does_the_same_is_right_however_it_is_written(code: str) -> None:
    assert is_right(CODE, python(code))


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (CODE, python("def f(x):\n    return " + "-" * 100_000 + "x")),
        (CODE, python("def f(x):\n    return x" + " + x" * 50_000)),
        (CODE, python("def f(x):\n    return " + "(" * 5_000 + "x" + ")" * 5_000)),
        (CODE, python("def f(x):\n" + "    x = x * x\n" * 60 + "    return x")),
        (CODE, python("y = 3\n" + "y *= y\n" * 60 + "def f(x):\n    return y")),
        (CODE, python("def f(x):\n    return 'a' * 10000000000000")),
        (CODE, python("def f(x):\n    return f(x)")),
        (CODE, python("def f(x):\n    return y")),
        (CODE, python("def f(x):\n    return 1 / 0")),
        (CODE, python("def f():\n    return 3")),
        (CODE, python("def f(x):\n    x.y = 3\n    return x")),
        (CODE, python("def g(x):\n    return 2 * x + 3")),
        (CODE, python("f = 3")),
        (CODE, python("\0")),
        ({"kind": "json", "value": {}}, '{"a": ' + "[" * 100_000 + "}"),
        ({"kind": "number", "value": 1}, "#### " + "1" * 10_000),
    ],
    ids=range(16),
)
def test_an_answer_that_no_computer_could_bear_is_wrong(check: dict[str, Any], text: str) -> None:
    """Models repeat themselves; whatever comes of it is a wrong answer, and costs neither memory nor time."""
    assert problem_with(check) is None
    assert not is_right(check, text)


@pytest.mark.parametrize(
    ("check", "problem"),
    [
        ("Paris", "check of type str, expected an object such as"),
        ({}, "check of kind None, expected one of contains, regex, number"),
        ({"kind": ["json"]}, "check of kind ['json'], expected one of"),
        ({"kind": "contains"}, "check of kind contains has no 'value', expected a non-empty text"),
        ({"kind": "contains", "value": ""}, "has value '', expected a non-empty text"),
        ({"kind": "contains", "value": "a", "ignore_case": True}, "unknown key 'ignore_case', expected value"),
        ({"kind": "regex", "value": "("}, "has value '(', expected a regular expression"),
        ({"kind": "number", "value": "7"}, "has value '7', expected a whole number"),
        ({"kind": "number", "value": True}, "has value True, expected a whole number"),
        ({"kind": "json", "value": [1]}, "expected an object"),
        ({"kind": "words", "value": [1]}, "expected a list of texts"),
        ({"kind": "code", "name": "f", "ops": [["/", 3]]}, 'expected a list such as [["+", 3]]'),
    ],
)
def test_a_malformed_check_is_described(check: Any, problem: str) -> None:
    assert problem in (problem_with(check) or "")
