"""A backend of the runtime in one module: it "runs" a model file that holds the salt of a hashed table."""

from pathlib import Path

from fly_trt.engines import Engine, EngineInfo
from fly_trt.engines.base import LoadSettings
from fly_trt.manifest import Manifest, ModelEngine
from table_engine import NextToken, TableEngine, hashed


def table(salt: int, vocab_size: int) -> NextToken:
    return hashed(vocab_size, salt)


def load(directory: Path, manifest: Manifest, model: ModelEngine, info: EngineInfo, settings: LoadSettings) -> Engine:
    return TableEngine(
        table(int((directory / model.model).read_text()), info.vocab_size),
        vocab_size=info.vocab_size,
        max_batch_size=settings.num_slots,
        max_num_tokens=info.max_num_tokens,
        max_seq_len=info.max_seq_len,
    )
