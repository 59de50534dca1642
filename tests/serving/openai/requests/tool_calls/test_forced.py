"""A call that is forced comes in the model's own syntax: whatever a model samples under the grammar is read back as
calls of the given functions, with arguments that their schemas allow."""

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer, grammar_from
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fly_trt.serving.openai.requests.answer_form import AnswerForm, ToolCalling
from fly_trt.serving.openai.requests.tool_calls import PARSERS, collect

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/city"},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "maxLength": 4}},
}
SWITCH = {"properties": {"on": {"type": "boolean"}, "mode": {"enum": ["a", 'b"}', None]}}, "required": ["on", "mode"]}
SWITCH["additionalProperties"] = False
SCHEMAS: dict[str, Any] = {"weather": WEATHER, "switch": SWITCH, "now": None}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMAS[name]}} for name in SCHEMAS]
NOW = {"type": "object", "additionalProperties": False}
END = "<end>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def make_tokenizer(*markers: str, special: bool = False) -> Tokenizer:
    """Byte-level, with some longer tokens that cut JSON in the middle of things."""
    merged = ['{"', '":', "Ġ{", '"}', "}}", '":Ġ', ",Ġ", "na", "me", '":Ġ{', "ĊĊ", ";Ġ"]
    vocabulary = {text: i for i, text in enumerate([*ALPHABET, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(END, special=True), *(AddedToken(each, special=special) for each in markers)])
    return tokenizer


TOKENIZERS = {
    "markers are text": make_tokenizer(),
    "markers are tokens": make_tokenizer("<tool_call>", "</tool_call>", "<|python_tag|>"),
    "markers are special tokens": make_tokenizer("<tool_call>", "</tool_call>", "<|python_tag|>", special=True),
}
VOCABULARIES = {
    name: LLTokenizer(tokenizer.to_str(), n_vocab=tokenizer.get_vocab_size(), eos_token=[tokenizer.token_to_id(END)])
    for name, tokenizer in TOKENIZERS.items()
}


def form_of(parser: str, tokenizer: str, **body: Any) -> AnswerForm:
    return ToolCalling(parser, "", TOKENIZERS[tokenizer]).read(tools=TOOLS, **body)


def sample(form: AnswerForm, tokenizer: str, seed: int) -> str:
    """What a model that knows nothing would write."""
    assert form.structured_outputs is not None
    matcher = LLMatcher(VOCABULARIES[tokenizer], grammar_from("grammar", form.structured_outputs.text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    end, ids, rng = TOKENIZERS[tokenizer].token_to_id(END), [], random.Random(seed)
    while not matcher.is_stopped():
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        token = end if end in allowed and rng.random() < 0.5 else rng.choice(allowed)
        if token == end:
            break
        assert matcher.consume_token(token)
        ids.append(token)
    return TOKENIZERS[tokenizer].decode(ids, skip_special_tokens=False)


def read(form: AnswerForm, text: str) -> tuple[str, list[tuple[str, Any]]]:
    content, calls = collect(form.new_reader().read(text, is_last=True))
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name] or NOW)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("parser", PARSERS)
def test_required_brings_one_call_or_several(parser: str, tokenizer: str) -> None:
    form = form_of(parser, tokenizer, tool_choice="required")
    found = [read(form, sample(form, tokenizer, seed)) for seed in range(20)]
    assert {content for content, _ in found} == {""}
    numbers = {len(calls) for _, calls in found}
    assert min(numbers) == 1
    assert max(numbers) > 1
    assert {name for _, calls in found for name, _ in calls} == set(SCHEMAS)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("parser", PARSERS)
def test_a_named_function_is_called_once(parser: str, tokenizer: str) -> None:
    form = form_of(parser, tokenizer, tool_choice={"type": "function", "function": {"name": "weather"}})
    for seed in range(6):
        content, [(name, _)] = read(form, sample(form, tokenizer, seed))
        assert (content, name) == ("", "weather")


@pytest.mark.parametrize("parser", PARSERS)
def test_without_parallel_calls_there_is_one(parser: str) -> None:
    form = form_of(parser, "markers are text", tool_choice="required", parallel_tool_calls=False)
    assert {len(read(form, sample(form, "markers are text", seed))[1]) for seed in range(12)} == {1}


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "switch", "arguments": {"on": true, "mode": "a"}}\n</tool_call>'),
        ("llama3_json", '{"name": "switch", "parameters": {"on": true, "mode": "a"}}'),
    ],
)
def test_the_text_is_what_the_model_was_trained_on(parser: str, text: str) -> None:
    form = form_of(parser, "markers are tokens", tool_choice="required")
    assert form.structured_outputs is not None
    grammar = grammar_from("grammar", form.structured_outputs.text)
    matcher = LLMatcher(VOCABULARIES["markers are tokens"], grammar, log_level=0)
    assert matcher.consume_tokens(TOKENIZERS["markers are tokens"].encode(text).ids)
    assert matcher.is_accepting()


@pytest.mark.parametrize("parser", PARSERS)
def test_an_answer_of_a_form_is_that_or_calls(parser: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    schema["additionalProperties"] = False
    given = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    form = form_of(parser, "markers are text", response_format=given)
    found = [read(form, sample(form, "markers are text", seed)) for seed in range(30)]
    answers = [json.loads(content) for content, calls in found if not calls]
    assert answers
    for answer in answers:
        jsonschema.validate(answer, schema)
    assert {content for content, calls in found if calls} == {""}
    assert any(name == "weather" for _, calls in found for name, _ in calls)


def test_a_special_marker_is_shown_to_the_parser_and_no_other_special_token() -> None:
    assert form_of("hermes", "markers are special tokens").shown_special_tokens == ("<tool_call>", "</tool_call>")
    assert form_of("llama3_json", "markers are special tokens").shown_special_tokens == ("<|python_tag|>",)
    assert form_of("hermes", "markers are tokens").shown_special_tokens == ()
    assert form_of("hermes", "markers are special tokens", tool_choice="none").shown_special_tokens == ()
