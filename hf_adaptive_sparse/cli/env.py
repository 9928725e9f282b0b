"""The command ``env``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch

from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.options import add_command
from hf_adaptive_sparse.kernels import triton_device
from hf_adaptive_sparse.kernels.library import describe as describe_kernels
from hf_adaptive_sparse.version import library_versions

DEPENDENCIES = ("accelerate", "datasets", "huggingface_hub", "optimum-quanto", "optuna")


def add_env(commands: Any) -> None:
    """Add the command."""
    add_command(commands, "env", run_env, "Show what is installed and which kernels are in use")


def run_env(_options: argparse.Namespace) -> Answer:
    """List installed versions, devices and kernels."""
    versions = {**library_versions(), "python": platform.python_version()}
    for name in DEPENDENCIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    on_cpu = describe_kernels()
    kernels = {"KV cache, CPU": on_cpu, "sparse weights, CPU": on_cpu}
    if torch.cuda.is_available():
        on_gpu = "Triton" if triton_device.is_available() else "torch"
        kernels |= {"KV cache, GPU": on_gpu, "sparse weights, GPU": on_gpu}
    data = {
        "platform": platform.platform(),
        "versions": versions,
        "devices": devices,
        "kernels": kernels,
    }
    rows = [("platform", data["platform"]), *versions.items()]
    rows += [("device", device) for device in devices]
    rows += [(f"kernels: {part}", path) for part, path in kernels.items()]
    width = max(len(name) for name, _ in rows)
    return Answer("\n".join(f"{name:<{width}}  {value}" for name, value in rows), data)
