"""The playground at `/`: the files in page/, and what its form must know of acceptance.

It knows fixed tables of files, read once; nothing of a request's path reaches the file system. It knows no engine: the
page itself asks the public API, as any client does.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from fly_trt.acceptance import GUARDS, acceptance_settings
from fly_trt.inspection.page import FOLDER as COMPONENTS
from fly_trt.settings import Setting
from fly_trt.verification import POLICIES

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
FILES = {
    INDEX: "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "playground.js": "text/javascript; charset=utf-8",
    "settings_form.js": "text/javascript; charset=utf-8",
    "run_panel.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
}
# What fly-inspect's page is made of as well.
SHARED_FILES = {
    "token_view.css": "text/css; charset=utf-8",
    "token_view.js": "text/javascript; charset=utf-8",
    "histogram.css": "text/css; charset=utf-8",
    "histogram.js": "text/javascript; charset=utf-8",
    "elements.js": "text/javascript; charset=utf-8",
    "difference.js": "text/javascript; charset=utf-8",
}
ACCEPTANCE = "acceptance.json"
HEADERS = {
    # A new release is seen at once, and what has not changed is not sent again.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_page_router() -> APIRouter:
    """GET / and /page/NAME for each file of the page. Its URLs are relative: the page works below any root path."""
    router = APIRouter(include_in_schema=False)
    served = {name: ((FOLDER / name).read_bytes(), kind) for name, kind in FILES.items()}
    served |= {name: ((COMPONENTS / name).read_bytes(), kind) for name, kind in SHARED_FILES.items()}
    served[ACCEPTANCE] = (json.dumps(describe_acceptance()).encode(), "application/json")
    for name, (content, kind) in served.items():
        path = "/" if name == INDEX else f"/page/{name}"
        router.add_api_route(path, _answer_with(content, kind), methods=["GET", "HEAD"])

    @router.get("/favicon.ico")
    async def favicon() -> Response:
        """The page has its icon inside; browsers ask here when they show other answers of the server."""
        return Response(status_code=204, headers={"Cache-Control": "max-age=86400"})

    return router


def describe_acceptance() -> dict[str, Any]:
    """The policies with the settings that each of them reads, the guards of all but exact, and what each setting may
    be: what a form for them is made of."""
    declared = acceptance_settings()
    return {
        "policies": {
            name: [setting for setting in policy.settings if setting in declared] for name, policy in POLICIES.items()
        },
        "guards": list(GUARDS),
        "settings": {name: _describe(value) for name, value in declared.items() if name != "acceptance"},
    }


def _describe(setting: Setting) -> dict[str, Any]:
    return {
        "kind": setting.kind.__name__,
        "help": setting.help,
        "choices": None if setting.choices is None else list(setting.choices),
        "least": setting.least,
        "most": setting.most,
        "is_list": setting.is_list,
    }


def _answer_with(content: bytes, kind: str) -> Callable[[Request], Any]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = HEADERS | {"ETag": tag}

    async def answer(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if tag in (part.strip().removeprefix("W/") for part in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return answer
