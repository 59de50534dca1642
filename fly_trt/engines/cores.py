"""How many CPU cores this process may use: those it is allowed to run on, and no more than its control groups grant.

Containers usually limit time, not cores: with a quota of one CPU on a machine of 64, 64 threads that wait for each
other are stopped most of the time. Other systems than Linux have no such limits here.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CONTROLLER = "cpu"


def available_cores(root: Path = Path("/")) -> int:
    """Whole cores, at least 1; a part of a core is left out, since a thread on it would hold up the others.

    root: where the system's files are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for group in _groups(root) if (quota := _quota(group)) is not None]
    return max(1, int(min([allowed, *quotas])))


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


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
