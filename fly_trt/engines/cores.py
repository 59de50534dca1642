"""Which CPU cores a model's threads should use: physical ones, fast ones, of one socket, and no more than the process
may use and its control groups grant.

All threads of a step read all weights and wait for each other, so that the slowest decides. Two threads of one core
share its arithmetic, memory behind another socket is further away, and an efficiency core is late: what OpenVINO leaves
out for latency ("Performance Hints and Thread Scheduling" in its documentation) is left out here. Containers usually
limit time, not cores: with a quota of one CPU on a machine of 64, 64 threads are stopped most of the time. Linux alone
says all this, in /sys and /proc; elsewhere every CPU counts as a core. Nothing here knows what the threads compute.
"""

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CONTROLLER = "cpu"
CPUS = "sys/devices/system/cpu"
PERFORMANCE_CPUS = "sys/devices/cpu_core/cpus"  # of Intel's hybrid processors
FAST = 0.75  # of the largest cpu_capacity
FEW_FAST = 4  # times as many slow cores are worth waiting for
LAST_CPU = 36  # in /proc/self/stat, counted from the state behind the program's name: see proc_pid_stat(5)


@dataclass(frozen=True, slots=True)
class Cores:
    """As many threads as `count` are worth having. `cpus` are the logical CPUs that they should stay on, None wherever
    the process may be; `reason` says in words where the number comes from."""

    count: int
    cpus: frozenset[int] | None
    reason: str

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The calling thread is on these CPUs meanwhile, and threads that it starts are for good; what it first writes
        to lies in memory beside them. One that may not be there, since its cpuset was changed, goes on where it is."""
        if self.cpus is None:
            yield
            return
        before = os.sched_getaffinity(0)
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, self.cpus)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, before)


def choose_cores(root: Path = Path("/")) -> Cores:
    """The fast physical cores of that socket which has most of them, within the quota; among equals that on which the
    process runs. A quota counts in whole cores and as 1 at least, since a thread on a part would hold up the others.

    root: where the system's files are.
    """
    allowed = _allowed()
    places = [_Place(cpus, _cores(root, cpus)) for cpus in _places(root, allowed)]
    here = _current_cpu(root)
    best = max(places, key=lambda place: (len(place.cores), here in place.cpus, -min(place.cpus)))
    fast = _fast(root, best.cores)
    reason = f"{len(fast)} physical cores" if len(fast) > 1 else "1 physical core"
    if len(fast) < len(best.cores):
        reason = f"{len(fast)} fast ones of {len(best.cores)} physical cores"
    if len(places) > 1:
        reason += f" of one of {len(places)} sockets"
    count = len(fast)
    if (quota := _whole_quota(root)) is not None and quota <= count:
        count, reason = quota, f"{reason}, quota {quota}"
    cpus = frozenset().union(*fast)
    return Cores(count, None if cpus == allowed else cpus, reason)


def available_cores(root: Path = Path("/")) -> int:
    """Physical cores of all sockets, within the quota: what several processes that run models have together."""
    allowed = _allowed()
    count = len(_cores(root, allowed))
    return min(count, _whole_quota(root) or count)


@dataclass(frozen=True, slots=True)
class _Place:
    """A socket: the logical CPUs of it that the process may use, and by core."""

    cpus: frozenset[int]
    cores: list[frozenset[int]]


def _allowed() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _places(root: Path, allowed: frozenset[int]) -> list[frozenset[int]]:
    """Sockets. NUMA nodes of one processor are one place: their memory is near, and each has a part of the cores. A
    virtual machine may have a processor for each CPU, so that what shares a node is one place too."""
    nodes = [_cpu_list(path) & allowed for path in (root / "sys/devices/system/node").glob("node[0-9]*/cpulist")]
    if not nodes or frozenset().union(*nodes) != allowed:
        return [allowed]
    packages: dict[str, set[int]] = {}
    for cpu in allowed:
        packages.setdefault(_text(root / CPUS / f"cpu{cpu}/topology/physical_package_id"), set()).add(cpu)
    for unknown in ("", "-1"):  # the second on virtual machines of some kinds
        packages.pop(unknown, None)
    places: list[frozenset[int]] = []
    for cpus in (*nodes, *map(frozenset, packages.values())):
        touched = [place for place in places if place & cpus]
        places = [place for place in places if not place & cpus]
        if joined := cpus.union(*touched):
            places.append(joined)
    return places


def _cores(root: Path, cpus: Collection[int]) -> list[frozenset[int]]:
    """The logical CPUs of each physical core."""
    cores = set()
    for cpu in cpus:
        topology = root / CPUS / f"cpu{cpu}/topology"
        siblings = _cpu_list(topology / "core_cpus_list") or _cpu_list(topology / "thread_siblings_list")
        cores.add((siblings & frozenset(cpus)) | {cpu})
    return sorted(cores, key=min)


def _fast(root: Path, cores: list[frozenset[int]]) -> list[frozenset[int]]:
    """All, unless some are much slower and not the most by far."""
    if performance := _cpu_list(root / PERFORMANCE_CPUS):
        fast = [core for core in cores if core <= performance]
    else:
        found = {core: _text(root / CPUS / f"cpu{min(core)}/cpu_capacity") for core in cores}
        capacities = {core: int(text) if text.isdecimal() else 0 for core, text in found.items()}
        fast = [core for core in cores if capacities[core] >= FAST * max(capacities.values())]
    return fast if fast and len(cores) < (1 + FEW_FAST) * len(fast) else cores


def _current_cpu(root: Path) -> int:
    fields = _text(root / "proc/self/stat").rpartition(")")[2].split()
    return int(fields[LAST_CPU]) if len(fields) > LAST_CPU and fields[LAST_CPU].isdecimal() else -1


def _whole_quota(root: Path) -> int | None:
    quotas = [quota for group in _groups(root) if (quota := _quota(group)) is not None]
    return max(1, int(min(quotas))) if quotas else None


def _cpu_list(path: Path) -> frozenset[int]:
    """Of a list as cpuset(7) has it: 0-3,8."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", _text(path)):
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups for CPU time, of both versions, and of all groups around them."""
    paths = dict(_paths(_lines(root / "proc/self/cgroup")))
    for is_v2, mount_root, mount_point in _mounts(_lines(root / "proc/self/mountinfo")):
        if is_v2 not in paths:
            continue
        top = root / mount_point.lstrip("/")
        # A container may see its group under the name it has outside: the mount is then the group itself.
        path = PurePosixPath(paths[is_v2])
        group = top / path.relative_to(mount_root) if path.is_relative_to(mount_root) else top
        yield from (group, *(parent for parent in group.parents if parent.is_relative_to(top)))


def _paths(lines: list[str]) -> Iterator[tuple[bool, str]]:
    """By version, the process's group: lines are `0::/path`, and `4:cpu,cpuacct:/path` of version 1."""
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield True, path
        elif CONTROLLER in controllers.split(","):
            yield False, path


def _mounts(lines: list[str]) -> Iterator[tuple[bool, str, str]]:
    """Version, root in the file system, and mount point of what proc_pid_mountinfo(5) lists."""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), (after.split() + [""] * 3)[:3]
        if len(fields) >= 5 and (kind == "cgroup2" or (kind == "cgroup" and CONTROLLER in options.split(","))):
            yield kind == "cgroup2", _unescaped(fields[3]), _unescaped(fields[4])


def _quota(group: Path) -> float | None:
    """Cores that a group may keep busy; None where it sets no limit."""
    try:
        if (limit := group / "cpu.max").is_file():
            quota, period = limit.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # not there, not readable, or "max"
        return None


def _text(path: Path) -> str:
    return "\n".join(_lines(path)).strip()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
