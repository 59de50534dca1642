"""A client's tensors, as Triton hands them over, become the request that a caller in Python would make."""

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_trt import AcceptanceParams, FlyError, RequestError, RequestOutputKind, SamplingParams, StructuredOutputs
from fly_trt.serving.triton.request import ClientRequest, read_request
from fly_trt.serving.triton.tensors import INPUTS

SPECS = {spec.name: spec for spec in INPUTS}
DTYPES = {
    "TYPE_STRING": np.object_,
    "TYPE_INT32": np.int32,
    "TYPE_UINT64": np.uint64,
    "TYPE_FP32": np.float32,
    "TYPE_BOOL": np.bool_,
}
GREEDY = SamplingParams(stop=[], output_kind=RequestOutputKind.FINAL_ONLY)


def tensor(name: str, value: Any) -> np.ndarray:
    """[1, d], as the python backend's as_numpy() gives it: text as an object array of bytes."""
    values = value if isinstance(value, list) else [value]
    values = [item.encode() if isinstance(item, str) else item for item in values]
    return np.array(values, DTYPES[SPECS[name].data_type]).reshape(1, -1)


def read(*, parameters: str = "{}", excludes_input: bool = True, **inputs: Any) -> ClientRequest:
    tensors = {name: tensor(name, value) for name, value in ({"text_input": "Tell me"} | inputs).items()}
    return read_request(tensors, parameters, exclude_input_in_output=excludes_input)


def params(**inputs: Any) -> SamplingParams:
    return read(**inputs).params


def refusal(**inputs: Any) -> str:
    with pytest.raises(FlyError) as refused:
        read(**inputs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def changed(**settings: Any) -> SamplingParams:
    """What a request with nothing but a prompt is, with these settings."""
    return SamplingParams(**{"stop": [], "output_kind": RequestOutputKind.FINAL_ONLY} | settings)


def test_a_prompt_alone_is_a_greedy_request_with_pythons_defaults() -> None:
    request = read()
    assert request == ClientRequest(prompt="Tell me", params=GREEDY, includes_input=False, pad_id=0)
    assert request.params.max_tokens == SamplingParams().max_tokens
    assert not request.is_streamed


@pytest.mark.parametrize(
    ("name", "value", "settings"),
    [
        ("max_tokens", 7, {"max_tokens": 7}),
        ("min_tokens", 3, {"min_tokens": 3}),
        ("min_length", 3, {"min_tokens": 3}),
        ("stream", True, {"output_kind": RequestOutputKind.DELTA}),
        ("stream", False, {}),
        ("stop_words", ["###", "ü"], {"stop": ["###", "ü"]}),
        ("bad_words", ["one", " two"], {"bad_words": ["one", " two"]}),
        ("end_id", 5, {"ignore_eos": True, "stop_token_ids": [5]}),
        ("temperature", 0.5, {"temperature": 0.5}),
        ("min_p", 0.25, {"min_p": 0.25, "temperature": 1.0}),
        ("seed", 11, {"seed": 11}),
        ("random_seed", 11, {"seed": 11}),
        ("repetition_penalty", 1.5, {"repetition_penalty": 1.5}),
        ("presence_penalty", -0.5, {"presence_penalty": -0.5}),
        ("frequency_penalty", 0.75, {"frequency_penalty": 0.75}),
        ("beam_width", 1, {}),
        ("num_return_sequences", 1, {"n": 1}),
        ("return_log_probs", True, {"logprobs": 0}),
        ("return_log_probs", False, {}),
        ("num_draft_tokens", 4, {"num_speculative_tokens": 4}),
        ("num_draft_tokens", 0, {"num_speculative_tokens": 0}),
        ("acceptance", "exact", {"acceptance": AcceptanceParams(acceptance="exact")}),
        ("preset", "paper", {"acceptance": AcceptanceParams(preset="paper")}),
        ("fly_entropy_threshold", 0.3, {"acceptance": AcceptanceParams(fly_entropy_threshold=0.3)}),
        ("fly_window_size", 8, {"acceptance": AcceptanceParams(fly_window_size=8)}),
        ("exact_within", ["code", "json"], {"acceptance": AcceptanceParams(exact_within=["code", "json"])}),
        ("exact_token_ids", [5, 7], {"acceptance": AcceptanceParams(exact_token_ids=[5, 7])}),
        ("cactus_delta", 0.5, {"acceptance": AcceptanceParams(cactus_delta=0.5)}),
        ("draft_stop", "adasd", {"draft_stop": "adasd"}),
        ("draft_stop_threshold", 0.75, {"draft_stop_threshold": 0.75}),
        ("guided_decoding_guide_type", "json", {"structured_outputs": StructuredOutputs(json=True)}),
    ],
)
def test_each_input_is_one_setting_and_changes_no_other(name: str, value: Any, settings: dict[str, Any]) -> None:
    assert read(**{name: value}) == ClientRequest(prompt="Tell me", params=changed(**settings))


@pytest.mark.parametrize(
    ("guide_type", "guide", "form"),
    [
        ("json", "", StructuredOutputs(json=True)),
        ("json_schema", '{"type": "integer"}', StructuredOutputs(json={"type": "integer"})),
        ("regex", "[0-9]+", StructuredOutputs(regex="[0-9]+")),
        ("ebnf_grammar", 'root ::= "a"', StructuredOutputs(grammar='root ::= "a"')),
    ],
)
def test_a_guide_is_read_as_its_type_says(guide_type: str, guide: str, form: StructuredOutputs) -> None:
    asked = read(guided_decoding_guide_type=guide_type, guided_decoding_guide=guide)
    assert asked.params == changed(structured_outputs=form)


def test_all_inputs_together_are_all_settings() -> None:
    asked = read(
        max_tokens=50,
        min_tokens=2,
        stream=True,
        stop_words=["a", "b"],
        bad_words=["c"],
        end_id=7,
        pad_id=3,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        seed=1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        num_return_sequences=2,
        return_log_probs=True,
        num_draft_tokens=6,
        acceptance="fly",
        preset="vllm",
        fly_entropy_threshold=0.4,
        fly_window_size=5,
    )
    acceptance = AcceptanceParams(acceptance="fly", preset="vllm", fly_entropy_threshold=0.4, fly_window_size=5)
    want = SamplingParams(
        n=2,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        bad_words=["c"],
        max_tokens=50,
        min_tokens=2,
        stop=["a", "b"],
        stop_token_ids=[7],
        ignore_eos=True,
        logprobs=0,
        acceptance=acceptance,
        num_speculative_tokens=6,
        output_kind=RequestOutputKind.DELTA,
    )
    assert asked == ClientRequest(prompt="Tell me", params=want, pad_id=3)


def test_values_are_pythons_own_types() -> None:
    """SamplingParams refuses NumPy's."""
    asked = params(max_tokens=5, temperature=0.5, seed=3, end_id=4, num_return_sequences=2)
    assert asked.stop_token_ids is not None
    values = (asked.max_tokens, asked.temperature, asked.seed, asked.stop_token_ids[0], asked.n)
    assert [type(value) for value in values] == [int, float, int, int, int]


@pytest.mark.parametrize(("older", "newer"), [("min_length", "min_tokens"), ("random_seed", "seed")])
def test_an_older_name_beside_the_newer_one_is_refused(older: str, newer: str) -> None:
    assert refusal(**{older: 3, newer: 3}) == f"{older}: the same as {newer}: give one of them"


@pytest.mark.parametrize(
    ("words", "want"), [("", []), (["", ""], []), (["", "a", ""], ["a"]), ([" "], [" "]), (["a", "a"], ["a", "a"])]
)
def test_empty_stop_and_bad_words_are_none(words: Any, want: list[str]) -> None:
    """TensorRT-LLM's examples send "" for none."""
    asked = params(stop_words=words, bad_words=words)
    assert asked.stop_strings == tuple(want)
    assert asked.bad_words == (want or None)


@given(st.decimals(min_value="0.0001", max_value="1000", places=4))
def test_a_32_bit_number_is_the_decimal_that_the_client_wrote(number: Decimal) -> None:
    digits = number.normalize().as_tuple().digits
    if len(digits) <= 6:  # what float32 keeps of any decimal
        assert params(temperature=float(number)).temperature == float(number)


@given(st.floats(min_value=2**-140, max_value=2.0**100, width=32))
def test_any_32_bit_number_stays_that_number(number: float) -> None:
    assert np.float32(params(temperature=number).temperature) == np.float32(number)


@given(st.integers(0, 2**64 - 1))
def test_any_64_bit_seed_is_kept(seed: int) -> None:
    assert params(seed=seed).seed == params(random_seed=seed).seed == seed


@pytest.mark.parametrize(
    ("inputs", "temperature", "top_k", "top_p"),
    [
        ({"top_k": 50}, 1.0, 50, 1.0),
        ({"top_p": 0.9}, 1.0, 0, 0.9),
        ({"top_k": 1}, 0.0, 1, 1.0),
        ({"top_k": 1, "top_p": 0.9}, 1.0, 1, 0.9),
        ({"top_k": 0}, 0.0, 0, 1.0),
        ({"top_k": -1}, 0.0, -1, 1.0),
        ({"top_p": 1.0}, 0.0, 0, 1.0),
        ({"top_p": 0.0}, 0.0, 0, 1.0),
        ({"top_k": 50, "top_p": 0.0}, 1.0, 50, 1.0),
        ({"top_k": 50, "temperature": 0.0}, 0.0, 50, 1.0),
        ({"top_p": 0.9, "temperature": 0.4}, 0.4, 0, 0.9),
        ({"temperature": 0.4}, 0.4, 0, 1.0),
    ],
)
def test_top_k_or_top_p_without_a_temperature_sample_at_1(
    inputs: dict[str, Any], temperature: float, top_k: int, top_p: float
) -> None:
    assert params(**inputs) == changed(temperature=temperature, top_k=top_k, top_p=top_p)


def test_end_id_stands_for_the_models_own_end_and_minus_1_for_none() -> None:
    asked = params(end_id=0)
    assert (asked.ignore_eos, asked.stop_token_ids) == (True, [0])
    endless = params(end_id=-1)
    assert (endless.ignore_eos, endless.stop_token_ids) == (True, None)


def test_pad_id_defaults_to_0_and_minus_1_is_the_default() -> None:
    assert [read(pad_id=pad_id).pad_id for pad_id in (5, 0, -1)] == [5, 0, 0]


@pytest.mark.parametrize("excludes_input", [False, True])
def test_the_models_default_says_whether_the_prompt_precedes_the_output(excludes_input: bool) -> None:
    assert read(excludes_input=excludes_input).includes_input is not excludes_input
    for asked in (False, True):
        request = read(excludes_input=excludes_input, exclude_input_in_output=asked)
        assert request == ClientRequest(prompt="Tell me", params=GREEDY, includes_input=not asked)


def test_a_stream_has_only_what_is_new() -> None:
    request = read(stream=True, exclude_input_in_output=False)
    assert request.is_streamed
    assert not request.includes_input


def test_a_prompt_is_text_or_token_ids() -> None:
    assert read(text_input="naïve ✓ 漢").prompt == "naïve ✓ 漢"
    ids = {"input_ids": tensor("input_ids", [5, 6, 7])}
    assert read_request(ids, "", exclude_input_in_output=True).prompt == {"prompt_token_ids": [5, 6, 7]}
    assert "got both: give one of them" in refusal(input_ids=[5, 6])
    assert "got both" in refusal(text_input="", input_ids=[5])
    with pytest.raises(RequestError, match="text_input or input_ids, got neither: give one of them"):
        read_request({}, "", exclude_input_in_output=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, [b"fine", b"na\xefve"]) for name in ("stop_words", "bad_words")]
    + [(name, [b"na\xefve"]) for name in ("text_input", "acceptance", "preset")],
)
def test_text_that_is_not_utf_8_is_refused_by_name(name: str, value: list[bytes]) -> None:
    assert refusal(**{name: value}).startswith(f"{name}: not UTF-8 text")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"beam_width": 2}, "beam_width: there is no beam search: use 1, or num_return_sequences"),
        ({"beam_width": 0}, "beam_width: there is no beam search"),
        ({"max_tokens": 0}, "max_tokens 0: expected a whole number, at least 1"),
        ({"min_tokens": -1}, "min_tokens -1"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens 9: more than max_tokens 5"),
        ({"temperature": -0.1}, "temperature -0.1: expected a number at least 0"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": -2}, "top_k -2"),
        ({"top_p": 1.1}, "top_p 1.1: expected a number above 0 and at most 1"),
        ({"top_p": -0.1}, "top_p -0.1"),
        ({"top_p": math.nan}, "top_p nan"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0: expected a number above 0"),
        ({"presence_penalty": 2.5}, "presence_penalty 2.5"),
        ({"frequency_penalty": -2.5}, "frequency_penalty -2.5"),
        ({"num_return_sequences": 0}, "n 0"),
        ({"num_return_sequences": 2}, "greedy completions are all the same"),
        ({"num_draft_tokens": -1}, "num_speculative_tokens -1"),
        ({"acceptance": "loose"}, "acceptance 'loose': expected one of"),
        ({"acceptance": ""}, "acceptance ''"),
        ({"preset": "strict"}, "preset 'strict': expected one of"),
        ({"fly_entropy_threshold": -1.0}, "fly_entropy_threshold -1.0: expected a number >= 0"),
        ({"fly_window_size": -1}, "fly_window_size -1"),
        ({"guided_decoding_guide_type": "xml"}, "guided_decoding_guide_type 'xml': expected one of json, json_schema"),
        ({"guided_decoding_guide": "a"}, "guided_decoding_guide_type None: expected one of json, json_schema, regex"),
        ({"guided_decoding_guide_type": "regex"}, "guided_decoding_guide_type 'regex': needs a guided_decoding_guide"),
        (
            {"guided_decoding_guide_type": "json", "guided_decoding_guide": "{}"},
            "guided_decoding_guide_type 'json': has no guide: leave it out, or use json_schema",
        ),
        (
            {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"},
            "structured_outputs.json: not JSON",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(inputs: dict[str, Any], message: str) -> None:
    assert message in refusal(**inputs)


@pytest.mark.parametrize("name", ["max_token", "top_K", "min_new_tokens", "seeds", "prompt", "_x"])
def test_a_misspelt_input_is_refused_and_the_right_names_are_told(name: str) -> None:
    message = refusal(parameters=json.dumps({name: 5}))
    assert message.startswith(f"unknown input {name!r}: expected one of text_input, ")
    assert all(spec.name in message for spec in INPUTS)


@pytest.mark.parametrize(
    "parameters",
    [
        "",
        "{}",
        '{"priority": 1, "timeout": 5, "id": "x", "headers": {}, "binary_data_output": true}',
        '{"sequence_id": 1, "sequence_start": true, "sequence_end": true}',
        '{"triton_enable_empty_final_response": true}',
        '{"x-request-id": "7", "user-agent": "curl"}',
    ],
)
def test_what_tritons_frontends_add_is_no_input(parameters: str) -> None:
    assert read(parameters=parameters) == read()


@given(st.data())
def test_any_values_of_the_declared_types_are_served_or_refused_in_one_line(data: st.DataObject) -> None:
    values = {
        "TYPE_STRING": st.sampled_from(["", "a", "fly", "paper", "ü", b"\xff", "x\ny"]),
        "TYPE_INT32": st.one_of(st.integers(-2, 3), st.integers(-(2**31), 2**31 - 1)),
        "TYPE_UINT64": st.integers(0, 2**64 - 1),
        "TYPE_FP32": st.floats(width=32),
        "TYPE_BOOL": st.booleans(),
    }
    names = data.draw(st.lists(st.sampled_from(sorted(SPECS)), unique=True, max_size=6))
    tensors = {}
    for name in names:
        of_type = values[SPECS[name].data_type]
        drawn = data.draw(st.lists(of_type, max_size=3)) if SPECS[name].is_list else data.draw(of_type)
        tensors[name] = tensor(name, drawn)
    try:
        request = read_request(tensors, "{}", exclude_input_in_output=True)
    except FlyError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert ("text_input" in tensors) != ("input_ids" in tensors)
        assert request.is_streamed == bool(tensors.get("stream", np.array([False])).item())
    assert "\n" not in refusal
