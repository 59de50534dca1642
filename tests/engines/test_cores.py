"""CPU quotas of control groups, on file trees as Linux shows them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fly_trt.engines.cores import available_cores

V2_MOUNT = "31 24 0:27 {root} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "33 25 0:29 {root} {point} rw,nosuid shared:11 - cgroup cgroup rw,cpu,cpuacct"
V1_OTHER = "34 25 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def write(tree: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tree / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tree


def mounted(form: str, root: str = "/", point: str = "/sys/fs/cgroup") -> str:
    others = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n25 22 0:23 / /proc rw - proc proc rw\n"
    return others + V1_OTHER + "\n" + form.format(root=root, point=point) + "\n"


def v2(tree: Path, group: str, limits: dict[str, str], **mount: str) -> int:
    point = mount.get("point", "/sys/fs/cgroup")
    files = {f"{point}{name}/cpu.max": text for name, text in limits.items()}
    system = {"/proc/self/cgroup": f"0::{group}\n", "/proc/self/mountinfo": mounted(V2_MOUNT, **mount)}
    return available_cores(write(tree, files | system))


def v1(tree: Path, group: str, limits: dict[str, tuple[int, int]], **mount: str) -> int:
    point = mount.setdefault("point", "/sys/fs/cgroup/cpu,cpuacct")
    files = {}
    for name, (quota, period) in limits.items():
        files[f"{point}{name}/cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"{point}{name}/cpu.cfs_period_us"] = f"{period}\n"
    groups = f"12:cpuset:/elsewhere\n4:cpu,cpuacct:{group}\n1:name=systemd:/init.scope\n"
    system = {"/proc/self/cgroup": groups, "/proc/self/mountinfo": mounted(V1_MOUNT, **mount)}
    return available_cores(write(tree, files | system))


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 8),
        ("100000 100000", 1),
        ("200000 100000", 2),
        ("50000 100000", 1),
        ("190000 100000", 1),
        ("250000 100000", 2),
        ("30000 10000", 3),
        ("6400000 100000", 8),
        ("", 8),
        ("nonsense", 8),
        ("100000 0", 8),
    ],
)
def test_a_quota_is_rounded_down_to_whole_cores_and_one_at_least(tmp_path: Path, limit: str, cores: int) -> None:
    assert v2(tmp_path, "/", {"": limit}) == cores


def test_the_smallest_quota_along_the_path_counts(tmp_path: Path) -> None:
    group = "/kubepods.slice/pod7.slice/container"
    limits = {"/kubepods.slice": "600000 100000", "/kubepods.slice/pod7.slice": "300000 100000", group: "max 100000"}
    assert v2(tmp_path / "a", group, limits) == 3
    assert v2(tmp_path / "b", group, limits | {group: "200000 100000"}) == 2
    assert v2(tmp_path / "c", group, {"/other": "100000 100000", "/kubepods.slice/pod8.slice": "100000 100000"}) == 8


def test_the_first_version_has_two_files_and_minus_one_for_none(tmp_path: Path) -> None:
    assert v1(tmp_path / "a", "/", {"": (-1, 100_000)}) == 8
    assert v1(tmp_path / "b", "/", {"": (400_000, 100_000)}) == 4
    assert v1(tmp_path / "c", "/docker/x", {"/docker": (300_000, 100_000), "/docker/x": (50_000, 10_000)}) == 3


def test_a_container_that_sees_its_group_under_the_outer_name(tmp_path: Path) -> None:
    """Docker without a namespace of its own mounts the group itself, and names it as the host does."""
    assert v1(tmp_path / "a", "/docker/x", {"": (200_000, 100_000)}, root="/docker/x") == 2
    assert v1(tmp_path / "b", "/docker/x/y", {"/y": (100_000, 100_000)}, root="/docker/x") == 1
    assert v1(tmp_path / "e", "/docker/xy", {"y": (100_000, 100_000), "": (200_000, 100_000)}, root="/docker/x") == 2
    assert v2(tmp_path / "c", "/", {"": "200000 100000"}, root="/../..") == 2
    assert v2(tmp_path / "d", "/elsewhere", {"": "200000 100000"}, root="/docker/x") == 2


def test_both_versions_side_by_side_are_both_looked_at(tmp_path: Path) -> None:
    hybrid = {
        "/proc/self/cgroup": "4:cpu,cpuacct:/a\n0::/b\n",
        "/proc/self/mountinfo": mounted(V1_MOUNT, point="/sys/fs/cgroup/cpu")
        + V2_MOUNT.format(root="/", point="/sys/fs/cgroup/unified"),
        "/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "300000",
        "/sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
        "/sys/fs/cgroup/unified/b/cgroup.procs": "1",
    }
    assert available_cores(write(tmp_path, hybrid)) == 3


def test_a_mount_point_may_have_spaces(tmp_path: Path) -> None:
    files = {
        "/proc/self/cgroup": "0::/\n",
        "/proc/self/mountinfo": mounted(V2_MOUNT, point=r"/sys/fs/my\040groups"),
        "/sys/fs/my groups/cpu.max": "200000 100000",
    }
    assert available_cores(write(tmp_path, files)) == 2


def test_the_affinity_counts_where_it_is_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert v2(tmp_path, "/", {"": "200000 100000"}) == 1


def test_a_system_without_control_groups_has_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores(tmp_path) == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores(tmp_path) == 1


def test_the_engines_of_a_process_get_as_many_threads() -> None:
    """In a process of its own, since the pool of one is sized once."""
    code = (
        "import fly_trt.engines.onnxruntime as engine; engine.available_cores = lambda: 3;"
        "engine.session_options(); print(engine.num_pool_threads())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "3\n"
