"""What fly-tune tries: made of what is declared, and no more than the engines can do."""

import pytest

from fly_trt import ConfigError
from fly_trt.drafting import DRAFTERS, DrafterKind
from fly_trt.manifest import SCHEMA_VERSION, Head, Limits, Manifest, ModelEngine, Source
from fly_trt.service.config import ServiceConfig, head_info, resolve_sizes, resolve_speculative_config
from fly_trt.tuning.result import DEFAULT, PLAIN, Candidate
from fly_trt.tuning.search_space import SearchSpace
from fly_trt.verification import POLICIES, PRESETS
from toy_drafter import period
from toy_policy import LikelyPolicy

WITHOUT_DRAFT_MODEL = {name for name, kind in DRAFTERS.items() if name in ("ngram", "alignment", "suffix")}


def model() -> ModelEngine:
    return ModelEngine(
        model="model.onnx",
        source=Source(checkpoint="org/model", architecture="LlamaForCausalLM", num_parameters=700),
        vocab_size=32,
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
    )


def manifest(*, has_draft: bool = True, max_draft_len: int = 16, **more: object) -> Manifest:
    """Of a directory with a draft model and without self-draft and inner draft."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        backend="onnxruntime",
        name="tiny",
        fly_trt_version="0",
        library_versions={},
        limits=Limits(max_batch_size=1, max_seq_len=64, max_draft_len=max_draft_len, max_num_tokens=32),
        head=Head(entropy_top_k=3, stop_token_ids=[1], top_tokens=True),
        target=model(),
        draft=model() if has_draft else None,
        files={"model.onnx": {"size": 1, "sha256": ""}},
        **{"speculative": {}} | more,
    )


def candidates(made: Manifest, count: int = 200, seed: int = 0, **filters: list[str]) -> list[Candidate]:
    return SearchSpace(made, **filters).candidates(count, seed)


def test_plain_decoding_and_the_default_come_first_then_every_drafter_exactly_and_the_presets() -> None:
    names = [candidate.name for candidate in candidates(manifest(), count=25)]
    assert names[:2] == [PLAIN, DEFAULT]
    assert names[2:8] == [
        f"{name}+exact" for name in ("multi_level", "draft_model", "ngram", "alignment", "suffix", "hybrid")
    ]
    assert {f"draft_model+fly,preset={preset}" for preset in PRESETS} < set(names)
    assert "multi_level+margin" in names


@pytest.mark.parametrize("made", [manifest(), manifest(has_draft=False), manifest(max_draft_len=4)])
def test_the_engines_can_do_every_candidate(made: Manifest) -> None:
    for candidate in candidates(made):
        config = resolve_speculative_config(made, candidate.settings)
        resolve_sizes(ServiceConfig(), config, made)
        assert candidate.drafter == config.method
        assert candidate.policy == ("exact" if config.method is None else config.policy(head_info(made)).name)


def test_no_two_candidates_are_the_same() -> None:
    made = manifest()
    found = candidates(made)
    configs = {repr(resolve_speculative_config(made, candidate.settings)) for candidate in found}
    assert len(configs) == len(found) == len({candidate.name for candidate in found}) > 100


def test_lossless_is_what_emits_the_targets_own_tokens() -> None:
    found = candidates(manifest())
    assert {candidate.policy for candidate in found if candidate.is_lossless and candidate.name != PLAIN} == {"exact"}
    assert all(candidate.is_lossless for candidate in found if candidate.policy == "exact")
    assert not next(candidate for candidate in found if candidate.name == DEFAULT).is_lossless


def test_of_what_loosens_nothing_in_greedy_decoding_nothing_is_tried() -> None:
    assert "cactus" not in {candidate.policy for candidate in candidates(manifest())}


def test_the_seed_decides_what_is_drawn_and_not_what_is_usual() -> None:
    first, again, other = (candidates(manifest(), 60, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first[:20] == other[:20]


def test_without_a_draft_model_copies_are_tried() -> None:
    found = candidates(manifest(has_draft=False))
    assert {candidate.drafter for candidate in found} == WITHOUT_DRAFT_MODEL | {None}


def test_settings_are_varied_as_they_are_declared() -> None:
    varied = {name for candidate in candidates(manifest(), 300) for name in candidate.settings}
    assert {
        *("num_speculative_tokens", "draft_stop", "draft_stop_threshold", "fly_window_size", "fly_entropy_threshold"),
        *(
            "margin_threshold",
            "conditional_apply_to",
            "hybrid_min_match",
            "max_loosened_per_100",
            "adaptive_acceptance",
        ),
    } < varied


def test_a_new_policy_and_a_new_drafter_take_part_by_their_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, LikelyPolicy.name, LikelyPolicy)
    kind = DrafterKind(period, needs_draft_model=False, acceptance="exact", search={"prompt_lookup_max": (2,)})
    monkeypatch.setitem(DRAFTERS, "period", kind)
    found = candidates(manifest())
    assert "period+exact" in {candidate.name for candidate in found}
    assert any(candidate.policy == "likely" for candidate in found)
    assert any("prompt_lookup_max" in one.settings for one in found if one.drafter == "period")


def test_filters_leave_plain_decoding_and_the_default_to_compare_with() -> None:
    found = candidates(manifest(), 30, methods=["ngram", "hybrid"], acceptances=["exact"])
    assert [candidate.name for candidate in found[:2]] == [PLAIN, DEFAULT]
    assert {(candidate.drafter, candidate.policy) for candidate in found[2:]} == {
        ("ngram", "exact"),
        ("hybrid", "exact"),
    }


def test_an_exact_baseline_is_there_whichever_policy_is_asked_for() -> None:
    found = candidates(manifest(), 30, acceptances=["margin"])
    assert [candidate.name for candidate in found[2:4]] == ["multi_level+exact", "multi_level+margin"]
    assert {candidate.policy for candidate in found[4:]} == {"margin"}


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"methods": ["medusa"]}, "method 'medusa': expected one of"),
        ({"acceptances": ["fry"]}, "acceptance 'fry': expected one of"),
        ({"methods": ["chain"]}, "method chain: tiny was built for no such way to draft"),
    ],
)
def test_a_filter_that_leaves_nothing_is_refused(filters: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        candidates(manifest(), **filters)


def test_settings_of_the_manifest_stay_where_a_candidate_does_not_say_otherwise() -> None:
    made = manifest(speculative={"exact_within": ["code"], "num_speculative_tokens": 6})
    for candidate in candidates(made):
        config = resolve_speculative_config(made, candidate.settings)
        assert config.exact_within == ["code"]
        assert config.num_speculative_tokens == candidate.settings.get("num_speculative_tokens", 6)
