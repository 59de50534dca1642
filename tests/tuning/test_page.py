"""The page of a result in a real browser: it complains of nothing, asks for nothing and shows what the result says."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from fly_trt.tuning.chart import ticks
from fly_trt.tuning.page import FOLDER, make_page, write_page
from fly_trt.tuning.result import PLAIN, TuningResult
from fly_trt.tuning.wording import factor, percent
from tuning_results import HOSTILE, JUDGED, tuned
from tuning_tables import Simulated
from watched_pages import launched_chromium, watch

SEARCHED = tuple(Simulated(f"hybrid+fly,fly_window_size=1{n}", 1 + n / 10, 0.3 * (n % 2)) for n in range(6))
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched_chromium() as launched:
        yield launched


@pytest.fixture
def open_result(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """open_result(result, **of the context): its page. At the end no page has complained, or asked for more than
    itself."""
    contexts, problems, urls = [], [], []

    def open_page(result: TuningResult, **of_context: Any) -> Page:
        path = tmp_path / f"{len(contexts)}.html"
        write_page(result, path)
        contexts.append(browser.new_context(**of_context))
        page = contexts[-1].new_page()
        watch(page, problems, urls)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert all(url.startswith(("file://", "data:")) for url in urls)
    assert len([url for url in urls if url.startswith("file://")]) == len(contexts)


def column(page: Page, name: str) -> list[str]:
    """The cells of a column of the table, from above."""
    headers = page.locator("#table th").all_text_contents()
    return page.locator(f"#table tbody td:nth-child({headers.index(name) + 1})").all_text_contents()


def test_the_page_says_what_the_verdict_says_and_has_a_row_for_each_candidate(open_result: Open) -> None:
    result = tuned(searched=SEARCHED)
    page = open_result(result)
    for sentence in result.verdict.sentences:
        expect(page.locator(".verdict")).to_contain_text(sentence)
    assert column(page, "Candidate") == [one.candidate.name.replace(",", ", ") for one in result.candidates]
    assert column(page, "Verdict") == [one.verdict for one in result.candidates]
    assert column(page, "Times plain") == [
        "-" if one.over_plain is None else factor(one.over_plain.estimate) for one in result.candidates
    ]
    assert column(page, "At least") == [
        "-" if one.retention is None else percent(one.retention.lower) for one in result.candidates
    ]
    assert page.locator("tr.is-chosen td").first.text_content() == result.verdict.chosen.replace(",", ", ")
    for value in ("7", "ab" * 32, "600: 200-799", "a CPU", "2.4", "checks: right answers"):
        expect(page.locator("dd").get_by_text(value, exact=True).first).to_be_visible()


def test_the_chart_has_each_candidate_where_its_figures_are(open_result: Open) -> None:
    """From the ticks and their labels, as a reader would."""
    result = tuned()
    page = open_result(result)

    def scale(anchor: str, place: str) -> Callable[[float], float]:
        found = page.locator(f".tick[text-anchor={anchor}]").evaluate_all(
            f"all => all.map(each => [parseFloat(each.textContent), parseFloat(each.getAttribute('{place}'))])"
        )
        (low, low_at), (high, high_at) = found[0], found[-1]
        return lambda at: low + (at - low_at) / (high_at - low_at) * (high - low)

    speed_at, kept_at = scale("middle", "x"), scale("end", "y")
    assert page.locator(".point").count() == len(result.candidates)
    for number, one in enumerate(result.candidates):
        mark = page.locator(f".point[data-number='{number}'] circle")
        x, y = (float(mark.get_attribute(name) or "nan") for name in ("cx", "cy"))
        assert speed_at(x) == pytest.approx(one.speed, abs=0.01)
        assert kept_at(y - 0) == pytest.approx(100 * one.quality / one.target_quality, abs=2)
        if one.retention is not None:
            path = page.locator(f".point[data-number='{number}'] .bound").get_attribute("d") or ""
            (low_at,) = re.findall(r"V([\d.]+)", path)
            assert float(low_at) > y
    assert page.locator(".point.chosen").get_attribute("aria-label") == (
        "hybrid+fly,fly_window_size=4: 2.20x plain decoding, keeps 100 %, at least 99.1 %; chosen"
    )


def test_the_front_leads_over_what_nothing_beats_in_both(open_result: Open) -> None:
    result = tuned()
    page = open_result(result)
    path = page.locator(".chart .front").get_attribute("d") or ""

    def place(name: str) -> tuple[str, str]:
        number = next(n for n, one in enumerate(result.candidates) if one.candidate.name == name)
        mark = page.locator(f".point[data-number='{number}'] circle")
        return tuple(f"{float(mark.get_attribute(at) or 'nan'):g}" for at in ("cx", "cy"))

    best, fast = place("hybrid+fly,fly_window_size=4"), place("multi_level+relaxed,relaxed_top_n=3")
    assert path == f"M{best[0]} {best[1]} H{best[0]} V{fast[1]} H{fast[0]}"


def test_the_table_is_sorted_by_a_click_and_by_the_keyboard(open_result: Open) -> None:
    page = open_result(tuned(searched=SEARCHED))
    header = page.locator("#table th", has_text="Times plain")
    header.get_by_role("button").click()
    speeds = [float(text.rstrip("x")) for text in column(page, "Times plain") if text != "-"]
    assert speeds == sorted(speeds, reverse=True)
    expect(header).to_have_attribute("aria-sort", "descending")
    header.get_by_role("button").press("Enter")
    speeds = [float(text.rstrip("x")) for text in column(page, "Times plain") if text != "-"]
    assert speeds == sorted(speeds)
    page.locator("#table th button", has_text="Candidate").click()
    names = column(page, "Candidate")
    assert names == sorted(names)
    assert page.locator("[aria-sort]").count() == 1


def test_a_candidate_is_told_of_where_the_mouse_or_the_keyboard_is(open_result: Open) -> None:
    result = tuned(searched=SEARCHED)
    page = open_result(result)
    pointed = page.locator("#pointed")
    hint = pointed.text_content() or ""
    page.locator(".point.chosen .mark").hover()
    expect(pointed).to_contain_text("at least 99.1 %")
    expect(page.locator("tr.is-chosen")).to_have_class(re.compile("is-pointed"))
    page.mouse.move(0, 0)
    expect(pointed).to_have_text(hint)
    page.keyboard.press("Tab")
    expect(page.locator(".point").first).to_be_focused()
    first = page.locator(".point").first.get_attribute("aria-label") or ""
    expect(pointed).to_have_text(first)
    page.keyboard.press("Tab")
    expect(pointed).not_to_have_text(first)
    page.locator("#table tbody tr").last.hover()
    number = (page.locator("#table tbody tr").last.get_attribute("id") or "").removeprefix("row-")
    expect(page.locator(f".point[data-number='{number}']")).to_have_class(re.compile("is-pointed"))


def test_without_scripts_everything_can_be_read(open_result: Open) -> None:
    result = tuned()
    page = open_result(result, java_script_enabled=False)
    expect(page.locator(".verdict")).to_contain_text(result.verdict.sentences[0])
    assert page.locator("#table tbody tr").count() == len(result.candidates)
    assert page.locator(".point title").first.text_content()


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_no_wider_than_its_window(open_result: Open, width: int) -> None:
    page = open_result(tuned(searched=SEARCHED), viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_and_light_differ_and_paper_is_white(open_result: Open) -> None:
    def ground(page: Page) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = (open_result(tuned(), color_scheme=scheme) for scheme in ("light", "dark"))
    assert ground(light) != ground(dark)
    dark.emulate_media(media="print", color_scheme="dark")
    assert ground(dark) == "rgb(255, 255, 255)"


def test_what_a_file_or_a_setting_is_called_runs_nowhere(open_result: Open) -> None:
    hostile = tuned((*JUDGED[:2], Simulated(HOSTILE, 2.2)), prompts=HOSTILE)
    page = open_result(hostile)
    assert page.title() == "fly-tune: A faster setting was found"
    expect(page.locator(".verdict")).to_contain_text(HOSTILE)
    assert page.locator("main img").count() == 0


@pytest.mark.parametrize(
    ("judged", "title"),
    [
        ((JUDGED[0], Simulated("ngram+exact", 0.9)), "No speculation surely pays here"),
        ((JUDGED[0], Simulated("loose", 2, 0.1)), "Nothing faster keeps enough"),
        ((JUDGED[0],), "No speculation surely pays here"),
    ],
)
def test_where_nothing_is_chosen_the_page_says_so(open_result: Open, judged: tuple[Simulated, ...], title: str) -> None:
    page = open_result(tuned(judged, num_prompts=80))
    assert page.locator("#verdict").text_content() == title
    assert page.locator(".setting b").text_content() == PLAIN


def test_the_same_result_has_the_same_page_and_it_names_no_other_origin() -> None:
    result = tuned()
    assert make_page(result) == make_page(TuningResult.from_json(result.to_json()))
    for name in ("page.html", "page.css", "page.js"):
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\s'\"]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_ticks_are_round_and_within_their_range() -> None:
    assert ticks(0.89, 2.13) == [1, 1.5, 2]
    assert ticks(0.981, 1.002) == [0.985, 0.99, 0.995, 1.0]
