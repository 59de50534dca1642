"""The Python API on the demo pair."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from eval_checks import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, ConfigError, EngineError, RequestError, SamplingParams, SpeculativeConfig
from fly_trt.llm import resolve_speculative_config

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:6]]


@pytest.fixture(scope="module")
def llm(demo_engine: Path):
    with LLM(demo_engine) as llm:
        yield llm


def test_one_prompt_or_many_in_text_or_tokens(llm: LLM) -> None:
    many = llm.generate(PROMPTS)
    assert [output.prompt for output in many] == PROMPTS
    assert len({output.request_id for output in many}) == len(PROMPTS)
    one = llm.generate(PROMPTS[0])[0]
    tokens = llm.generate({"prompt_token_ids": one.prompt_token_ids})[0]
    assert tokens.prompt is None
    assert one.outputs[0].text == many[0].outputs[0].text == tokens.outputs[0].text
    assert one.outputs[0].finish_reason == "stop"
    assert one.finished


def test_the_text_is_the_decoded_tokens(llm: LLM) -> None:
    output = llm.generate(PROMPTS[0])[0].outputs[0]
    assert output.text == llm.tokenizer.decode(output.token_ids)


def test_metrics_add_up(llm: LLM) -> None:
    output = llm.generate(PROMPTS[0])[0]
    m = output.metrics
    assert m.num_output_tokens == len(output.outputs[0].token_ids)
    assert m.num_prompt_tokens == len(output.prompt_token_ids)
    assert m.num_draft_tokens == 15 * m.num_spec_steps
    assert sum(m.acceptance_histogram) == m.num_spec_steps
    assert sum(a * count for a, count in enumerate(m.acceptance_histogram)) == m.num_accepted_tokens
    assert m.num_accepted_tokens <= m.num_output_tokens <= m.num_accepted_tokens + m.num_spec_steps
    assert 0 < m.time_to_first_token <= m.latency


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_max_tokens_is_exact(llm: LLM, max_tokens: int) -> None:
    full = llm.generate(PROMPTS[1])[0].outputs[0].token_ids
    cut = llm.generate(PROMPTS[1], SamplingParams(max_tokens=max_tokens))[0].outputs[0]
    assert cut.token_ids == full[:max_tokens]
    assert cut.finish_reason == "length"


def test_without_a_limit_the_engines_length_is_the_limit(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [0, 266] * 1010}
    output = llm.generate(prompt, SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert output.outputs[0].finish_reason == "length"
    assert output.metrics.num_prompt_tokens + output.metrics.num_output_tokens == 2048


def test_end_of_sequence_can_be_ignored(llm: LLM) -> None:
    output = llm.generate(PROMPTS[1], SamplingParams(max_tokens=120, ignore_eos=True))[0].outputs[0]
    assert len(output.token_ids) == 120
    assert 1 in output.token_ids[:-1]


def test_a_stop_string_cuts_the_text_also_inside_a_round(llm: LLM) -> None:
    full = llm.generate(PROMPTS[0])[0].outputs[0].text
    stop = full[20:24]
    output = llm.generate(PROMPTS[0], SamplingParams(stop=stop))[0].outputs[0]
    assert output.text == full[: full.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    kept = llm.generate(PROMPTS[0], SamplingParams(stop=[stop], include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == full[: full.index(stop) + len(stop)]


def test_a_stop_token_ends_the_sequence_and_is_named(llm: LLM) -> None:
    exact = AcceptanceParams(acceptance="exact")
    full = llm.generate(PROMPTS[0], SamplingParams(acceptance=exact))[0].outputs[0].token_ids
    output = llm.generate(PROMPTS[0], SamplingParams(acceptance=exact, stop_token_ids=[full[9]]))[0].outputs[0]
    assert output.token_ids == full[: full.index(full[9]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", full[9])


def test_acceptance_is_chosen_per_request_on_one_engine(llm: LLM, demo_engine: Path) -> None:
    exact = SamplingParams(acceptance=AcceptanceParams(acceptance="exact"))
    with LLM(demo_engine, speculative_config=SpeculativeConfig(method=None)) as plain_llm:
        plain = plain_llm.generate(PROMPTS)
    mixed = llm.generate([p for p in PROMPTS for _ in range(2)], [exact, SamplingParams()] * len(PROMPTS))
    assert [o.outputs[0].token_ids for o in mixed[0::2]] == [o.outputs[0].token_ids for o in plain]
    assert sum(o.metrics.num_loosened_tokens for o in mixed[0::2]) == 0
    assert sum(o.metrics.num_loosened_tokens for o in mixed[1::2]) > 0


def test_a_stream_grows_to_what_generate_returns(llm: LLM) -> None:
    outputs = [output.outputs[0] for output in llm.stream(PROMPTS[0])]
    want = llm.generate(PROMPTS[0])[0].outputs[0]
    assert len(outputs) > 2
    assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(outputs))
    assert (outputs[-1].text, outputs[-1].token_ids, outputs[-1].finish_reason) == (want.text, want.token_ids, "stop")
    assert all(output.finish_reason is None for output in outputs[:-1])


def test_leaving_a_stream_early_leaves_nothing_behind(llm: LLM) -> None:
    want = llm.generate(PROMPTS[1])[0].outputs[0].token_ids
    for _ in llm.stream(PROMPTS[0]):
        break
    assert llm.generate(PROMPTS[1])[0].outputs[0].token_ids == want


def test_streams_and_other_calls_may_interleave(llm: LLM) -> None:
    want = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[:3])]
    first, second = llm.stream(PROMPTS[0]), llm.stream(PROMPTS[1])
    seen = [[next(first)], [next(second)]]
    assert llm.generate(PROMPTS[2])[0].outputs[0].token_ids == want[2]
    seen[1] += second
    seen[0] += first
    assert [outputs[-1].outputs[0].token_ids for outputs in seen] == want[:2]
    assert all(outputs[-1].finished for outputs in seen)
    assert [outputs[0].prompt for outputs in seen] == PROMPTS[:2]


def test_each_streamed_output_has_the_metrics_of_its_moment(llm: LLM) -> None:
    steps = [output.metrics.num_spec_steps for output in llm.stream(PROMPTS[0])]
    assert steps == list(range(1, len(steps) + 1))


def test_a_fly_setting_that_would_have_no_effect_is_refused(llm: LLM, demo_engine: Path) -> None:
    with pytest.raises(ConfigError, match=r"fly_entropy_threshold 0.1: has no effect with acceptance 'exact'"):
        LLM(demo_engine, speculative_config={"method": "ngram", "fly_entropy_threshold": 0.1})
    with pytest.raises(ConfigError, match="fly_window_size 4: has no effect"):
        llm.generate(PROMPTS[0], SamplingParams(acceptance=AcceptanceParams(acceptance="exact", fly_window_size=4)))


def test_another_preset_drops_the_engines_threshold_which_is_in_another_unit(llm: LLM) -> None:
    manifest = llm.manifest.model_copy(update={"speculative": {"preset": "paper", "fly_entropy_threshold": 0.2}})
    assert resolve_speculative_config(manifest, {}).fly_entropy_threshold == 0.2
    assert resolve_speculative_config(manifest, {"preset": "vllm"}).fly_entropy_threshold is None


def test_a_number_of_threads_below_one_is_refused(demo_engine: Path) -> None:
    with pytest.raises(ConfigError, match="num_threads 0: expected at least 1"):
        LLM(demo_engine, num_threads=0)


def test_a_stop_token_outside_the_vocabulary_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="stop_token_ids: 896 is not a token id, expected 0 to 895"):
        llm.generate(PROMPTS[0], SamplingParams(stop_token_ids=[896]))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt_token_ids": [0, 896]}, "896 is not a token id, expected 0 to 895"),
        ({"prompt_token_ids": [0, -1]}, "-1 is not a token id"),
        ({"prompt_token_ids": [0, 1.5]}, "expected a flat list of whole numbers"),
        ({"prompt_token_ids": [[0], [1]]}, "expected a flat list of whole numbers"),
        ({"prompt_token_ids": "abc"}, "expected a flat list of whole numbers"),
        ({"tokens": [1]}, "expected text or {'prompt_token_ids': [...]}"),
        (3, "prompt of type int"),
        ({"prompt_token_ids": [5] * 2048}, "prompt has 2048 tokens, the engine's max_seq_len is 2048"),
        ({"prompt_token_ids": [5] * 9000}, "rebuild with a larger --max-seq-len"),
    ],
)
def test_a_wrong_prompt_is_refused_in_one_line_and_nothing_runs(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        llm.generate([PROMPTS[0], prompt])
    assert message in str(raised.value)
    assert str(raised.value).startswith("prompts[1]: ")
    assert "\n" not in str(raised.value)
    assert llm.generate(PROMPTS[0])[0].finished


def test_params_are_one_for_all_or_one_for_each(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling_params for 3 prompts"):
        llm.generate(PROMPTS[:3], [SamplingParams()] * 2)
    outputs = llm.generate(PROMPTS[:2], [SamplingParams(max_tokens=3), SamplingParams(max_tokens=5)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 5]


def test_a_shut_down_llm_says_so(demo_engine: Path) -> None:
    llm = LLM(demo_engine)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(ConfigError, match="shut down"):
        llm.generate(PROMPTS[0])


def test_a_draft_method_without_a_draft_names_the_fix(target_only_engine: Path) -> None:
    with pytest.raises(ConfigError, match="built without one: use method='ngram' or rebuild with --draft"):
        LLM(target_only_engine, speculative_config=SpeculativeConfig())
    with LLM(target_only_engine) as llm:
        assert llm.speculative_config.method == "ngram"
        assert llm.generate(PROMPTS[0])[0].finished


def test_more_draft_tokens_than_built_for_names_the_fix(demo_engine: Path) -> None:
    with pytest.raises(ConfigError, match="built for max_draft_len 32: rebuild with --max-draft-len 33"):
        LLM(demo_engine, speculative_config={"num_speculative_tokens": 33})


def test_an_engine_of_another_backend_is_refused(demo_engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(demo_engine, copy)
    manifest = json.loads((copy / "fly.json").read_text())
    (copy / "fly.json").write_text(json.dumps(manifest | {"backend": "tensorrt"}))
    with pytest.raises(EngineError, match="built for backend 'tensorrt'"):
        LLM(copy)
