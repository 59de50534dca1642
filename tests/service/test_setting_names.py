"""By what audits tell requests apart: the default is whatever decides as the engine does, and nothing else is."""

import pytest

from fly_trt.acceptance import AcceptanceParams
from fly_trt.params import SamplingParams, SpeculativeConfig
from fly_trt.service.setting_names import MAX_CHARACTERS, setting_name
from fly_trt.verification import HeadInfo
from toy_policy import LikelyPolicy

HEAD = HeadInfo(1000, 16, True)


def name_of(defaults=None, *, acceptance=None, **params):
    defaults = defaults or SpeculativeConfig()
    asked = AcceptanceParams(**acceptance) if isinstance(acceptance, dict) else acceptance
    params = SamplingParams(acceptance=asked, **params)
    rule = params.acceptance_params.over(defaults).policy(HEAD)
    return setting_name(params, rule, defaults, defaults.policy(HEAD))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"acceptance": {"preset": "reference"}},
        {"acceptance": {"acceptance": "fly", "fly_entropy_threshold": 0.3, "fly_window_size": 6}},
        {"acceptance": {"exact_first": 0, "exact_within": []}},
        {"num_speculative_tokens": 15, "draft_stop": "none"},
        {"temperature": 1.0, "max_tokens": 5, "ignore_eos": True, "stop": "x"},
    ],
    ids=str,
)
def test_what_decides_as_the_engine_does_is_the_default(params):
    assert name_of(**params) == "default"


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"acceptance": {"fly_window_size": 1}}, "fly_window_size=1"),
        ({"acceptance": {"preset": "vllm"}}, "preset=vllm"),
        (
            {"acceptance": {"fly_entropy_threshold": 0.0, "fly_window_size": 1}},
            "fly_entropy_threshold=0.0 fly_window_size=1",
        ),
        ({"acceptance": {"acceptance": "typical"}}, "acceptance=typical"),
        (
            {"acceptance": {"acceptance": "typical", "typical_alpha": 0.2, "exact_first": 3}},
            "acceptance=typical typical_alpha=0.2 exact_first=3",
        ),
        ({"num_speculative_tokens": 8}, "num_speculative_tokens=8"),
        ({"draft_stop": "confidence", "draft_stop_threshold": 0.5}, "draft_stop=confidence draft_stop_threshold=0.5"),
        ({"acceptance": LikelyPolicy()}, f"acceptance={LikelyPolicy.name}"),
    ],
    ids=str,
)
def test_whatever_changes_a_loose_requests_tokens_is_a_setting_of_its_own(params, name):
    assert name_of(**params) == name


def test_numbers_that_are_nearly_the_same_are_different_settings():
    names = {name_of(acceptance={"fly_entropy_threshold": 0.3 + step * 1e-9}) for step in range(4)}
    assert len(names) == 4
    assert "default" in names


def test_a_rule_of_the_callers_own_is_not_the_default_where_it_has_its_name():
    defaults = SpeculativeConfig(acceptance=LikelyPolicy())
    other = LikelyPolicy()
    object.__setattr__(other, "entropy_threshold", 1.0)
    assert name_of(defaults) == name_of(defaults, acceptance=LikelyPolicy()) == "default"
    assert name_of(defaults, acceptance=other) == f"acceptance={LikelyPolicy.name}"
    guarded = {"exact_first": 4}
    assert name_of(defaults, acceptance=guarded) == "exact_first=4"
    own = AcceptanceParams(acceptance=other, **guarded)
    assert name_of(defaults, acceptance=own) == f"acceptance={LikelyPolicy.name} exact_first=4"


def test_a_clients_own_words_and_long_lists_are_not_in_the_name():
    """Names are labels of metrics, which are open to all."""
    secret = name_of(acceptance={"exact_within": ["before:secret"], "exact_token_ids": list(range(900))})
    assert "secret" not in secret
    assert len(secret) <= MAX_CHARACTERS + 20
    assert secret != name_of(acceptance={"exact_within": ["before:secreT"], "exact_token_ids": list(range(900))})
    assert secret != name_of(acceptance={"exact_within": ["before:secret"], "exact_token_ids": list(range(901))})


def test_long_names_that_begin_alike_differ():
    shared = {"acceptance": "conditional", "conditional_alpha": 0.1234567890123, "conditional_beta": 0.12345678901234}
    more = {"conditional_floor": 0.1234567890123, "exact_token_ids": [1, 2, 3]}
    names = {name_of(acceptance={**shared, **more, "exact_first": n}) for n in (10001, 10002)}
    assert len(names) == 2
    assert all(len(name) <= MAX_CHARACTERS + 20 for name in names)
