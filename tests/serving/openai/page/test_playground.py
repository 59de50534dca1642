"""The playground in a real browser, over a real server."""

import difflib
import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from eval_prompts import load_eval_prompts

FIXED = {"speculative_config": {"adaptive_draft_length": False}}
"""What becomes of a draft so depends on nothing but the request."""
PROMPTS = [record["prompt"] for record in load_eval_prompts()[:12]]
MAX_TOKENS = 60
INJECTED = '<img src=x onerror=document.title="hit"><script>document.title="hit"</script>'
# Texts of tokens that must be shown as they are, and how a test sees that they can be seen.
ODD_TEXTS = ["  two", "\n\n", "\t", "end\n", "\u202e", "<b>", "é", "\u200d", "👩‍👩‍👧"]


@pytest.fixture(scope="module")
def site(server: Any, demo_engine: Path) -> Any:
    return server(demo_engine, llm_settings=FIXED)


@pytest.fixture(scope="module")
def hidden_site(server: Any, demo_engine: Path) -> Any:
    """Below a path, for those who have a key."""
    return server(demo_engine, llm_settings=FIXED, root_path="/llm", api_keys=("a key",))


def category(token: dict[str, Any]) -> str:
    return token["source"] if token["kind"] == "matched" else token["kind"]


def shown(token: dict[str, Any]) -> tuple[str, str]:
    return category(token), token["token"]


def traced(site: Any, prompt: str, **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Trace, metrics and text of the same request, asked through the API and not streamed."""
    answer = site.client.completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        temperature=0,
        extra_body={"speculation_trace": True, **fields},
    ).model_dump()
    return answer["choices"][0]["speculation_trace"], answer["metrics"], answer["choices"][0]["text"]


@pytest.fixture(scope="module")
def loose_prompt(site: Any) -> str:
    """One whose answer has tokens of several kinds, loosened ones among them."""
    for prompt in PROMPTS:
        kinds = {category(token) for token in traced(site, prompt)[0]}
        if "loosened" in kinds and len(kinds) > 3:
            return prompt
    raise AssertionError("no answer has a loosened token")


def test_the_tokens_shown_are_those_of_the_trace(site: Any, visit: Any, loose_prompt: str) -> None:
    trace, metrics, text = traced(site, loose_prompt, acceptance="fly")
    playground = visit(site.base_url)
    said = "Server default: fly (reference: threshold 0.3, window 6), "  # when the page has asked for it
    expect(playground.page.locator("#setting")).to_contain_text(said)
    playground.run(loose_prompt, acceptance="fly", max_tokens=MAX_TOKENS)
    assert playground.tokens() == [shown(token) for token in trace]
    assert bytes(byte for token in trace for byte in token["bytes"]).decode().removesuffix("<|eos|>") == text
    assert "".join(text for _, text in playground.tokens()).removesuffix("<|eos|>") == text

    speculation = metrics["speculative_decoding"]
    statistics = playground.statistics()
    assert statistics["length"] == f"{speculation['mean_acceptance_length']:.2f}"
    assert statistics["rate"] == f"{100 * speculation['draft_acceptance_rate']:.1f} %"
    assert statistics["steps"] == str(speculation["num_spec_steps"])
    assert statistics["loosened"] == str(metrics["num_loosened_tokens"])
    counts = playground.page.locator(".token-legend b").all_text_contents()
    assert sum(map(int, counts)) == len(trace)
    bars = playground.page.locator(".histogram").get_attribute("aria-label")
    assert bars == "Rounds by accepted tokens. " + ", ".join(
        f"{number}: {count}" for number, count in enumerate(speculation["acceptance_histogram"])
    )

    loosened = next(at for at, token in enumerate(trace) if token["kind"] == "loosened")
    playground.page.locator(".tokens .token").nth(loosened).hover()
    token = trace[loosened]
    detail = playground.page.locator(".token-detail").inner_text()
    for part in (
        json.dumps(token["token"]),
        f"id {token['token_id']}",
        "loosened, from the draft model" if token["source"] == "model" else "loosened, from n-gram lookup",
        f"round {token['round']}",
        f"{token['entropy']:.3f} nats",
        f"{json.dumps(token['choice_token'])} (id {token['choice']})",
    ):
        assert part in detail
    in_round = playground.page.locator(".tokens .in-round").all_text_contents()
    assert in_round == [other["token"] for other in trace if other["round"] == token["round"]]

    exact, _, exact_text = traced(site, loose_prompt, acceptance="exact")
    playground.run(loose_prompt, acceptance="exact")
    assert playground.tokens() == [shown(token) for token in exact]
    assert playground.statistics()["loosened"] == "0"
    assert exact_text != text


def test_exact_and_fly_side_by_side_mark_what_differs(site: Any, visit: Any, loose_prompt: str) -> None:
    playground = visit(site.base_url)
    playground.page.check("#compare")
    playground.run(loose_prompt, acceptance="exact", max_tokens=MAX_TOKENS)  # has FLy beside it
    panels = [playground.panel(number) for number in (0, 1)]
    assert [panel.locator("h2").inner_text() for panel in panels] == ["exact", "fly"]
    texts = [[text for _, text in playground.tokens(number)] for number in (0, 1)]
    assert texts == [[t["token"] for t in traced(site, loose_prompt, acceptance=name)[0]] for name in ("exact", "fly")]
    same = [panel.locator(".tokens .token:not(.differs)").all_text_contents() for panel in panels]
    assert same[0] == same[1]
    matcher = difflib.SequenceMatcher(None, *texts, autojunk=False)
    assert len(same[0]) >= sum(block.size for block in matcher.get_matching_blocks())
    num_marked = len(texts[1]) - len(same[1])
    assert num_marked
    assert f"{num_marked} differ" in panels[1].locator(".panel-note").inner_text()


def test_every_setting_is_sent_as_the_api_has_it(site: Any, visit: Any) -> None:
    playground = visit(site.base_url)
    playground.page.locator("#guards summary").click()
    numbers = {"max_tokens": 5, "temperature": 0.5, "num_speculative_tokens": 3, "seed": 7, "fly_window_size": 2}
    numbers |= {"fly_entropy_threshold": 0.25, "exact_first": 1, "max_loosened_per_100": 50}
    lists = {"exact_token_ids": [3, 4], "exact_within": ["code", "digits"]}
    with playground.page.expect_request("**/v1/completions") as asked:
        playground.run(
            "Spell out: 21.",
            acceptance="fly",
            preset="vllm",
            **numbers,
            **{name: ", ".join(map(str, values)) for name, values in lists.items()},
        )
    assert asked.value.post_data_json == {
        "model": "demo",
        "prompt": "Spell out: 21.",
        "acceptance": "fly",
        "preset": "vllm",
        "stream": True,
        "stream_options": {"include_usage": True},
        "speculation_trace": True,
        **numbers,
        **lists,
    }
    playground.expect_status("^Done: [1-5] tokens?$")


def num_running(site: Any) -> float:
    with urllib.request.urlopen(f"{site.base_url}/metrics") as answer:
        found = re.search(r"^fly_trt:num_requests_running(?:\{[^}]*\})? (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found
    return float(found[1])


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("slow_steps")
def test_it_is_usable_by_keyboard_alone_and_stopping_frees_the_server(site: Any, visit: Any) -> None:
    playground = visit(site.base_url)
    page, keyboard = playground.page, playground.page.keyboard
    expect(page.locator("#prompt")).to_be_focused()
    keyboard.type("Spell out: 21.")
    for control in ("#acceptance", "#max_tokens"):
        keyboard.press("Tab")
        expect(page.locator(control).first).to_be_focused()
    keyboard.type("2000")
    playground.add_to_requests(ignore_eos=True)
    keyboard.press("Control+Enter")
    page.locator(".tokens .token").nth(30).wait_for()
    assert num_running(site) == 1
    keyboard.press("Escape")
    playground.expect_status("^Stopped: [0-9]+ tokens$")
    wait_until(lambda: num_running(site) == 0)

    for _ in range(40):
        keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.token')"):
            break
    focused = page.locator(".tokens .token:focus")
    assert focused.get_attribute("data-at") == "0"
    assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    keyboard.press("ArrowRight")
    keyboard.press("ArrowRight")
    assert focused.get_attribute("data-at") == "2"
    assert focused.get_attribute("aria-label").split(", ")[0] in page.locator(".token-detail").inner_text()
    keyboard.press("End")
    assert focused.get_attribute("data-at") == str(len(playground.tokens()) - 1)
    keyboard.press("ArrowUp")
    assert int(focused.get_attribute("data-at")) < len(playground.tokens()) - 1
    keyboard.press("Home")
    keyboard.press("Shift+Tab")
    keyboard.press("Tab")
    assert focused.get_attribute("data-at") == "0"


def test_below_a_root_path_with_a_key_as_a_chat_in_the_dark(hidden_site: Any, visit: Any, loose_prompt: str) -> None:
    playground = visit(f"{hidden_site.base_url}/llm/", color_scheme="dark")
    page = playground.page
    key, error = page.locator("#api-key"), page.locator("#page-error")
    expect(key).to_be_focused()
    key.fill("another key")
    key.press("Enter")
    expect(error).not_to_be_empty()
    key.fill("a key")
    key.press("Enter")
    expect(key).to_be_hidden()
    expect(error).to_be_hidden()
    assert len(playground.problems) == 2
    assert all("401" in problem for problem in playground.problems)
    playground.problems.clear()

    message = re.fullmatch(r"### Instruction:\n(.*)\n### Response:\n", loose_prompt, re.DOTALL)
    assert message
    page.check("[value=chat]")
    playground.run(message[1], acceptance="fly", max_tokens=MAX_TOKENS)
    assert playground.urls[-1] == f"{hidden_site.base_url}/llm/v1/chat/completions"
    answer = hidden_site.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": message[1]}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        extra_body={"speculation_trace": True, "acceptance": "fly"},
    ).model_dump()
    assert playground.tokens() == [shown(token) for token in answer["choices"][0]["speculation_trace"]]

    colours = page.locator(".tokens .token").evaluate_all(
        "all => all.map(each => [getComputedStyle(each).color, getComputedStyle(each).backgroundColor])"
    )
    brightness = [[sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in pair] for pair in colours]
    assert all(text > 600 > 400 > ground for text, ground in brightness)
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", body))) < 100


def test_neither_prompts_nor_errors_nor_tokens_become_part_of_the_page(site: Any, visit: Any) -> None:
    playground = visit(site.base_url)
    page = playground.page
    playground.run(INJECTED, max_tokens=8)
    page.locator("#guards summary").click()
    playground.run(INJECTED, exact_within=INJECTED)
    assert INJECTED in playground.panel().locator(".error").inner_text()
    playground.problems[:] = [text for text in playground.problems if "400" not in text]
    draw_tokens(page, [{"token": INJECTED, "token_id": 7, "choice": 7, "choice_token": INJECTED}])
    page.locator("#drawn .token").first.hover()
    assert INJECTED[:20] in page.locator("#drawn .token-detail").inner_text()
    assert page.locator("#panels img, #panels script, #drawn img, #drawn script").count() == 0
    assert page.title() == "fly-serve playground"


def draw_tokens(page: Any, tokens: list[dict[str, Any]]) -> None:
    """The component alone, with tokens that no small model says."""
    plain = {"kind": "plain", "source": None, "round": 0, "entropy": None}
    page.evaluate(
        """async tokens => {
            const { TokenView } = await import("./page/token_view.js");
            const parent = document.body.appendChild(document.createElement("div"));
            parent.id = "drawn";
            new TokenView(parent, "drawn").append(tokens);
        }""",
        [plain | token for token in tokens],
    )


def test_what_has_no_looks_can_be_seen_and_copies_as_it_is(site: Any, visit: Any) -> None:
    page = visit(site.base_url).page
    cat = "🐱".encode()
    tokens = [{"token": text, "token_id": 5, "choice": 5, "choice_token": text} for text in ODD_TEXTS]
    tokens += [
        {"token": "\ufffd", "token_id": 6, "choice": 6, "choice_token": "\ufffd", "bytes": list(part)}
        for part in (b" " + cat[:1], cat[1:3], cat[3:])
    ]
    draw_tokens(page, tokens)
    drawn = page.locator("#drawn .tokens")
    assert drawn.evaluate("element => element.textContent") == "".join(ODD_TEXTS) + " 🐱"
    assert drawn.locator(".space").count() == 2
    assert drawn.locator(".newline").count() == 3
    codes = drawn.locator("[data-code]").evaluate_all("all => all.map(each => each.dataset.code)")
    assert codes == ["U+202E", "U+200D", "20 F0", "9F 90", "B1"]
    assert drawn.locator(".token").last.text_content() == "🐱"


def test_a_stream_reads_the_same_wherever_it_is_cut(site: Any, visit: Any) -> None:
    stream = ": comment\r\n\r\ndata: 1\n\ndata:two\r\ndata:  lines\r\n\r\nevent: x\ndata: [DONE]\n\n"
    found = visit(site.base_url).page.evaluate(
        """async stream => {
            const { events } = await import("./page/api.js");
            const cut = Array.from(stream, (_, at) => [stream.slice(0, at), stream.slice(at)]);
            const all = [];
            for (const pieces of [...cut, [...stream]]) {
                const data = [];
                for await (const event of events(pieces)) data.push(event);
                all.push(JSON.stringify(data));
            }
            return [...new Set(all)];
        }""",
        stream,
    )
    assert found == [json.dumps(["1", "two\n lines", "[DONE]"], separators=(",", ":"))]
