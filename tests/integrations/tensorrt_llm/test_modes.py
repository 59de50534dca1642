"""Which speculative modes take FLy, and that the others are refused with the reason."""

from typing import Any

import pytest

from fly_trt.errors import ConfigError
from fly_trt.integrations.tensorrt_llm.modes import MODES, Release, check_mode, modes_of, release_of


def test_the_one_model_modes_of_each_release() -> None:
    assert modes_of("1.2") == ("Eagle3", "Eagle", "MTP")
    assert modes_of("main") == ("Draft_Target", "Eagle3", "Eagle", "MTP", "PARD", "DFlash", "SA")


def test_what_does_not_take_it_says_why() -> None:
    for mode in MODES.values():
        assert mode.mode if mode.releases else mode.exact_because
        assert mode.exact_because or set(mode.releases) == {"1.2", "main"}


@pytest.mark.parametrize(("version", "release"), [("1.2.0", "1.2"), ("1.2.1", "1.2"), ("1.3.0rc4", "main")])
def test_versions_belong_to_releases(version: str, release: Release) -> None:
    assert release_of(version) == release


@pytest.mark.parametrize("version", ["1.1.0", "1.20.0", "0.21.0", "2.0", "main", ""])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=r"expected 1\.2\.x or 1\.3\.x: install one of them"):
        release_of(version)


@pytest.mark.parametrize(
    ("config", "release"),
    [
        ({"decoding_type": "Draft_Target", "max_draft_len": 8, "speculative_model": "draft"}, "main"),
        ({"decoding_type": "Eagle3", "eagle3_one_model": True, "use_dynamic_tree": False}, "1.2"),
        ({"decoding_type": "MTP", "use_relaxed_acceptance_for_thinking": False, "eagle_choices": None}, "1.2"),
    ],
)
def test_modes_that_take_it(config: dict[str, Any], release: Release) -> None:
    assert check_mode(config, release).decoding_type == config["decoding_type"]


@pytest.mark.parametrize(
    ("config", "release", "said"),
    [
        ({}, "1.2", "decoding_type 'None': expected one of Eagle3, Eagle, MTP"),
        ({"decoding_type": "Draft_Target"}, "1.2", "two models: accepts on the host.*expected one of Eagle3"),
        ({"decoding_type": "PARD"}, "1.2", "this release does not have it"),
        ({"decoding_type": "NGram"}, "main", "n-gram drafts: accepts on the host"),
        ({"decoding_type": "Eagle3", "eagle3_one_model": False}, "main", "eagle3_one_model False.*two models"),
        ({"decoding_type": "Eagle3", "eagle_choices": [[0]]}, "main", "draft trees are accepted by another kernel"),
        ({"decoding_type": "Eagle", "dynamic_tree_max_topK": 4}, "main", "draft trees are accepted by another kernel"),
        ({"decoding_type": "MTP", "use_relaxed_acceptance_for_thinking": True}, "1.2", "relaxed acceptance takes"),
        ({"decoding_type": "DFlash", "use_rejection_sampling": True}, "main", "test of drawn tokens"),
    ],
)
def test_modes_that_do_not_are_refused(config: dict[str, Any], release: Release, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_mode(config, release)
