"""A server that does not answer, does not count and does not send, as no real one does when asked to."""

from collections.abc import Callable
from typing import Any

import pytest

from served_model import (
    GENERATED,
    LONG,
    SHORT,
    SLOW_STEP_SECONDS,
    Steps,
    assert_answered,
    cancel,
    wait_until,
    wait_until_running,
)
from simulated_triton import Request, SimulatedTriton, TritonError, TritonModelException


def test_a_question_that_fails_harms_nobody(
    load: Callable[..., Any], send: Callable[..., Request], server: SimulatedTriton, steps: Steps
) -> None:
    model = load()
    failures: list[str] = []

    def fail() -> None:
        failures.append("asked")
        raise RuntimeError("the server does not answer")

    steps.seconds = SLOW_STEP_SECONDS
    first, second = Request(server, **LONG), Request(server, **LONG)
    first.sender.on_ask = fail
    model.execute([first, second])
    wait_until(lambda: len(failures) == 2)
    wait_until_running(first, second)
    cancel(second)
    num_responses = len(first.sender.responses)
    wait_until(lambda: len(first.sender.responses) > num_responses)
    first.sender.on_ask = lambda: None
    cancel(first)
    assert any("the server does not answer" in text for _, text in server.log)


@pytest.mark.parametrize("recovers", [True, False])
def test_a_metric_that_fails_harms_nobody_and_is_told_later(
    recovers: bool,
    load: Callable[..., Any],
    send: Callable[..., Request],
    server: SimulatedTriton,
    steps: Steps,
    reference: dict[str, list[int]],
) -> None:
    model = load()
    failures: list[str] = []

    def fail(name: str) -> None:
        failures.append(name)
        raise RuntimeError("the server does not count")

    server.on_metric = fail
    steps.seconds = SLOW_STEP_SECONDS
    request = send(model, **LONG)
    wait_until(lambda: len(failures) >= 2)
    cancel(request)
    steps.seconds = 0.0
    answered = send(model, **SHORT)
    assert_answered(answered, reference)
    if recovers:
        server.on_metric = lambda name: None
    model.finalize()  # ends well all the same
    if not recovers:
        return
    assert server.value(GENERATED) >= len(request.token_ids) + len(answered.token_ids)
    assert server.value("fly_trt:request_success_total") == 2
    assert any("the server does not count" in text for _, text in server.log)


@pytest.mark.parametrize("index", [0, 2])
def test_a_part_that_cannot_be_sent_ends_its_request_only(
    load: Callable[..., Any],
    send: Callable[..., Request],
    server: SimulatedTriton,
    steps: Steps,
    reference: dict[str, list[int]],
    index: int,
) -> None:
    model = load(settings={"max_batch_size": 2})
    steps.seconds = SLOW_STEP_SECONDS
    request = Request(server, **LONG)

    def fail(response: Any, flags: int) -> None:
        if len(request.sender.responses) == index and not response.has_error():
            raise TritonModelException("no shared\nmemory")

    request.sender.on_send = fail
    other = send(model, **LONG)
    model.execute([request])
    request.wait()
    assert request.errors == [(TritonError.INTERNAL, "the request failed: no shared memory")]
    assert len(request.sender.responses) == index + 1
    assert_answered(send(model, **SHORT), reference)
    assert not other.sender.closed.is_set()
    cancel(other)


def test_a_last_part_that_cannot_be_sent_harms_nobody(
    load: Callable[..., Any], send: Callable[..., Request], server: SimulatedTriton, reference: dict[str, list[int]]
) -> None:
    """Triton's sender is closed then: nothing more can be sent."""
    model = load()
    request = Request(server, **SHORT)

    def fail(response: Any, flags: int) -> None:
        raise TritonModelException("no shared memory")

    request.sender.on_send = fail
    model.execute([request])
    request.wait()
    assert request.sender.responses == []
    assert_answered(send(model, **SHORT), reference)
    assert any("no shared memory" in text for _, text in server.log)
