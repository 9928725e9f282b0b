from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_adaptive_sparse.runtime import free_memory
from hf_adaptive_sparse.runtime.free_memory import available_bytes

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 900 MiB free, whose process is in no control group yet."""
    monkeypatch.setattr(free_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(free_memory, "CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc/meminfo", f"MemTotal: 1024000 kB\nMemAvailable: {900 * 1024} kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limit(folder: Path, most: int | str, used: int, reclaimable: int = 0) -> None:
    """Limit a group of version 2, figures in MiB."""
    write(folder / "memory.max", f"{most * MIB if isinstance(most, int) else most}\n")
    write(folder / "memory.current", f"{used * MIB}\n")
    write(folder / "memory.stat", f"anon 7\ninactive_file {reclaimable * MIB}\nactive_file 9\n")


def test_this_machine_tells() -> None:
    assert (available_bytes(CPU) or 1) > 0
    assert available_bytes(torch.device("meta")) is None


def test_without_groups_it_is_what_the_machine_has(machine: Path) -> None:
    assert available_bytes(CPU) == 900 * MIB


def test_a_container_sees_its_own_limit_at_the_root(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/\n")
    limit(machine / "cgroup", 512, used=200, reclaimable=50)
    assert available_bytes(CPU) == 362 * MIB


def test_the_narrowest_group_around_the_process_counts(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/jobs/one/step\n")
    limit(machine / "cgroup/jobs/one/step", "max", used=100)
    limit(machine / "cgroup/jobs/one", 400, used=150)
    limit(machine / "cgroup/jobs", 800, used=300)
    limit(machine / "cgroup/other", 1, used=1)
    assert available_bytes(CPU) == 250 * MIB


def test_groups_of_the_first_version(machine: Path) -> None:
    lines = "5:memory:/docker/a1\n4:cpu,cpuacct:/docker/a1\n0::/\n"
    write(machine / "proc/self/cgroup", lines)
    folder = machine / "cgroup/memory"  # of the container, whatever it is called outside
    write(folder / "memory.limit_in_bytes", str(300 * MIB))
    write(folder / "memory.usage_in_bytes", str(100 * MIB))
    write(folder / "memory.stat", f"inactive_file 1\ntotal_inactive_file {20 * MIB}\n")
    assert available_bytes(CPU) == 220 * MIB


def test_an_unlimited_group_and_more_used_than_allowed(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/../a\n")
    limit(machine / "cgroup", "max", used=100)
    assert available_bytes(CPU) == 900 * MIB
    limit(machine / "cgroup", 50, used=100)
    assert available_bytes(CPU) == 0


def test_a_system_that_tells_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "proc/meminfo").unlink()
    monkeypatch.delattr(free_memory.os, "sysconf")
    assert available_bytes(CPU) is None
