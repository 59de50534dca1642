"""fly-bench as a user runs it."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from eval_prompts import EVAL_PROMPTS
from fly_trt.cli.bench import main

QUICK = ("--prompts", str(EVAL_PROMPTS), "--num-prompts", "2", "--rounds", "2", "--max-tokens", "8")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_json_holds_settings_machine_and_every_round(demo_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "bench.json"
    flags = ("--modes", "autoregressive, fly", "--modes", "exact", "--concurrency", "1,2", "--request-rate", "inf")
    result = run(str(demo_engine), *QUICK, *flags, "--fly-window-size", "5", "--json", "-o", str(file))
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    record = json.loads(result.stdout)
    assert json.loads(file.read_text()) == record
    assert list(file.parent.iterdir()) == [file]
    assert record["schema_version"] == 1
    assert record["engine"]["directory"] == str(demo_engine)
    assert record["engine"]["load_seconds"].keys() == {"target", "draft"}
    assert record["engine"]["target"]["num_parameters"] > record["engine"]["draft"]["num_parameters"]
    assert record["machine"].keys() == {"cpu", "instructions", "num_cores", "gpu", "num_threads", "platform"}
    assert record["machine"]["num_threads"] >= 1
    assert record["versions"].keys() >= {"fly-trt", "python", "numpy", "tokenizers", "onnxruntime"}
    settings = record["settings"]
    assert (settings["num_prompts"], settings["rounds"], settings["max_tokens"], settings["seed"]) == (2, 2, 8, 0)
    assert settings["prompts"] == str(EVAL_PROMPTS)
    assert list(settings["modes"]) == ["autoregressive", "exact", "fly"]
    assert settings["modes"]["autoregressive"] == {"method": None}
    assert settings["modes"]["fly"]["fly_window_size"] == 5
    assert settings["running"]["autoregressive"] == "plain decoding"
    assert "window 5" in settings["running"]["fly"]
    loads = [{"concurrency": 1, "request_rate": None}, {"concurrency": 2, "request_rate": None}]
    assert settings["loads"] == [*loads, {"concurrency": None, "request_rate": "inf"}]
    assert [row["mode"] for row in record["results"]] == ["autoregressive", "exact", "fly"] * 3
    for row in record["results"]:
        assert row["load"] in settings["loads"]
        assert row["tokens_per_second"].keys() == {"median", "min", "max", "rounds"}
        assert len(row["speed_up_over_autoregressive"]["rounds"]) == 2
        assert row["num_checks"] == 2
        assert len(row["right_answers_interval"]) == 2
        assert len(row["nll_per_token"]["rounds"]) == len(row["perplexity_over_autoregressive"]["rounds"]) == 2


def test_the_table_has_every_mode_and_no_empty_column(demo_engine: Path) -> None:
    result = run(str(demo_engine), *QUICK, "--modes", "exact,ngram")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for words in (
        "2 prompts, 1 in flight, median of 2 rounds",
        "exact",
        "ngram",
        "tokens/s",
        "ITL ms",
        "p50 / p99",
        "1.00x",
    ):
        assert words in " ".join(result.stdout.split())  # a long title goes on in the next line
    for words in ("autoregressive", "AR", "ratio"):  # nothing is over plain decoding, or the same as it
        assert words not in result.stdout
    assert "…" not in result.stdout


def test_modes_are_written_with_their_settings(demo_engine: Path) -> None:
    flags = ("--modes", "autoregressive,w0=fly,fly_window_size=0", "--mode", "ngram+fly,num_speculative_tokens=4")
    result = run(str(demo_engine), *QUICK, *flags, "--no-perplexity", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    found = record["settings"]["modes"]
    assert list(found) == ["autoregressive", "w0", "ngram+fly,num_speculative_tokens=4"]
    assert [(mode.get("fly_window_size"), mode.get("num_speculative_tokens")) for mode in found.values()][1:] == [
        (0, 15),
        (None, 4),
    ]
    assert [row["mode"] for row in record["results"]] == list(found)
    assert [row["nll_per_token"] for row in record["results"]] == [None] * 3
    assert record["settings"]["perplexity"] is False


def test_a_plot_is_drawn_beside_the_table(demo_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    result = run(str(demo_engine), *QUICK, "--modes", "autoregressive", "--plot", str(file))
    assert result.exit_code == 0, result.output
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such engine directory"),
        (["{engine}", "--modes", "fly,medusa"], "mode 'medusa': expected autoregressive, exact, fly-draft, fly, ngram"),
        (["{engine}", "--modes", ""], "mode '': expected autoregressive"),
        (["{engine}", "--mode", "exact,fly_window_size=1"], "mode exact,fly_window_size=1: fly_window_size 1: has no"),
        (["{engine}", "--concurrency", "1,x"], "concurrency 'x': expected numbers with commas, such as 1,4"),
        (["{engine}", "--concurrency", "0"], "concurrency 0: expected at least 1"),
        (["{engine}", "--request-rate", "-1"], "request_rate -1: expected requests per second"),
        (["{engine}", "--num-speculative-tokens", "99"], "rebuild with --max-draft-len 99"),
        (["{engine}", "--preset", "paper", "--modes", "exact"], "preset 'paper': has no effect in mode exact"),
        (["{engine}", "--prompts", "{engine}/fly.json"], "fly.json:1: not JSON"),
        (["{engine}", "--prompts", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
        (["{engine}", "--plot", "plot.pdf"], "plot plot.pdf: expected a file name that ends in .png or .svg"),
        (["{engine}", "--temperature", "-1"], "temperature -1.0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(demo_engine: Path, arguments: list[str], message: str) -> None:
    result = run(*(argument.format(engine=demo_engine) for argument in arguments))
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("fly-bench: ")
    assert message in line


def test_ctrl_c_ends_it_with_a_word_and_exit_code_130(demo_engine: Path) -> None:
    """On a terminal, which is where progress is shown."""
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-m", "fly_trt.cli.bench", str(demo_engine), "--rounds", "1000", "--modes", "fly"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env={**os.environ, "COLUMNS": "200"})
    finally:
        signal.signal(signal.SIGINT, handler)
    os.close(stderr)
    seen = b""
    while b"round 1 of 1000" not in seen:
        seen += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    while b"fly-bench: interrupted" not in seen:
        seen += os.read(terminal, 4096)
    assert process.wait(60) == 130
    assert process.stdout.read() == b""
    process.stdout.close()
    os.close(terminal)


def test_help_has_examples_and_says_what_the_figures_are() -> None:
    text = run("--help").stdout
    for words in ("Examples:", "TTFT is the time", "ITL is the gap"):
        assert words in text


def test_the_runtime_needs_neither_torch_nor_onnx_nor_matplotlib(demo_engine: Path) -> None:
    missing = ["torch", "transformers", "onnx", "onnxscript", "fly_build", "matplotlib"]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}));from fly_trt.cli.bench import main; main()"
    command = [sys.executable, "-c", code, str(demo_engine), *QUICK, "--modes", "ngram", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout)["results"][0]["mode"] == "ngram"
