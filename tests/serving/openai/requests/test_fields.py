"""Which fields a body may have, which are refused, and what holds where it says nothing."""

import contextlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fly_trt import ConfigError, RequestError
from fly_trt.params import request_settings
from fly_trt.serving.openai.requests.protocol import REFUSED, ChatCompletionRequest, CompletionRequest
from fly_trt.serving.openai.requests.sampling import Defaults, chat_params, completion_params

PROMPT = {"prompt": "a"}
CHAT = {"messages": [{"role": "user", "content": "a"}]}
WRONG = {
    "model": 5,
    "prompt": {"text": "a"},
    "stream": "yes",
    "stream_options": {"include_usage": 1},
    "n": 1.5,
    "temperature": "hot",
    "top_p": True,
    "seed": "x",
    "stop": [5],
    "presence_penalty": [],
    "frequency_penalty": {},
    "logit_bias": {"5": "x"},
    "max_tokens": "16",
    "logprobs": True,
    "echo": 1,
    "top_k": 2.5,
    "min_p": "x",
    "repetition_penalty": "x",
    "min_tokens": "x",
    "ignore_eos": 1,
    "bad_words": "word",
    "stop_token_ids": ["5"],
    "include_stop_str_in_output": "x",
    "skip_special_tokens": 0,
    "prompt_logprobs": True,
    "structured_outputs": "json",
    "return_token_ids": 1,
    "return_tokens_as_token_ids": 1,
    "request_id": "a b",
    "rejection_sample_method": "synthetic",
    "fly_entropy_top_k": "x",
    "num_speculative_tokens": "x",
    "speculation_trace": 1,
    "acceptance": 5,
    "fly_window_size": 1.5,
    "exact_token_ids": [1.5],
    "exact_within": "code",
    "draft_stop_threshold": "x",
    "user": 5,
    "metadata": "x",
}


@pytest.fixture(scope="module")
def post(demo: Any) -> Any:
    with httpx.Client(base_url=demo.base_url) as client:
        headers = {"content-type": "application/json"}
        yield lambda body, path="/v1/completions": client.post(path, content=json.dumps(body), headers=headers)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_type_is_refused_with_the_name_of_its_field(post: Any, name: str) -> None:
    error = post(PROMPT | {name: WRONG[name]}).json()["error"]
    assert error["param"].split(".")[0].split("[")[0] == name
    assert name in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", [*REFUSED, "temprature", "guided_json", "extra_body"])
def test_what_is_not_supported_is_refused_by_name(post: Any, name: str) -> None:
    for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
        response = post(body | {name: 7}, path)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"temperature": 10**400}, "temperature"),
        ({"fly_entropy_threshold": 10**400}, "fly_entropy_threshold"),
        ({"temperature": -1}, "temperature -1"),
        ({"top_p": 0}, "top_p 0"),
        ({"n": 0}, "n 0"),
        ({"n": 2, "temperature": 0}, "greedy completions are all the same"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"max_tokens": -3}, "max_tokens -3"),
        ({"logprobs": 21}, "logprobs 21"),
        ({"stop": ["a", ""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias 'x': expected a token id"),
        ({"logit_bias": {"-1": 1}}, "logit_bias '-1': expected a token id"),
        ({"logit_bias": {"9" * 5000: 1}}, "expected a token id"),
        ({"logit_bias": {"896": 1}}, "logit_bias: 896 is not a token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options: has no effect without stream"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs: not in a stream"),
        ({"num_speculative_tokens": 16}, "num_speculative_tokens 16: served with 15"),
        ({"fly_window_size": -1}, "fly_window_size -1"),
        ({"fly_window_size": 3, "acceptance": "exact"}, "fly_window_size 3: has no effect with acceptance 'exact'"),
        ({"fly_entropy_top_k": 5}, "fly_entropy_top_k 5: the engine was built for 3"),
        ({"draft_stop": "guess"}, "draft_stop 'guess'"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs: unknown field 'xml'"),
        ({"prompt": []}, "prompt: expected a text"),
        ({"prompt": ["a", 5]}, "prompt: expected a text"),
        ({"prompt": [[5], []]}, "prompt: expected a text"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "\ud800"}, "the prompt"),
    ],
)
def test_a_value_that_cannot_be_served_is_named(post: Any, field: dict[str, Any], message: str) -> None:
    response = post(PROMPT | field)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_an_unknown_model_is_not_found(post: Any) -> None:
    response = post(PROMPT | {"model": "gpt-4"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_what_ordinary_clients_send_besides_is_taken(post: Any) -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "best_of": 1,
        "suffix": None,
        "priority": 0,
        "modalities": ["text"],
    }
    plain = post(PROMPT | {"temperature": 0, "max_tokens": 4}).json()["choices"]
    assert post(PROMPT | harmless | {"temperature": 0, "max_tokens": 4}).json()["choices"] == plain
    nothing = dict.fromkeys(CompletionRequest.model_fields.keys() - {"prompt"})
    assert post(nothing | PROMPT | {"temperature": 0, "max_tokens": 4}).json()["choices"] == plain


def test_more_prompts_than_an_engine_queues_are_refused(post: Any) -> None:
    message = post({"prompt": ["a"] * 600, "n": 2}).json()["error"]["message"]
    assert message == "prompt: 600 with n 2 are more than max_queue_size 1024: send several requests"


def test_a_request_may_name_itself(post: Any) -> None:
    response = post(PROMPT)
    assert response.json()["id"] == f"cmpl-{response.headers['x-request-id']}"
    assert post(PROMPT | {"request_id": "mine-1"}).json()["id"] == "cmpl-mine-1"
    assert post(CHAT | {"request_id": "mine-1", "max_tokens": 1}, "/v1/chat/completions").json()["id"] == (
        "chatcmpl-mine-1"
    )


def test_every_declared_setting_is_a_field() -> None:
    for model in (CompletionRequest, ChatCompletionRequest):
        assert request_settings().keys() <= model.model_fields.keys()


@given(
    st.sampled_from(sorted(CompletionRequest.model_fields)),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)
def test_whatever_a_field_holds_is_taken_or_refused(name: str, value: Any) -> None:
    with contextlib.suppress(ValidationError, RequestError, ConfigError):  # and nothing else
        completion_params(CompletionRequest.model_validate(PROMPT | {name: value}), Defaults({"temperature": 1.0}))


def read(body: dict[str, Any], defaults: Defaults, kind: str = "completion") -> Any:
    if kind == "chat":
        return chat_params(ChatCompletionRequest.model_validate(CHAT | body), defaults)
    return completion_params(CompletionRequest.model_validate(PROMPT | body), defaults)


def test_defaults_are_those_of_openai(tmp_path: Path) -> None:
    defaults = Defaults.read(tmp_path, "auto", {})  # the directory says nothing
    assert (read({}, defaults).temperature, read({}, defaults).max_tokens) == (1.0, 16)
    assert (read({}, defaults, "chat").temperature, read({}, defaults, "chat").max_tokens) == (1.0, None)


def test_the_model_says_how_it_wants_to_be_sampled(tmp_path: Path) -> None:
    config = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, 2]}))
    defaults = Defaults.read(tmp_path, "auto", {})
    params = read({}, defaults)
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.6, 20, 0.95, 1.05)
    params = read({"temperature": 0, "top_k": 0}, defaults, "chat")
    assert (params.temperature, params.top_k, params.top_p) == (0, 0, 0.95)
    assert read({"temperature": None}, defaults).temperature == 0.6
    assert read({}, Defaults.read(tmp_path, "vllm", {})).temperature == 1.0
    assert read({}, Defaults.read(tmp_path / "other", str(tmp_path), {})).top_k == 20


def test_the_operator_says_it_over_the_model(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    defaults = Defaults.read(tmp_path, "auto", {"temperature": 0.1, "max_new_tokens": 50})
    params = read({}, defaults)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.1, 20, 50)
    assert read({}, defaults, "chat").max_tokens == 50
    assert read({"max_completion_tokens": 5}, defaults, "chat").max_tokens == 5


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("{", {}, "not readable"),
        ("[]", {}, "expected a JSON object, got list"),
        ('{"temperature": -1}', {}, "temperature -1"),
        ("{}", {"top_k": "x"}, "override_generation_config: top_k 'x'"),
        ("{}", {"topk": 5}, "override_generation_config: unknown field 'topk'"),
    ],
)
def test_defaults_that_cannot_be_sampled_with_are_found_at_the_start(
    tmp_path: Path, text: str, override: dict[str, Any], message: str
) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Defaults.read(tmp_path, "auto", override)


def test_a_missing_folder_of_defaults_is_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not readable"):
        Defaults.read(tmp_path, str(tmp_path / "nowhere"), {})
