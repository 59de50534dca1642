"""The picture of a benchmark: a real one, or none."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fly_trt import ConfigError
from fly_trt.benchmark.measure import Benchmark
from fly_trt.benchmark.plot import write_plot


def test_the_suffix_says_which_kind_of_picture(benchmark: Benchmark, tmp_path: Path) -> None:
    write_plot(benchmark.rows, "engines/demo", tmp_path / "new" / "plot.PNG")
    pixels = imread(tmp_path / "new" / "plot.PNG", format="png")
    assert pixels.shape[0] > 600  # two loads, one below the other
    assert pixels[..., :3].std() > 0.05
    write_plot(benchmark.rows, "engines/demo", tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for words in (*benchmark.modes, "engines/demo", "1 in flight", "2 in flight"):
        assert f"<!-- {words} -->" in text


def test_another_suffix_is_refused(benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plot .*plot\.gif: expected a file name that ends in \.png or \.svg"):
        write_plot(benchmark.rows, "", tmp_path / "plot.gif")


def test_an_error_leaves_what_was_there(benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")

    def disk_is_full(figure: Figure, file: Path, **settings: object) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", disk_is_full)
    with pytest.raises(OSError, match="disk full"):
        write_plot(benchmark.rows, "", path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"plot.png": b"old"}


def test_a_missing_matplotlib_names_the_extra(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"matplotlib is not installed: pip install 'fly-trt\[bench\]'"):
        write_plot(benchmark.rows, "", tmp_path / "plot.png")
