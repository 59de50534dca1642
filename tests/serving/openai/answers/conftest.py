"""Beside a server the same engines without it, to compare with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from fly_trt import LLM


@pytest.fixture(scope="module")
def llm(demo_engine: Path) -> Iterator[LLM]:
    with LLM(demo_engine) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(demo: Any) -> OpenAI:
    return demo.client
