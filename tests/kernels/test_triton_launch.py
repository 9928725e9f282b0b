"""Launching what Triton compiled without Triton's own search for it; needs neither it nor a GPU."""

import pytest

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
    monkeypatch.setattr(triton_device, "_takes_constants", lambda: True)
    compiled = Compiled()
    kernel = Kernel(compiled)
    again = triton_device.compile_and_launch(kernel, (3, 1, 1), ("a", 7), CONSTANTS)
    assert kernel.launches == [((3, 1, 1), ("a", 7), CONSTANTS)]
    again((5, 1, 1), ("b", 9))
    assert compiled.launches == [((5, 1, 1), ("b", 9, 64, True))]
    assert len(kernel.launches) == 1


@pytest.mark.parametrize(("takes", "compiled"), [(True, None), (False, Compiled())])
def test_the_interpreter_and_older_versions_launch_as_triton_does(monkeypatch, takes, compiled):
    monkeypatch.setattr(triton_device, "_takes_constants", lambda: takes)
    kernel = Kernel(compiled)
    again = triton_device.compile_and_launch(kernel, (3, 1, 1), ("a", 7), CONSTANTS)
    again((5, 1, 1), ("b", 9))
    assert kernel.launches[1] == ((5, 1, 1), ("b", 9), CONSTANTS)
