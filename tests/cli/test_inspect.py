"""fly-inspect as a user runs it, on what the other commands wrote."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from eval_prompts import EVAL_PROMPTS
from fly_trt.cli import bench, generate, inspect
from trace_documents import document_of

PROMPT = "### Instruction:\nSpell out: 21.\n### Response:\n"


def run(*arguments: object, given: bytes | None = None) -> Result:
    return CliRunner().invoke(inspect.main, [str(argument) for argument in arguments], input=given)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(document_of({"token": "a"}, {"token": "b"})))
    return path


def test_the_page_lies_beside_the_trace(trace: Path) -> None:
    result = run(trace)
    assert (result.exit_code, result.stdout) == (0, "")
    page = trace.with_suffix(".html")
    assert result.stderr == f"{page}: 1 request, 2 tokens\n"
    first = page.read_bytes()
    assert run(trace, "-o", page).exit_code == 0
    assert page.read_bytes() == first
    assert sorted(path.name for path in trace.parent.iterdir()) == ["trace.html", "trace.json"]


def test_standard_input_and_several_files(trace: Path) -> None:
    page = trace.parent / "new" / "page.html"
    result = run("-", trace, "-o", page, given=trace.read_bytes())
    assert result.exit_code == 0, result.output
    assert result.stderr == f"{page}: 2 requests, 4 tokens\n"
    assert json.loads(run("-", "--json", given=trace.read_bytes()).stdout)["version"] == 1
    assert "--output" in run("-", given=trace.read_bytes()).stderr


def test_what_cannot_be_read_leaves_no_page(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for path in (broken, tmp_path / "missing.json"):
        result = run(path)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"fly-inspect: {path}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]
    html = tmp_path / "page.html"
    html.write_text(json.dumps(document_of({})))
    assert "another name" in run(html).stderr
    assert json.loads(html.read_text())["version"] == 1


def test_what_fly_generate_prints_with_the_exact_text_beside_it(demo_engine: Path, tmp_path: Path) -> None:
    arguments = [str(demo_engine), PROMPT, "--json", "--trace", "--compare", "exact", "--max-tokens", "20"]
    printed = CliRunner().invoke(generate.main, arguments)
    assert printed.exit_code == 0, printed.output
    document = json.loads(run("-", "--json", given=printed.stdout_bytes).stdout)
    loose, exact = document["requests"]
    record = json.loads(printed.stdout)
    assert [token["token_id"] for token in loose["tokens"]] == record["token_ids"]
    assert [token["token_id"] for token in exact["tokens"]] == record["compared"]["token_ids"]
    assert not any(token["kind"] == "loosened" for token in exact["tokens"])
    assert loose["group"] == exact["group"]
    refused = CliRunner().invoke(generate.main, [str(demo_engine), PROMPT, "--compare", "exact"])
    assert refused.exit_code != 0
    assert "--trace" in refused.stderr


def test_what_fly_bench_writes_is_by_mode_and_prompt(demo_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    flags = ("--prompts", str(EVAL_PROMPTS), "--num-prompts", "2", "--rounds", "1", "--max-tokens", "8")
    modes = ("--modes", "autoregressive,fly", "--no-perplexity", "--traces", str(file))
    result = CliRunner().invoke(bench.main, [str(demo_engine), *flags, *modes])
    assert result.exit_code == 0, result.output
    assert len(file.read_text().splitlines()) == 4
    requests = json.loads(run(file, "--json").stdout)["requests"]
    names = [f"prompt {number}, {mode}" for number in (1, 2) for mode in ("autoregressive", "fly")]
    assert [request["name"] for request in requests] == names
    assert [request["group"] for request in requests] == ["prompt 1", "prompt 1", "prompt 2", "prompt 2"]
    assert {token["kind"] for token in requests[0]["tokens"]} == {"plain"}
    assert all(request["metrics"]["num_output_tokens"] == len(request["tokens"]) for request in requests)
