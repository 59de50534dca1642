"""However a text is cut into pieces, the same content and the same calls come of it, in the same order."""

import itertools
import json
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from call_texts import CASES
from fly_trt.serving.openai.requests.tool_calls import PARSERS, Delta, make_parser

# What texts are made of that a parser has to look at twice, and what is none of its business.
MARKS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "<tool_", "call>", "<", ">", "<|", "python_tag|>", "</", ";"]
CALL_PARTS = ['{"name": "f", ', '"name"', '"arguments": {', '"parameters"', '{"name": "g", "arguments": {"a": "}"}}']
JSON_PARTS = ["{", "}", "[", "]", ":", ",", '"', "\\", "\\u", "d83d", "1", "-2.5", "null", "name", " ", "\n"]
PIECES = [*MARKS, *CALL_PARTS, *JSON_PARTS, "x", "Hello", "é", "😀", "'"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


def story(deltas: Sequence[Delta]) -> list[tuple[str, ...]]:
    """What a client would have heard: pieces that follow each other are one."""
    heard: list[tuple[str, ...]] = []
    for delta in deltas:
        if delta.index is None:
            assert delta.content
            if heard and heard[-1][0] == "content":
                heard[-1] = ("content", heard[-1][1] + delta.content)
            else:
                heard.append(("content", delta.content))
        elif delta.id is not None:
            assert delta.index == sum(kind == "call" for kind, *_ in heard)
            heard.append(("call", str(delta.name), delta.arguments))
        else:
            assert heard[-1][0] == "call"
            assert delta.arguments
            heard[-1] = (*heard[-1][:2], heard[-1][2] + delta.arguments)
    return heard


def read(parser: str, pieces: Sequence[str], max_calls: int | None = None) -> list[tuple[str, ...]]:
    one = make_parser(parser, max_calls=max_calls)
    deltas = [delta for piece in pieces for delta in one.feed(piece)]
    return story(deltas + one.finish())


def cut(text: str, ends: Sequence[int]) -> list[str]:
    places = [0, *sorted(end % (len(text) + 1) for end in ends), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(places)]


@pytest.mark.parametrize(("parser", "text"), CASES)
def test_a_cut_at_any_place_changes_nothing(parser: str, text: str) -> None:
    whole = read(parser, [text])
    assert read(parser, text) == whole
    for end in range(len(text) + 1):
        assert read(parser, [text[:end], text[end:]]) == whole
        assert read(parser, [text[:end], text[end : end + 3], text[end + 3 :]]) == whole


@settings(max_examples=300)
@given(
    parser=st.sampled_from(sorted(PARSERS)),
    text=TEXTS,
    ends=st.lists(st.integers(0, 500), max_size=12),
    most=st.none() | st.integers(1, 2),
)
def test_cuts_of_any_text_change_nothing(parser: str, text: str, ends: list[int], most: int | None) -> None:
    whole = read(parser, [text], most)
    assert read(parser, cut(text, ends), most) == whole
    assert read(parser, text, most) == whole


@settings(max_examples=300)
@given(parser=st.sampled_from(sorted(PARSERS)), text=TEXTS)
def test_a_text_without_a_call_comes_back_whole(parser: str, text: str) -> None:
    heard = read(parser, text)
    if all(kind == "content" for kind, *_ in heard):
        shown = text if PARSERS[parser].begin_is_text else text.replace(PARSERS[parser].begin, "")
        assert "".join(content for _, content in heard) == shown


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.tuples(
    st.text("abcXYZ019_-", min_size=1),
    st.dictionaries(st.text(), VALUES, max_size=4),
    st.booleans(),
    st.sampled_from([None, 2]),
)
WORDS = st.text(st.characters(exclude_characters="<", exclude_categories=("Cs",)), min_size=1).filter(str.strip)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.none() | WORDS, CALLS), min_size=1, max_size=3), st.booleans(), st.lists(st.integers(0, 5000))
)
def test_calls_that_are_written_are_the_calls_that_are_read(
    parts: list[tuple[str | None, tuple[str, dict[str, object], bool, int | None]]], name_first: bool, ends: list[int]
) -> None:
    text, expected = "", []
    for words, (name, arguments, is_ascii, indent) in parts:
        written = json.dumps(arguments, ensure_ascii=is_ascii, indent=indent)
        members = [f'"name": "{name}"', f'"arguments": {written}']
        call = ", ".join(members if name_first else members[::-1])
        text += f"{words or ''}<tool_call>\n{{{call}}}\n</tool_call>\n"
        expected += [("content", words if not expected else f"\n{words}")] if words else []
        expected += [("call", name, written)]
    assert read("hermes", cut(text, ends)) == expected


@pytest.mark.parametrize(
    ("beginning", "middle"),
    [
        ("Hello ", "abc <tool "),
        ('<tool_call>{"name": "f", "arguments": {"a": "', 'x{\\"'),
        ('<tool_call>{"arguments": {"a": [', '{"b": 1.5}, '),
        ("", '<tool_call>{"<tool_call>{":"'),
    ],
)
def test_a_long_answer_costs_as_much_by_character_as_a_short_one(beginning: str, middle: str) -> None:
    def num_calls(length: int) -> int:
        count = 0

        def note(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            read("hermes", [beginning, *[middle] * length])
        finally:
            sys.setprofile(None)
        return count

    assert num_calls(2000) < 4.5 * num_calls(500)
