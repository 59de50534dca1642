"""What the modes mean for an engine directory."""

from pathlib import Path

import pytest

from fly_trt import ConfigError
from fly_trt.benchmark.modes import choose_modes
from fly_trt.manifest import Manifest, read_manifest


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
    for name, value, asked in (("preset", "paper", ["exact"]), ("num_speculative_tokens", 3, ["autoregressive"])):
        with pytest.raises(ConfigError, match=f"{name} {value!r}: has no effect in mode {asked[0]}"):
            choose_modes(asked, pair, {name: value})
    with pytest.raises(ConfigError, match="mode exact: num_speculative_tokens 99: built for max_draft_len 32"):
        choose_modes([], pair, {"num_speculative_tokens": 99})
