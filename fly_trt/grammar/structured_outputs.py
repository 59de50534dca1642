"""What form an output must have, as a caller says it: a JSON Schema, a regular expression, one of some texts, or a
grammar. Names are vLLM's. Nothing is compiled here; what can be seen to be wrong at once is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fly_trt.errors import RequestError

MAX_GRAMMAR_CHARACTERS = 200_000
MAX_CHOICES = 1024
KINDS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputs:
    """Exactly one of `json`, `json_object`, `regex`, `choice` and `grammar`.

    json: a JSON Schema, as a mapping or as its text. json_object: any JSON object. regex: the whole output matches, in
    the syntax of Rust's regex crate. choice: the output is one of these. grammar: in Lark's syntax, or GBNF, the form
    of llama.cpp and xgrammar. disable_any_whitespace: JSON without any; whitespace_pattern: a regular expression of
    what may stand between its parts. Raises RequestError for anything else.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs: got {' and '.join(given) or 'none of them'}: give one of {', '.join(KINDS)}"
            )
        if len(self.text) > MAX_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"structured_outputs.{given[0]}: {len(self.text)} characters, at most {MAX_GRAMMAR_CHARACTERS}: "
                "make it smaller"
            )

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def text(self) -> str:
        """What was given, as text."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json.dumps(value)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "StructuredOutputs":
        """Raises RequestError for an unknown name."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise RequestError(f"structured_outputs: unknown field {unknown[0]!r}: expected one of {', '.join(known)}")
        return cls(**given)
