"""Launching what Triton compiled without Triton's own search for it; needs neither it nor a GPU."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from hf_adaptive_sparse.kernels import triton_device


class Kernel:
    """Takes launches like what ``triton.jit`` makes."""

    arg_names = ("x", "rows", "WIDTH", "HALF")

    def __init__(self, compiled):
        self.compiled, self.launches = compiled, []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.append((grid, arguments, constants))
            return self.compiled

        return launch


class Compiled:
    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


CONSTANTS = {"HALF": True, "num_warps": 4, "WIDTH": 64}


def test_what_was_compiled_is_called_with_constants_in_their_order(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    compiled = Compiled()
    kernel = Kernel(compiled)
    again = triton_device.compile_and_launch(kernel, (3, 1, 1), ("a", 7), CONSTANTS)
    assert kernel.launches == [((3, 1, 1), ("a", 7), CONSTANTS)]
    again((5, 1, 1), ("b", 9))
    assert compiled.launches == [((5, 1, 1), ("b", 9, 64, True))]
    assert len(kernel.launches) == 1


@pytest.mark.parametrize(("hip", "compiled"), [(None, None), ("6.4", Compiled())])
def test_the_interpreter_and_rocm_launch_as_triton_does(monkeypatch, hip, compiled):
    monkeypatch.setattr(torch.version, "hip", hip)
    kernel = Kernel(compiled)
    again = triton_device.compile_and_launch(kernel, (3, 1, 1), ("a", 7), CONSTANTS)
    again((5, 1, 1), ("b", 9))
    assert kernel.launches[1] == ((5, 1, 1), ("b", 9), CONSTANTS)


@pytest.mark.parametrize(
    ("version", "serves"),
    [
        ("3.3.1", False),
        ("3.4.0", True),
        ("3.10.1+rocm", True),
        ("4.0.0", True),
        ("damaged", False),
        (None, False),
    ],
)
def test_kernels_need_a_recent_triton_and_say_so_once(monkeypatch, caplog, version, serves):
    triton = None
    if version is not None:
        triton = ModuleType("triton")
        triton.__version__, triton.__spec__ = version, ModuleSpec("triton", None)
        monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(
        triton_device.importlib.util, "find_spec", lambda name: triton and triton.__spec__
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("HF_ADAPTIVE_SPARSE_KERNEL", raising=False)
    triton_device._has_recent_triton.cache_clear()
    try:
        for _ in range(2):
            assert triton_device.serves(torch.device("cpu")) == serves
    finally:
        triton_device._has_recent_triton.cache_clear()
    told = [record.message for record in caplog.records]
    warnings = {"3.3.1": "Triton 3.3 is too old", "damaged": "Triton cannot be imported"}
    assert len(told) == (version in warnings)
    assert all(warnings[version] in message for message in told)
