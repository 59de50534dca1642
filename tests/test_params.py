"""Settings: what is refused, and how acceptance settings combine."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_trt import (
    AcceptanceParams,
    ConfigError,
    RequestError,
    RequestOutputKind,
    SamplingParams,
    SpeculativeConfig,
    StructuredOutputs,
)
from fly_trt.drafting import DRAFT_STOPS
from fly_trt.verification import EXACT, PRESETS, GuardSettings, HeadInfo

GOOD_VALUES = {
    "n": [1, 4],
    "temperature": [0, 0.0, 1e-9, 0.7, 1, 2.5],
    "top_p": [1, 1.0, 0.01],
    "top_k": [-1, 0, 1, 50, 10**6],
    "min_p": [0, 0.05, 1],
    "seed": [None, 0, -1, 2**63, 10**30],
    "presence_penalty": [-2, 0.5, 2],
    "frequency_penalty": [-2, 0.5, 2],
    "repetition_penalty": [0.01, 1, 1.3, 10],
    "logit_bias": [None, {}, {0: -100, 7: 100.0}],
    "bad_words": [None, [], ["a", " b"], ("c",)],
    "max_tokens": [None, 1, 10**6],
    "min_tokens": [0, 5],
    "stop": [None, [], "x", ["x", "yz"], ("x",)],
    "stop_token_ids": [None, [], [1, 2], (3,)],
    "include_stop_str_in_output": [False, True],
    "ignore_eos": [False, True],
    "skip_special_tokens": [False, True],
    "detailed_metrics": [False, True],
    "shown_special_tokens": [None, [], ["<|python_tag|>"]],
    "logprobs": [None, 0, 5],
    "prompt_logprobs": [None, 0, 5],
    "acceptance": [None, AcceptanceParams(), AcceptanceParams(acceptance="exact")],
    "num_speculative_tokens": [None, 0, 1, 25],
    "draft_stop": [None, *DRAFT_STOPS],
    "draft_stop_threshold": [None, 0, 0.7, 3],
    "structured_outputs": [None, StructuredOutputs(regex="a+"), StructuredOutputs(json={"type": "integer"})],
    "speculation_trace": [False, True],
    "output_kind": list(RequestOutputKind),
}

BAD_VALUES = {
    "n": ([0, -1, 1.5, "2", None, True], "expected a whole number, at least 1"),
    "temperature": ([-0.1, math.nan, math.inf, "0", None, True], "expected a number at least 0"),
    "top_p": ([0, -0.1, 1.01, math.nan, "1", None], "expected a number above 0 and at most 1"),
    "top_k": ([-2, 1.5, "3", None], "expected a whole number, at least -1"),
    "min_p": ([-0.1, 1.1, math.nan, None], "expected a number at least 0 and at most 1"),
    "seed": ([1.5, "7", True], "expected a whole number or None"),
    "presence_penalty": ([-2.1, 2.1, math.nan, "1", None], "expected a number at least -2 and at most 2"),
    "frequency_penalty": ([-2.1, 2.1, math.nan, "1", None], "expected a number at least -2 and at most 2"),
    "repetition_penalty": ([0, -1, math.nan, math.inf, "1", None], "expected a number above 0"),
    "logit_bias": (
        [{1: 100.5}, {1: -math.inf}, {1: math.nan}, {1: "2"}, {"1": 2.0}, {1.5: 2.0}, [1, 2], 3],
        "expected token ids with numbers of at most 100",
    ),
    "bad_words": (["x", [""], [1], 5, ["a", None]], "expected a list of non-empty strings"),
    "max_tokens": ([0, -3, 1.5, "5", True], "expected a whole number, at least 1 or None"),
    "min_tokens": ([-1, 1.5, "1", None], "expected a whole number, at least 0"),
    "stop": (["", ["a", ""], [1], 5, ["a", None]], "expected non-empty strings"),
    "stop_token_ids": ([5, ["</s>"], [1.5], "12", [True], {1, 2}], "expected a list of token ids"),
    "include_stop_str_in_output": (["yes", 1, None], "expected True or False"),
    "ignore_eos": (["no", 0, None], "expected True or False"),
    "skip_special_tokens": (["no", 0, None], "expected True or False"),
    "detailed_metrics": (["yes", 1, None], "expected True or False"),
    "shown_special_tokens": (["<s>", [""], [7], 5], "expected a list of non-empty strings"),
    "logprobs": ([-1, 1.5, "1", True], "expected a whole number, at least 0 or None"),
    "prompt_logprobs": ([-1, 1.5, "1", True], "expected a whole number, at least 0 or None"),
    "acceptance": (
        ["exact", {"acceptance": "exact"}, SpeculativeConfig()],
        "expected AcceptanceParams, a policy or None",
    ),
    "num_speculative_tokens": ([-1, 1.5, "1", True], "expected a whole number, at least 0 or None"),
    "draft_stop": (["entropy", 3, ["adasd"]], "expected one of None, none, adasd, confidence, adaedl"),
    "draft_stop_threshold": ([-1, "0.7", math.nan, True], "expected a number >= 0"),
    "structured_outputs": (["[0-9]+", 5, True, ["a", "b"]], "expected StructuredOutputs, a mapping or None"),
    "speculation_trace": (["no", 0, None], "expected True or False"),
    "output_kind": (["delta", None, 1], "expected a RequestOutputKind"),
}


def each_of(table: dict[str, list]) -> list:
    return [
        pytest.param(name, value, id=f"{name}={value!r}"[:60]) for name, values in table.items() for value in values
    ]


def test_these_tables_have_every_field() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams) if field.init}
    assert names == set(GOOD_VALUES) == set(BAD_VALUES)


@pytest.mark.parametrize(("name", "value"), each_of(GOOD_VALUES))
def test_a_good_value_is_taken_as_it_is(name: str, value: object) -> None:
    others = {"temperature": 1.0} if name == "n" else {}
    assert getattr(SamplingParams(**{name: value}, **others), name) == value


@pytest.mark.parametrize(("name", "value"), each_of({name: values for name, (values, _) in BAD_VALUES.items()}))
def test_a_bad_value_is_refused_in_one_line_with_name_value_and_expectation(name: str, value: object) -> None:
    others = {"temperature": 1.0} if name == "n" else {}
    with pytest.raises(RequestError) as raised:
        SamplingParams(**{name: value}, **others)
    assert str(raised.value) == f"{name} {value!r}: {expectation(name)}"
    assert "\n" not in str(raised.value)


def expectation(name: str) -> str:
    return BAD_VALUES[name][1]


def test_several_greedy_completions_are_refused_because_they_would_all_be_the_same() -> None:
    with pytest.raises(
        RequestError, match="n 2: greedy completions are all the same: use n=1 or a temperature above 0"
    ):
        SamplingParams(n=2)
    assert SamplingParams(n=2, temperature=0.1).n == 2


def test_more_min_tokens_than_max_tokens_are_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens 5: more than max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(RequestError, match="min_tokens 257: more than max_tokens 256"):
        SamplingParams(min_tokens=257)
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=5000, max_tokens=None).min_tokens == 5000


def test_one_stop_string_or_several_are_kept_as_a_tuple() -> None:
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")


def test_the_default_is_greedy_and_cumulative() -> None:
    params = SamplingParams()
    assert (params.temperature, params.n, params.max_tokens) == (0, 1, 256)
    assert params.output_kind is RequestOutputKind.CUMULATIVE


def test_structured_outputs_may_be_given_as_a_mapping() -> None:
    asked = SamplingParams(structured_outputs={"choice": ["yes", "no"]}).structured_outputs
    assert asked == StructuredOutputs(choice=["yes", "no"])
    with pytest.raises(RequestError, match="structured_outputs: unknown field 'xml': expected one of json, "):
        SamplingParams(structured_outputs={"xml": "<a/>"})


def test_an_output_of_a_form_has_no_least_length() -> None:
    with pytest.raises(RequestError, match=r"^min_tokens 3: an output of structured_outputs ends where its form does"):
        SamplingParams(structured_outputs={"regex": "a+"}, min_tokens=3)


def test_params_cannot_be_changed_after_they_were_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = -1


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
        ({"suffix_corpus_tokens": -1}, "suffix_corpus_tokens -1: expected a whole number, at least 0"),
        ({"suffix_max_spec_factor": 0}, "suffix_max_spec_factor 0: expected a number above 0"),
        ({"hybrid_min_match": 0}, "hybrid_min_match 0: expected a whole number, at least 1"),
        ({"alignment_mode": "tree"}, "alignment_mode 'tree': expected one of prompt, argmax, cut"),
        ({"alignment_margin": math.nan}, "alignment_margin nan: expected a number >= 0, in nats"),
        ({"acceptance": "best"}, "acceptance 'best': expected one of None, fly, exact"),
        ({"preset": "strict"}, "preset 'strict': expected one of reference, paper, vllm"),
        ({"fly_window_size": -1}, "fly_window_size -1"),
        ({"fly_entropy_threshold": -0.1}, "fly_entropy_threshold -0.1: expected a number >= 0"),
        ({"fly_entropy_threshold": math.nan}, "fly_entropy_threshold nan"),
        ({"fly_entropy_threshold": "0.3"}, "fly_entropy_threshold '0.3'"),
        ({"fly_entropy_top_k": 0}, "fly_entropy_top_k 0"),
        ({"adaptive_draft_length": "no"}, "adaptive_draft_length 'no': expected True or False"),
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
    assert config.policy(HeadInfo(128_256, 3)) == PRESETS["reference"]


def test_ngram_drafts_are_verified_exactly_unless_asked_otherwise() -> None:
    assert SpeculativeConfig(method="ngram").policy(HeadInfo(100, 3)) == EXACT
    loose = SpeculativeConfig(method="ngram", acceptance="fly")
    assert loose.policy(HeadInfo(100, 3)) == PRESETS["reference"]


def test_a_request_overrides_what_it_names_and_keeps_the_rest() -> None:
    engine = SpeculativeConfig(fly_entropy_threshold=0.5, fly_window_size=4)
    assert AcceptanceParams().over(engine) == AcceptanceParams(
        acceptance="fly", preset="reference", fly_entropy_threshold=0.5, fly_window_size=4
    )
    assert AcceptanceParams(acceptance="exact").over(engine).policy(HeadInfo(100, 3)) == EXACT
    policy = AcceptanceParams(fly_window_size=8).over(engine).policy(HeadInfo(100, 3))
    assert (policy.entropy_threshold, policy.window, policy.lookahead) == (0.5, 8, 7)


def test_guards_of_the_engine_are_a_bound_that_requests_only_tighten() -> None:
    engine = SpeculativeConfig(
        exact_first=4, exact_token_ids=[5, 6], exact_within=["code"], max_loosened_per_100=3, method="ngram"
    )
    looser = AcceptanceParams(
        acceptance="fly", exact_first=0, exact_token_ids=[], exact_within=[], max_loosened_per_100=100
    )
    assert looser.over(engine).guard_settings() == engine.guard_settings()
    assert AcceptanceParams().over(engine).guard_settings() == engine.guard_settings()
    stricter = AcceptanceParams(
        acceptance="typical",
        exact_first=9,
        exact_token_ids=[7, 5],
        exact_within=["digits", "code"],
        max_loosened_per_100=0,
    )
    assert stricter.over(engine) == AcceptanceParams(
        acceptance="typical",
        preset="reference",
        exact_first=9,
        exact_token_ids=[5, 6, 7],
        exact_within=["code", "digits"],
        max_loosened_per_100=0,
    )
    assert stricter.over(SpeculativeConfig()).guard_settings() == stricter.guard_settings()


@given(
    *[st.none() | st.integers(0, 4), st.none() | st.lists(st.integers(0, 3), max_size=3), st.none() | st.integers(0, 4)]
    * 2
)
def test_what_holds_of_two_guards_is_both_and_no_more(
    first: int | None,
    ids: list[int] | None,
    budget: int | None,
    other_first: int | None,
    other_ids: list[int] | None,
    other_budget: int | None,
) -> None:
    own = AcceptanceParams(exact_first=first, exact_token_ids=ids, max_loosened_per_100=budget)
    engine = SpeculativeConfig(exact_first=other_first, exact_token_ids=other_ids, max_loosened_per_100=other_budget)
    assert own.over(engine).guard_settings() == GuardSettings(
        exact_first=max(first or 0, other_first or 0),
        exact_token_ids=frozenset(ids or ()) | frozenset(other_ids or ()),
        max_loosened_per_100=min([given for given in (budget, other_budget) if given is not None], default=None),
    )


def test_another_preset_does_not_inherit_a_threshold_in_another_unit() -> None:
    engine = SpeculativeConfig(fly_entropy_threshold=0.5)
    policy = AcceptanceParams(preset="paper").over(engine).policy(HeadInfo(100, 3))
    assert policy.entropy_threshold == pytest.approx(0.3 * math.log(100))


def test_another_top_k_than_the_engines_names_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"built for 3: rebuild with --entropy-top-k 5"):
        AcceptanceParams(fly_entropy_top_k=5).policy(HeadInfo(100, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": ["x"] * 257}, "stop: 257 strings, at most 256"),
        ({"bad_words": ["x"] * 257}, "bad_words: 257 strings, at most 256"),
        ({"stop": "x" * 1001}, "stop: a string of 1001 characters, at most 1000"),
        ({"n": 129, "temperature": 1.0}, "n 129: at most 128"),
        ({"logprobs": 21}, "logprobs 21: at most 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs 21: at most 20"),
        ({"stop_token_ids": [*range(1025)]}, "stop_token_ids: 1025 tokens, at most 1024"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias: 1025 tokens, at most 1024"),
    ],
)
def test_one_request_cannot_cost_the_others_much(settings: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**settings)


def test_what_is_at_a_limit_is_taken() -> None:
    params = SamplingParams(
        logprobs=20, prompt_logprobs=20, stop_token_ids=[*range(1024)], logit_bias=dict.fromkeys(range(1024), 1.0)
    )
    assert (params.logprobs, params.prompt_logprobs) == (20, 20)


@pytest.mark.parametrize(
    ("name", "value"), [("stop", "a\udcff"), ("stop", ["b", "a\udcff"]), ("bad_words", ["a\udcff"])]
)
def test_half_a_surrogate_pair_is_no_text(name: str, value: object) -> None:
    with pytest.raises(RequestError) as raised:
        SamplingParams(**{name: value})
    assert str(raised.value) == (
        f"{name}: '\\udcff' at character 1 is half of a surrogate pair and no text: decode its source as UTF-8, or "
        "leave it out"
    )


def test_a_rule_that_could_loosen_nothing_of_what_is_drafted_is_refused() -> None:
    head = HeadInfo(100, 3, has_top_tokens=True)
    for method, acceptance, fix in (
        ("multi_level", {"acceptance": "conditional"}, "or conditional_apply_to='all'"),
        ("ngram", {"acceptance": "adaptive"}, "use method hybrid or draft_model"),
    ):
        config = SpeculativeConfig(method=method, **acceptance)
        with pytest.raises(ConfigError, match=fix):
            config.check_policy(config.policy(head))
    for method, acceptance in (
        ("multi_level", {"acceptance": "conditional", "conditional_apply_to": "all"}),
        ("hybrid", {"acceptance": "conditional"}),
        ("hybrid", {"acceptance": "adaptive"}),
        ("alignment", {"acceptance": "conditional"}),
        ("ngram", {"acceptance": "exact"}),
    ):
        config = SpeculativeConfig(method=method, **acceptance)
        config.check_policy(config.policy(head))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_stop": "confidence", "draft_stop_threshold": 1.5}, "1.5: of confidence expected at most 1"),
        ({"draft_stop": "adaedl", "draft_stop_threshold": 2}, "2: of adaedl expected at most 1"),
        ({"draft_stop_threshold": 0.5}, "has no effect without draft_stop: add one of adasd, confidence, adaedl"),
        ({"draft_stop": "adasd", "method": "ngram"}, "has no effect with method 'ngram'"),
        ({"draft_stop": "adasd", "method": None}, "has no effect with method None"),
        ({"cactus_delta": math.inf}, "cactus_delta inf: expected a number >= 0 and <= 100"),
        ({"exact_token_ids": [1.5]}, "expected a list of whole numbers"),
        ({"exact_within": "code"}, "expected a list of non-empty strings"),
        ({"exact_within": ["xml"]}, "expected code, json, digits, before:TAG or after:TAG"),
    ],
)
def test_stops_and_guards_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        SpeculativeConfig(**settings)
    assert message in str(raised.value)
