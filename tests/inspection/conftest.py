"""Traces of real answers, and their pages in Chromium, which must neither complain nor ask for anything."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from eval_prompts import load_eval_prompts
from fly_trt import LLM, SamplingParams
from fly_trt.acceptance import AcceptanceParams
from fly_trt.inspection import read_traces, save_trace, write_page
from fly_trt.outputs import RequestOutput
from watched_pages import SECONDS, launched_chromium, watch

NUM_PROMPTS = 12
Outputs = dict[str, list[RequestOutput]]
OpenTrace = Callable[..., Page]


@pytest.fixture(scope="session")
def llm(demo_engine: Path) -> Iterator[LLM]:
    with LLM(demo_engine, speculative_config={"adaptive_draft_length": False}) as llm:
        yield llm


@pytest.fixture(scope="session")
def outputs(llm: LLM) -> Outputs:
    """What the demo pair answers to the same prompts, by rule, with traces."""
    prompts = [record["prompt"] for record in load_eval_prompts()[:NUM_PROMPTS]]
    return {
        rule: llm.generate(
            prompts,
            SamplingParams(max_tokens=60, speculation_trace=True, acceptance=AcceptanceParams(acceptance=rule)),
        )
        for rule in ("fly", "exact")
    }


@pytest.fixture(scope="session")
def loose(outputs: Outputs) -> RequestOutput:
    """An answer with loosened tokens, corrections and others."""
    for output in outputs["fly"]:
        kinds = {token.kind for token in output.outputs[0].trace or ()}
        if {"loosened", "matched", "correction"} <= kinds:
            return output
    raise AssertionError("no answer has tokens of all kinds")


@pytest.fixture(scope="session")
def saved(llm: LLM, loose: RequestOutput, outputs: Outputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of the loose answer and of the exact one to the same prompt."""
    path = tmp_path_factory.mktemp("saved") / "trace.json"
    exact = next(output for output in outputs["exact"] if output.prompt == loose.prompt)
    save_trace([loose, exact], path, llm.tokenizer)
    return read_traces(path)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched_chromium() as launched:
        yield launched


@pytest.fixture
def open_trace(browser: Browser, tmp_path: Path) -> Iterator[OpenTrace]:
    """open_trace(document, **of the context): its page. At the end no page has complained, or asked for more than
    itself."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []
    urls: list[str] = []

    def open_page(document: dict[str, Any], **of_context: Any) -> Page:
        path = tmp_path / f"{len(contexts)}.html"
        write_page(document, path)
        context = browser.new_context(**of_context)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        watch(page, problems, urls)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert all(url.startswith(("file:", "data:")) for url in urls)
    assert len([url for url in urls if url.startswith("file:")]) == len(contexts)
