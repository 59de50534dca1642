"""A directory that fly-build wrote, served by LLM: `fly-build --backend tensorrt-llm` and then `LLM("engines/dir")`."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fly_build.cli import main
from fly_trt import LLM, SamplingParams
from served_by_tensorrt_llm import PROMPTS, RULE, told

PAIR = Path(__file__).parents[3] / "assets" / "pair"


@pytest.mark.parametrize(("release", "mode"), [("1.2", "eagle3"), ("1.3", "draft_target")])
def test_what_fly_build_writes_is_served(
    release: str, mode: str, tmp_path: Path, own: LLM, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", f"{release}.1")
    directory = tmp_path / "engines"
    flags = {
        "--target": PAIR / "target",
        "--draft": PAIR / "draft",
        "--backend": "tensorrt-llm",
        "--tensorrt-llm-release": release,
        "--speculative-mode": mode,
        "--max-seq-len": 2048,
        "--max-draft-len": RULE["num_speculative_tokens"],
        "-o": directory,
    }
    built = CliRunner().invoke(main, [str(word) for flag in flags.items() for word in flag])
    assert built.exit_code == 0, built.output
    params = SamplingParams(max_tokens=120)
    with LLM(directory) as llm:
        outputs = llm.generate(PROMPTS, params)
        arguments = stand_in().STARTED[-1]
    expected = own.generate(PROMPTS, params)
    assert [told(output.outputs[0]) for output in outputs] == [told(output.outputs[0]) for output in expected]
    assert arguments.model == str(PAIR / "target")
    assert arguments.kwargs["cuda_graph_config"]["enable_padding"] is True
