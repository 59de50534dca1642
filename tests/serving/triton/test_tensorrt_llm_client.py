"""A client that was written for TensorRT-LLM's Triton repository, by its documentation and its own client program.

Such clients send [1, 1] tensors to a model named ensemble or tensorrt_llm_bls, always with beam_width, over a gRPC
stream, and read text_output as [1]; over HTTP they send empty stop_words and bad_words.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, SamplingParams
from hosted_model import hosted_model
from triton_server import TritonServer

PROMPTS = [record["prompt"] for record in load_eval_prompts()[90:94]]


@pytest.fixture(scope="module", autouse=True)
def ensemble(server: TritonServer, demo_engine: Path) -> Iterator[None]:
    # That repository answers with the prompt in front unless told otherwise.
    with hosted_model(server, demo_engine, "ensemble", exclude_input_in_output=False):
        yield


@pytest.fixture(scope="module")
def texts(demo_engine: Path) -> list[str]:
    with LLM(demo_engine) as llm:
        return [output.outputs[0].text for output in llm.generate(PROMPTS, SamplingParams(max_tokens=60))]


def request(prompt: str, stream: bool, **more: Any) -> dict[str, Any]:
    inputs = {
        "text_input": np.array([[prompt]]).astype(object),
        "max_tokens": np.array([[60]], np.int32),
        "stream": np.array([[stream]], bool),
        "beam_width": np.array([[1]], np.int32),
        "temperature": np.array([[0.0]], np.float32),
    }
    return inputs | more


def test_without_streaming_the_prompt_comes_first(server: TritonServer, texts: list[str]) -> None:
    for prompt, text in zip(PROMPTS, texts, strict=True):
        (response,) = server.stream("ensemble", **request(prompt, stream=False)).finish().responses
        assert response["text_output"].shape == (1,)
        assert response["text_output"][0].decode() == prompt + text


def test_a_stream_holds_what_is_new(server: TritonServer, texts: list[str]) -> None:
    for prompt, text in zip(PROMPTS, texts, strict=True):
        # Said in every request, also where it has no meaning.
        inputs = request(prompt, stream=True, exclude_input_in_output=np.array([[False]], bool))
        stream = server.stream("ensemble", **inputs).finish()
        assert stream.text == text
        assert len(stream.responses) > 1


def test_stop_words_end_the_text_before_them(server: TritonServer, texts: list[str]) -> None:
    word = texts[0].split()[2]
    inputs = request(PROMPTS[0], stream=False, stop_words=np.array([["never said", word]], dtype=object))
    stream = server.stream("ensemble", **inputs).finish()
    assert stream.text == PROMPTS[0] + texts[0][: texts[0].index(word)]


def test_the_curl_command_of_its_documentation(server: TritonServer, texts: list[str]) -> None:
    body = {"text_input": PROMPTS[0], "max_tokens": 60, "bad_words": "", "stop_words": ""}
    assert server.generate("ensemble", **body)["text_output"] == PROMPTS[0] + texts[0]


def test_the_end_token_can_be_named(server: TritonServer, texts: list[str]) -> None:
    inputs = request(PROMPTS[0], stream=False, end_id=np.array([[1]], np.int32), pad_id=np.array([[1]], np.int32))
    assert server.stream("ensemble", **inputs).finish().text == PROMPTS[0] + texts[0]


def test_the_names_of_older_releases(server: TritonServer, texts: list[str]) -> None:
    inputs = request(
        PROMPTS[0],
        stream=True,
        min_length=np.array([[50]], np.int32),
        random_seed=np.array([[3]], np.uint64),
        return_log_probs=np.array([[True]], bool),
    )
    stream = server.stream("ensemble", **inputs).finish()
    assert len(stream.token_ids) >= 50
    assert stream.text.startswith(texts[0][:20])
    assert all(response["output_log_probs"].ndim == 3 for response in stream.responses)
    assert all(response["cum_log_probs"].shape == (1, 1) for response in stream.responses)
