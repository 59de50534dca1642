"""fly-inspect's page in a real browser: what it shows of an answer is what the runtime counted of it."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from colours import contrast, variables
from fly_trt.inspection.document import new_document
from fly_trt.inspection.page import FOLDER, SCRIPTS, STYLES, make_page, write_page
from fly_trt.inspection.sources import parse_traces
from fly_trt.outputs import RequestOutput
from trace_documents import as_bytes, document_of

HOSTILE = '</script><script>document.title="hit"</script><img src=x onerror=document.title="hit"><!--'
ODD = [
    HOSTILE,
    "\u2028\u2029",
    "\u202eabc",
    "\ud800",
    "a\udfffb",
    "<|eos|>",
    "&amp;",
    "\x00",
    "']]>",
    "{{script}}",
    "\\u003c",
]


def statistics(page: Page) -> dict[str, str]:
    found: dict[str, str] = page.locator("[data-stat]").evaluate_all(
        "all => Object.fromEntries(all.map(each => [each.dataset.stat, each.querySelector('dd').textContent]))"
    )
    return found


def shown_tokens(page: Page, answer: int = 0) -> list[tuple[str, str]]:
    """Category and text of each token."""
    found = (
        page.locator(".answer")
        .nth(answer)
        .locator(".tokens .token")
        .evaluate_all("all => all.map(each => [/token-(\\w+)/.exec(each.className)[1], each.textContent])")
    )
    return [(category, text) for category, text in found]


def category(token: dict[str, Any]) -> str:
    return token["source"] if token["kind"] == "matched" else token["kind"]


def test_colours_reasons_and_totals_are_those_of_the_request(
    saved: dict[str, Any], loose: RequestOutput, open_trace: Any
) -> None:
    page = open_trace(saved)
    completion, metrics = loose.outputs[0], loose.metrics
    trace = completion.trace
    assert trace is not None
    tokens = saved["requests"][0]["tokens"]
    assert shown_tokens(page) == [(category(token), token["token"]) for token in tokens]
    assert [token["token_id"] for token in tokens] == completion.token_ids

    counted = Counter(category for category, _ in shown_tokens(page))
    assert counted["loosened"] == metrics.num_loosened_tokens
    by_source = Counter(how.source for how in trace if how.source is not None)
    assert by_source == metrics.num_accepted_tokens_by_source
    for name, count in counted.items():
        assert page.locator(".answer").first.locator(f".token-legend button:has(.token-{name}) b").inner_text() == str(
            count
        )
    said = statistics(page)
    assert said["tokens"] == str(metrics.num_output_tokens)
    assert said["steps"] == str(metrics.num_spec_steps)
    assert said["length"] == f"{metrics.mean_acceptance_length:.2f}"
    assert said["rate"] == f"{100 * metrics.num_accepted_tokens / metrics.num_draft_tokens:.1f} %"
    assert said["accepted"] == str(metrics.num_accepted_tokens)
    assert said["loosened"] == str(metrics.num_loosened_tokens)
    assert said["saved"] == str(metrics.num_saved_tokens)
    assert said["policy"] == "fly"
    assert said["end"] == completion.finish_reason
    histogram = page.locator(".histogram").get_attribute("aria-label")
    assert histogram == "Rounds by accepted tokens. " + ", ".join(
        f"{number}: {count}" for number, count in enumerate(metrics.acceptance_histogram)
    )

    for at, how in enumerate(trace):
        if how.kind not in ("loosened", "correction"):
            continue
        page.locator(".answer").first.locator(".tokens .token").nth(at).hover()
        detail = page.locator(".token-detail").first.inner_text()
        assert how.reason in detail
        assert f"round {how.round}" in detail
        assert f"{how.entropy:.3f} nats" in detail
        assert how.top is not None
        for token in tokens[at]["top"]:
            assert json.dumps(token["token"]) in detail
        rejected = tokens[at]["rejected"]
        assert (rejected is not None) == (how.kind == "correction")
        if rejected is not None:
            assert f"in place of {json.dumps(rejected['token'])}" in detail


def test_rounds_and_costs_are_those_of_the_trace(saved: dict[str, Any], loose: RequestOutput, open_trace: Any) -> None:
    page = open_trace(saved)
    rounds = loose.outputs[0].rounds
    assert rounds is not None
    strip = page.locator(".strip")
    assert strip.get_attribute("aria-valuemax") == str(len(rounds) - 1)
    strip.focus()
    page.keyboard.press("Home")
    for number, round_ in enumerate(rounds):
        said = page.locator(".round-detail").inner_text()
        assert said == strip.get_attribute("aria-valuetext")
        assert f"Round {number} " in said
        if round_.num_draft:
            assert f"{round_.num_draft} drafted" in said
            assert f"{round_.num_accepted} accepted, {round_.num_loosened} of them loosened" in said
        marked = page.locator(".answer").first.locator(".tokens .in-round").all_text_contents()
        tokens = saved["requests"][0]["tokens"]
        assert marked == [token["token"] for token in tokens if token["round"] == number]
        page.keyboard.press("ArrowRight")
    spent = {
        "draft": sum(round_.draft_seconds for round_ in rounds),
        "verification": sum(round_.verification_seconds for round_ in rounds),
    }
    for name, seconds in spent.items():
        row = page.locator(f"[data-cost={name}]")
        assert row.locator(".cost-share").inner_text() == f"{100 * seconds / sum(spent.values()):.1f} %"
    assert "up to" in page.locator(".costs .note").inner_text()  # others were in its steps

    strip.click(position={"x": int(strip.get_attribute("data-step") or 0) + 3, "y": 30})  # the second one
    assert page.locator(".round-detail").inner_text().startswith("Round 1 ")


def test_what_guards_and_the_breaker_did_is_among_the_totals(saved: dict[str, Any], open_trace: Any) -> None:
    request = saved["requests"][0]
    counts = {"num_refused_loosenings_by_guard": {"exact_first": 2, "exact_within": 1}, "exact_because": "breaker"}
    page = open_trace(new_document([request | {"metrics": request["metrics"] | counts}]))
    assert (statistics(page)["refused"], statistics(page)["exact"]) == ("3", "breaker")
    assert page.locator("[data-stat=refused]").get_attribute("title") == "exact_first: 2, exact_within: 1"


def test_another_request_stands_beside_it_with_the_differences_marked(saved: dict[str, Any], open_trace: Any) -> None:
    page = open_trace(saved)
    assert page.locator(".answer h3").all_inner_texts() == ["fly", "exact"]
    same = [
        page.locator(".answer").nth(number).locator(".tokens .token:not(.differs)").all_text_contents()
        for number in (0, 1)
    ]
    assert same[0] == same[1]
    marked = page.locator(".answer").first.locator(".tokens .differs").count()
    assert marked == len(saved["requests"][0]["tokens"]) - len(same[0]) > 0
    assert f"{marked} differ" in page.locator(".answer-note").first.inner_text()
    page.select_option("#beside", "-1")
    assert page.locator(".answer").count() == 1
    page.select_option("#request", "1")
    assert statistics(page)["policy"] == "exact"
    assert page.locator(".answer").count() == 2


def test_it_is_usable_by_keyboard_alone(saved: dict[str, Any], open_trace: Any) -> None:
    page = open_trace(saved)
    keyboard = page.keyboard
    reached = []
    for _ in range(30):
        keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.className || document.activeElement.id"))
        if page.evaluate("document.activeElement.matches('.token')"):
            break
    assert reached[:2] == ["request", "beside"]
    focused = page.locator(".tokens .token:focus")
    keyboard.press("ArrowRight")
    assert focused.get_attribute("data-at") == "1"
    token = saved["requests"][0]["tokens"][1]
    assert token["reason"] in page.locator(".token-detail").first.inner_text()
    assert token["reason"] in (focused.get_attribute("aria-label") or "")
    keyboard.press("Tab")  # the legend
    keyboard.press("Enter")
    button = page.locator(".token-legend button:focus")
    assert button.get_attribute("aria-pressed") == "true"
    opacity = "all => all.map(each => [each.className.includes('token-model'), getComputedStyle(each).opacity])"
    for is_model, value in page.locator(".answer").first.locator(".tokens .token").evaluate_all(opacity):
        assert (value == "1") == is_model
    keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    page.locator(".switch input").focus()
    keyboard.press("Space")
    wanted = next(token["rejected"]["token"] for token in saved["requests"][0]["tokens"] if token["rejected"])
    struck = page.locator("[data-rejected]").first.evaluate("each => getComputedStyle(each, '::before').content")
    assert json.loads(struck) == wanted


def test_no_text_becomes_a_part_of_the_page(open_trace: Any) -> None:
    odd = [
        {
            "token": text,
            "choice_token": text,
            "kind": "correction",
            "reason": text,
            "guard": text,
            "rejected": {"token": text, "token_id": 3},
            "top": [{"token": text, "token_id": 5, "logprob": -0.1}],
        }
        for text in ODD
    ]
    rounds = [
        {
            "number": number,
            "num_draft": 1,
            "num_accepted": 0,
            "num_loosened": 0,
            "asked": HOSTILE,
            "policy": HOSTILE,
            "rejected": [{"token": text, "token_id": 3}],
            "num_steps": 1,
            "num_rows": 1,
            "draft_seconds": 0.1,
            "verification_seconds": 0.2,
        }
        for number, text in enumerate(ODD)
    ]
    texts = {"name": HOSTILE, "prompt": HOSTILE, "text": HOSTILE, "acceptance": HOSTILE, "finish_reason": HOSTILE}
    document = document_of(*odd, rounds=rounds, **texts)
    document["requests"].append(document["requests"][0] | {"name": "\u202e other \ud800"})
    page = open_trace(parse_traces(as_bytes(document), "test"))
    assert [text for _, text in shown_tokens(page)] == ODD
    for number in range(len(ODD)):
        page.locator(".tokens .token").nth(number).hover()
        page.locator(".strip").press("ArrowRight")
    for said in (page.locator(".round-detail").inner_text(), page.locator(".token-detail .token-name").inner_text()):
        assert "\u202e" not in said
    page.locator(".tokens .token").nth(ODD.index("\u202eabc")).hover()
    assert page.locator(".token-detail .token-name").inner_text() == '"\\u{202e}abc"'
    assert page.locator("img, main script, iframe").count() == 0
    assert page.locator("script").count() == 2
    assert page.title() == f"{HOSTILE} · fly-inspect"
    assert page.locator(".prompt").text_content() == HOSTILE


def test_a_script_that_came_in_all_the_same_would_not_run(
    saved: dict[str, Any], browser: Browser, tmp_path: Path
) -> None:
    write_page(saved, tmp_path / "page.html")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.evaluate(
        """document.body.append(
            Object.assign(document.createElement("script"), { textContent: "document.title = 'hit'" }),
            document.createRange().createContextualFragment("<img src=x onerror=\\"document.title='hit'\\">"),
        )"""
    )
    page.wait_for_timeout(50)
    assert "hit" not in page.title()
    assert len(said) >= 2
    assert all("Content Security Policy" in text for text in said)
    page.close()


def test_what_has_no_rounds_or_metrics_is_counted_from_its_tokens(open_trace: Any) -> None:
    matched = {"kind": "matched", "source": "model"}
    tokens = [
        matched | {"round": 0},
        {"kind": "loosened", "source": "lookup", "round": 0},
        {"kind": "bonus", "round": 0},
    ]
    tokens += [matched | {"round": 1}, {"kind": "correction", "round": 1}, {"kind": "plain", "round": 2}]
    page = open_trace(parse_traces(as_bytes(document_of(*tokens)), "test"))
    said = statistics(page)
    assert (said["tokens"], said["steps"], said["accepted"], said["loosened"]) == ("6", "2", "3", "1")
    assert said["length"] == "2.50"
    assert said["policy"] == "–"
    bars = page.locator(".histogram").get_attribute("aria-label")
    assert bars == "Rounds by accepted tokens. 0: 0, 1: 1, 2: 1"
    assert "no times" in page.locator(".costs").inner_text()
    expect(page.locator("#request-label")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_and_can_be_read_in_both_schemes(
    saved: dict[str, Any], open_trace: Any, scheme: str
) -> None:
    page = open_trace(saved, color_scheme=scheme, viewport={"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    text, ground = (
        sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))[:3]))
        for name in ("color", "backgroundColor")
    )
    assert (text < 150 and ground > 600) if scheme == "light" else (text > 600 and ground < 150)


def test_the_same_trace_gives_the_same_page_of_its_own_files_alone(saved: dict[str, Any]) -> None:
    page = make_page(saved)
    assert page == make_page(json.loads(json.dumps(saved)))
    addresses = set(re.findall(r"(?:https?:)?//[a-z0-9.]+\.[a-z]{2,}[^\s'\"]*", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert page.count("<script") == page.count("</script>") == 2
    assert {path.name for path in FOLDER.iterdir()} == {*STYLES, *SCRIPTS, "inspect.html"}
    for name in (*STYLES, *SCRIPTS):
        assert "</" not in (FOLDER / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_and_bars_can_be_told_from_their_ground(mode: int) -> None:
    colours = variables((FOLDER / "inspect.css").read_text(encoding="utf-8"))[mode]
    for text in ("text", "muted"):
        assert min(contrast(colours[text], colours[ground]) for ground in ("ground", "card")) >= 4.5, text
    for part in ("field-edge", "accent", "bar", "matched", "loosened", "own", "draft", "verification"):
        assert contrast(colours[part], colours["card"]) >= 3, part


def test_a_part_of_the_timeline_is_not_told_from_those_beside_it_by_colour_alone() -> None:
    """Each has its place in a stack; some are outlines, and the target's own is narrower than what it stands on."""
    css = (FOLDER / "inspect.css").read_text(encoding="utf-8")
    outlined = set(re.findall(r"\.part-(\w+) \{ fill: none; stroke:", css))
    assert outlined == {"rejected", "verification"}
