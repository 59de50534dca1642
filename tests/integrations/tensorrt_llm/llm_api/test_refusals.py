"""What a directory for TensorRT-LLM cannot be asked for is refused by name, when it is loaded and by each request."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fly_trt import LLM, AcceptanceParams, ConfigError, EngineError, RequestError, SamplingParams
from served_by_tensorrt_llm import NUM_DRAFT_TOKENS, SPECULATIVE_CONFIG


@pytest.fixture(scope="module")
def llm_for_refusals(directory: Path, demo_engine: Path, stand_in_of: Any) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        for _ in stand_in_of(demo_engine, patch):
            with LLM(directory) as llm:
                yield llm


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"logprobs": 1}, r"logprobs 1: is not to be had of its one-model modes \(TensorRT-LLM\): leave it out, or"),
        ({"prompt_logprobs": 0}, "prompt_logprobs 0: is not to be had"),
        ({"logit_bias": {3: 1.0}}, r"logit_bias \{3: 1.0\}: is not to be had"),
        ({"bad_words": ["no"]}, r"bad_words \['no'\]: is not to be had"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs: is not to be had of its one-model modes"),
        ({"speculation_trace": True}, "speculation_trace True: is not to be had: it says nothing of its rounds"),
        ({"min_tokens": 4}, "min_tokens 4: is not read by its one-model modes"),
        ({"presence_penalty": 0.5}, "presence_penalty 0.5: is not read"),
        ({"frequency_penalty": 0.5}, "frequency_penalty 0.5: is not read"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1: is not read"),
        ({"temperature": 0.7}, "temperature 0.7: TensorRT-LLM 1.2 takes the most probable"),
        ({"num_speculative_tokens": 4}, "num_speculative_tokens 4: is the server's for all requests"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens 0: is the server's for all requests"),
        ({"draft_stop": "confidence"}, "draft_stop 'confidence': is not to be had: its drafts are all of one length"),
        ({"acceptance": AcceptanceParams(acceptance="exact")}, "acceptance 'exact': the server accepts by 'fly'"),
        ({"acceptance": AcceptanceParams(preset="paper")}, "preset 'paper': the server accepts by 'fly' for all"),
        ({"acceptance": AcceptanceParams(fly_entropy_threshold=0.1)}, "fly_entropy_threshold 0.1: the server accepts"),
        ({"acceptance": AcceptanceParams(fly_window_size=2)}, "fly_window_size 2: the server accepts by 'fly'"),
        ({"acceptance": AcceptanceParams(exact_first=2)}, "exact_first 2: is not to be had: guards are the host's"),
        ({"acceptance": AcceptanceParams(acceptance="margin")}, "acceptance 'margin': the server accepts by 'fly'"),
    ],
)
def test_what_no_server_of_it_can_do_for_a_request_is_refused_by_name(
    asked: dict[str, Any], said: str, llm_for_refusals: LLM
) -> None:
    with pytest.raises((RequestError, ConfigError), match=said) as raised:
        llm_for_refusals.generate("Hello", SamplingParams(**asked))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_speculative_tokens": NUM_DRAFT_TOKENS},
        {"draft_stop": "none"},
        {"acceptance": AcceptanceParams(acceptance="fly", preset="reference")},
        {"acceptance": AcceptanceParams(fly_entropy_threshold=0.3, fly_window_size=6)},
        {"seed": 3},
    ],
)
def test_what_the_server_does_anyway_may_be_said(asked: dict[str, Any], llm_for_refusals: LLM) -> None:
    assert llm_for_refusals.generate("Hello", SamplingParams(max_tokens=2, **asked))


def test_samplers_read_no_seed_and_no_least_probability(make_directory: Any, stand_in: Any) -> None:
    directory = make_directory(speculative_config=SPECULATIVE_CONFIG | {"allow_advanced_sampling": True})
    with LLM(directory) as llm:
        for asked in ({"seed": 1}, {"min_p": 0.1}):
            (name,) = asked
            with pytest.raises(RequestError, match=f"{name} .*: is not read by its samplers"):
                llm.generate("Hello", SamplingParams(temperature=0.5, **asked))


def test_sampling_needs_no_flag_from_1_3_on(directory: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", "1.3.0")
    with LLM(directory) as llm:
        assert llm.generate("Hello", SamplingParams(temperature=0.5, max_tokens=2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"num_speculative_tokens": 4},
            "num_speculative_tokens 4: pair was built for 10, and TensorRT-LLM has it from",
        ),
        ({"num_speculative_tokens": 4}, "or rebuild with --max-draft-len"),
        ({"method": "ngram"}, "method 'ngram': pair was built for 'draft_model'"),
        ({"draft_stop": "confidence"}, "draft_stop 'confidence': pair was built for None"),
        ({"adaptive_acceptance": True}, "adaptive_acceptance True: pair was built for False"),
        ({"acceptance": "margin"}, "acceptance 'margin': of TensorRT-LLM expected 'fly' or 'exact'"),
        ({"exact_first": 3}, "exact_first 3: guards are the host's, TensorRT-LLM has none"),
        ({"max_loosened_per_100": 3}, "max_loosened_per_100 3: guards are the host's"),
    ],
)
def test_what_it_was_not_built_for_is_refused_before_anything_starts(
    settings: dict[str, Any], said: str, directory: Path
) -> None:
    with pytest.raises(ConfigError, match=said):  # without tensorrt_llm, too
        LLM(directory, speculative_config=settings)


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        (SPECULATIVE_CONFIG | {"decoding_type": "NGram"}, "decoding_type NGram of TensorRT-LLM 1.2 does not take FLy"),
        (SPECULATIVE_CONFIG | {"eagle3_one_model": False}, "Eagle3 with eagle3_one_model False does not take FLy"),
        (None, "built without speculative_config: use method None, or rebuild it"),
    ],
)
def test_a_mode_that_would_be_exact_without_a_word_is_refused(
    yaml: dict[str, Any] | None, said: str, make_directory: Any, stand_in: Any
) -> None:
    with pytest.raises((ConfigError, EngineError), match=said):
        LLM(make_directory(speculative_config=yaml))


@pytest.mark.parametrize("version", ["0.21.0", "1.1.0", "2.0"])
def test_an_unknown_version_is_one_line(
    version: str, directory: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", version)
    with pytest.raises(EngineError, match=rf"tensorrt_llm {version}: expected 1.2.x or 1.3.x"):
        LLM(directory)


def test_what_it_does_not_load_is_one_line(make_directory: Any, stand_in: Any) -> None:
    directory = make_directory(no_such_setting=1)
    with pytest.raises(EngineError, match="pair: tensorrt_llm did not load it: LLM got invalid argument: no_such_sett"):
        LLM(directory)


def test_a_file_that_is_no_yaml_is_one_line(make_directory: Any, stand_in: Any) -> None:
    directory = make_directory()
    for text, said in (("a: [", "not YAML"), ("[1]", "a list, expected settings")):
        path = directory / "llm_api.yaml"
        path.write_text(text.ljust(path.stat().st_size))
        with pytest.raises(EngineError, match=said) as raised:
            LLM(directory)
        assert "\n" not in str(raised.value)


def test_a_checkpoint_that_has_moved_is_named(make_directory: Any, stand_in: Any) -> None:
    """TensorRT-LLM would take its folder for a hub id."""
    directory = make_directory()
    path = directory / "fly.json"
    content = json.loads(path.read_text())
    content["draft"]["source"]["checkpoint"] = "/no/such/draft"
    path.write_text(json.dumps(content))
    with pytest.raises(EngineError, match=r"pair: the draft, /no/such/draft, is no folder here: put it there"):
        LLM(directory)
