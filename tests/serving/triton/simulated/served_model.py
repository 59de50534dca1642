"""What the tests of the model on a simulated server send it, and what they wait for."""

import math
import time
from collections.abc import Callable
from typing import Any

from eval_prompts import load_eval_prompts
from simulated_triton import Request, TritonError

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:8]]
LONG = {"text_input": PROMPTS[0], "max_tokens": 1500, "end_id": -1, "stream": True}
SHORT = {"text_input": PROMPTS[1], "max_tokens": 6}
SLOW_STEP_SECONDS = 0.02  # half a minute for LONG: it runs until somebody ends it
WAIT_SECONDS = 60.0
WAITING = "fly_trt:num_requests_waiting"
GAUGES = ("fly_trt:num_requests_running", WAITING, "fly_trt:kv_cache_usage_perc")
GENERATED = "fly_trt:generation_tokens_total"
UNLOADED = (TritonError.UNAVAILABLE, "the model was unloaded before this request was finished: send it again")
CANCELLED = (TritonError.CANCELLED, "cancelled by the client")


class Steps:
    """What befalls every step of the engine."""

    seconds = 0.0
    error: Exception | None = None
    num_errors = math.inf  # steps that raise it


def wait_until(is_true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_true():
        assert time.monotonic() < deadline, "still not true"
        time.sleep(0.005)


def wait_until_running(*requests: Request) -> None:
    wait_until(lambda: all(request.sender.responses for request in requests))


def cancel(request: Request) -> None:
    request.sender.is_gone = True
    request.wait()
    assert request.errors == [CANCELLED]


def assert_answered(request: Request, reference: dict[str, list[int]]) -> None:
    request.wait()
    assert request.errors == []
    assert request.token_ids == reference[SHORT["text_input"]]
