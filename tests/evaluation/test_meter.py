from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest
import torch

from hf_adaptive_sparse.evaluation import meter
from hf_adaptive_sparse.evaluation.meter import ResourceMeter

MEGABYTE = 1 << 20


def test_seconds() -> None:
    with ResourceMeter() as measured:
        time.sleep(0.02)
    assert 0.02 <= measured.seconds < 5


def test_peak_of_memory_that_is_freed_again() -> None:
    # Mapped, not allocated: malloc may keep freed memory resident.
    with ResourceMeter() as measured, mmap.mmap(-1, 64 * MEGABYTE) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert measured.peak_rss_bytes - measured.start_rss_bytes > 60 * MEGABYTE
    if measured.peak_since_start:
        with ResourceMeter() as after:
            pass
        # The earlier peak is not this block's.
        assert after.peak_rss_bytes < measured.peak_rss_bytes - 50 * MEGABYTE
    assert measured.peak_cuda_bytes is None or torch.cuda.is_available()


def test_where_the_mark_cannot_be_reset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meter, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    with ResourceMeter() as measured:
        pass
    assert not measured.peak_since_start
    assert measured.peak_rss_bytes >= measured.start_rss_bytes > 0


def test_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meter, "_STATUS", tmp_path / "missing")
    with ResourceMeter() as measured:
        pass
    assert measured.start_rss_bytes == 0
    assert measured.peak_rss_bytes > 0


def test_measured_after_an_error_too() -> None:
    measured = ResourceMeter()
    with pytest.raises(RuntimeError), measured:
        raise RuntimeError
    assert measured.seconds > 0
    assert measured.peak_rss_bytes > 0
