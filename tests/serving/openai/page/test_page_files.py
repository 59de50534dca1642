"""The page's files: how they are served, and that they can be read in both colour schemes."""

import importlib.resources
import re

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from colours import contrast, variables
from fly_trt.acceptance import acceptance_settings
from fly_trt.serving.openai.page import ACCEPTANCE, FILES, INDEX, SHARED_FILES, describe_acceptance, make_page_router
from fly_trt.verification import POLICIES

FOLDER = importlib.resources.files("fly_trt.serving.openai") / "page"
COMPONENTS = importlib.resources.files("fly_trt.inspection") / "page"
CATEGORIES = ("model", "lookup", "corpus", "grammar", "loosened", "correction", "bonus", "plain")


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(make_page_router())
    return TestClient(app)


def test_every_file_is_served_with_its_type_and_a_policy_that_lets_nothing_else_in(client: TestClient) -> None:
    for name, kind in {**FILES, **SHARED_FILES, ACCEPTANCE: "application/json"}.items():
        answer = client.get("/" if name == INDEX else f"/page/{name}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        directives = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'"} <= set(directives)
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.head(answer.url.path).headers["content-length"] == answer.headers["content-length"]


def test_the_table_has_every_file_of_the_folder() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)


def test_what_a_browser_has_already_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/playground.js")
    again = client.get("/page/playground.js", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert client.get("/page/playground.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert first.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path", ["/page/", "/page/page.py", "/page/..%2Fpage.py", "/page/%2e%2e/page.py", "/index.html"]
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_names_nothing_of_another_origin() -> None:
    for name in (*FILES, *SHARED_FILES):
        text = ((FOLDER if name in FILES else COMPONENTS) / name).read_text(encoding="utf-8")
        addresses = set(re.findall(r"(?:https?:)?//[a-z0-9.]+\.[a-z]{2,}[^\s'\"]*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        # Behind a proxy the page is not at the root of its host.
        assert not re.findall(r"""(?:src|href|fetch\()=?["'`(]+/""", text), name


def test_the_form_has_every_policy_and_every_setting_that_can_be_given_anywhere() -> None:
    known = describe_acceptance()
    assert list(known["policies"]) == list(POLICIES)
    in_form = {name for names in known["policies"].values() for name in names} | set(known["guards"])
    assert in_form == set(known["settings"]) == set(acceptance_settings()) - {"acceptance"}


def test_the_contrast_of_black_on_white_is_21() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_and_lines_can_be_told_from_every_colour_of_a_token(mode: int) -> None:
    colours = variables((COMPONENTS / "token_view.css").read_text())[mode]
    for category in CATEGORIES:
        ground = colours[f"token-{category}"]
        assert contrast(colours["token-text"], ground) >= 4.5, category
        assert contrast(colours[f"token-{category}-line"], ground) >= 3, category
    for text in ("token-text", "token-muted"):
        assert contrast(colours[text], colours["token-ground"]) >= 4.5


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_the_text_of_the_page_can_be_read(mode: int) -> None:
    colours = variables((FOLDER / "style.css").read_text())[mode]
    for text, grounds in {
        "text": ("ground", "card", "field"),
        "muted": ("ground", "card", "field"),
        "error": ("error-ground",),
        "on-accent": ("accent", "accent-hover"),
    }.items():
        assert min(contrast(colours[text], colours[ground]) for ground in grounds) >= 4.5, text
    for edge, ground in (("field-edge", "field"), ("field-edge", "card"), ("accent", "card"), ("bar", "card")):
        assert contrast(colours[edge], colours[ground]) >= 3, edge


def test_no_two_kinds_of_token_are_told_apart_by_colour_alone() -> None:
    css = (COMPONENTS / "token_view.css").read_text()
    rules = {name: re.search(rf"\.token-{name} \{{(.*)\}}", css) for name in CATEGORIES if name != "plain"}
    marks = {re.search(r"--(?:decoration|mark): ([^;]+)", rule[1])[1] for rule in rules.values() if rule}
    assert len(marks) == len(CATEGORIES) - 1
