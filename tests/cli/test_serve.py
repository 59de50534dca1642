"""fly-serve's command line: what it refuses before it serves. That it serves is in tests/serving/openai."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fly_trt.cli.serve import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--override-generation-config", "{"], "override-generation-config '{': not JSON"),
        (["--override-generation-config", "[1]"], "override-generation-config '[1]': expected a JSON object"),
        (["--override-generation-config", '{"temperature": -1}'], "temperature"),
        (["--devices", "0"], "devices [0]: has no effect, demo was built for onnxruntime, which runs on the CPU"),
        (["--max-batch-size", "99"], "max_batch_size 99: demo was built for 8"),
        (["--queue-timeout", "0"], "queue_timeout 0.0: expected seconds, above 0"),
        (["--drain-timeout", "-1"], "drain_timeout -1.0: expected seconds, above 0"),
        (["--write-timeout", "nan"], "write_timeout nan: expected seconds, above 0"),
        (["--api-key", ""], "api_keys: an empty one"),
        (["--served-model-name", ""], "model_names: an empty one"),
        (["--ssl-certfile", "nothing.pem"], "TLS: nothing.pem: "),
        (["--root-path", "fly"], "root_path 'fly': expected a path"),
        (["--uds", "/nowhere/fly.sock"], "/nowhere/fly.sock: No such file or directory"),
        (["--ssl-keyfile", "key.pem"], "ssl_keyfile: has no effect without ssl_certfile"),
        (["--audit-fraction", "1", "--min-quality", "2"], "min_quality 2.0: expected a number from 0, no breaker, to"),
        (["--audit-log", "a.jsonl"], "audit_log 'a.jsonl': has no effect without audit_fraction"),
        (["--host", "256.1.1.1", "--port", "0"], "256.1.1.1:0: "),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(demo_engine: Path, flags: list[str], message: str) -> None:
    result = run(str(demo_engine), "--num-threads", "1", *flags)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("fly-serve: ")
    assert message in line


def test_a_directory_without_engines_is_one_line(tmp_path: Path) -> None:
    result = run(str(tmp_path))
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (2, 1)


def test_a_port_that_is_taken_is_one_line(demo_engine: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run(str(demo_engine), "--num-threads", "1", "--port", str(port))
    assert result.exit_code == 2
    assert re.fullmatch(rf"fly-serve: 127\.0\.0\.1:{port}: Address already in use\n", result.stderr)


def test_a_socket_takes_the_place_of_no_file_and_no_other_server(demo_engine: Path, tmp_path: Path) -> None:
    file, taken = tmp_path / "notes.txt", tmp_path / "taken.sock"
    file.write_text("kept", encoding="utf-8")
    result = run(str(demo_engine), "--num-threads", "1", "--uds", str(file))
    assert (result.exit_code, result.stderr) == (2, f"fly-serve: {file}: File exists\n")
    assert file.read_text(encoding="utf-8") == "kept"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(taken))
        other.listen()
        result = run(str(demo_engine), "--num-threads", "1", "--uds", str(taken))
        assert (result.exit_code, result.stderr) == (2, f"fly-serve: {taken}: Address already in use\n")
        assert taken.is_socket()


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_a_missing_library_names_the_extra(demo_engine: Path, missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from fly_trt.cli.serve import main; main()"
    result = subprocess.run([sys.executable, "-c", code, str(demo_engine)], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"fly-serve: fly-serve needs {missing}: pip install 'fly-trt[serve]'\n"


def test_help_has_examples_and_the_names_of_all_defaults() -> None:
    text = run("--help").stdout
    assert "Examples:" in text
    assert "FLY_TRT_API_KEY" in text
