"""A model that a running server has for a while: loading one takes a second, starting a server several."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fly_trt.serving.triton.repository import make_plan, write_model
from triton_server import TritonServer


@contextlib.contextmanager
def written_model(server: TritonServer, engine: Path, name: str, **settings: Any) -> Iterator[Path]:
    """The folder of a model in the server's repository, which is not loaded yet. At the end it is unloaded and gone.
    Settings are those of make_plan."""
    plan = make_plan(engine, server.repository, name=name, **settings)
    write_model(plan, lambda done, total: None)
    try:
        yield plan.model_dir
    finally:
        server.unload(name)
        server.wait_until_unloaded(name)
        shutil.rmtree(plan.model_dir)


@contextlib.contextmanager
def hosted_model(server: TritonServer, engine: Path, name: str, **settings: Any) -> Iterator[Path]:
    """The folder of a model that the server has loaded."""
    with written_model(server, engine, name, **settings) as model_dir:
        server.load(name)
        yield model_dir
