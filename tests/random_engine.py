"""Engines of tiny random models with a large vocabulary."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tiny_models import save_tiny, tiny_llama
from traced_once import build

DRAFT_NOISE = 0.2


def build_random_engine(folder: Path, vocab_size: int, hidden_size: int) -> Path:
    """A llama of two layers whose token i is the word "w<i>"; its draft is the same with noise, so that it is often
    right. Built in float32 for 8 requests of 512 tokens."""
    config = tiny_llama(
        vocab_size=vocab_size, hidden_size=hidden_size, tie_word_embeddings=True, max_position_embeddings=512
    )
    model = save_tiny(config, folder / "target")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + DRAFT_NOISE * torch.randn_like(parameter)
    model.save_pretrained(folder / "draft")
    tokenizer = Tokenizer(models.WordLevel({f"▁w{i}": i for i in range(vocab_size)}, unk_token="▁w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"▁w{config.eos_token_id}")
    for name in ("target", "draft"):
        fast.save_pretrained(folder / name)
    # Measured, they would decide differently on each machine which windows pay.
    costs = {"draft_token_cost": 0.05, "verification_token_cost": 0.02}
    checkpoints = {"target": str(folder / "target"), "draft": str(folder / "draft")}
    build(folder / "engine", **checkpoints, speculative=costs)
    return folder / "engine"
