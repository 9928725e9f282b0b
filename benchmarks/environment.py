"""What every benchmark records beside its figures, and how results are stored."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_adaptive_sparse.files import replacing

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Evaluation data and model; they lie beside the project and are not part of it."""

PACKAGES = ("torch", "transformers", "optuna", "numpy")


def processor_name() -> str:
    """Return the processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed_version(name: str) -> str | None:
    """Return a package's version, None where it is not installed: not all benchmarks need all."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Return machine, threads and versions, for a result's JSON."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": devices,
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in PACKAGES},
    }


def write_result(name: str, result: Mapping[str, Any], table: str | None = None) -> Path:
    """Write ``results/<name>.json``, and ``results/<name>.md`` where there is a table.

    Args:
        name: Name of the benchmark.
        result: Its figures, plain JSON types; the environment is added.
        table: Markdown for people, made from ``result``.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"environment": describe(), **result}
    with replacing(path) as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if table is not None:
        path.with_suffix(".md").write_text(table.rstrip() + "\n", encoding="utf-8")
    return path


def shared(path: str) -> Path:
    """Return a file or folder of the evaluation data.

    Raises:
        SystemExit: If it is not there, saying what is needed.
    """
    found = SHARED / path
    if not found.exists():
        raise SystemExit(
            f"This benchmark needs {path} in a folder `shared` beside the project (see "
            "benchmarks/README.md), or other data through its options."
        )
    return found
