"""Wall-clock time and peak memory of a block of code."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class ResourceMeter:
    """Context manager that measures the block inside it.

    The peak of the process's resident memory is the kernel's own high-water mark, set back on
    entry, so nothing between two samples is missed and nothing is slowed down. Where it cannot be
    set back (other systems than Linux, some containers), the peak of the process's whole life is
    given, and ``peak_since_start`` says so. Meters of one process must not be nested: the
    inner one sets the mark back for both.

    Attributes:
        seconds: Wall-clock time. CUDA work launched inside the block is waited for.
        start_rss_bytes: Resident memory on entry; 0 where the system does not tell.
        peak_rss_bytes: Highest resident memory.
        peak_since_start: Whether ``peak_rss_bytes`` is the peak of the block alone.
        peak_cuda_bytes: Highest memory allocated by torch, summed over CUDA devices (each at its
            own peak); ``None`` if CUDA is not in use.

    Example:
        >>> with ResourceMeter() as measured:
        ...     total = sum(range(1000))
        >>> measured.seconds > 0 and measured.peak_rss_bytes > 0
        True
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.start_rss_bytes = 0
        self.peak_rss_bytes = 0
        self.peak_since_start = False
        self.peak_cuda_bytes: int | None = None
        self._started = 0.0

    def __enter__(self) -> ResourceMeter:
        for device in _cuda_devices():
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.peak_since_start = _reset_peak()
        self.start_rss_bytes = _status_bytes("VmRSS") or 0
        self._started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        devices = _cuda_devices()
        if kind is None:
            for device in devices:
                torch.cuda.synchronize(device)
        self.seconds = time.perf_counter() - self._started
        peak = _status_bytes("VmHWM") if self.peak_since_start else None
        peak = _lifetime_peak_bytes() if peak is None else peak
        # The kernel's counters are exact to a few pages only, so a peak may trail what is resident.
        self.peak_rss_bytes = max(peak, self.start_rss_bytes)
        if devices:
            self.peak_cuda_bytes = sum(torch.cuda.max_memory_allocated(d) for d in devices)


def _cuda_devices() -> range:
    """Return the CUDA devices, without initialising CUDA for a process that does not use it."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return _status_bytes("VmHWM") is not None


def _status_bytes(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024  # the kernel writes "kB" and means KiB
    return None


def _lifetime_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
