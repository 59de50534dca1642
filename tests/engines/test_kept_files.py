"""What is kept between processes is written whole or not at all, and a full disk leaves nothing behind."""

import logging
import resource
from pathlib import Path

import pytest

from fly_trt.engines.tensorrt_library import keep


def test_content_is_kept_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "cache"
    for content in (b"old", bytearray(b"new"), memoryview(b"newer")):
        keep(path, content, "kernels")
        assert path.read_bytes() == bytes(content)
    assert list(path.parent.iterdir()) == [path]


def test_full_disk_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the size of files stands for the disk."""
    path = tmp_path / "cache"
    keep(path, b"old", "kernels")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.INFO):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
        try:
            keep(path, b"larger than that", "kernels")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "kernels are not kept" in caplog.text
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
