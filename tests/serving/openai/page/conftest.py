"""Debian's Chromium, and pages in it that must neither complain nor ask any other origin."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Locator,
    Page,
    Route,
    expect,
)

from watched_pages import SECONDS, launched_chromium, watch


@dataclass
class Playground:
    """The page in a tab of its own. problems: what the console said and what was not caught; urls: what was asked."""

    page: Page
    problems: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def run(self, prompt: str, **fields: Any) -> None:
        """Fills in and runs; returns when the answers are there."""
        for name, value in fields.items():
            control = self.page.locator(f"#{name}")
            if control.evaluate("element => element.tagName") == "SELECT":
                control.select_option(value)
            else:
                control.fill(str(value))
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Control+Enter")
        self.expect_status(r"^(Done|Failed)")

    def add_to_requests(self, **fields: Any) -> None:
        """Has them carry what the form has no field for."""

        def send(route: Route) -> None:
            route.continue_(post_data=json.dumps(route.request.post_data_json | fields))

        self.page.route(re.compile(r"/v1/completions$"), send)

    def expect_status(self, pattern: str) -> None:
        expect(self.page.locator("#status")).to_have_text(re.compile(pattern), timeout=SECONDS)

    def panel(self, number: int = 0) -> Locator:
        return self.page.locator(".panel").nth(number)

    def tokens(self, number: int = 0) -> list[tuple[str, str]]:
        """Category and text of each token of a panel."""
        found: list[tuple[str, str]] = (
            self.panel(number)
            .locator(".tokens .token")
            .evaluate_all("all => all.map(each => [/token-(\\w+)/.exec(each.className)[1], each.textContent])")
        )
        return [(category, text) for category, text in found]

    def statistics(self, number: int = 0) -> dict[str, str]:
        found: dict[str, str] = (
            self.panel(number)
            .locator("[data-stat]")
            .evaluate_all(
                "all => Object.fromEntries(all.map(each => [each.dataset.stat, each.querySelector('dd').textContent]))"
            )
        )
        return found


Visit = Callable[..., Playground]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for a module."""
    with launched_chromium() as launched:
        yield launched


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """visit(url, **of the context): the page there, loaded. At the end no page has said anything in its console but
    what its `problems` were emptied of, and none has asked any other origin."""
    visited: list[tuple[str, Playground]] = []
    contexts: list[BrowserContext] = []

    def open_page(url: str, **of_context: Any) -> Playground:
        context = browser.new_context(**of_context)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        playground = Playground(page)
        visited.append((url, playground))

        watch(page, playground.problems, playground.urls)
        page.goto(url)
        return playground

    yield open_page
    for context in contexts:
        context.close()
    for url, playground in visited:
        assert playground.problems == []
        assert all(asked.startswith((url, "data:")) for asked in playground.urls), playground.urls
