"""OpenAI's response_format: which form the text of an answer must have."""

from collections.abc import Mapping
from typing import Any

from fly_trt.serving.openai.requests.tool_calls.tools import NAME, invalid

TYPES = ("text", "json_object", "json_schema")
SCHEMA = "response_format.json_schema"
SCHEMA_FIELDS = ("name", "description", "schema", "strict")
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def read_response_format(given: Mapping[str, Any] | None) -> Mapping[str, Any] | bool | None:
    """The JSON Schema of the answer, ANY_OBJECT for any object, None for any text. A schema is held to whether it is
    strict or not. Raises ApiError."""
    if given is None:
        return None
    kind = given.get("type")
    if kind == "structural_tag":
        raise invalid("response_format.type", "'structural_tag': not supported: use tools, or structured_outputs")
    if kind not in TYPES:
        raise invalid("response_format.type", f"{_short(kind)}: expected one of {', '.join(TYPES)}")
    _check_fields("response_format", given, ("type", "json_schema") if kind == "json_schema" else ("type",))
    if kind == "text":
        return None
    return ANY_OBJECT if kind == "json_object" else _read_schema(given.get("json_schema"))


def _read_schema(given: Any) -> Mapping[str, Any] | bool:
    if not isinstance(given, Mapping):
        raise invalid(SCHEMA, "expected {'name': ..., 'schema': {...}}")
    _check_fields(SCHEMA, given, SCHEMA_FIELDS)
    name, schema, strict = given.get("name"), given.get("schema"), given.get("strict")
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise invalid(f"{SCHEMA}.name", f"{_short(name)}: expected 1 to 64 letters, digits, underscores and hyphens")
    if not isinstance(schema, (Mapping, bool)):
        raise invalid(f"{SCHEMA}.schema", "expected a JSON Schema")
    if not (strict is None or isinstance(strict, bool)):
        raise invalid(f"{SCHEMA}.strict", "expected true or false")
    return schema


def _check_fields(where: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(given.keys() - set(known)):
        raise invalid(f"{where}.{unknown[0]}"[:200], f"unknown field: expected {', '.join(known)}")


def _short(value: Any) -> str:
    return repr(value)[:80]
