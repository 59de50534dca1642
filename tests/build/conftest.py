"""A tiny target and draft with the demo pair's tokenizer, saved once for all tests that build engine directories, and
builds that trace each model once."""

import json
from collections.abc import Iterator

import pytest

import fly_build.model_build
from tiny_models import TinyPair, add_demo_tokenizer, save_tiny, tiny_llama
from traced_once import export_once

CALM = 0.08


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fly_build.model_build, "export_decoder", export_once)
        yield


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("tiny-pair")
    target, draft = folder / "target", folder / "draft"
    ids = {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": CALM, "num_hidden_layers": 1}
    model = save_tiny(tiny_llama(vocab_size=896, **ids), target)
    save_tiny(tiny_llama(vocab_size=1024, hidden_size=32, max_position_embeddings=128, **ids), draft)
    for checkpoint in (target, draft):
        add_demo_tokenizer(checkpoint)
    generation = {"eos_token_id": [1, 9], "temperature": 0.6, "do_sample": True}
    (target / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return TinyPair(target, draft, model)
