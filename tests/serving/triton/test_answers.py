"""What a client of a real tritonserver gets for a request that can be served."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, SamplingParams
from fly_trt.serving.triton.tensors import OUTPUTS
from triton_server import TritonServer

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:50]]
EOS = 1


@pytest.fixture(scope="module")
def llm(demo_engine: Path) -> Any:
    with LLM(demo_engine) as llm:
        yield llm


def test_50_prompts_get_the_tokens_of_the_python_runtime(server: TritonServer, llm: LLM) -> None:
    wanted = [output.outputs[0] for output in llm.generate(PROMPTS, SamplingParams(max_tokens=160))]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda prompt: server.generate(text_input=prompt, max_tokens=160), PROMPTS))
    assert [answer["text_output"] for answer in answers] == [completion.text for completion in wanted]
    assert [answer["output_ids"] for answer in answers] == [completion.token_ids for completion in wanted]
    assert [answer["finish_reason"] for answer in answers] == [completion.finish_reason for completion in wanted]
    assert sum(answer["total_loosened_tokens"] for answer in answers) > 0  # it was FLy


def test_a_stream_is_the_same_text_in_pieces(server: TritonServer) -> None:
    whole = server.generate(text_input=PROMPTS[0], max_tokens=100)
    over_http = list(server.generate_stream(text_input=PROMPTS[0], max_tokens=100, stream=True))
    over_grpc = server.stream(text_input=PROMPTS[0], max_tokens=100, stream=True).finish()
    assert len(over_http) > 1
    assert len(over_grpc.responses) > 1
    assert "".join(piece["text_output"] for piece in over_http) == whole["text_output"] == over_grpc.text
    assert [len(r["output_ids"][0, 0]) for r in over_grpc.responses] == [
        int(r["sequence_length"][0, 0]) for r in over_grpc.responses
    ]
    assert over_grpc.token_ids == whole["output_ids"]
    for last, before in ((over_http[-1], over_http[:-1]), (over_grpc.responses[-1], over_grpc.responses[:-1])):
        assert last["num_output_tokens"] == whole["num_output_tokens"]
        assert all("num_output_tokens" not in response for response in before)


def test_without_stream_grpc_gets_one_response(server: TritonServer) -> None:
    stream = server.stream(text_input=PROMPTS[0], max_tokens=100).finish()
    (response,) = stream.responses
    assert response["output_ids"].shape == (1, 1, response["sequence_length"][0, 0])
    assert response["acceptance_rate"].shape == response["num_input_tokens"].shape == (1, 1)
    assert stream.token_ids == server.generate(text_input=PROMPTS[0], max_tokens=100)["output_ids"]


def test_outputs_have_the_declared_types(server: TritonServer) -> None:
    types = {"TYPE_STRING": np.object_, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32}
    (response,) = server.stream(text_input=PROMPTS[0], return_log_probs=True).finish().responses
    assert {name: array.dtype.type for name, array in response.items()} == {
        spec.name: types[spec.data_type] for spec in OUTPUTS
    }


def test_token_ids_are_a_prompt_too(server: TritonServer, llm: LLM) -> None:
    token_ids = list(llm.tokenizer.encode(PROMPTS[1]).ids)
    want = server.generate(text_input=PROMPTS[1], max_tokens=60)["output_ids"]
    assert server.generate(input_ids=token_ids, max_tokens=60)["output_ids"] == want
    assert server.stream(input_ids=token_ids, max_tokens=60).finish().token_ids == want


def test_acceptance_is_chosen_per_request(server: TritonServer, llm: LLM) -> None:
    settings = [
        {"acceptance": "exact"},
        {"acceptance": "fly"},
        {"preset": "paper"},
        {"fly_entropy_threshold": 0.05, "fly_window_size": 8},
        {"fly_entropy_threshold": 100.0},
        {"acceptance": "typical", "typical_alpha": 0.25},
        {"acceptance": "relaxed", "relaxed_top_n": 2, "relaxed_delta": 0.375},
        {"exact_first": 9, "exact_within": ["digits", "after:::"], "exact_token_ids": [5], "max_loosened_per_100": 2},
    ]
    for prompt in PROMPTS[:6]:
        for setting in settings:
            params = SamplingParams(max_tokens=80, acceptance=AcceptanceParams(**setting))
            want = llm.generate(prompt, params)[0]
            answer = server.generate(text_input=prompt, max_tokens=80, **setting)
            assert answer["output_ids"] == want.outputs[0].token_ids, setting
            assert answer["total_loosened_tokens"] == want.metrics.num_loosened_tokens, setting
            assert answer["total_saved_tokens"] == want.metrics.num_saved_tokens, setting
            refused = sum(want.metrics.num_refused_loosenings_by_guard.values())
            assert answer["total_refused_loosenings"] == refused, setting
            assert json.loads(answer["guards"]) == want.metrics.guards, setting


def test_draft_tokens_are_chosen_per_request(server: TritonServer, llm: LLM) -> None:
    plain = server.generate(text_input=PROMPTS[2], max_tokens=80, num_draft_tokens=0)
    assert plain["total_draft_tokens"] == plain["acceptance_rate"] == 0
    few = server.generate(text_input=PROMPTS[2], max_tokens=80, num_draft_tokens=8)
    want = llm.generate(PROMPTS[2], SamplingParams(max_tokens=80, num_speculative_tokens=8))[0]
    assert few["output_ids"] == want.outputs[0].token_ids
    assert 0 < few["total_accepted_draft_tokens"] <= few["total_draft_tokens"]
    assert few["acceptance_rate"] == pytest.approx(few["total_accepted_draft_tokens"] / few["total_draft_tokens"])


def test_a_draft_stop_is_chosen_per_request(server: TritonServer, llm: LLM) -> None:
    answers = {}
    for stop in ("none", "confidence"):
        setting = {"draft_stop": stop} | ({"draft_stop_threshold": 0.75} if stop != "none" else {})
        answers[stop] = server.generate(text_input=PROMPTS[2], max_tokens=80, **setting)
        want = llm.generate(PROMPTS[2], SamplingParams(max_tokens=80, **setting))[0]
        assert answers[stop]["output_ids"] == want.outputs[0].token_ids
    assert answers["confidence"]["total_loosened_tokens"] < answers["none"]["total_loosened_tokens"]


def test_sampling_is_that_of_the_python_runtime(server: TritonServer, llm: LLM) -> None:
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 2**64 - 3, "repetition_penalty": 1.1}
    want = llm.generate(PROMPTS[3], SamplingParams(max_tokens=60, **settings))[0].outputs[0].token_ids
    assert server.generate(text_input=PROMPTS[3], max_tokens=60, **settings)["output_ids"] == want


def test_several_sequences_come_side_by_side(server: TritonServer, llm: LLM) -> None:
    settings = {"temperature": 1.5, "seed": 4, "max_tokens": 40}
    want = llm.generate(PROMPTS[4], SamplingParams(n=3, **settings))[0].outputs
    inputs = {"text_input": PROMPTS[4], "num_return_sequences": 3, "pad_id": 7, "temperature": 1.5, "max_tokens": 40}
    (response,) = server.stream(**inputs, seed=np.array([[4]], np.uint64)).finish().responses
    lengths = response["sequence_length"][0].tolist()
    assert lengths == [len(completion.token_ids) for completion in want]
    assert [text.decode() for text in response["text_output"]] == [completion.text for completion in want]
    for row, length, completion in zip(response["output_ids"][0], lengths, want, strict=True):
        assert row[:length].tolist() == completion.token_ids
        assert (row[length:] == 7).all()


def test_log_probabilities_are_those_of_the_python_runtime(server: TritonServer, llm: LLM) -> None:
    want = llm.generate(PROMPTS[5], SamplingParams(max_tokens=50, logprobs=0))[0].outputs[0]
    each = [entry[token].logprob for token, entry in zip(want.token_ids, want.logprobs or (), strict=True)]
    stream = server.stream(text_input=PROMPTS[5], max_tokens=50, stream=True, return_log_probs=True).finish()
    found = [value for response in stream.responses for value in response["output_log_probs"][0, 0].tolist()]
    assert found == pytest.approx(each, abs=1e-5)  # the NumPy of another version
    assert stream.responses[-1]["cum_log_probs"][0, 0] == pytest.approx(sum(each), abs=1e-4)
    assert "output_log_probs" not in server.generate(text_input=PROMPTS[5])


def test_the_prompt_precedes_the_output_where_asked_for(server: TritonServer, llm: LLM) -> None:
    completion = server.generate(text_input=PROMPTS[0], max_tokens=20)
    whole = server.generate(text_input=PROMPTS[0], max_tokens=20, exclude_input_in_output=False)
    assert whole["text_output"] == PROMPTS[0] + completion["text_output"]
    assert whole["output_ids"] == list(llm.tokenizer.encode(PROMPTS[0]).ids) + completion["output_ids"]


def test_the_model_says_that_it_is_ready(server: TritonServer) -> None:
    with urllib.request.urlopen(f"{server.url}/v2/models/fly/ready", timeout=30) as response:
        assert response.status == 200


def test_metrics_tell_what_speculation_did(server: TritonServer) -> None:
    server.settle()
    names = ("drafts", "draft_tokens", "accepted_tokens", "loosened_tokens")
    before = {name: server.metric(f"spec_decode_num_{name}_total") for name in names}
    tokens = server.metric("generation_tokens_total")
    answer = server.generate(text_input=PROMPTS[6], max_tokens=80)
    server.settle()
    assert server.metric("generation_tokens_total") == tokens + answer["num_output_tokens"]
    changes = {name: server.metric(f"spec_decode_num_{name}_total") - before[name] for name in names}
    assert changes["drafts"] > 0
    assert changes["draft_tokens"] == answer["total_draft_tokens"]
    assert changes["accepted_tokens"] == answer["total_accepted_draft_tokens"]
    assert changes["loosened_tokens"] == answer["total_loosened_tokens"]
    (labels,) = server.metrics("num_requests_waiting")
    assert labels == '{instance="fly_0_0",model="fly",version="1"}'
