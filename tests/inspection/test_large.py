"""A long trace: that it is shown as a whole, and how long that takes. Nothing rests on the time: it is only said."""

import time
from typing import Any

import pytest

from fly_trt.inspection.document import new_document

NUM_TOKENS = 4000


def repeated(request: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """A request with the tokens and rounds of this one over and over."""
    tokens: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    while len(tokens) < num_tokens:
        first = tokens[-1]["round"] + 1 if tokens else 0
        tokens += [token | {"round": token["round"] + first} for token in request["tokens"]]
        rounds += [round_ | {"number": round_["number"] + first} for round_ in request["rounds"]]
    last = tokens[num_tokens - 1]["round"]
    return request | {"tokens": tokens[:num_tokens], "rounds": rounds[: last + 1], "metrics": None, "group": None}


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1280])
def test_a_trace_of_4000_tokens_is_shown_and_how_long_that_takes(
    saved: dict[str, Any], open_trace: Any, width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    document = new_document([repeated(saved["requests"][0], NUM_TOKENS)])
    started = time.perf_counter()
    page = open_trace(document, viewport={"width": width, "height": 900})
    page.evaluate("new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    seconds = time.perf_counter() - started
    assert page.locator(".tokens .token").count() == NUM_TOKENS
    assert page.locator("[data-stat=tokens] dd").inner_text() == str(NUM_TOKENS)
    num_rounds = len(document["requests"][0]["rounds"])
    assert page.locator(".strip").get_attribute("aria-valuemax") == str(num_rounds - 1)
    with capsys.disabled():
        print(f"\n{NUM_TOKENS} tokens, {num_rounds} rounds, {width} pixels wide: open and drawn in {seconds:.2f} s")
