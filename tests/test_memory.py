"""Memory that was freed goes back to the system."""

import subprocess
import sys

import pytest

from hf_adaptive_sparse import memory

# Large pieces between smaller ones that stay, too many to lie in gaps that imports left; in a
# process of its own, whose heap nobody else uses.
PROGRAM = """
from pathlib import Path
from hf_adaptive_sparse.memory import release_freed

def held():
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in s)
    return int(line.split()[1]) * 1024

kept, large = [], []
for _ in range(1000):
    large.append(bytearray(b"x" * 100_000))
    kept.append(bytearray(b"x" * 20_000))
del large
before = held()
release_freed()
print(before - held())
"""


@pytest.mark.skipif(memory._trim() is None, reason="only glibc is known to keep freed memory")
def test_freed_memory_goes_back():
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, stdout=subprocess.PIPE, text=True
    )
    assert int(found.stdout) > 50_000_000


def test_a_library_without_it_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory._trim.__wrapped__() is None
