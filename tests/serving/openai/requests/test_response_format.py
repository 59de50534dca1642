"""response_format as requests give it."""

import re
from typing import Any

import pytest

from fly_trt.serving.openai.http.errors import ApiError
from fly_trt.serving.openai.requests.response_format import read_response_format

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize("strict", [{}, {"strict": None}, {"strict": True}, {"strict": False}])
def test_a_schema_is_held_to_whether_it_is_strict_or_not(strict: dict[str, Any]) -> None:
    schema = {"name": "answer", "description": "What to say", "schema": SCHEMA} | strict
    assert read_response_format({"type": "json_schema", "json_schema": schema}) == SCHEMA


def test_text_is_any_text_and_json_object_any_object() -> None:
    assert read_response_format(None) is None
    assert read_response_format({"type": "text"}) is None
    assert read_response_format({"type": "json_object"}) == {"type": "object"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "response_format.type: None: expected one of text, json_object, json_schema"),
        ({"type": "xml"}, "response_format.type: 'xml': expected one of text, json_object, json_schema"),
        ({"type": ["text"]}, "response_format.type: ['text']: expected one of"),
        ({"type": "structural_tag", "structures": []}, "response_format.type: 'structural_tag': not supported"),
        ({"type": "text", "json_schema": {}}, "response_format.json_schema: unknown field: expected type"),
        ({"type": "json_object", "schema": SCHEMA}, "response_format.schema: unknown field"),
        ({"type": "json_schema"}, "response_format.json_schema: expected {'name': ..., 'schema': {...}}"),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            "response_format.json_schema.name: None: expected",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": SCHEMA}},
            "response_format.json_schema.name: 'a b': expected 1 to 64 letters",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": "{}"}},
            "response_format.json_schema.schema: expected a JSON Schema",
        ),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema: expected a JSON"),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": "yes"}},
            "response_format.json_schema.strict: expected true or false",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "stricter": True}},
            "response_format.json_schema.stricter: unknown field: expected name, description, schema, strict",
        ),
    ],
)
def test_what_is_wrong_is_said_of_its_field(given: Any, message: str) -> None:
    with pytest.raises(ApiError, match=re.escape(message)):
        read_response_format(given)
