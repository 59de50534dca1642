"""ONNX Runtime's CUDA provider on a simulated GPU that computes with its CPU provider: the tokens are those of the
CPU's engines and of FLy's authors, the contract's promises hold, and what cannot run on the GPU is refused in one line.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, EngineError, SamplingParams, SpeculativeConfig
from fly_trt.benchmark.checks import is_right
from fly_trt.engines import Engine, onnxruntime_cuda
from fly_trt.engines.base import TOP_OUTPUTS
from fly_trt.engines.blocks import OUTPUTS
from fly_trt.verification import FlyPolicy
from simulated_cuda import Error, SimulatedCuda
from simulated_engine import LONGEST, LONGEST_ROW, TOKENS, build_for_onnxruntime, load, logits, run, same
from simulated_onnxruntime import SimulatedOnnxRuntime

BuildOnce = Callable[[str, Callable[[Path], object]], Path]
GOLDEN = Path(__file__).parents[1] / "assets" / "golden" / "public.jsonl"
RECORDS = load_eval_prompts()[::20]
PROMPTS = [record["prompt"] for record in RECORDS]
LOOSE = FlyPolicy(entropy_threshold=0.0, use_full_entropy=True, window=2, lookahead=0)
CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "exact": ("multi_level", {"acceptance": "exact"}),
    "FLy": ("multi_level", {"acceptance": "fly"}),
    "paper": ("draft_model", {"acceptance": "fly", "preset": "paper"}),
    "relaxed": ("multi_level", {"acceptance": "relaxed"}),
    "sampled": ("multi_level", {"acceptance": "exact", "temperature": 0.9, "top_p": 0.95, "seed": 5, "logprobs": 2}),
}


@pytest.fixture
def cuda(library: SimulatedOnnxRuntime, cuda_engine: Path) -> Engine:
    """The demo draft with three slots."""
    return load(cuda_engine)


def generate(directory: Path, method: str | None, settings: dict[str, Any]) -> list[Any]:
    names = ("acceptance", "preset")
    chosen = {name: settings[name] for name in names if name in settings}
    sampling = {name: value for name, value in settings.items() if name not in names}
    params = SamplingParams(max_tokens=48, **sampling, acceptance=AcceptanceParams(**chosen) if chosen else None)
    with LLM(directory, speculative_config={"method": method}, max_batch_size=4, max_seq_len=300) as llm:
        return llm.generate(PROMPTS, params)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_cpu(
    case: str, demo_engine: Path, cuda_engine: Path, library: SimulatedOnnxRuntime, gpu: SimulatedCuda
) -> None:
    want = generate(demo_engine, *CASES[case])
    got = generate(cuda_engine, *CASES[case])
    assert gpu.calls["graph launches of sessions"] > 20
    assert [output.outputs[0].token_ids for output in got] == [output.outputs[0].token_ids for output in want]


@pytest.mark.parametrize("config", ["exact", "fly", "fly_multilevel"])
def test_every_sequence_is_the_authors(config: str, cuda_engine: Path, library: SimulatedOnnxRuntime) -> None:
    rows = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    rows = [row for row in rows if row["config"]["name"] == config][::3]
    assert len(rows) == 20
    settings = SpeculativeConfig(
        method="multi_level" if rows[0]["config"]["multi_level"] else "draft_model",
        num_speculative_tokens=rows[0]["config"]["num_speculative_tokens"],
        acceptance="fly" if rows[0]["config"]["fly"] else "exact",
    )
    with LLM(cuda_engine, speculative_config=settings, max_batch_size=8) as llm:
        prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=160))
    assert [output.outputs[0].token_ids for output in outputs] == [row["token_ids"] for row in rows]


@pytest.mark.parametrize(
    "built_as", [{"dtype": "float16"}, {"quantization": "int4"}], ids=lambda built_as: next(iter(built_as.values()))
)
def test_fewer_bits_answer_right(
    built_as: dict[str, str], build_once: BuildOnce, library: SimulatedOnnxRuntime
) -> None:
    """Near ties break differently, so that not the tokens but the answers are compared."""
    name = "_".join(built_as.values())
    built = build_once(f"cuda_{name}", lambda path: build_for_onnxruntime(path, **built_as))
    with LLM(built, max_batch_size=8) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=160))
    is_answered = [
        is_right(record["check"], output.outputs[0].text) for record, output in zip(RECORDS, outputs, strict=True)
    ]
    assert is_answered.count(True) >= len(RECORDS) - 1
    assert sum(output.metrics.num_accepted_tokens for output in outputs) > 0


@pytest.mark.parametrize(("quantization", "least", "most"), [("int8", 1e-4, 0.02), ("int4", 0.02, 0.3)])
def test_blocks_of_weights_give_nearly_the_same_logits(
    quantization: str, least: float, most: float, cuda: Engine, build_once: BuildOnce, library: SimulatedOnnxRuntime
) -> None:
    built = build_once(f"cuda_{quantization}", lambda path: build_for_onnxruntime(path, quantization=quantization))
    want, got = logits(cuda, 0, TOKENS), logits(load(built), 0, TOKENS)
    assert least < np.linalg.norm(got - want) / np.linalg.norm(want) < most


@pytest.mark.parametrize("length", [1, 4, 5, LONGEST_ROW, 50])
def test_chunks_give_the_logits_of_the_whole(cuda: Engine, length: int) -> None:
    whole = logits(cuda, 0, TOKENS)
    same(np.concatenate([logits(cuda, at, TOKENS[at : at + length]) for at in range(0, LONGEST, length)]), whole)


def test_a_rewind_forgets_what_came_after(cuda: Engine) -> None:
    whole = logits(cuda, 0, TOKENS)
    logits(cuda, 0, TOKENS[:20])
    logits(cuda, 20, TOKENS[40:60])
    same(logits(cuda, 20, TOKENS[20:40]), whole[20:40])


@pytest.mark.parametrize("num_tokens", [1, 5, LONGEST_ROW, LONGEST_ROW + 1])
def test_rows_of_a_batch_give_what_they_give_alone(cuda: Engine, num_tokens: int) -> None:
    """Also with drafts that a policy of their own judges; long rows run one by one."""
    cut, policies, alone = max(1, num_tokens // 2), ({"policy": LOOSE}, {}), []
    for row, policy in enumerate(policies):
        step = cuda.step(1 + row, 1, num_tokens, with_logits=True, with_top=True)
        tokens = TOKENS[row:][:num_tokens]
        step.set_row(0, 0, tokens[:cut], tokens[cut:], **policy)
        cuda.run(step)
        alone.append([np.array(getattr(step, name)[0]) for name in (*OUTPUTS, *TOP_OUTPUTS, "logits")])
    for _ in range(2):
        step = cuda.step(1, 2, num_tokens, with_logits=True, with_top=True)
        for row, policy in enumerate(policies):
            tokens = TOKENS[row:][:num_tokens]
            step.set_row(row, 0, tokens[:cut], tokens[cut:], **policy)
        cuda.run(step)
        for row, want in enumerate(alone):
            for name, value in zip((*OUTPUTS, *TOP_OUTPUTS, "logits"), want, strict=True):
                found, last = np.atleast_1d(getattr(step, name)[row]), -1 if name == "token_logprob" else None
                np.testing.assert_allclose(found[:last], np.atleast_1d(value)[:last], atol=1e-4, err_msg=name)


def test_slots_are_copied_swapped_and_cleared(cuda: Engine) -> None:
    texts = TOKENS[:30], TOKENS[30:60]
    want = [logits(cuda, 0, text, slot=slot)[20:] for slot, text in zip((0, 2), texts, strict=True)]
    cuda.swap_slots(0, 2, 20)
    same(logits(cuda, 20, texts[0][20:], slot=2), want[0])
    same(logits(cuda, 20, texts[1][20:], slot=0), want[1])
    cuda.copy_slot(2, 1, 20)
    same(logits(cuda, 20, texts[0][20:], slot=1), want[0])
    cuda.clear_slot(1, 20)
    same(logits(cuda, 20, texts[0][20:], slot=1), want[0])


def test_a_step_is_one_copy_each_way_and_one_graph(
    cuda: Engine, gpu: SimulatedCuda, library: SimulatedOnnxRuntime
) -> None:
    for start in (0, 20, 40):
        preparations, launches = cuda.num_preparations, gpu.calls["graph launches of sessions"]
        gpu.copies.clear()
        step = run(cuda, 0, TOKENS[start:][:5], with_logits=False)
        assert step.logits is None
        assert gpu.copies == {"host to device": 1, "device to host": 1}
        assert (cuda.num_preparations - preparations, gpu.calls["graph launches of sessions"] - launches) == (
            (1, 0) if start == 0 else (0, 1)
        )
    assert len(library.sessions[0].graphs) == 1
    assert step.argmax[0].tolist() == logits(cuda, 0, TOKENS[40:45]).argmax(-1).tolist()


def test_steps_of_a_prompt_are_not_captured(cuda: Engine, library: SimulatedOnnxRuntime) -> None:
    for _ in range(3):
        run(cuda, 0, TOKENS[: LONGEST_ROW + 1])
    assert library.sessions[0].graphs == {}


def test_shapes_beyond_the_most_graphs_run_without(
    cuda_engine: Path, library: SimulatedOnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime keeps every graph until the session ends. What was bound for others is let go."""
    monkeypatch.setattr(onnxruntime_cuda, "MAX_GRAPHS", 3)
    monkeypatch.setattr(onnxruntime_cuda, "MAX_UNCAPTURED_SHAPES", 2)
    engine = load(cuda_engine)
    whole = logits(engine, 0, TOKENS[:60])
    for length in (1, 2, 4, 8, 1, 60, 16, 2, 8):
        same(logits(engine, 0, TOKENS[:length]), whole[:length])
    assert sorted(library.sessions[0].graphs) == [1, 2, 3]
    assert len(engine._uncaptured) == 2


def test_steps_that_cannot_be_captured_run_without_a_graph(
    cuda: Engine, gpu: SimulatedCuda, library: SimulatedOnnxRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """And those that were captured before go on as they are."""
    whole = logits(cuda, 0, TOKENS[:5])
    gpu.captures_of_engines = "are refused"
    for length in (2, 3, 5):
        for _ in range(2):
            same(logits(cuda, 0, TOKENS[:length]), whole[:length])
    assert list(library.sessions[0].graphs) == [1]
    assert caplog.text.count("without a CUDA graph") == 1


def test_shutting_down_frees_the_gpu(cuda_engine: Path, library: SimulatedOnnxRuntime, gpu: SimulatedCuda) -> None:
    generate(cuda_engine, *CASES["FLy"])
    assert gpu.calls["cudaMalloc"] > 0
    assert not [found for found in gpu.allocations.values() if found.is_device]


def test_a_gpu_that_fails_ends_the_requests(
    cuda_engine: Path, library: SimulatedOnnxRuntime, gpu: SimulatedCuda
) -> None:
    with LLM(cuda_engine, max_batch_size=2) as llm:
        gpu.fatal_error = Error.cudaErrorIllegalAddress
        with pytest.raises(EngineError, match="cudaErrorIllegalAddress"):
            llm.generate(PROMPTS[:3])


def test_an_engine_stays_on_the_device_that_was_chosen(
    cuda_engine: Path, library: SimulatedOnnxRuntime, gpu: SimulatedCuda
) -> None:
    gpu.num_devices = 3
    with LLM(cuda_engine, device_id=2, max_batch_size=2) as llm:
        (output,) = llm.generate(PROMPTS[:1], SamplingParams(max_tokens=8))
    assert output.outputs[0].token_ids
    assert {session.device for session in library.sessions} == {2}
    assert gpu.used_devices == {2}


def test_the_package_without_cuda_is_refused_with_the_extra(cuda_engine: Path, gpu: SimulatedCuda) -> None:
    """The real package of this environment is the CPU's."""
    with pytest.raises(
        EngineError, match=r"^onnxruntime [\d.]+: the package without CUDA: pip install 'fly-trt\[cuda\]'"
    ):
        load(cuda_engine)


def test_a_provider_that_does_not_load_is_refused(cuda_engine: Path, library: SimulatedOnnxRuntime) -> None:
    """ONNX Runtime would compute on the CPU."""
    library.loads_provider = False
    with pytest.raises(
        EngineError, match=r"cannot load its CUDA provider \(.*\): install the CUDA libraries"
    ) as refused:
        load(cuda_engine)
    assert "\n" not in str(refused.value)


def test_an_old_package_is_refused(cuda_engine: Path, library: SimulatedOnnxRuntime) -> None:
    library.__version__ = "1.29.0"
    with pytest.raises(EngineError, match=r"^onnxruntime-gpu 1\.29\.0: 1\.31\.1 or newer is needed"):
        load(cuda_engine)


def test_a_gpu_without_bfloat16_is_refused(
    cuda_engine: Path, library: SimulatedOnnxRuntime, gpu: SimulatedCuda
) -> None:
    gpu.compute_capability = (7, 5)
    with pytest.raises(EngineError, match=r"bfloat16 needs compute capability 8\.0, this GPU has 7\.5: rebuild with"):
        load(cuda_engine, dtype="bfloat16")
    assert logits(load(cuda_engine), 0, TOKENS[:3]).shape[0] == 3


def test_a_file_that_is_no_graph_is_refused(cuda_engine: Path, library: SimulatedOnnxRuntime, tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(EngineError, match=r"model\.onnx: ONNX Runtime 1\.31\.1 cannot load it: "):
        load(cuda_engine, folder=tmp_path)
