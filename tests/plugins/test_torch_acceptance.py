"""plugins/check/torch_acceptance.py on the CPU: the rule in torch passes it, and what accepts otherwise does not."""

import numpy as np

import torch_acceptance as check
from fly_trt.integrations.tensorrt_llm.acceptance import FlyAcceptance
from fly_trt.integrations.tensorrt_llm.environment import Acceptance

SHAPE = 1, 6, 24, 300  # contexts, requests, draft tokens, vocabulary


def test_the_rule_in_torch_agrees_with_the_one_on_the_host() -> None:
    seen = check.compare("cpu", num_cases=12, seed=5)
    assert seen["wrong"] == 0
    assert seen["requests"] >= 12
    assert seen["loosened"] > 0


def test_it_finds_an_acceptance_that_is_not_the_rules() -> None:
    rng = np.random.default_rng(0)
    batches = [check.Batch.random(rng, SHAPE) for _ in range(20)]
    rule, wrong, loosened = Acceptance("reference"), 0, 0
    for batch in batches:
        fly = FlyAcceptance(rule, lambda text: None)
        exact = check.run_exactly(batch, "cpu")
        assert check.mismatches(batch, rule, check.run(fly, batch.inputs("cpu"), batch.num_contexts), exact) == 0
        wrong += check.mismatches(batch, rule, exact, exact)
        loosened += fly.counts()[1]
    assert loosened > 0
    assert wrong > 0
