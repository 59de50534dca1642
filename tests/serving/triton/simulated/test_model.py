"""The model where a real server never takes it: Triton waits for running requests before it unloads a model."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

from served_model import (
    GAUGES,
    GENERATED,
    LONG,
    PROMPTS,
    SHORT,
    SLOW_STEP_SECONDS,
    UNLOADED,
    WAITING,
    Steps,
    assert_answered,
    cancel,
    wait_until,
    wait_until_running,
)
from simulated_triton import MODULE, Request, SimulatedTriton, TritonError, TritonModelException


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_is_answered_with_the_tokens_of_llm(
    load: Callable[..., Any], send: Callable[..., Request], reference: dict[str, list[int]], is_streamed: bool
) -> None:
    model = load()
    requests = {prompt: send(model, **SHORT | {"text_input": prompt, "stream": is_streamed}) for prompt in PROMPTS}
    for prompt, request in requests.items():
        request.wait()
        assert request.errors == []
        assert request.token_ids == reference[prompt]
        assert is_streamed or len(request.sender.responses) == 1
    assert model.is_ready()


def test_unloading_ends_every_request_with_an_error_and_leaves_no_thread(
    load: Callable[..., Any],
    send: Callable[..., Request],
    server: SimulatedTriton,
    steps: Steps,
    threads: Callable[[], set[str]],
) -> None:
    model = load(settings={"max_batch_size": 2})
    assert threads() == {"fly-trt responses", "fly-trt watch", "fly-trt engine"}
    steps.seconds = SLOW_STEP_SECONDS
    running = [send(model, **LONG) for _ in range(2)]
    wait_until_running(*running)
    queued = [send(model, **LONG) for _ in range(2)]
    wait_until(lambda: server.value(WAITING) == 2)
    model.finalize()
    for request in running + queued:
        assert request.sender.closed.is_set()
        assert request.errors == [UNLOADED]
        assert request.sender.responses[-1].has_error()
    assert threads() == set()


def test_after_the_engine_failed_every_request_gets_an_error(
    load: Callable[..., Any],
    send: Callable[..., Request],
    server: SimulatedTriton,
    steps: Steps,
    threads: Callable[[], set[str]],
) -> None:
    model = load(settings={"max_batch_size": 2})
    steps.seconds = SLOW_STEP_SECONDS
    requests = [send(model, **LONG) for _ in range(2)]
    wait_until_running(*requests)
    assert model.is_ready()
    requests.append(send(model, **LONG))
    wait_until(lambda: server.value(WAITING) == 1)
    steps.error = RuntimeError("out of\nmemory")
    for request in requests:
        request.wait()
        ((code, error),) = request.errors
        assert code == TritonError.INTERNAL
        assert "(out of memory)" in error
    wait_until(lambda: not model.is_ready())
    later = send(model, **SHORT)
    later.wait()
    message = "the engine stopped after an error (out of memory): make a new one"
    assert later.errors == [(TritonError.INTERNAL, message)]
    # The program that these tests run in is not the server's: it is not ended.
    wait_until(lambda: any("its engine cannot run any more: load the model again" in text for _, text in server.log))
    model.finalize()
    assert threads() == set()


def test_a_step_that_fails_ends_its_requests_only(
    load: Callable[..., Any],
    send: Callable[..., Request],
    server: SimulatedTriton,
    steps: Steps,
    reference: dict[str, list[int]],
) -> None:
    model = load(settings={"max_batch_size": 1})
    steps.seconds = SLOW_STEP_SECONDS
    failing = send(model, **LONG)
    wait_until_running(failing)
    waiting = send(model, **SHORT)
    wait_until(lambda: server.value(WAITING) == 1)
    steps.error, steps.num_errors = RuntimeError("out of memory"), 1
    failing.wait()
    message = "request 1: the step that it was in failed (out of memory): send it again"
    assert failing.errors == [(TritonError.INTERNAL, message)]
    assert_answered(waiting, reference)
    assert model.is_ready()


def test_a_client_that_goes_away_frees_its_slot(
    load: Callable[..., Any], send: Callable[..., Request], steps: Steps, reference: dict[str, list[int]]
) -> None:
    model = load(settings={"max_batch_size": 1})
    steps.seconds = SLOW_STEP_SECONDS
    request = send(model, **LONG)
    wait_until_running(request)
    waiting, gone = send(model, **SHORT), send(model, **SHORT)
    cancel(gone)
    assert waiting.sender.responses == []
    cancel(request)
    assert_answered(waiting, reference)


def test_nobody_is_asked_about_a_request_that_was_answered(
    load: Callable[..., Any],
    send: Callable[..., Request],
    server: SimulatedTriton,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load()
    monkeypatch.setattr(sys.modules["fly_trt.serving.triton.model"], "POLL_SECONDS", 0.0)
    asked: list[Request] = []
    requests = []
    for index in range(200):
        request = Request(server, **SHORT | {"max_tokens": 1 + index % 6, "stream": index % 2 == 0})
        request.sender.on_ask = lambda request=request: asked.append(request)
        request.sender.is_gone = index % 10 == 0
        requests.append(request)
    for start in range(0, len(requests), 20):
        model.execute(requests[start : start + 20])
    for request in requests:
        request.wait()
        assert request.sender.is_gone or request.errors == []
    assert asked
    last = send(model, **LONG | {"max_tokens": 50})
    wait_until_running(last)
    last.wait()
    assert server.faults == []


def test_a_server_without_metrics_serves_all_the_same(
    load: Callable[..., Any], send: Callable[..., Request], server: SimulatedTriton, reference: dict[str, list[int]]
) -> None:
    server.has_metrics = False
    model = load()
    assert_answered(send(model, **SHORT), reference)
    model.finalize()
    assert server.values == {}
    assert any("no metrics" in text for _, text in server.log)


def test_gauges_are_told_at_the_start_and_counters_are_complete_at_the_end(
    load: Callable[..., Any], send: Callable[..., Request], server: SimulatedTriton
) -> None:
    labels = frozenset({"model": "fly", "version": "1", "instance": "fly_0_0"}.items())
    server.values |= dict.fromkeys([(name, labels) for name in GAUGES], 5.0)  # an instance before left them
    model = load()
    assert [server.values[name, labels] for name in GAUGES] == [0, 0, 0]
    requests = [send(model, **SHORT | {"text_input": prompt}) for prompt in PROMPTS]
    for request in requests:
        request.wait()
    model.finalize()
    assert server.values[GENERATED, labels] == sum(len(request.token_ids) for request in requests)
    assert server.value("fly_trt:request_success_total") == len(requests)
    assert [server.values[name, labels] for name in GAUGES[:2]] == [0, 0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"engine_dir": "/nowhere"}, "/nowhere: no such engine directory"),
        ({"max_batch_size": "99"}, "max_batch_size 99: demo was built for 8"),
    ],
)
def test_a_model_that_cannot_load_says_why_in_one_line(
    load: Callable[..., Any], threads: Callable[[], set[str]], parameters: dict[str, str], message: str
) -> None:
    with pytest.raises(TritonModelException, match=message) as refused:
        load(parameters)
    assert "\n" not in str(refused.value)
    assert threads() == set()


@pytest.mark.usefixtures("server")
def test_the_module_loads_where_the_server_only_asks_for_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module has no TritonError then."""
    monkeypatch.delattr(sys.modules[MODULE], "TritonError")
    assert importlib.import_module("fly_trt.serving.triton.model").TritonPythonModel


def test_a_request_that_waited_too_long_is_told_to_try_again(
    load: Callable[..., Any], send: Callable[..., Request], steps: Steps
) -> None:
    model = load(settings={"max_batch_size": 1})
    steps.seconds = SLOW_STEP_SECONDS
    running = send(model, **LONG)
    wait_until_running(running)
    patient, late = send(model, **LONG), send(model, timeout=1, **LONG)
    late.wait()
    assert late.errors == [(TritonError.UNAVAILABLE, "timed out in the queue: all slots were busy: try again")]
    assert not running.sender.closed.is_set()
    assert not patient.sender.closed.is_set()
    cancel(running)
    wait_until_running(patient)


def test_the_queue_time_does_not_count_once_a_request_runs(
    load: Callable[..., Any], send: Callable[..., Request], steps: Steps
) -> None:
    model = load()
    steps.seconds = SLOW_STEP_SECONDS
    asked: list[int] = []
    request = send(model, timeout=1, **LONG)  # it is over before the first step, which has a slot for it
    request.sender.on_ask = lambda: asked.append(1)
    wait_until_running(request)
    num_asked = len(asked)
    wait_until(lambda: len(asked) > num_asked + 2)
    assert not request.sender.closed.is_set()
    cancel(request)
