"""What may be asked of an output's form, and what is refused before anything is compiled."""

import json

import pytest

from fly_trt import RequestError, StructuredOutputs
from fly_trt.grammar.structured_outputs import MAX_DEPTH, MAX_SCHEMA_PARTS


def nested(levels: int) -> dict:
    schema: dict = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "structured_outputs: got none of them: give one of json, json_object, regex, choice, grammar"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs: got regex and choice: give one of"),
        ({"json": 5}, "structured_outputs.json 5: expected a JSON Schema, as a mapping or its text"),
        ({"json": False}, "structured_outputs.json: false: expected an object, or true for any JSON"),
        ({"json": "{"}, "structured_outputs.json: not JSON (Expecting property name"),
        ({"json": "[1]"}, "structured_outputs.json: [1]: expected an object, or true for any JSON"),
        ({"json": "null"}, "structured_outputs.json: null: expected an object, or true for any JSON"),
        ({"json": '{"maximum": 1e999}'}, "structured_outputs.json: not JSON (Out of range float"),
        ({"json": {"enum": {1, 2}}}, "structured_outputs.json: not JSON (Object of type set"),
        ({"json": {"const": "\ud800"}}, r"structured_outputs.json: '\ud800' at character 10 is half of a surrogate"),
        ({"json": '{"const": "\\ud800"}'}, r"structured_outputs.json: '\ud800' at character 10 is half of a surrogate"),
        ({"json": nested(MAX_DEPTH)}, "structured_outputs.json: more than 64 levels deep: use $defs and $ref"),
        ({"json": '{"items":' * 50_000}, "structured_outputs.json: 450000 characters, at most 200000: make it smaller"),
        ({"json": '{"items":' * 20_000}, "structured_outputs.json: more than 64 levels deep"),
        ({"json": {"enum": [[]] * MAX_SCHEMA_PARTS}}, "structured_outputs.json: 5002 objects and arrays, at most 5000"),
        ({"json": {"x-guidance": {"lenient": True}}}, "structured_outputs.json: 'x-guidance': use disable_any_whitesp"),
        ({"json_object": False}, "structured_outputs.json_object False: expected True, or None"),
        ({"json_object": 1}, "structured_outputs.json_object 1: expected True, or None"),
        ({"regex": ""}, "structured_outputs.regex '': expected a non-empty string"),
        ({"regex": 5}, "structured_outputs.regex 5: expected a non-empty string"),
        ({"regex": "\udc80"}, r"structured_outputs.regex: '\udc80' at character 0 is half of a surrogate pair"),
        ({"regex": "a" * 10_001}, "structured_outputs.regex: 10001 characters, at most 10000"),
        ({"choice": []}, "structured_outputs.choice []: expected a list of non-empty strings"),
        ({"choice": "ab"}, "structured_outputs.choice 'ab': expected a list of non-empty strings"),
        ({"choice": ["a", 1]}, "structured_outputs.choice ['a', 1]: expected a list of non-empty strings"),
        ({"choice": ["a", ""]}, "structured_outputs.choice ['a', '']: expected a list of non-empty strings"),
        ({"choice": ["\ud800"]}, r"structured_outputs.choice: '\ud800' at character 2 is half of a surrogate pair"),
        ({"choice": ["a"] * 1025}, "structured_outputs.choice: 1025 strings, at most 1024"),
        ({"choice": ["a" * 2001]}, "structured_outputs.choice: 2001 characters, at most 2000"),
        ({"choice": ["a" * 1000] * 60}, "structured_outputs.choice: 60240 characters, at most 50000"),
        ({"grammar": ""}, "structured_outputs.grammar '': expected a non-empty string"),
        ({"grammar": "a: b\n" * 601}, "structured_outputs.grammar: 601 rules and brackets, at most 600"),
        ({"grammar": "start: " + "(" * 1000}, "structured_outputs.grammar: 1001 rules and brackets, at most 600"),
        ({"grammar": "start: " + '"a" ' * 20_000}, "structured_outputs.grammar: 80007 characters, at most 50000"),
        ({"grammar": "start: %json " + json.dumps(nested(80))}, "structured_outputs.grammar: more than 64 levels deep"),
        (
            {"grammar": "\n".join(f'a{i}: %json {{"enum": {[[]] * 100}}}' for i in range(80))},
            "structured_outputs.grammar: 8160 objects and arrays, at most 5000",
        ),
        (
            {"json": {"multipleOf": 9999991}},
            "structured_outputs.json: multipleOf 9999991: a multiple of it and of those",
        ),
        ({"json": {"multipleOf": 10**400 + 1}}, "structured_outputs.json: multipleOf 1000000000"),
        ({"json": {"multipleOf": 5**10}}, "structured_outputs.json: multipleOf 9765625: "),
        (
            {"json": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 0.9967}]}},
            "structured_outputs.json: multipleOf 0.9967",
        ),
        ({"grammar": 'start: %json {"items": {"multipleOf": 99991}}'}, "structured_outputs.grammar: multipleOf 99991"),
        ({"regex": "a", "disable_any_whitespace": True}, "structured_outputs.disable_any_whitespace: has no effect on"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern: has no effect on a cho"),
        ({"json": {}, "disable_any_whitespace": 1}, "structured_outputs.disable_any_whitespace 1: expected True or F"),
        ({"json": {}, "whitespace_pattern": ""}, "structured_outputs.whitespace_pattern '': expected a non-empty str"),
        ({"json": {}, "whitespace_pattern": 3}, "structured_outputs.whitespace_pattern 3: expected a non-empty string"),
        ({"json": {}, "whitespace_pattern": "a" * 201}, "structured_outputs.whitespace_pattern: 201 characters, at"),
        (
            {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
            "structured_outputs.whitespace_pattern: has no effect with disable_any_whitespace",
        ),
        ({"structural_tag": "x"}, "structured_outputs: unknown field 'structural_tag': expected one of json, json_obj"),
        ({5: "x"}, "structured_outputs: unknown field 5: expected one of json, json_object"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line_that_names_it(asked: dict, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        StructuredOutputs.from_dict(asked)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_two_that_ask_for_the_same_are_one_key() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    as_mapping, as_text = StructuredOutputs(json=schema), StructuredOutputs(json=json.dumps(schema, indent=2))
    assert as_mapping == as_text
    assert hash(as_mapping) == hash(as_text)
    assert StructuredOutputs(regex="a") != StructuredOutputs(grammar="a")
    assert StructuredOutputs(json=schema, disable_any_whitespace=True) != as_mapping
    assert StructuredOutputs(choice=["a", "b"]) == StructuredOutputs(choice=("a", "b"))


def test_the_order_of_properties_is_part_of_what_is_asked_for() -> None:
    one, other = ({"properties": {name: {} for name in names}} for names in ("ab", "ba"))
    assert StructuredOutputs(json=one) != StructuredOutputs(json=other)


def test_a_schema_that_is_changed_afterwards_changes_nothing() -> None:
    schema = {"type": "object"}
    asked = StructuredOutputs(json=schema)
    schema["type"] = "string"
    assert json.loads(asked.text) == {"type": "object"}


def test_what_is_as_deep_as_may_be_is_taken() -> None:
    assert StructuredOutputs(json=nested(MAX_DEPTH - 1)).kind == "json"


def test_multiples_of_usual_numbers_are_taken() -> None:
    steps = [0.01, 0.05, 0.25, 5, 7, 12, 60, 1000, 1e9, 1e-9, 0.5]
    asked = StructuredOutputs(json={"properties": {f"p{i}": {"multipleOf": step} for i, step in enumerate(steps)}})
    assert asked.kind == "json"
    assert StructuredOutputs(json={"properties": {"multipleOf": {"enum": [{"multipleOf": True}]}}}).kind == "json"


def test_schemas_and_strings_within_a_grammar_are_no_rules_of_it() -> None:
    schema = json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(200)}})
    lines = [f'call_{i}: "{{\\"name\\": (" ": [" args_{i}\nargs_{i}: %json {schema}' for i in range(20)]
    assert StructuredOutputs(grammar="\n".join(lines)).kind == "grammar"


def test_the_schema_true_is_any_json() -> None:
    assert StructuredOutputs(json=True) == StructuredOutputs(json="true") == StructuredOutputs(json={})
