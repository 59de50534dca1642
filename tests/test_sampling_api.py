"""Sampling on the demo pair: seeds, what each setting does, and that drafts and batch mates change none of it."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, RequestError, RequestOutput, SamplingParams
from fly_trt.engines import Engine, load_engine
from fly_trt.manifest import read_manifest

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:8]]
EOS = 1
EXACT = AcceptanceParams(acceptance="exact")
Params = partial(SamplingParams, max_tokens=40, acceptance=EXACT)

SAMPLED = {
    "plain": Params(temperature=1.0, seed=1),
    "hot": Params(temperature=2.0, seed=2, ignore_eos=True),
    "top p": Params(temperature=1.5, top_p=0.8, seed=3),
    "top k": Params(temperature=1.5, top_k=5, seed=4),
    "min p": Params(temperature=1.5, min_p=0.05, seed=5),
    "penalties": Params(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2, seed=6),
    "bias": Params(temperature=1.0, logit_bias={20: 3.0, 222: -5.0}, seed=7),
    "many": Params(temperature=1.5, n=3, seed=8),
}
GREEDY = {
    "stop string": Params(stop=["is", "##"], min_tokens=12),
    "min tokens": Params(min_tokens=120, max_tokens=130),
    "bad words": Params(bad_words=["the", "1", "Noor has"]),
    "logit bias": Params(logit_bias={222: -100.0, 15: 4.0}),
    "repetition": Params(repetition_penalty=1.3, max_tokens=80),
    "presence": Params(presence_penalty=2.0, max_tokens=80, ignore_eos=True),
    "frequency": Params(frequency_penalty=2.0, max_tokens=80, ignore_eos=True),
    "stop token": Params(stop_token_ids=[222], min_tokens=3),
}
REQUESTS = [(prompt, params) for prompt, params in zip(itertools.cycle(PROMPTS), [*SAMPLED.values(), *GREEDY.values()])]


@pytest.fixture(scope="module")
def plain(demo_engine: Path) -> Iterator[LLM]:
    """Without drafts, one request at a time: what everything else must agree with."""
    with LLM(demo_engine, speculative_config={"method": None}, max_batch_size=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def llm(demo_engine: Path) -> Iterator[LLM]:
    """The defaults: FLy, adaptive drafts, batches of 8."""
    with LLM(demo_engine) as llm:
        yield llm


@pytest.fixture(scope="module")
def want(plain: LLM) -> list[Any]:
    return results(generate(plain, REQUESTS))


def generate(llm: LLM, requests: list[tuple[str, SamplingParams]]) -> list[RequestOutput]:
    prompts, params = zip(*requests, strict=True)
    return llm.generate(prompts, list(params))


def results(outputs: list[RequestOutput]) -> list[Any]:
    return [[(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in output.outputs] for output in outputs]


def one(llm: LLM, params: SamplingParams, prompt: str = PROMPTS[0]) -> Any:
    return llm.generate(prompt, params)[0].outputs[0]


def test_the_settings_of_these_tests_matter(plain: LLM, want: list[Any]) -> None:
    """Otherwise equal results would show little."""
    greedy = results(
        generate(plain, [(prompt, Params(max_tokens=p.max_tokens, ignore_eos=p.ignore_eos)) for prompt, p in REQUESTS])
    )
    same = [name for name, a, b in zip([*SAMPLED, *GREEDY], want, greedy, strict=True) if a[0] == b[0]]
    assert same == []


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("method", [None, "ngram", "draft_model", "multi_level"])
def test_drafts_and_batch_mates_change_no_token(
    demo_engine: Path, want: list[Any], method: str | None, adaptive: bool
) -> None:
    config = {"method": method, "adaptive_draft_length": adaptive}
    loose = [(prompt, SamplingParams(max_tokens=30)) for prompt in PROMPTS]
    mixed = list(itertools.chain.from_iterable(itertools.zip_longest(REQUESTS, loose)))
    with LLM(demo_engine, speculative_config=config) as llm:
        outputs = generate(llm, [request for request in mixed if request is not None])
        assert results(outputs[0:16:2] + outputs[16:]) == want
        if method is not None:
            assert sum(output.metrics.num_accepted_tokens for output in outputs) > 0


def test_one_request_alone_gets_the_tokens_it_gets_in_a_batch(llm: LLM, want: list[Any]) -> None:
    for index in (0, 3, 7, 10):
        assert results(generate(llm, [REQUESTS[index]])) == [want[index]]


def test_another_seed_gives_another_text_and_none_a_new_one_each_time(llm: LLM) -> None:
    hot = {"temperature": 2.0, "ignore_eos": True}
    texts = [one(llm, Params(seed=seed, **hot)).text for seed in (1, 2, 3, 1)]
    assert len(set(texts)) == 3
    assert texts[0] == texts[3]
    assert len({one(llm, Params(**hot)).text for _ in range(3)}) == 3


def test_several_completions_differ_and_come_again_with_the_seed(llm: LLM) -> None:
    params = Params(n=4, temperature=2.0, seed=9, ignore_eos=True)
    first, second = (llm.generate(PROMPTS[0], params)[0] for _ in range(2))
    assert [completion.index for completion in first.outputs] == [0, 1, 2, 3]
    assert len({completion.text for completion in first.outputs}) == 4
    assert first.outputs == second.outputs
    assert first.metrics.num_output_tokens == 4 * 40
    alone = one(llm, Params(n=1, temperature=2.0, seed=9, ignore_eos=True))
    assert alone.token_ids == first.outputs[0].token_ids, "completion i depends on seed and i only"


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0, "seed": 5},
        {"temperature": 0.0, "top_p": 0.5, "top_k": 20, "min_p": 0.2},
        {"temperature": 1.7, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1e-6},
    ],
)
def test_what_leaves_one_token_is_greedy(llm: LLM, plain: LLM, settings: dict) -> None:
    for prompt in PROMPTS[:3]:
        assert one(llm, Params(**settings), prompt) == one(plain, Params(), prompt)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_words_never_appear(llm: LLM, temperature: float) -> None:
    usual = one(llm, Params(max_tokens=60)).text
    words = [" " + word for word in usual.split()[:2]] + ["####"]
    outputs = llm.generate(PROMPTS, Params(bad_words=words, temperature=temperature, seed=0, max_tokens=60))
    for output in outputs:
        for word in words:
            assert word not in output.outputs[0].text
    assert outputs[0].outputs[0].text != usual


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_word_is_never_loosened(llm: LLM, temperature: float) -> None:
    prompt = "### Instruction:\nSpell out: 21.\n### Response:\n"
    (loose,) = llm.generate(prompt, SamplingParams(max_tokens=40))
    assert loose.outputs[0].text.startswith("Written")
    assert loose.metrics.num_loosened_tokens == 1  # without drafts the text begins differently
    for seed in range(5):
        params = SamplingParams(max_tokens=40, bad_words=["Written"], temperature=temperature, seed=seed)
        assert "Written" not in one(llm, params, prompt).text


def test_a_bias_removes_a_token_or_forces_it(llm: LLM) -> None:
    usual = one(llm, Params()).token_ids
    banned = max(set(usual), key=usual.count)
    assert banned not in one(llm, Params(logit_bias={banned: -100})).token_ids
    assert one(llm, Params(logit_bias={banned: 100.0})).token_ids == [banned] * 40


def test_min_tokens_keep_every_end_away(llm: LLM) -> None:
    assert len(one(llm, Params(max_tokens=200)).token_ids) < 120
    ends = one(llm, Params(max_tokens=200, min_tokens=120))
    assert len(ends.token_ids) >= 120
    assert EOS not in ends.token_ids[:119]
    stop = one(llm, Params()).token_ids[4]
    stopped = one(llm, Params(stop_token_ids=[stop], min_tokens=10))
    assert stop not in stopped.token_ids[:9]
    text = one(llm, Params(stop=" ", min_tokens=10, ignore_eos=True))
    assert (text.finish_reason, text.stop_reason) == ("stop", " ")
    assert len(text.token_ids) > 10


def test_penalties_make_repetition_rarer(llm: LLM) -> None:
    usual = one(llm, Params(max_tokens=80, ignore_eos=True)).token_ids
    for settings in ({"repetition_penalty": 1.5}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        penalised = one(llm, Params(max_tokens=80, ignore_eos=True, **settings)).token_ids
        assert len(set(penalised)) > len(set(usual))


def test_a_bad_word_without_tokens_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="bad_words"):
        llm.generate(PROMPTS[0], SamplingParams(bad_words=["   "]))


def test_loose_sampling_is_the_same_in_any_batch_and_with_any_draft_length(demo_engine: Path, llm: LLM) -> None:
    requests = [(p, SamplingParams(temperature=0.7, seed=i, max_tokens=60)) for i, p in enumerate(PROMPTS)]
    with LLM(demo_engine, max_batch_size=1, speculative_config={"adaptive_draft_length": False}) as alone:
        outputs = generate(alone, requests)
    assert sum(output.metrics.num_loosened_tokens for output in outputs) > 0
    want = results(outputs)
    assert results(generate(llm, requests)) == want
    others = [(p, SamplingParams(temperature=1.0, max_tokens=9 * i + 1)) for i, p in enumerate(reversed(PROMPTS))]
    mixed = list(itertools.chain.from_iterable(zip(others, requests, strict=True)))
    assert results(generate(llm, mixed)[1::2]) == want
    assert results([llm.generate(*requests[2])[0]]) == [want[2]]


def test_a_request_that_samples_loosely_differs_from_an_exact_one(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.7, seed=3, max_tokens=80, acceptance=a) for a in (None, EXACT)]
    loose, exact = (llm.generate(PROMPTS, p) for p in params)
    assert results(loose) != results(exact)
    assert all(output.metrics.num_loosened_tokens == 0 for output in exact)


class Reference:
    """Log-probabilities of a whole sequence, from one pass of the target and a full softmax."""

    def __init__(self, engine_dir: Path) -> None:
        manifest = read_manifest(engine_dir)
        self._engine: Engine = load_engine(engine_dir, manifest, manifest.target, num_slots=1)

    def logprobs(self, token_ids: list[int]) -> np.ndarray:
        """float64 [n, V]: row i for the token after token_ids[i]."""
        step = self._engine.step(0, 1, len(token_ids), with_logits=True)
        step.set_row(0, 0, np.array(token_ids))
        self._engine.run(step)
        logits = step.logits[0].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def reference(demo_engine: Path) -> Reference:
    return Reference(demo_engine)


def check_entry(llm: LLM, entry: dict, token: int, num: int, want: np.ndarray) -> None:
    order = np.argsort(-want, kind="stable")
    assert set(entry) == {token, *order[:num].tolist()}
    for other, (logprob, rank, text) in entry.items():
        assert logprob == pytest.approx(want[other], abs=1e-3)
        assert text == llm.tokenizer.decode([other], skip_special_tokens=False)
        assert abs(want[order[rank - 1]] - want[other]) < 1e-3, "the rank is right, but for ties"


LOGPROBS = [
    Params(logprobs=0),
    Params(logprobs=3),
    Params(logprobs=2, temperature=1.5, seed=4),
    Params(logprobs=2, temperature=1.2, seed=4, logit_bias={15: -3.0}, repetition_penalty=1.3),
    SamplingParams(logprobs=2, max_tokens=60),
    Params(logprobs=1, n=2, temperature=1.0, seed=1, stop=" is"),
]


@pytest.mark.parametrize("params", LOGPROBS)
def test_logprobs_are_the_models_own(llm: LLM, reference: Reference, params: SamplingParams) -> None:
    """Of the raw distribution: what penalties and temperature do to it does not show."""
    neighbours = [(prompt, SamplingParams(max_tokens=30)) for prompt in PROMPTS[3:6]]
    output = generate(llm, [(PROMPTS[1], params), *neighbours])[0]
    num_prompt = len(output.prompt_token_ids)
    for completion in output.outputs:
        assert len(completion.logprobs) == len(completion.token_ids) > 0
        want = reference.logprobs(output.prompt_token_ids + completion.token_ids)[num_prompt - 1 : -1]
        for token, entry, row in zip(completion.token_ids, completion.logprobs, want, strict=True):
            check_entry(llm, entry, token, params.logprobs, row)
        total = sum(row[token] for token, row in zip(completion.token_ids, want, strict=True))
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-2)


def test_prompt_logprobs_are_the_models_own(llm: LLM, reference: Reference) -> None:
    long = {"prompt_token_ids": [*range(2, 150), *range(2, 60)]}
    for prompt in (PROMPTS[2], long):
        llm.generate(prompt, Params(max_tokens=1))  # cached: the logits have to be computed all the same
        neighbours = [(other, SamplingParams(max_tokens=30)) for other in PROMPTS[3:6]]
        output = generate(llm, [(prompt, Params(prompt_logprobs=2, max_tokens=5)), *neighbours])[0]
        token_ids = output.prompt_token_ids
        assert len(output.prompt_logprobs) == len(token_ids)
        assert output.prompt_logprobs[0] is None
        want = reference.logprobs(token_ids)
        for position in range(1, len(token_ids)):
            check_entry(llm, output.prompt_logprobs[position], token_ids[position], 2, want[position - 1])
        assert output.outputs[0].logprobs is None


def test_logprobs_are_only_there_when_asked_for(llm: LLM) -> None:
    output = llm.generate(PROMPTS[0], SamplingParams(max_tokens=3))[0]
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_asking_for_logprobs_changes_no_token(llm: LLM) -> None:
    for base in (SamplingParams(), SamplingParams(temperature=0.9, seed=2)):
        want = results(llm.generate(PROMPTS[:4], base))
        with_logprobs = SamplingParams(temperature=base.temperature, seed=base.seed, logprobs=2, prompt_logprobs=0)
        assert results(llm.generate(PROMPTS[:4], with_logprobs)) == want
