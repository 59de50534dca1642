"""What is JSON and what is not."""

import json

import pytest

from fly_trt.serving.openai.http.bodies import MAX_DEPTH, MAX_VALUES, parse_json
from fly_trt.serving.openai.http.errors import ApiError

BROKEN = {
    "nothing": (b"", "the body is empty"),
    "spaces": (b" \n ", "the body is empty"),
    "cut off": (b'{"prompt": "a', "the body is not JSON"),
    "two values": (b"{} {}", "the body is not JSON: Extra data at character 3"),
    "single quotes": (b"{'prompt': 'a'}", "the body is not JSON"),
    "a trailing comma": (b'{"prompt": "a",}', "the body is not JSON"),
    "a comment": (b'{"prompt": "a"} // hello', "the body is not JSON"),
    "a control character": (b'{"prompt": "a\x00"}', "the body is not JSON: Invalid control character"),
    "an unknown escape": (rb'{"prompt": "\x41"}', "the body is not JSON: Invalid \\escape"),
    "Latin-1": ('{"prompt": "é"}'.encode("latin-1"), "the body is not UTF-8: byte 12 is 0xe9"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "the body is not UTF-8"),
    "a cut off character": (b'{"prompt": "\xf0\x9f"}', "the body is not UTF-8"),
    "an overlong encoding": (b'{"prompt": "\xc0\xaf"}', "the body is not UTF-8"),
    "an encoded surrogate": (b'{"prompt": "\xed\xa0\x80"}', "the body is not UTF-8"),
    "a byte order mark": (b'\xef\xbb\xbf{"prompt": "a"}', "the body is not JSON"),
    "NaN": (b'{"temperature": NaN}', "the body has NaN, which is no JSON"),
    "Infinity": (b'{"temperature": -Infinity}', "the body has -Infinity, which is no JSON"),
    "a number beyond doubles": (
        b'{"temperature": 1e999}',
        "the body has the number 1e999, which is beyond",
    ),
    "a number of 5,000 digits": (b'{"seed": ' + b"9" * 5000 + b"}", "the body has a number with too many digits"),
    "lists in lists": (b"[" * 100_000, "the body is nested too deeply"),
    "closed lists in lists": (b"[" * 900 + b"]" * 900, "the body is nested too deeply"),
    "objects in objects": (b'{"a": ' * 101 + b"1" + b"}" * 101, "the body is nested too deeply: at most 100 levels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_json_is_refused_in_one_line(name: str) -> None:
    body, message = BROKEN[name]
    with pytest.raises(ApiError) as raised:
        parse_json(body)
    assert str(raised.value).startswith(message)
    assert len(str(raised.value).splitlines()) == 1
    assert (raised.value.status, raised.value.code) == (400, "malformed_json")


def test_as_many_levels_as_are_allowed_are_read() -> None:
    value: object = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert parse_json(json.dumps(value).encode()) == value
    with pytest.raises(ApiError):
        parse_json(json.dumps([value]).encode())


def test_many_brackets_side_by_side_are_no_depth() -> None:
    wide = [{"a": [index]} for index in range(500)]
    assert parse_json(json.dumps(wide).encode()) == wide


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{}] * (MAX_VALUES + 1)},
        {"bad_words": list(range(MAX_VALUES + 1))},
        {str(key): 1 for key in range(MAX_VALUES + 1)},
        [{"a": [1] * 100}] * (MAX_VALUES // 100),
    ],
)
def test_more_values_than_anybody_needs_are_refused_before_they_are_looked_at(value: object) -> None:
    with pytest.raises(ApiError, match="the body has more than 50000 values"):
        parse_json(json.dumps(value).encode())


def test_a_prompt_may_have_any_number_of_tokens() -> None:
    value = {"prompt": [5] * (2 * MAX_VALUES), "stop": ["a"]}
    assert parse_json(json.dumps(value).encode()) == value


def test_commas_in_a_text_are_no_values() -> None:
    value = {"prompt": "a, " * (2 * MAX_VALUES), "messages": [{"content": "," * (2 * MAX_VALUES)}]}
    assert parse_json(json.dumps(value).encode()) == value


def test_brackets_in_a_text_are_no_depth() -> None:
    assert parse_json(json.dumps("[" * 5000).encode()) == "[" * 5000


def test_of_a_key_that_comes_twice_the_last_one_counts() -> None:
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}


@pytest.mark.parametrize("text", ['{"a": 1e308, "b": -0.0, "c": 12345678901234567890}', '"\\ud83d\\ude00"', "null"])
def test_all_json_is_read(text: str) -> None:
    assert parse_json(text.encode()) == json.loads(text)
