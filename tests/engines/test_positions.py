"""A step says of the positions that were asked for what it says of them among all, and nothing of others; engines from
before steps could be asked go on saying it of all.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from fly_trt import LLM, SamplingParams
from fly_trt.engines import Engine, load_engine
from fly_trt.engines.base import TOKEN_OUTPUTS, TOP_OUTPUTS, EngineInfo, Step, StepShape
from fly_trt.manifest import hash_directory, read_manifest, write_manifest
from older_graphs import find_positions

TOKENS = np.random.default_rng(0).integers(2, 880, 64)
OUTPUTS = [*TOKEN_OUTPUTS, *TOP_OUTPUTS, "logits"]
MAX_DRAFT_LEN = 16
INFO = EngineInfo(4, 128, MAX_DRAFT_LEN, 64, 100, 3, frozenset(), has_top_tokens=True, has_positions=True)


@pytest.fixture(scope="module", params=["demo_engine", "demo_int8_engine"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """The draft, which is small."""
    return load(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def older(demo_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory as it was before: its graphs find positions and following tokens by themselves."""
    folder = tmp_path_factory.mktemp("older")
    directory, source = folder / "engine", folder / "source"  # onnx reads no file that has several names
    shutil.copytree(demo_engine, directory)
    shutil.copytree(demo_engine, source)
    manifest = read_manifest(directory)
    for model in (manifest.target, manifest.draft):
        path = directory / model.model
        graph = ir.load(source / model.model)
        find_positions(graph)
        ir.save(graph, path, external_data=f"{path.name}.data")
    head = manifest.head.model_copy(update={"positions": False})
    write_manifest(manifest.model_copy(update={"head": head, "files": hash_directory(directory)}), directory)
    return directory


def load(directory: Path) -> Engine:
    manifest = read_manifest(directory)
    return load_engine(directory, manifest, manifest.draft, num_slots=3)


def said(step: Step, row: int, begin: int, end: int) -> dict[str, np.ndarray]:
    at = step.at(row, begin, end)
    return {name: getattr(step, name)[row, at].copy() for name in OUTPUTS}


def run(engine: Engine, first: int, num_positions: int | None, num_rows: int, num_tokens: int) -> Step:
    """Rows of five cached tokens, then context and two draft tokens; of one token no drafts."""
    outputs = {"with_logits": True, "with_top": True}
    step = engine.step(0, num_rows, 5)
    for row in range(num_rows):
        step.set_row(row, 0, TOKENS[row : row + 5])
    engine.run(step)
    step = engine.step(0, num_rows, num_tokens, num_positions=num_positions, **outputs)
    context = max(1, num_tokens - 2)
    for row in range(num_rows):
        tokens = TOKENS[5 + row : 5 + row + num_tokens]
        step.set_row(row, 5, tokens[:context], tokens[context:], first=first)
    engine.run(step)
    return step


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 3, 17, 18, 50])
def test_what_is_said_of_some_positions_has_the_same_bits(engine: Engine, num_rows: int, num_tokens: int) -> None:
    every = run(engine, 0, None, num_rows, num_tokens)
    assert every.num_positions == num_tokens
    last = max(1, num_tokens - 2) - 1
    for first in {0, last // 2, last}:
        want = [said(every, row, first, num_tokens) for row in range(num_rows)]
        verdict = every.num_accepted.copy(), every.next_token.copy()
        some = run(engine, first, num_tokens - first, num_rows, num_tokens)
        assert some.num_positions >= num_tokens - first
        assert some.logits.shape[:2] == (num_rows, some.num_positions)
        for row in range(num_rows):
            found = said(some, row, first, num_tokens)
            for name in OUTPUTS:
                known = slice(None, -1 if name == "token_logprob" else None)  # after the last one nothing follows
                np.testing.assert_array_equal(found[name][known], want[row][name][known], err_msg=name)
        np.testing.assert_array_equal((some.num_accepted, some.next_token), verdict)
        every = run(engine, 0, None, num_rows, num_tokens)


def test_a_prompt_has_one_row_of_logits(engine: Engine) -> None:
    step = engine.step(0, 1, 50, num_positions=1, with_logits=True)
    step.set_row(0, 0, TOKENS[:50], first=49)
    engine.run(step)
    assert step.logits.shape == (1, 1, engine.info.vocab_size)
    assert step.next_token[0] == step.argmax[0, step.at(0, 49, 50)] == step.logits[0, 0].argmax()


@pytest.mark.parametrize(
    ("num_tokens", "num_positions", "want"),
    [(1, 1, 1), (9, 1, 1), (9, 3, 9), (17, 17, 17), (50, 1, 1), (50, 4, 17), (50, 18, 50), (50, None, 50)],
)
def test_steps_have_few_numbers_of_positions(num_tokens: int, num_positions: int | None, want: int) -> None:
    shape = StepShape.of(INFO, 0, 2, num_tokens, num_positions, with_logits=False, with_top=False)
    assert shape.num_positions == want
    again = StepShape.of(INFO, 0, 2, num_tokens, want, with_logits=False, with_top=False)
    assert again == shape


def test_an_older_engine_says_it_of_all_positions(older: Path, demo_engine: Path) -> None:
    engine = load(older)
    assert not engine.info.has_positions
    step = run(engine, 10, 3, 2, 13)
    assert step.num_positions == 13
    want = run(load(demo_engine), 0, None, 2, 13)
    for row in range(2):
        found, expected = said(step, row, 10, 12), said(want, row, 10, 12)
        for name in OUTPUTS:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_an_older_engine_directory_gives_the_same_texts(older: Path, demo_engine: Path) -> None:
    prompts = ["### Instruction:\nSpell out: 21.\n### Response:\n"]
    settings = [
        SamplingParams(max_tokens=24),
        SamplingParams(max_tokens=24, temperature=0.7, seed=3, prompt_logprobs=1),
    ]
    texts = []
    for directory in (older, demo_engine):
        with LLM(directory, max_batch_size=1) as llm:
            outputs = [output for params in settings for output in llm.generate(prompts, params)]
            texts.append([(output.outputs[0].token_ids, output.prompt_logprobs) for output in outputs])
    assert texts[0] == texts[1]
