"""Results of tuning over simulated truths, for those who show them."""

import functools

import numpy as np

from fly_trt.tuning.result import DEFAULT, PLAIN, TuningResult, TuningSettings
from fly_trt.tuning.verdict import Rules, conclude
from tuning_tables import Simulated, Truth

HOSTILE = '</script><script>document.title="hit"</script><img src=x onerror=document.title="hit">'
JUDGED = (
    Simulated(PLAIN, 1.0),
    Simulated(DEFAULT, 1.8, 0.02),
    Simulated("ngram+exact", 1.4),
    Simulated("hybrid+fly,fly_window_size=4", 2.2, 0.0),
    Simulated("multi_level+relaxed,relaxed_top_n=3", 2.6, 0.012),
)


@functools.cache
def tuned(
    judged: tuple[Simulated, ...] = JUDGED,
    searched: tuple[Simulated, ...] = (),
    num_prompts: int = 800,
    kind: str = "checks",
    prompts: str = "prompts.jsonl",
) -> TuningResult:
    """A quarter of the prompts chose, the others judged; what was searched alone answered the first ten."""
    simulated = [*judged, *searched]
    truth = Truth.drawn(simulated, num_prompts, np.random.default_rng(3), share_right=0.8)
    chose = num_prompts // 4
    names = [one.name for one in judged]
    outcomes = truth.outcomes([one.name for one in simulated], range(10), "search")
    outcomes += truth.outcomes(names, range(10, chose), "search") + truth.outcomes(
        names, range(chose, num_prompts), "judge"
    )
    rules = Rules(kind, num_resamples=100)
    results, verdict = conclude([one.candidate for one in simulated], outcomes, rules)
    settings = TuningSettings(
        prompts=prompts,
        prompts_sha256="ab" * 32,
        num_prompts=num_prompts,
        judged_by=kind,
        min_retention=rules.min_retention,
        confidence=rules.confidence,
        seed=7,
        max_tokens=256,
        extra={"budget": 30.0, "methods": ()},
    )
    return TuningResult(
        settings=settings,
        candidates=results,
        verdict=verdict,
        search_prompts=list(range(chose)),
        judge_prompts=list(range(chose, num_prompts)),
        engine={"name": "demo", "limits": {"max_batch_size": 8}},
        machine={"cpu": "a CPU", "gpu": None},
        versions={"numpy": "2.4"},
        date="2026-11-27T06:00:00+00:00",
        seconds=600.0,
    )
