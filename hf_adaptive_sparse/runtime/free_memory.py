"""How much memory is free: of a GPU, or of this process on the CPU.

A container sees the memory of the whole machine in ``/proc/meminfo``. What its process may take is
what its control group is limited to, and each of those around that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

_VERSIONS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files with a group's limit and with what it uses, and the part of that which is given back."""


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device; ``None`` where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = [*_of_groups(), *_of_machine()]
    return min(found) if found else None


def _of_machine() -> Iterator[int]:
    try:
        lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        yield int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        try:
            yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return


def _of_groups() -> Iterator[int]:
    """Yield what each control group that this process is in leaves to it, if that is limited."""
    for folder in _group_folders():
        for limit, usage, given_back in _VERSIONS:
            try:
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                lines = (folder / "memory.stat").read_text().splitlines()
                pages = dict(line.split(maxsplit=1) for line in lines)
                yield max(0, most - used + int(pages.get(given_back, 0)))
            except (OSError, ValueError):  # of the other version, or without a limit ("max")
                continue


def _group_folders() -> Iterator[Path]:
    """Yield the folder of every group that may limit memory: this process's, and those around it.

    In a container, its own group is often what is mounted, whatever name it has outside.
    """
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        group = PurePosixPath(path.lstrip("/"))
        yield from (root / parent for parent in (group, *group.parents) if ".." not in parent.parts)
