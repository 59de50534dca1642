"""The model that Triton's python backend runs, on a simulated server and a real engine."""

import importlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from fly_trt import LLM, SamplingParams
from fly_trt.engines import onnxruntime
from fly_trt.serving.triton.repository import make_plan
from served_model import PROMPTS, SHORT, Steps
from simulated_triton import MODEL_MODULES, Request, SimulatedTriton, install


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    run = onnxruntime.OnnxRuntimeEngine.run

    def slower_run(engine: Any, step: Any) -> None:
        time.sleep(steps.seconds)
        if steps.error is not None and steps.num_errors:
            steps.num_errors -= 1
            raise steps.error
        run(engine, step)

    monkeypatch.setattr(onnxruntime.OnnxRuntimeEngine, "run", slower_run)
    return steps


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedTriton]:
    """A server whose rules have to be kept."""
    package = logging.getLogger("fly_trt")
    monkeypatch.setattr(package, "handlers", [])
    level = package.level
    server = install(monkeypatch)
    for name in MODEL_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield server
    for name in MODEL_MODULES:
        sys.modules.pop(name, None)
    package.setLevel(level)
    assert server.faults == []


@pytest.fixture
def threads() -> Callable[[], set[str]]:
    """Names of the runtime's threads that were started since."""
    before = set(threading.enumerate())
    return lambda: {t.name for t in set(threading.enumerate()) - before if t.name.startswith("fly-trt")}


@pytest.fixture
def load(
    server: SimulatedTriton, demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Loads a model that decodes without drafts. Its `parameters` are those of config.pbtxt."""
    open_models: list[Any] = []

    def load(parameters: dict[str, str] | None = None, **plan: Any) -> Any:
        made = make_plan(demo_engine, tmp_path / "models", speculative={"method": None}, **plan)
        message = text_format.Parse(made.config, ModelConfig())
        config = json_format.MessageToDict(message, preserving_proto_field_name=True)
        config["parameters"] |= {name: {"string_value": text} for name, text in (parameters or {}).items()}
        # Else pytest keeps the log's tracebacks, and they the metrics. It looks at this when a test starts.
        monkeypatch.setattr(logging.getLogger("fly_trt"), "propagate", False)
        model = importlib.import_module("fly_trt.serving.triton.model").TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
                "model_instance_name": "fly_0_0",
                "model_repository": str(made.model_dir),
                "model_version": "1",
                "model_name": "fly",
            }
        )
        open_models.append(model)
        finalize = model.finalize

        def finalize_once() -> None:
            open_models.remove(model)
            finalize()

        model.finalize = finalize_once
        return model

    yield load
    while open_models:
        open_models[-1].finalize()


@pytest.fixture
def send(server: SimulatedTriton) -> Callable[..., Request]:
    """Hands a request to a model."""

    def send(model: Any, **inputs: Any) -> Request:
        request = Request(server, **inputs)
        model.execute([request])
        return request

    return send


@pytest.fixture(scope="session")
def reference(demo_engine: Path) -> dict[str, list[int]]:
    """The tokens of LLM for a short request, by prompt."""
    with LLM(demo_engine, speculative_config={"method": None}) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=SHORT["max_tokens"]))
        return {prompt: output.outputs[0].token_ids for prompt, output in zip(PROMPTS, outputs, strict=True)}
