"""Settings: what is refused, and how acceptance settings combine."""

import math

import pytest

from fly_trt import AcceptanceParams, ConfigError, RequestError, SamplingParams, SpeculativeConfig
from fly_trt.engines.base import EXACT
from fly_trt.verification import PRESETS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens 0: expected a whole number, at least 1"),
        ({"max_tokens": 1.5}, "max_tokens 1.5"),
        ({"max_tokens": "5"}, "max_tokens '5'"),
        ({"temperature": "0"}, "temperature '0'"),
        ({"stop_token_ids": 5}, "stop_token_ids 5: expected a list of token ids"),
        ({"stop_token_ids": ["</s>"]}, "stop_token_ids ['</s>']"),
        ({"max_tokens": -3}, "max_tokens -3"),
        ({"temperature": 0.7}, "temperature 0.7: this version decodes greedily"),
        ({"temperature": -1}, "temperature -1: expected 0"),
        ({"temperature": math.nan}, "temperature nan: expected 0"),
        ({"n": 2}, "n 2: this version"),
        ({"top_p": 0.9}, "top_p 0.9"),
        ({"top_k": 40}, "top_k 40"),
        ({"min_p": 0.1}, "min_p 0.1"),
        ({"min_tokens": 3}, "min_tokens 3"),
        ({"logprobs": 1}, "logprobs 1"),
        ({"prompt_logprobs": 1}, "prompt_logprobs 1"),
        ({"presence_penalty": 0.5}, "presence_penalty 0.5"),
        ({"frequency_penalty": 0.5}, "frequency_penalty 0.5"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1"),
        ({"logit_bias": {1: 2.0}}, "logit_bias"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"stop": ""}, "stop '': expected non-empty strings"),
        ({"stop": ["a", ""]}, "expected non-empty strings"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        SamplingParams(**settings)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "eagle"}, "method 'eagle': expected one of None, multi_level, draft_model, ngram"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens 0: expected a whole number, at least 1"),
        ({"num_speculative_tokens": 2.5}, "num_speculative_tokens 2.5"),
        ({"prompt_lookup_min": 3, "prompt_lookup_max": 2}, "prompt_lookup_max 2: expected a whole number, at least 3"),
        ({"acceptance": "typical"}, "acceptance 'typical': expected one of None, fly, exact"),
        ({"preset": "strict"}, "preset 'strict': expected one of reference, paper, vllm"),
        ({"fly_window_size": -1}, "fly_window_size -1"),
        ({"fly_entropy_threshold": -0.1}, "fly_entropy_threshold -0.1: expected a number >= 0"),
        ({"fly_entropy_threshold": math.nan}, "fly_entropy_threshold nan"),
        ({"fly_entropy_threshold": "0.3"}, "fly_entropy_threshold '0.3'"),
        ({"fly_entropy_top_k": 0}, "fly_entropy_top_k 0"),
    ],
)
def test_a_speculative_setting_that_makes_no_sense_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        SpeculativeConfig(**settings)
    assert message in str(raised.value)


def test_an_unknown_field_in_a_mapping_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown field 'num_draft': expected one of method, num_speculative_tokens"):
        SpeculativeConfig.from_dict({"num_draft": 3})


def test_defaults_are_the_authors() -> None:
    config = SpeculativeConfig()
    assert (config.method, config.num_speculative_tokens, config.acceptance) == ("multi_level", 15, "fly")
    assert config.acceptance_params().policy(128_256, 3) == PRESETS["reference"]


def test_ngram_drafts_are_verified_exactly_unless_asked_otherwise() -> None:
    assert SpeculativeConfig(method="ngram").acceptance_params().policy(100, 3) == EXACT
    loose = SpeculativeConfig(method="ngram", acceptance="fly")
    assert loose.acceptance_params().policy(100, 3) == PRESETS["reference"]


def test_a_request_overrides_what_it_names_and_keeps_the_rest() -> None:
    engine = SpeculativeConfig(fly_entropy_threshold=0.5, fly_window_size=4).acceptance_params()
    assert AcceptanceParams().over(engine) == engine
    assert AcceptanceParams(acceptance="exact").over(engine).policy(100, 3) == EXACT
    policy = AcceptanceParams(fly_window_size=8).over(engine).policy(100, 3)
    assert (policy.entropy_threshold, policy.window, policy.lookahead) == (0.5, 8, 7)


def test_another_preset_does_not_inherit_a_threshold_in_another_unit() -> None:
    engine = SpeculativeConfig(fly_entropy_threshold=0.5).acceptance_params()
    policy = AcceptanceParams(preset="paper").over(engine).policy(100, 3)
    assert policy.entropy_threshold == pytest.approx(0.3 * math.log(100))


def test_another_top_k_than_the_engines_names_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"built for 3: rebuild with --entropy-top-k 5"):
        AcceptanceParams(fly_entropy_top_k=5).policy(100, 3)
