"""CPU quotas of control groups, and cores, sockets and kinds of cores, on file trees as Linux shows them."""

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from fly_trt.engines.cores import Cores, available_cores, choose_cores

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
        "import fly_trt.engines.onnxruntime as engine; from fly_trt.engines.cores import Cores;"
        "engine.choose_cores = lambda: Cores(3, None, '4 physical cores, quota 3');"
        "engine.session_options(); print(engine.num_pool_threads(), engine.describe_threads())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "3 3 threads (4 physical cores, quota 3)\n"


# --- which cores ------------------------------------------------------------------------------------------------------


def machine(
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: list[list[int]],
    *,
    nodes: list[str],
    packages: list[str],
    allowed: Collection[int] | None = None,
    capacities: dict[int, int] | None = None,
    performance: str | None = None,
    current: int = 0,
    quota: str = "max 100000",
) -> Path:
    """A machine with these physical cores, as the logical CPUs of each; the process has just run on CPU `current`."""
    cpus = {cpu for core in cores for cpu in core}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed or cpus), raising=False)
    system, files = "/sys/devices/system", {"/proc/self/cgroup": "0::/\n", "/proc/self/mountinfo": mounted(V2_MOUNT)}
    files["/sys/fs/cgroup/cpu.max"] = quota
    files["/proc/self/stat"] = f"71 (fly (x) serve) S {' '.join(['0'] * 35)} {current} 0 0\n"
    for core in cores:
        for cpu in core:
            files[f"{system}/cpu/cpu{cpu}/topology/thread_siblings_list"] = ",".join(map(str, core)) + "\n"
    for number, text in enumerate(nodes):
        files[f"{system}/node/node{number}/cpulist"] = text + "\n"
    for number, text in enumerate(packages):
        for cpu in listed(text):
            files[f"{system}/cpu/cpu{cpu}/topology/physical_package_id"] = f"{number}\n"
    for cpu, capacity in (capacities or {}).items():
        files[f"{system}/cpu/cpu{cpu}/cpu_capacity"] = f"{capacity}\n"
    if performance is not None:
        files["/sys/devices/cpu_core/cpus"] = performance + "\n"
    return write(tree, files)


def listed(text: str) -> list[int]:
    ranges = [part.split("-") for part in text.split(",") if part]
    return [cpu for part in ranges for cpu in range(int(part[0]), int(part[-1]) + 1)]


def pairs(*cpus: int, step: int) -> list[list[int]]:
    """Cores of two threads each, numbered as Linux does: the second threads behind all first ones."""
    return [[cpu, cpu + step] for cpu in cpus]


def test_the_threads_of_a_core_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = machine(tmp_path, monkeypatch, pairs(*range(4), step=4), nodes=["0-7"], packages=["0-7"])
    assert choose_cores(tree) == Cores(4, None, "4 physical cores")
    assert available_cores(tree) == 4


def test_a_core_of_which_the_process_may_use_one_thread_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = pairs(*range(4), step=4)
    tree = machine(tmp_path, monkeypatch, cores, nodes=["0-7"], packages=["0-7"], allowed={0, 4, 5, 7})
    assert choose_cores(tree) == Cores(3, None, "3 physical cores")


def test_of_two_sockets_one_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That on which the process runs already, and its memory lies."""
    cores, sockets = pairs(*range(8), step=8), ["0-3,8-11", "4-7,12-15"]
    for current, cpus in ((2, sockets[0]), (13, sockets[1])):
        tree = machine(tmp_path, monkeypatch, cores, nodes=sockets, packages=sockets, current=current)
        assert choose_cores(tree) == Cores(4, frozenset(listed(cpus)), "4 physical cores of one of 2 sockets")
        assert available_cores(tree) == 8  # what several processes have


def test_the_socket_with_more_cores_for_the_process_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores, sockets = [[cpu] for cpu in range(8)], ["0-3", "4-7"]
    allowed = {2, 3, 4, 5, 6}
    tree = machine(tmp_path, monkeypatch, cores, nodes=sockets, packages=sockets, allowed=allowed, current=2)
    assert choose_cores(tree) == Cores(3, frozenset({4, 5, 6}), "3 physical cores of one of 2 sockets")
    tree = machine(tmp_path, monkeypatch, cores, nodes=sockets, packages=sockets, allowed={4, 5, 6, 7}, current=4)
    assert choose_cores(tree) == Cores(4, None, "4 physical cores")  # numactl has chosen


def test_nodes_of_one_socket_are_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sub-NUMA clusters, or an EPYC that shows its chiplets as nodes."""
    nodes = ["0-1", "2-3", "4-5", "6-7"]
    cores = [[cpu] for cpu in range(8)]
    tree = machine(tmp_path / "one", monkeypatch, cores, nodes=nodes, packages=["0-7"])
    assert choose_cores(tree) == Cores(8, None, "8 physical cores")
    tree = machine(tmp_path / "two", monkeypatch, cores, nodes=nodes, packages=["0-3", "4-7"], current=5)
    assert choose_cores(tree) == Cores(4, frozenset(range(4, 8)), "4 physical cores of one of 2 sockets")


def test_a_virtual_machine_with_a_socket_for_each_cpu_has_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores, packages = [[cpu] for cpu in range(4)], ["0", "1", "2", "3"]
    assert choose_cores(machine(tmp_path / "a", monkeypatch, cores, nodes=["0-3"], packages=packages)).count == 4
    assert choose_cores(machine(tmp_path / "b", monkeypatch, cores, nodes=[], packages=packages)).count == 4


def test_where_no_package_is_known_each_node_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores, nodes = [[cpu] for cpu in range(8)], ["0-3", "4-7"]
    for name, number in (("none", None), ("minus one", "-1")):
        tree = machine(tmp_path / name, monkeypatch, cores, nodes=nodes, packages=[], current=5)
        if number is not None:
            topology = "/sys/devices/system/cpu/cpu{}/topology/physical_package_id"
            write(tree, {topology.format(cpu): number + "\n" for cpu in range(8)})
        assert choose_cores(tree) == Cores(4, frozenset(range(4, 8)), "4 physical cores of one of 2 sockets"), name


@pytest.mark.parametrize("known_by", ["capacity", "kind"])
def test_efficiency_cores_are_left_out_unless_they_are_most_by_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_by: str
) -> None:
    for num_slow, expected in (
        (6, Cores(2, frozenset(range(4)), "2 fast ones of 8 physical cores")),
        (8, Cores(10, None, "10 physical cores")),
    ):
        slow = range(4, 4 + num_slow)
        known: dict[str, Any] = {"performance": "0-3"}
        if known_by == "capacity":
            known = {"capacities": dict.fromkeys(range(4), 1024) | dict.fromkeys(slow, 620)}
        cores, every = [[0, 1], [2, 3], *([cpu] for cpu in slow)], f"0-{slow[-1]}"
        folder = tmp_path / str(num_slow)
        tree = machine(folder, monkeypatch, cores, nodes=[every], packages=[every], **known)
        assert choose_cores(tree) == expected


def test_cores_that_are_a_little_slower_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Favoured cores of a processor, or the middle ones of a telephone's."""
    capacities = {0: 1024, 1: 1010, 2: 880, 3: 800}
    cores = [[cpu] for cpu in range(4)]
    tree = machine(tmp_path, monkeypatch, cores, nodes=["0-3"], packages=["0-3"], capacities=capacities)
    assert choose_cores(tree).count == 4


def test_a_quota_below_the_cores_counts_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores, sockets = pairs(*range(8), step=8), ["0-3,8-11", "4-7,12-15"]
    for quota, cpus in (("290000 100000", 2), ("300000 100000", 3), ("600000 100000", 4)):
        tree = machine(tmp_path, monkeypatch, cores, nodes=sockets, packages=sockets, quota=quota)
        found = choose_cores(tree)
        assert (found.count, found.cpus) == (cpus, frozenset(listed(sockets[0])))
        ending = f", quota {cpus}" if cpus < 4 else ""
        assert found.reason == f"4 physical cores of one of 2 sockets{ending}"


def test_a_system_that_does_not_say_has_a_core_for_each_cpu(tmp_path: Path) -> None:
    assert choose_cores(tmp_path) == Cores(8, None, "8 physical cores")


# --- staying there ----------------------------------------------------------------------------------------------------


def run_alone(code: str) -> str:
    """In a process of its own: affinities and the pool are those of a process."""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no threads")
def test_threads_that_start_meanwhile_stay_on_the_cores_and_the_caller_goes_back() -> None:
    code = (
        "import os, threading; from fly_trt.engines.cores import Cores\n"
        "before = os.sched_getaffinity(0); one = frozenset([min(before)]); seen = []\n"
        "with Cores(1, one, '').held():\n"
        "    go = threading.Event()\n"
        "    thread = threading.Thread(target=lambda: (go.wait(), seen.append(os.sched_getaffinity(0))))\n"
        "    thread.start()\n"
        "assert os.sched_getaffinity(0) == before\n"
        "go.set(); thread.join(); assert seen == [one], seen\n"
        "with Cores(1, frozenset([4000]), '').held(): assert os.sched_getaffinity(0) == before\n"
        "with Cores(1, None, '').held(): assert os.sched_getaffinity(0) == before\n"
    )
    run_alone(code)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are not in /proc")
def test_the_pool_and_the_engine_thread_stay_on_the_chosen_cores(demo_engine: Path) -> None:
    """And no other thread of the process, also one that runs a step."""
    code = f"""
import os, threading
import numpy as np
from fly_trt import LLM
from fly_trt.engines import onnxruntime
from fly_trt.engines.cores import Cores
from fly_trt.engines.directory import LoadedEngines

before, chosen = os.sched_getaffinity(0), frozenset([min(os.sched_getaffinity(0))])
onnxruntime.choose_cores = lambda: Cores(3, chosen, "")
known = set(os.listdir("/proc/self/task"))
engines = LoadedEngines({str(demo_engine)!r})
engine = engines.target
started = set(os.listdir("/proc/self/task")) - known
assert len(started) >= 2, started
assert all(os.sched_getaffinity(int(thread)) == chosen for thread in started)
step = engine.step(0, 1, 3)
step.set_row(0, 0, np.arange(5, 8))
engine.run(step)
assert os.sched_getaffinity(0) == before
with engines, LLM(engines, enable_prefix_caching=False) as llm:
    llm.generate("a")
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "fly-trt engine"]
    assert os.sched_getaffinity(thread.native_id) == chosen
    assert os.sched_getaffinity(0) == before
with engines.held_cores():
    assert os.sched_getaffinity(0) == chosen
assert os.sched_getaffinity(0) == before
"""
    run_alone(code)
