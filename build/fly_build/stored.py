"""The tensors in a checkpoint's safetensors files: where each lies, and reading one; not what they mean."""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor: `kind` is the name that safetensors has for its type."""

    path: str
    key: str
    kind: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """Its values, mapped from the file: what is not looked at is not read."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.key)


def stored_tensors(name: str, revision: str | None) -> dict[str, Stored]:
    """Every tensor in the files. Raises OSError or SafetensorError for files that are none, and what a wrong index
    causes."""
    stored = {}
    for path in _files(name, revision):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(key)
                stored[key] = Stored(path, key, part.get_dtype(), tuple(part.get_shape()))
    return stored


def _files(name: str, revision: str | None) -> list[str]:
    """The safetensors files that transformers reads, downloaded where it would."""
    optional: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if (single := cached_file(name, "model.safetensors", **optional)) is not None:
        return [single]
    if (index := cached_file(name, INDEX_NAME, **optional)) is None:
        return []
    return get_checkpoint_shard_files(name, index, revision=revision)[0]
