"""The costs that a request's windows are decided by, and who says what they are."""

from pathlib import Path

import pytest

from fly_build import measure
from fly_build.measure import estimate_costs
from fly_build.pipeline import add_costs
from fly_trt import SpeculativeConfig
from fly_trt.engines.base import Step
from fly_trt.engines.onnxruntime import OnnxRuntimeEngine
from fly_trt.engines.rollouts import Rollout
from fly_trt.manifest import read_manifest
from fly_trt.runtime.loosening import DRAFT_TOKEN_COST, VERIFICATION_TOKEN_COST, StepCosts
from fly_trt.service.config import step_costs

NAMES = ("draft_token_cost", "verification_token_cost")


def costs_after(engine: Path, given: dict[str, float | None]) -> StepCosts | None:
    manifest = read_manifest(engine).model_copy(update={"speculative": {"preset": "paper", **given}})
    built = add_costs(manifest, engine, lambda step, fraction: None)
    assert built.speculative["preset"] == "paper"
    return step_costs(built, SpeculativeConfig())


@pytest.mark.parametrize("given", [{}, dict.fromkeys(NAMES)])
def test_costs_are_measured_where_none_are_given(demo_engine: Path, given: dict[str, float | None]) -> None:
    costs = costs_after(demo_engine, given)
    assert costs is not None
    assert costs.draft_token > 0
    assert costs.verification_token >= 0
    assert costs != StepCosts(DRAFT_TOKEN_COST, VERIFICATION_TOKEN_COST)


def test_a_draft_is_measured_as_it_drafts(
    demo_engine: Path, cpu_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tokens in one call, where its engine has rollouts: steps of their own cost more."""
    rolled, stepped = set[int](), set[bool]()
    run, run_rollout = OnnxRuntimeEngine.run, OnnxRuntimeEngine.run_rollout

    def noted_run(engine: OnnxRuntimeEngine, step: Step) -> None:
        stepped.add(engine.has_rollouts)
        run(engine, step)

    def noted_rollout(engine: OnnxRuntimeEngine, rollout: Rollout) -> None:
        rolled.add(rollout.num_steps)
        run_rollout(engine, rollout)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", noted_run)
    monkeypatch.setattr(OnnxRuntimeEngine, "run_rollout", noted_rollout)
    monkeypatch.setattr(measure, "MAX_ROUNDS", 5)
    measure.measure_costs(read_manifest(demo_engine), demo_engine)
    assert (rolled, stepped) == ({measure.DRAFT_TOKENS}, {False})


def test_given_costs_stay(demo_engine: Path) -> None:
    assert costs_after(demo_engine, {NAMES[0]: 7.5, NAMES[1]: 0.0}) == StepCosts(7.5, 0.0)
    half = costs_after(demo_engine, {NAMES[0]: 7.5, NAMES[1]: None})
    assert half is not None
    assert half.draft_token == 7.5


def test_an_engine_without_costs_has_the_usual_ones_and_a_caller_may_choose(demo_engine: Path) -> None:
    for kept in ({}, dict.fromkeys(NAMES)):
        manifest = read_manifest(demo_engine).model_copy(update={"speculative": kept})
        assert step_costs(manifest, SpeculativeConfig()) == StepCosts(0.1, 0.05)
        assert step_costs(manifest, SpeculativeConfig(draft_token_cost=0.0)) == StepCosts(0.0, 0.05)
        assert step_costs(manifest, SpeculativeConfig(adaptive_acceptance=False)) is None


def test_a_model_on_several_gpus_costs_what_each_of_them_reads(demo_engine: Path) -> None:
    manifest = read_manifest(demo_engine)
    assert manifest.draft is not None
    alone, further = estimate_costs(manifest)
    spread = {"other_ranks": [f"rank{rank}" for rank in range(1, 4)]}
    target, draft = (engine.model_copy(update=spread) for engine in (manifest.target, manifest.draft))
    assert estimate_costs(manifest.model_copy(update={"target": target})) == (pytest.approx(4 * alone), further)
    both = manifest.model_copy(update={"target": target, "draft": draft})
    assert estimate_costs(both) == (pytest.approx(alone), further)
