"""A document as one HTML page that needs nothing else: no network, no second file.

It puts the files of page/ together; fly-serve's page has the same token view. The document goes in as data that no
parser of HTML or JavaScript can take for anything else, and a Content-Security-Policy lets no script run but the page's
own. The same document gives the same bytes.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fly_trt.files import new_file

FOLDER = Path(__file__).parent / "page"
STYLES = ("token_view.css", "histogram.css", "inspect.css")
# Each behind those that it imports.
SCRIPTS = ("elements.js", "difference.js", "histogram.js", "token_view.js", "timeline.js", "inspect.js")
IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([\w.]+)";$', re.MULTILINE)
EXPORT = re.compile(r"^export ((?:const|class|(?:async )?function\*?) (\w+))", re.MULTILINE)


def write_page(document: Mapping[str, Any], path: str | Path) -> None:
    """Writes the page of a document that `read_traces` gave."""
    with new_file(Path(path)) as file:
        file.write_text(make_page(document), encoding="utf-8")


def make_page(document: Mapping[str, Any]) -> str:
    """The page, to be written as UTF-8."""
    style = "".join(_read(name) for name in STYLES)
    # One script instead of several modules: a page that is a file cannot load others.
    script = "const modules = {};\n" + "".join(_as_function(name) for name in SCRIPTS)
    parts = {"policy": content_policy(script, style), "style": style, "script": script, "document": as_data(document)}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("inspect.html"))


def content_policy(script: str, style: str) -> str:
    """The Content-Security-Policy of a page with this one script and this one style sheet, and nothing else."""
    return f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'"


def _as_function(name: str) -> str:
    """A module as a function of its own, whose result is what it exports."""
    text = _read(name)
    exported = ", ".join(found[2] for found in EXPORT.finditer(text))
    body = EXPORT.sub(r"\1", IMPORT.sub(r'const \1 = modules["\2"];', text))
    return f'modules["{name}"] = (() => {{\n{body}\nreturn {{ {exported} }};\n}})();\n'


def as_data(document: Mapping[str, Any]) -> str:
    """JSON within <script type="application/json">: nothing in it ends the element or begins a comment."""
    text = json.dumps(document, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
