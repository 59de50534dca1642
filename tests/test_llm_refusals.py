"""What the Python API refuses, in one line that names the fix."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import (
    LLM,
    AcceptanceParams,
    ConfigError,
    EngineError,
    RequestError,
    SamplingParams,
    SpeculativeConfig,
)
from fly_trt.service.config import resolve_speculative_config

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:6]]


@pytest.fixture(scope="module")
def llm(demo_engine: Path):
    with LLM(demo_engine) as llm:
        yield llm


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "fly-trt engine"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch_size": 9}, "max_batch_size 9: demo was built for 8: rebuild with --max-batch-size 9"),
        ({"max_num_seqs": 9}, "max_batch_size 9: demo was built for 8: rebuild with --max-batch-size 9"),
        ({"max_seq_len": 2049}, "max_seq_len 2049: demo was built for 2048: rebuild with --max-seq-len 2049"),
        ({"max_model_len": 4096}, "max_seq_len 4096: demo was built for 2048: rebuild with --max-seq-len 4096"),
        ({"max_num_tokens": 513}, "max_num_tokens 513: demo was built for 512: rebuild with --max-num-tokens 513"),
        ({"max_num_tokens": 7}, "max_num_tokens 7: less than one token for each of max_batch_size 8 requests"),
        ({"max_num_seqs": 2, "max_batch_size": 2}, "the same setting as max_batch_size: give one of them"),
        ({"gpu_memory_utilization": 0.9}, "unknown setting 'gpu_memory_utilization': expected one of max_batch_size"),
        ({"max_batch_size": 0}, "max_batch_size 0: expected a whole number, at least 1"),
        ({"max_model_len": "2k"}, "max_seq_len '2k': expected a whole number, at least 1"),
        ({"max_queue_size": -1}, "max_queue_size -1: expected a whole number, at least 1"),
        ({"max_queue_size": None}, "max_queue_size None: expected a whole number, at least 1"),
        ({"num_threads": 0}, "num_threads 0: expected a whole number, at least 1"),
        (
            {"devices": [0, 1]},
            "devices [0, 1]: has no effect, demo was built for onnxruntime, which runs on the CPU: leave",
        ),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching 'no': expected True or False"),
        ({"verify_hashes": 1}, "verify_hashes 1: expected True or False"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(demo_engine: Path, settings: dict, message: str) -> None:
    threads = engine_threads()
    with pytest.raises(ConfigError) as raised:
        LLM(demo_engine, **settings)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert engine_threads() <= threads, "nothing was started"


def test_a_fly_setting_that_would_have_no_effect_is_refused(llm: LLM, demo_engine: Path) -> None:
    with pytest.raises(ConfigError, match=r"fly_entropy_threshold 0.1: has no effect with acceptance 'exact'"):
        LLM(demo_engine, speculative_config={"method": "ngram", "fly_entropy_threshold": 0.1})
    with pytest.raises(ConfigError, match="fly_window_size 4: has no effect"):
        llm.generate(PROMPTS[0], SamplingParams(acceptance=AcceptanceParams(acceptance="exact", fly_window_size=4)))


def test_another_preset_drops_the_engines_threshold_which_is_in_another_unit(llm: LLM) -> None:
    manifest = llm.manifest.model_copy(update={"speculative": {"preset": "paper", "fly_entropy_threshold": 0.2}})
    assert resolve_speculative_config(manifest, {}).fly_entropy_threshold == 0.2
    assert resolve_speculative_config(manifest, {"preset": "vllm"}).fly_entropy_threshold is None


def test_the_engines_draft_stop_is_for_methods_that_it_can_end(llm: LLM) -> None:
    stops = {"draft_stop": "confidence", "draft_stop_threshold": 0.9}
    manifest = llm.manifest.model_copy(update={"speculative": stops})
    for method in ("multi_level", "hybrid"):
        config = resolve_speculative_config(manifest, {"method": method})
        assert (config.draft_stop, config.draft_stop_threshold) == ("confidence", 0.9)
    for method in (None, "ngram", "suffix"):
        assert resolve_speculative_config(manifest, {"method": method}).draft_stop is None
    other = resolve_speculative_config(manifest, {"draft_stop": "adasd"})
    assert (other.draft_stop, other.draft_stop_threshold) == ("adasd", None)
    with pytest.raises(ConfigError, match="draft_stop 'adasd': has no effect with method 'ngram'"):
        resolve_speculative_config(manifest, {"method": "ngram", "draft_stop": "adasd"})


def test_tokens_to_be_exact_are_refused_where_they_are_none(llm: LLM, demo_engine: Path) -> None:
    with pytest.raises(RequestError, match="exact_token_ids: 896 is not a token id, expected 0 to 895"):
        llm.generate(PROMPTS[0], SamplingParams(acceptance=AcceptanceParams(exact_token_ids=[896])))
    with pytest.raises(ConfigError, match="exact_token_ids: -5 is not a token id, expected 0 to 895"):
        LLM(demo_engine, speculative_config={"exact_token_ids": [-5]})


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
        ({"prompt_token_ids": [5] * 2048}, "prompt has 2048 tokens, max_seq_len is 2048 with the output: shorten it"),
        ({"prompt_token_ids": [5] * 9000}, "prompt has 9000 tokens"),
    ],
)
def test_a_wrong_prompt_is_refused_in_one_line_and_nothing_runs(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        llm.generate([PROMPTS[0], prompt])
    assert message in str(raised.value)
    assert str(raised.value).startswith("prompts[1]: ")
    assert "\n" not in str(raised.value)
    assert llm.generate(PROMPTS[0])[0].finished


def test_a_token_that_the_embedding_table_has_not_is_refused_and_the_others_are_served(demo_engine: Path) -> None:
    """Fine-tunes often add tokens to a tokenizer and no rows to the model."""
    with LLM(demo_engine) as llm:
        llm.tokenizer.add_special_tokens([f"[PAD{i}]" for i in range(3, 8)])
        talk = [{"role": "user", "content": "hello [PAD7]"}]
        for params in (SamplingParams(max_tokens=2), SamplingParams(max_tokens=2, repetition_penalty=1.2)):
            for prompt in ("hello [PAD7]", {"prompt_token_ids": [0, 896]}, llm.render_chat(talk)):
                with pytest.raises(RequestError, match=r"the tokenizer's token '\[PAD7\]' has the id 896, and the tar"):
                    llm.generate(prompt, params)
            with pytest.raises(RequestError, match="has the id 896"):
                llm.chat(talk, params)
            assert llm.generate(PROMPTS[0], params)[0].finished


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda llm: llm.generate(None),
            "prompts of type NoneType: expected text, {'prompt_token_ids': [...]} or a li",
        ),
        (lambda llm: llm.generate(5), "prompts of type int: expected text"),
        (lambda llm: llm.generate(b"bytes"), "prompts of type bytes: expected text"),
        (lambda llm: llm.generate([b"bytes"]), "prompt of type bytes: expected text"),
        (lambda llm: next(llm.stream(None)), "prompt of type NoneType: expected text"),
        (lambda llm: llm.chat(None), "messages None: expected a list of {'role': ..., 'content': ...}"),
        (
            lambda llm: llm.chat({"role": "user", "content": "x"}),
            "messages {'role': 'user', 'content': 'x'}: expected a",
        ),
        (lambda llm: llm.chat("hello"), "messages 'hello': expected a list"),
        (lambda llm: llm.chat(5), "messages 5: expected a list"),
        (lambda llm: llm.chat(iter([])), "expected a list of {'role': ..., 'content': ...}"),
        (
            lambda llm: llm.generate("x", {"max_tokens": 3}),
            "sampling_params of type dict: expected SamplingParams or a l",
        ),
        (lambda llm: llm.generate("x", 5), "sampling_params of type int: expected SamplingParams or a list"),
        (lambda llm: llm.generate("x", [{"max_tokens": 3}]), "sampling_params of type dict: expected SamplingParams"),
        (lambda llm: next(llm.stream("x", {})), "sampling_params of type dict: expected SamplingParams"),
        (lambda llm: llm.generate("x\udcff"), "the prompt: '\\udcff' at character 1 is half of a surrogate pair"),
        (lambda llm: llm.chat([{"role": "user", "content": "\udcff"}]), "the rendered chat: '\\udcff' at character"),
    ],
)
def test_what_is_no_request_at_all_is_refused_in_one_line(
    llm: LLM, call: Callable[[LLM], object], message: str
) -> None:
    with pytest.raises(RequestError) as raised:
        call(llm)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


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


def test_more_draft_tokens_than_served_with_are_refused_for_one_request(llm: LLM) -> None:
    with pytest.raises(RequestError) as raised:
        llm.generate(PROMPTS[:2], [SamplingParams(), SamplingParams(num_speculative_tokens=16)])
    assert str(raised.value) == (
        "prompts[1]: num_speculative_tokens 16: served with 15: ask for at most 15, or serve with a larger "
        "num_speculative_tokens, which is at most the engine's max_draft_len, 32"
    )
    assert llm.generate(PROMPTS[0], SamplingParams(num_speculative_tokens=15))[0].finished


def test_draft_tokens_are_refused_where_nothing_drafts(demo_engine: Path) -> None:
    with LLM(demo_engine, speculative_config={"method": None}) as llm:
        for asked in (1, 16):
            with pytest.raises(RequestError) as raised:
                llm.generate(PROMPTS[0], SamplingParams(num_speculative_tokens=asked))
            assert str(raised.value) == (
                f"num_speculative_tokens {asked}: served with method None, which makes no drafts: leave it out, or "
                "serve with another method"
            )
        assert llm.generate(PROMPTS[0], SamplingParams(num_speculative_tokens=0))[0].finished


def test_an_engine_of_another_backend_is_refused(demo_engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(demo_engine, copy)
    manifest = json.loads((copy / "fly.json").read_text())
    (copy / "fly.json").write_text(json.dumps(manifest | {"backend": "openvino"}))
    with pytest.raises(EngineError, match="built for backend 'openvino'"):
        LLM(copy)
    (copy / "fly.json").write_text(json.dumps(manifest | {"backend": "tensorrt", "device": "cuda"}))
    with pytest.raises(EngineError, match="the manifest has no TensorRT record: rebuild the engine"):
        LLM(copy)


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(llm: LLM) -> None:
    longest = max(map(len, llm.tokenizer.get_vocab()))
    longest_prompt = "x" * (2048 * longest)
    with pytest.raises(RequestError, match=r"prompt has \d+ tokens, max_seq_len is 2048"):
        llm.generate(longest_prompt)
    with pytest.raises(RequestError, match=f"prompt has {2048 * longest + 1} characters, max_seq_len is 2048 tokens"):
        llm.generate(longest_prompt + "x")
