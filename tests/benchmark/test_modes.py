"""What the modes mean for an engine directory."""

from pathlib import Path

import pytest

from fly_trt import ConfigError
from fly_trt.benchmark.modes import choose_modes, modes, read_modes
from fly_trt.drafting import DRAFTERS
from fly_trt.manifest import Manifest, read_manifest
from fly_trt.verification import POLICIES


@pytest.fixture(scope="module")
def pair(demo_engine: Path) -> Manifest:
    return read_manifest(demo_engine)


@pytest.fixture(scope="module")
def target_only(pair: Manifest) -> Manifest:
    return pair.model_copy(update={"draft": None})


def test_a_pair_can_do_them_all(pair: Manifest) -> None:
    modes = choose_modes([], pair)
    assert list(modes) == ["autoregressive", "exact", "fly-draft", "fly", "ngram"]
    assert {mode: (config.method, config.acceptance) for mode, config in modes.items()} == {
        "autoregressive": (None, "fly"),
        "exact": ("multi_level", "exact"),
        "fly-draft": ("draft_model", "fly"),
        "fly": ("multi_level", "fly"),
        "ngram": ("ngram", "exact"),
    }


def test_without_a_draft_model_or_draft_tokens_fewer_are_possible(target_only: Manifest) -> None:
    assert list(choose_modes([], target_only)) == ["autoregressive", "ngram"]
    no_drafts = target_only.model_copy(update={"limits": target_only.limits.model_copy(update={"max_draft_len": 0})})
    assert list(choose_modes([], no_drafts)) == ["autoregressive"]


def test_what_was_asked_for_is_taken_or_refused(pair: Manifest, target_only: Manifest) -> None:
    assert list(choose_modes(["fly", "autoregressive"], pair)) == ["autoregressive", "fly"]
    with pytest.raises(ConfigError, match="mode 'medusa': expected autoregressive, exact, fly-draft, fly, ngram"):
        choose_modes(["fly", "medusa"], pair)
    with pytest.raises(
        ConfigError, match=r"mode fly: method 'multi_level' needs a draft model and .* rebuild with --draft"
    ):
        choose_modes(["fly"], target_only)


def test_settings_go_to_the_modes_that_they_fit(pair: Manifest) -> None:
    modes = choose_modes([], pair, {"num_speculative_tokens": 9, "fly_window_size": 4})
    assert [config.num_speculative_tokens for config in modes.values()][1:] == [9, 9, 9, 9]
    assert [config.fly_window_size for config in modes.values()] == [None, None, 4, 4, None]
    stopped = choose_modes([], pair, {"draft_stop": "confidence", "draft_stop_threshold": 0.5})
    assert [config.draft_stop for config in stopped.values()] == [None, *["confidence"] * 3, None]
    for name, value, asked in (("preset", "paper", ["exact"]), ("num_speculative_tokens", 3, ["autoregressive"])):
        with pytest.raises(ConfigError, match=f"{name} {value!r}: has no effect in mode {asked[0]}"):
            choose_modes(asked, pair, {name: value})
    with pytest.raises(ConfigError, match="mode exact: num_speculative_tokens 99: built for max_draft_len 32"):
        choose_modes([], pair, {"num_speculative_tokens": 99})


def test_a_mode_is_a_drafter_a_policy_and_settings() -> None:
    found = read_modes(["ngram+fly,fly_window_size=0, preset=paper,w0=draft_model", "multi_level+exact,autoregressive"])
    assert next(iter(found)) == "autoregressive"
    assert found == {
        "autoregressive": {"method": None},
        "ngram+fly,fly_window_size=0,preset=paper": {
            "method": "ngram",
            "acceptance": "fly",
            "fly_window_size": 0,
            "preset": "paper",
        },
        "w0": {"method": "draft_model", "acceptance": "fly"},
        "multi_level+exact": {"method": "multi_level", "acceptance": "exact"},
    }


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_drafter_goes_with_every_policy(drafter: str, policy: str) -> None:
    expected = {"method": drafter, "acceptance": policy}
    assert read_modes([f"a={drafter}+{policy}", f"b={policy}", f"c={drafter}"]) == {
        "a": expected,
        "b": modes().get(policy, {"method": "multi_level", "acceptance": policy}),
        "c": {"method": drafter, "acceptance": DRAFTERS[drafter].acceptance},
    }


def test_values_are_json_or_words() -> None:
    """Whether they suit their fields is for SpeculativeConfig to say."""
    text = "fly,adaptive_acceptance=false,draft_token_cost=0.5,fly_window_size=null,preset=vllm,exact_token_ids=[1,2]"
    (settings,) = read_modes([text]).values()
    assert list(settings.values())[2:] == [False, 0.5, None, "vllm", [1, 2]]
    (settings,) = read_modes(["fly,exact_token_ids=7,exact_within=code"]).values()
    assert list(settings.values())[2:] == [[7], ["code"]]


def test_what_a_mode_says_itself_goes_before_what_is_said_for_all(pair: Manifest) -> None:
    found = choose_modes(["fly,w0=fly,fly_window_size=0", "exact"], pair, {"fly_window_size": 4})
    assert {mode: config.fly_window_size for mode, config in found.items()} == {"exact": None, "fly": 4, "w0": 0}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("multi_level+medusa", "mode 'multi_level\\+medusa': expected autoregressive, .* a policy of fly, exact"),
        ("medusa+fly", "mode 'medusa\\+fly': expected .* a drafter of multi_level, draft_model, ngram"),
        ("fly,fly_windw_size=0", "mode 'fly_windw_size=0': expected .* fields of SpeculativeConfig"),
        (
            "fly_window_size=0,fly",
            "mode 'fly_window_size=0': a setting without a mode: write it after one, such",
        ),
        ("fly,acceptance=exact", "mode 'fly,acceptance=exact': a mode's acceptance has its place: write it as DRAFTER"),
        (
            "autoregressive,num_speculative_tokens=3",
            "num_speculative_tokens has no effect without drafts: leave it out",
        ),
        ("fly,preset=vllm,preset=paper", "preset twice: leave one out"),
        ("exact=ngram", "mode exact=ngram: exact is another mode's name: give it one of its own, such as my-exact"),
        ("a=ngram,a=fly", "mode a=fly: a is another mode's name"),
        ("=ngram", "mode '=ngram': no name before the =: write it, or leave the = out"),
        (
            "fly,fly_window_size=much",
            "fly_window_size=much: fly_window_size 'much': expected a whole number, at least 0",
        ),
        ("exact,fly_window_size=1", "fly_window_size 1: has no effect with acceptance 'exact': add acceptance='fly'"),
        ("fly,num_speculative_tokens=99", "built for max_draft_len 32: rebuild with --max-draft-len 99"),
    ],
)
def test_what_is_no_mode_is_refused_in_one_line(pair: Manifest, asked: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose_modes([asked], pair)
    assert "\n" not in str(caught.value)
