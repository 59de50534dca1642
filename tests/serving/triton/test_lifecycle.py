"""Servers that start and stop, and models that are loaded, unloaded and moved."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_switch import BROKEN, add_switch

from eval_prompts import load_eval_prompts
from fly_trt.serving.triton.repository import make_plan, write_model
from hosted_model import hosted_model, written_model
from triton_server import GrpcStream, TritonServer

PROMPT = load_eval_prompts()[0]["prompt"]
WITHOUT_END = {"end_id": -1, "stream": True}
Write = Callable[[], Path]


@pytest.fixture
def write(launcher: None, demo_engine: Path, tmp_path: Path) -> Write:
    """Writes a model into a repository of its own, for a server of its own."""

    def write() -> Path:
        repository = tmp_path / "model_repository"
        write_model(make_plan(demo_engine, repository), lambda done, total: None)
        return repository

    return write


def start(repository: Path, *arguments: str) -> TritonServer:
    return TritonServer(repository, repository.parent / "server.log", *arguments)


def streams(server: TritonServer, count: int, max_tokens: int, model: str = "fly") -> list[GrpcStream]:
    """Requests that are being served."""
    started = [server.stream(model, text_input=PROMPT, max_tokens=max_tokens, **WITHOUT_END) for _ in range(count)]
    for stream in started:
        stream.wait_for_response()
    return started


def test_sigterm_lets_running_requests_finish(write: Write) -> None:
    with start(write()) as server:
        running = streams(server, 4, 400)
        server.terminate()
        for stream in running:
            assert stream.finish().error is None
            assert len(stream.token_ids) == 400
        assert server.wait() == 0
    assert _stubs(server) == []


def test_a_model_is_unloaded_and_loaded_again(server: TritonServer, demo_engine: Path) -> None:
    with hosted_model(server, demo_engine, "again"):
        want = server.generate("again", text_input=PROMPT, max_tokens=20)["output_ids"]
        (running,) = streams(server, 1, 300, model="again")
        server.unload("again")
        assert server.post("/v2/models/again/generate", {"text_input": PROMPT})[0] == 404
        assert running.finish().error is None  # what runs is finished first
        assert len(running.token_ids) == 300
        server.wait_until_unloaded("again")
        assert _stubs(server, "again") == []
        assert _samples(server, "num_requests_running", "again") == {}
        for _ in range(2):
            server.load("again")
            assert server.generate("again", text_input=PROMPT, max_tokens=20)["output_ids"] == want
            server.unload("again")
            server.wait_until_unloaded("again")


def test_a_model_that_is_loaded_again_takes_an_edited_configuration(server: TritonServer, demo_engine: Path) -> None:
    with hosted_model(server, demo_engine, "edited") as model_dir:
        loose = server.generate("edited", text_input=PROMPT, max_tokens=160)
        server.unload("edited")
        server.wait_until_unloaded("edited")
        _make_exact(model_dir)
        server.load("edited")
        exact = server.generate("edited", text_input=PROMPT, max_tokens=160)
        assert loose["total_loosened_tokens"] > exact["total_loosened_tokens"] == 0


@pytest.mark.long
def test_a_model_is_replaced_while_it_is_served(write: Write) -> None:
    """On a server of its own, which is killed at the end: replacing a model, this release of it now and then breaks its
    heap and then hangs as it ends."""
    repository = write()
    with start(repository, "--model-control-mode", "explicit", "--load-model", "fly") as server:
        loose = server.generate(text_input=PROMPT, max_tokens=160)
        _make_exact(repository / "fly")
        server.load("fly")
        exact = server.generate(text_input=PROMPT, max_tokens=160)
        assert loose["total_loosened_tokens"] > exact["total_loosened_tokens"] == 0
        server.kill()


def _make_exact(model_dir: Path) -> None:
    config = model_dir / "config.pbtxt"
    text, parameter = config.read_text(), 'key: "acceptance" value {{ string_value: "{}" }}'
    assert parameter.format("fly") in text
    config.write_text(text.replace(parameter.format("fly"), parameter.format("exact")))


def test_a_copied_model_works_elsewhere(server: TritonServer, demo_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(demo_engine, engine)
    write_model(make_plan(engine, tmp_path / "here", name="moved", copy_engines=True), lambda done, total: None)
    shutil.rmtree(engine)
    elsewhere = Path(shutil.move(tmp_path / "here" / "moved", server.repository))
    try:
        server.load("moved")
        assert server.generate("moved", text_input=PROMPT, max_tokens=5)["num_output_tokens"] == 5
    finally:
        server.unload("moved")
        server.wait_until_unloaded("moved")
        shutil.rmtree(elsewhere)


def test_two_instances_have_a_runtime_each(server: TritonServer, demo_engine: Path) -> None:
    with hosted_model(server, demo_engine, "two", instances=2):
        assert set(_samples(server, "num_requests_running", "two")) == {
            f'{{instance="two_0_{number}",model="two",version="1"}}' for number in range(2)
        }
        want = server.generate("two", text_input=PROMPT, max_tokens=60)["output_ids"]
        together = [server.stream("two", text_input=PROMPT, max_tokens=60, stream=True) for _ in range(16)]
        assert [stream.finish().token_ids for stream in together] == [want] * 16
        server.wait_for("num_requests_running", 0)
        assert all(tokens > 0 for tokens in _samples(server, "generation_tokens_total", "two").values())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('key: "preset"', 'key: "presets"', "config.pbtxt: unknown parameter 'presets': expected one of engine_dir"),
        ('string_value: "15"', 'string_value: "99"', "num_speculative_tokens 99: built for max_draft_len 32"),
        ('string_value: "reference"', 'string_value: "best"', "preset 'best': expected one of"),
    ],
)
def test_a_wrong_configuration_does_not_load_and_says_why(
    server: TritonServer, demo_engine: Path, old: str, new: str, message: str
) -> None:
    before = len(server.log)
    with written_model(server, demo_engine, "wrong") as model_dir:
        config = model_dir / "config.pbtxt"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
        status, answer = server.post("/v2/repository/models/wrong/load")
        assert status >= 400
        assert message in answer["error"]
        assert message in server.log[before:]
        assert "Traceback" not in server.log[before:]


def test_missing_engines_do_not_load_and_say_why(launcher: None, demo_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(demo_engine, engine)
    write_model(make_plan(engine, tmp_path / "models"), lambda done, total: None)
    shutil.rmtree(engine)
    with pytest.raises(RuntimeError, match="no such engine directory"), start(tmp_path / "models"):
        pass


def test_a_server_whose_engine_cannot_run_any_more_ends(write: Write, tmp_path: Path) -> None:
    """It does not ask the model whether it is ready: whatever watches the server has to see it."""
    repository, broken = write(), tmp_path / "broken"
    add_switch(repository / "fly", broken, BROKEN)
    with start(repository) as server:
        assert server.generate(text_input=PROMPT, max_tokens=5)["num_output_tokens"] == 5
        broken.touch()
        status, answer = server.post("/v2/models/fly/generate", {"text_input": PROMPT, "max_tokens": 5})
        assert status >= 400
        assert "the device is lost" in answer["error"]
        assert server.wait() == 0
    assert "its engine cannot run any more: the server ends" in server.log
    assert _stubs(server) == []


def _samples(server: TritonServer, metric: str, model: str) -> dict[str, float]:
    """Those of the model, by their labels."""
    return {labels: value for labels, value in server.metrics(metric).items() if f'model="{model}"' in labels}


def _stubs(server: TritonServer, model: str = "fly") -> list[str]:
    """Processes that serve the model of the server's repository."""
    found = subprocess.run(["pgrep", "-fa", "triton_python_backend_stub"], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if f"{server.repository / model}/" in line]
