"""A tiny target and draft with the demo pair's tokenizer, saved once for all tests that build engine directories."""

import json

import pytest

from tiny_models import TinyPair, add_demo_tokenizer, save_tiny, tiny_llama

CALM = 0.08


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
