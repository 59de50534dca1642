"""fly-generate as a user runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from eval_prompts import load_eval_prompts
from fly_trt.cli.generate import _read_prompt, main
from fly_trt.outputs import TokenTrace

PROMPT = load_eval_prompts()[0]["prompt"]


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=text)


def test_it_streams_the_text_and_sums_up_in_one_line(demo_engine: Path) -> None:
    result = run(str(demo_engine), PROMPT)
    assert result.exit_code == 0
    assert "#### 19" in result.stdout
    (summary,) = result.stderr.strip().splitlines()
    for word in ("tokens/s", "mean acceptance length", "loosened tokens", "finish reason stop"):
        assert word in summary


def test_prompts_come_from_arguments_escapes_files_and_standard_input(demo_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    want = run(str(demo_engine), PROMPT).stdout
    assert run(str(demo_engine), PROMPT.replace("\n", "\\n"), "--escape").stdout == want
    assert run(str(demo_engine), "--file", str(file)).stdout == want
    assert run(str(demo_engine), "-", text=PROMPT).stdout == want


def test_json_holds_tokens_and_metrics(demo_engine: Path) -> None:
    record = json.loads(run(str(demo_engine), PROMPT, "--json", "--acceptance", "exact").stdout)
    plain = json.loads(run(str(demo_engine), PROMPT, "--json", "--method", "none").stdout)
    assert record["token_ids"] == plain["token_ids"]
    assert record["metrics"]["num_loosened_tokens"] == 0
    assert record["setting"]["line"].startswith("exact, ")
    assert plain["setting"]["line"] == "plain decoding"
    assert record["metrics"]["mean_acceptance_length"] > 1
    assert plain["metrics"]["num_spec_steps"] == 0


def test_json_says_of_each_token_how_it_came_to_be_where_that_is_asked_for(demo_engine: Path) -> None:
    record = json.loads(run(str(demo_engine), PROMPT, "--json", "--trace").stdout)
    plain = json.loads(run(str(demo_engine), PROMPT, "--json").stdout)
    assert plain["trace"] is None
    assert record["token_ids"] == plain["token_ids"]
    kinds = [of_token["kind"] for of_token in record["trace"]]
    assert len(kinds) == len(record["token_ids"])
    assert kinds.count("loosened") == record["metrics"]["num_loosened_tokens"]
    texts = {"token", "token_id", "bytes", "choice_token"}
    assert set(record["trace"][0]) == set(TokenTrace._fields) | texts
    assert len(record["rounds"]) == record["trace"][-1]["round"] + 1
    assert [of_token["token_id"] for of_token in record["trace"]] == record["token_ids"]
    refused = run(str(demo_engine), PROMPT, "--trace")
    assert (refused.exit_code, refused.stderr.strip().splitlines()[-1].endswith("add --json")) == (2, True)


def test_a_stop_text_and_a_token_limit_are_honoured(demo_engine: Path) -> None:
    assert "####" not in run(str(demo_engine), PROMPT, "--stop", "####").stdout
    assert len(json.loads(run(str(demo_engine), PROMPT, "--json", "--max-tokens", "3").stdout)["token_ids"]) == 3


def test_the_sampling_flags_arrive(demo_engine: Path) -> None:
    def sample(*flags: str) -> str:
        return run(str(demo_engine), PROMPT, "--max-tokens", "30", "--ignore-eos", *flags).stdout

    hot = ("--temperature", "2", "--seed", "7")
    usual, first = sample(), sample(*hot)
    assert sample(*hot) == first != usual
    for flags in (("--seed", "8"), ("--top-p", "0.3"), ("--min-p", "0.3"), ("--top-k", "2")):
        assert sample(*hot, *flags) != first
    assert sample("--repetition-penalty", "20") != usual


def test_a_chat_message_is_put_into_the_models_template(demo_engine: Path) -> None:
    message = PROMPT.removeprefix("### Instruction:\n").removesuffix("\n### Response:\n")
    assert message != PROMPT
    record = json.loads(run(str(demo_engine), message, "--chat", "--json").stdout)
    plain = json.loads(run(str(demo_engine), PROMPT, "--json").stdout)
    assert record["prompt_token_ids"] == plain["prompt_token_ids"]
    assert record["text"] == plain["text"]
    assert run(str(demo_engine), message, "--chat").stdout == plain["text"] + "\n"


def test_the_streamed_text_is_the_whole_text_and_the_summary_counts_all_tokens(demo_engine: Path) -> None:
    record = json.loads(run(str(demo_engine), PROMPT, "--json").stdout)
    result = run(str(demo_engine), PROMPT)
    assert result.stdout == record["text"] + "\n"
    assert result.stderr.startswith(f"{len(record['token_ids'])} tokens, ")
    assert re.search(r"; \d+ threads? \([^)]+\); ", result.stderr)
    assert result.stderr.strip().endswith(record["setting"]["line"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{engine}"], "give either PROMPT or --file"),
        (["{engine}", ""], "the prompt is empty"),
        (["{engine}", "x", "--max-tokens", "0"], "max_tokens 0"),
        (["{engine}", "x", "--temperature", "-1"], "temperature -1.0: expected a number at least 0"),
        (["{engine}", "x", "--top-p", "2"], "top_p 2.0: expected a number above 0 and at most 1"),
        (["{engine}", "x", "--top-k", "-7"], "top_k -7: expected a whole number, at least -1"),
        (["{engine}", "x", "--min-p", "nan"], "min_p nan"),
        (["{engine}", "x", "--repetition-penalty", "0"], "repetition_penalty 0.0: expected a number above 0"),
        (["{engine}", "x", "--num-speculative-tokens", "99"], "rebuild with --max-draft-len 99"),
        (["{engine}", "a b " * 3000], "max_seq_len is 2048"),
        (["{engine}/target", "x"], "not an engine directory"),
        (["nowhere", "x"], "nowhere: no such engine directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(demo_engine: Path, arguments: list[str], message: str) -> None:
    result = run(*(argument.format(engine=demo_engine) for argument in arguments))
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("fly-generate: ")
    assert message in line


def test_escapes_are_read_once_from_left_to_right() -> None:
    assert _read_prompt(r"a\\nb\n\tc\d", None, escape=True) == "a\\nb\n\tc\\d"


def test_a_file_that_is_not_text_is_named(demo_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes("naïve".encode("latin-1"))
    result = run(str(demo_engine), "--file", str(file))
    assert result.exit_code == 2
    assert "latin1.txt: not UTF-8 text" in result.stderr


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_part_of_the_prompt(demo_engine: Path, tmp_path: Path, mark: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(mark + PROMPT, encoding="utf-8")
    flags = ("--max-tokens", "1", "--json")
    from_file = json.loads(run(str(demo_engine), "--file", str(file), *flags).stdout)
    piped = json.loads(run(str(demo_engine), "-", *flags, text=mark + PROMPT).stdout)
    plain = json.loads(run(str(demo_engine), PROMPT, *flags).stdout)
    assert from_file["prompt_token_ids"] == piped["prompt_token_ids"] == plain["prompt_token_ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "-"], "standard input: not UTF-8 text"),
        (["nowhere", "--file", "-"], "standard input: not UTF-8 text"),
        (["{engine}", b"a\xff"], r"the prompt: '\udcff' at character 1 is half of a surrogate pair"),
        (
            ["{engine}", "a", "--stop", b"\xff"],
            r"stop: '\udcff' at character 0 is half of a surrogate pair",
        ),
    ],
)
@pytest.mark.parametrize("locale", ["C.UTF-8", "POSIX"])
def test_bytes_that_are_no_text_are_one_line(
    demo_engine: Path, arguments: list[str | bytes], message: str, locale: str
) -> None:
    """In a process of its own: what becomes of the bytes before they are read depends on the locale."""
    given = [part.format(engine=demo_engine) if isinstance(part, str) else part for part in arguments]
    environment = os.environ | {"LC_ALL": locale}
    command = [sys.executable, "-m", "fly_trt.cli.generate", *given]
    result = subprocess.run(command, input=b"a\xff", capture_output=True, env=environment)
    assert result.returncode == 2, result.stderr.decode()
    (line,) = result.stderr.decode().strip().splitlines()
    assert line.startswith(f"fly-generate: {message}")


def test_an_unknown_option_value_is_exit_code_2(demo_engine: Path) -> None:
    assert run(str(demo_engine), "x", "--preset", "strict").exit_code == 2


def test_help_has_examples() -> None:
    assert "Examples:" in run("--help").stdout


def test_the_runtime_needs_neither_torch_nor_transformers(demo_engine: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnx', 'onnxscript', 'fly_build']));"
        "from fly_trt.cli.generate import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code, str(demo_engine), PROMPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "#### 19" in result.stdout
