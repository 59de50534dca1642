"""How probable the target finds an output: what its log-probabilities say, however it was read."""

import math
from pathlib import Path

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, SamplingParams
from fly_trt.benchmark.likelihood import Likelihood
from fly_trt.engines.base import Step
from fly_trt.engines.directory import LoadedEngines

PROMPTS = [record["prompt"] for record in load_eval_prompts()[::60]]


def test_it_is_the_sum_of_the_outputs_logprobs(demo_engine: Path) -> None:
    """Prompts and outputs of more than one chunk; sampled, so that not every token is the most probable one."""
    params = [
        SamplingParams(max_tokens=length, ignore_eos=True, temperature=1, seed=1, logprobs=0) for length in (1, 90)
    ]
    with LLM(demo_engine) as llm:
        outputs = [llm.generate(prompt * 3, each)[0] for prompt in PROMPTS for each in params]
    with LoadedEngines(demo_engine, max_batch_size=1) as engines:
        likelihood = Likelihood(engines)
        for output in outputs:
            (completion,) = output.outputs
            found = likelihood.log_likelihood(output.prompt_token_ids, completion.token_ids)
            assert found == pytest.approx(completion.cumulative_logprob, rel=1e-4, abs=1e-4)
            assert found < 0


def test_what_was_read_is_not_read_again(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, outputs = list(range(10, 50)), [[5, 6, 7, 8], [5, 6, 9, 9, 9], [5, 6], [5]]
    with LoadedEngines(demo_engine, max_batch_size=1) as engines:
        alone = [Likelihood(engines).log_likelihood(prompt, output) for output in outputs]
        positions: list[int] = []
        run = engines.target.run

        def counting(step: Step) -> None:
            positions.append(step.input_ids.size)
            run(step)

        monkeypatch.setattr(engines.target, "run", counting)
        likelihood = Likelihood(engines)
        for _ in range(2):
            assert [likelihood.log_likelihood(prompt, output) for output in outputs] == pytest.approx(alone, rel=1e-5)
        assert positions == [44, 4]  # the whole of one, and from the token before where the next one leaves it
        assert likelihood.log_likelihood([1], [2]) < 0


def test_it_also_says_what_the_target_would_have_chosen(demo_engine: Path) -> None:
    """In place of each token, given what comes before it in the output; the logprobs of a request say the same."""
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=1, seed=1, logprobs=1)
    with LLM(demo_engine) as llm:
        (output,) = llm.generate(PROMPTS[0], params)
    (completion,) = output.outputs
    assert completion.logprobs is not None
    best = [max(entry.logprob for entry in entries.values()) for entries in completion.logprobs]
    with LoadedEngines(demo_engine, max_batch_size=1) as engines:
        likelihood = Likelihood(engines)
        likelihood.read([1], [2, 3])
        likelihood.forget()
        reading = likelihood.read(output.prompt_token_ids, completion.token_ids)
    assert reading.best_log_likelihood == pytest.approx(sum(best), rel=1e-4, abs=1e-4)
    assert reading.quality == pytest.approx(math.exp((completion.cumulative_logprob - sum(best)) / 30), rel=1e-4)
    assert 0 < reading.quality < 1
