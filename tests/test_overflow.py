"""A token on which a model overflows, on real engines: it ends the request that has it and changes nobody else's."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from eval_prompts import load_eval_prompts
from fly_trt import LLM, EngineError, SamplingParams

BAD = 850
EMBEDDING = "model.embed_tokens.weight"
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


def overflowing(engine: Path, model: str, folder: Path) -> Path:
    """A copy of the engine whose `model` reads infinity for the token BAD, as a type of too small a range gives."""
    shutil.copytree(engine, folder)
    path = folder / model / "model.onnx"
    proto = onnx.load(str(path))
    weights = next(numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name == EMBEDDING)
    changed = weights.copy()
    changed[BAD] = np.inf
    proto = onnx.load(str(path), load_external_data=False)
    proto.graph.initializer.append(numpy_helper.from_array(changed, "overflowing"))
    lookup = next(node for node in proto.graph.node if node.op_type == "Gather" and node.input[0] == EMBEDDING)
    lookup.input[0] = "overflowing"
    onnx.save(proto, str(path))
    manifest = json.loads((folder / "fly.json").read_text())
    manifest["files"][f"{model}/model.onnx"]["size"] = path.stat().st_size
    (folder / "fly.json").write_text(json.dumps(manifest))
    return folder


def tokens_of(llm: LLM, prompts: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, PARAMS)]


@pytest.mark.parametrize("method", [None, "multi_level"])
@pytest.mark.parametrize("caching", [False, True])
def test_a_prompt_on_which_the_target_overflows_ends_alone(
    demo_engine: Path, tmp_path: Path, method: str | None, caching: bool
) -> None:
    engine = overflowing(demo_engine, "target", tmp_path / "engine")
    config = {"method": method, "adaptive_acceptance": False} if method else {"method": None}
    prompts = [record["prompt"] for record in load_eval_prompts()[:3]]
    bad = {"prompt_token_ids": [*range(10, 150), BAD, *range(10, 40)]}
    with LLM(engine, speculative_config=config, enable_prefix_caching=caching, max_batch_size=1) as llm:
        before = tokens_of(llm, prompts)
        with pytest.raises(EngineError, match="are not numbers"):
            llm.generate([bad], PARAMS)
        assert tokens_of(llm, prompts) == before


def test_a_prompt_on_which_the_draft_overflows_changes_nobody_elses_tokens(demo_engine: Path, tmp_path: Path) -> None:
    engine = overflowing(demo_engine, "draft", tmp_path / "engine")
    prompts = [record["prompt"] for record in load_eval_prompts()[:6]]
    bad = {"prompt_token_ids": [*range(10, 150), BAD, *range(10, 40)]}
    settings: dict[str, Any] = {"speculative_config": {"adaptive_acceptance": False}, "max_batch_size": 1}
    with LLM(engine, enable_prefix_caching=False, **settings) as llm:
        before = llm.generate(prompts, PARAMS)
        assert sum(output.metrics.num_loosened_tokens for output in before) > 3
        harmed = llm.generate([bad], PARAMS)[0]
        assert harmed.metrics.num_draft_tokens == 0
        assert tokens_of(llm, prompts) == [list(output.outputs[0].token_ids) for output in before]
    with LLM(engine, speculative_config={"method": None}) as llm:
        assert tokens_of(llm, [bad]) == [list(harmed.outputs[0].token_ids)]
