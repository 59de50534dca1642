"""Debian's Chromium, and what its pages complain of and ask for."""

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS = 60_000  # milliseconds: an answer may have to wait for other tests' processes


@contextlib.contextmanager
def launched_chromium() -> Iterator[Browser]:
    """Without it the tests are skipped, but not where a build is to be judged."""
    executable = shutil.which("chromium")
    if executable is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        yield launched
        launched.close()


def watch(page: Page, problems: list[str], urls: list[str]) -> None:
    """Notes what its console says and what is not caught, and the addresses that it asks."""

    def note(message: ConsoleMessage) -> None:
        problems.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: urls.append(request.url))
