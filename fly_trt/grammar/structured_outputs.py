"""What form an output must have, as a caller says it: a JSON Schema, a regular expression, one of some texts, or a
grammar. Names are vLLM's. Nothing is compiled here; what can be seen to be wrong at once is refused.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import Any

from fly_trt.errors import RequestError
from fly_trt.text.surrogates import check_text

KINDS = ("json", "json_object", "regex", "choice", "grammar")
# What one request may cost the others. A text that a grammar leaves no choice about is read anew at each of its tokens,
# so that long regular expressions and choices cost more than schemas, where few characters are such a text. What is
# nested, in itself or by references, is followed by a recursion, in time that grows with the square of its depth.
MAX_CHARACTERS = {"json": 200_000, "json_object": 50, "regex": 10_000, "choice": 50_000, "grammar": 200_000}
MAX_LARK_CHARACTERS = 50_000  # of a grammar, without the schemas in it
MAX_CHOICES = 1024
MAX_CHOICE_CHARACTERS = 2000
MAX_PATTERN_CHARACTERS = 200
MAX_DEPTH = 64
MAX_SCHEMA_PARTS = 5000  # objects and arrays
MAX_MULTIPLE = 20_000  # an automaton of digits has a state for each remainder
MAX_GRAMMAR_PARTS = 600  # rules and brackets
_GRAMMAR_PART = re.compile(r"::=|[:(\[]")
_LARK_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_LARK_SCHEMA = re.compile(r"%json\s*")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputs:
    """Exactly one of `json`, `json_object`, `regex`, `choice` and `grammar`.

    json: a JSON Schema, as a mapping or as its text. json_object: True for any JSON object. regex: the whole output
    matches, in the syntax of Rust's regex crate without look-around. choice: the output is one of these. grammar: in
    Lark's syntax, or GBNF, the form of llama.cpp and xgrammar. Of JSON alone: disable_any_whitespace leaves none
    between its parts, whitespace_pattern is a regular expression of what may stand there; the default is a space, or a
    line's end and its indentation. Raises RequestError for anything else.

    Two are equal, and have one hash, that ask for the same in the same words. kind: which of KINDS it is; text: what
    was given, as text, schemas and choices in JSON.
    """

    json: str | Mapping[str, Any] | bool | None = field(default=None, compare=False)
    json_object: bool | None = field(default=None, compare=False)
    regex: str | None = field(default=None, compare=False)
    choice: Sequence[str] | None = field(default=None, compare=False)
    grammar: str | None = field(default=None, compare=False)
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    kind: str = field(init=False, repr=False)
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs: got {' and '.join(given) or 'none of them'}: give one of {', '.join(KINDS)}"
            )
        (kind,) = given
        name = f"structured_outputs.{kind}"
        text = _READERS[kind](name, getattr(self, kind))
        check_text(name, text)
        _check_size(name, len(text), MAX_CHARACTERS[kind])
        self._check_whitespace(kind)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "text", text)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "StructuredOutputs":
        """Raises RequestError for an unknown name."""
        known = [f.name for f in fields(cls) if f.init]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise RequestError(f"structured_outputs: unknown field {unknown[0]!r}: expected one of {', '.join(known)}")
        return cls(**given)

    def _check_whitespace(self, kind: str) -> None:
        name, pattern = "structured_outputs.whitespace_pattern", self.whitespace_pattern
        if not isinstance(self.disable_any_whitespace, bool):
            got = self.disable_any_whitespace
            raise RequestError(f"structured_outputs.disable_any_whitespace {got!r}: expected True or False")
        if pattern is not None:
            _read_text(name, pattern)
            check_text(name, pattern)
            _check_size(name, len(pattern), MAX_PATTERN_CHARACTERS)
        if pattern is not None and self.disable_any_whitespace:
            raise RequestError(f"{name}: has no effect with disable_any_whitespace: leave one of them out")
        if kind not in ("json", "json_object") and (self.disable_any_whitespace or pattern is not None):
            which = "disable_any_whitespace" if self.disable_any_whitespace else "whitespace_pattern"
            raise RequestError(f"structured_outputs.{which}: has no effect on a {kind}: leave it out")


def _check_size(name: str, size: int, most: int) -> None:
    if size > most:
        raise RequestError(f"{name}: {size} characters, at most {most}: make it smaller")


def _read_schema(name: str, value: Any) -> str:
    if not isinstance(value, (str, Mapping, bool)):
        raise RequestError(f"{name} {value!r:.100}: expected a JSON Schema, as a mapping or its text")
    if isinstance(value, str):
        _check_size(name, len(value), MAX_CHARACTERS["json"])
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        num_parts = _num_parts(name, schema, MAX_DEPTH)
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise _too_deep(name) from None
    except (TypeError, ValueError) as error:  # what json says of a text, and of what it cannot write
        raise RequestError(f"{name}: not JSON ({' '.join(str(error).split())[:200]}): mend it") from None
    if schema is True:
        return "{}"
    if not isinstance(schema, dict):
        raise RequestError(f"{name}: {text[:50]}: expected an object, or true for any JSON")
    if "x-guidance" in schema:
        raise RequestError(f"{name}: 'x-guidance': use disable_any_whitespace and whitespace_pattern instead")
    _check_parts(name, num_parts)
    _check_multiples(name, [schema])
    return text


def _num_parts(name: str, value: Any, depth: int) -> int:
    """Raises RequestError for what has more levels than `depth`."""
    if not isinstance(value, (dict, list, tuple)):
        return 0
    if not depth:
        raise _too_deep(name)
    parts = value.values() if isinstance(value, dict) else value
    return 1 + sum(_num_parts(name, part, depth - 1) for part in parts)


def _check_multiples(name: str, schemas: list[Any]) -> None:
    """Raises RequestError where a number may have to be a multiple of one with too many remainders. All of them are
    taken together, as allOf may have it; zeros at the end of one cost nothing, wherever its point is."""
    common = 1
    for number in _multiples(schemas):
        digits = "".join(map(str, Decimal(str(number)).as_tuple().digits)).rstrip("0")
        common = math.lcm(common, int(digits or "1"))
        if common > MAX_MULTIPLE:
            raise RequestError(
                f"{name}: multipleOf {number!s:.30}: a multiple of it and of those before it may have to be one of "
                f"{Decimal(common):.6g}, at most {MAX_MULTIPLE}: use rounder ones, or fewer"
            )


def _multiples(value: Any) -> Iterator[int | float]:
    """What is given as multipleOf anywhere."""
    if isinstance(value, dict):
        number = value.get("multipleOf")
        if type(number) is int or (type(number) is float and math.isfinite(number)):
            yield number
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for part in value:
        yield from _multiples(part)


def _too_deep(name: str) -> RequestError:
    return RequestError(f"{name}: more than {MAX_DEPTH} levels deep: use $defs and $ref, or a flatter schema")


def _read_flag(name: str, value: Any) -> str:
    if value is not True:
        raise RequestError(f"{name} {value!r}: expected True, or None for another form")
    return '{"type":"object"}'


def _read_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} {value!r}: expected a non-empty string")
    return value


def _read_grammar(name: str, value: Any) -> str:
    text = _read_text(name, value)
    _check_size(name, len(text), MAX_CHARACTERS["grammar"])
    own, num_parts, start, schemas = "", 0, 0, list[Any]()
    for found in _LARK_SCHEMA.finditer(text):
        if found.start() < start:
            continue  # within the last one
        try:
            schema, end = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            break  # what it is, the compiler will say
        num_parts += _num_parts(name, schema, MAX_DEPTH)
        schemas.append(schema)
        own, start = own + text[start : found.start()], end
    _check_parts(name, num_parts)
    _check_multiples(name, schemas)
    own = own + text[start:]
    _check_size(name, len(own), MAX_LARK_CHARACTERS)
    if (count := len(_GRAMMAR_PART.findall(_LARK_STRING.sub("", own)))) > MAX_GRAMMAR_PARTS:
        raise RequestError(f"{name}: {count} rules and brackets, at most {MAX_GRAMMAR_PARTS}: use fewer")
    return text


def _check_parts(name: str, num_parts: int) -> None:
    if num_parts > MAX_SCHEMA_PARTS:
        raise RequestError(f"{name}: {num_parts} objects and arrays, at most {MAX_SCHEMA_PARTS}: make it smaller")


def _read_choices(name: str, value: Any) -> str:
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not (is_list and value and all(isinstance(text, str) and text for text in value)):
        raise RequestError(f"{name} {value!r:.100}: expected a list of non-empty strings")
    if len(value) > MAX_CHOICES:
        raise RequestError(f"{name}: {len(value)} strings, at most {MAX_CHOICES}: leave some out")
    _check_size(name, max(map(len, value)), MAX_CHOICE_CHARACTERS)
    return json.dumps(list(value), ensure_ascii=False)


_READERS = {
    "json": _read_schema,
    "json_object": _read_flag,
    "regex": _read_text,
    "choice": _read_choices,
    "grammar": _read_grammar,
}
