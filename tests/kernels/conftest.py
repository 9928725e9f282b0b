"""Triton's kernels for tests without a GPU: by its interpreter, apart from the process's own."""

import functools
import importlib
import sys

import pytest
import torch

from hf_adaptive_sparse.kernels import (
    triton_attention,
    triton_decoding,
    triton_encoding,
    triton_sparse,
)

KERNELS = "hf_adaptive_sparse.kernels.triton_"
USERS = {"kernels": triton_attention, "sparse_kernels": triton_sparse}
USERS |= {"encode_kernels": triton_encoding, "decode_kernels": triton_decoding}
HELPERS = ("words", "rows", "raw", "warp", "pairs", "warp_kernels")
HELPERS += ("sparse_rows", "sparse_numbers", "encode_rows")
OWN = [f"{KERNELS}{name}" for name in (*HELPERS, *USERS)]


def is_triton(name):
    return name == "triton" or name.startswith("triton.")


def call_functions_quickly(interpreter):
    """Let the kernels' own functions find the language as their kernel has it.

    The interpreter replaces all of it once more at every call, in a third of the time of a test.
    """
    function, original = interpreter.InterpretedFunction, interpreter.InterpretedFunction.__call__

    def call(self, *arguments, **options):
        if self.fn.__module__ in OWN:
            return self.rewrite()(*arguments, **options)
        return original(self, *arguments, **options)

    function.__call__ = call


@pytest.fixture(scope="session")
def interpreted():
    """The kernels and Triton, imported for the interpreter, apart from those of the process.

    Triton decides when functions are decorated, its own at its import, and other libraries import
    it early.
    """
    before = {
        name: module for name, module in sys.modules.items() if is_triton(name) or name in OWN
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in before:
            if not name.startswith("triton._C"):  # native code is loaded once
                patch.delitem(sys.modules, name)
        importlib.import_module("triton.language")
        imported = {name: importlib.import_module(name) for name in OWN}
        call_functions_quickly(importlib.import_module("triton.runtime.interpreter"))
        modules = {name: module for name, module in sys.modules.items() if is_triton(name)}
        # By hand, since the patch would put back what it takes out: a submodule of the
        # interpreter's Triton would then answer for the process's own.
        for name in {*OWN, *modules}:
            del sys.modules[name]
    sys.modules.update(before)
    return imported, modules


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    kernels, modules = request.getfixturevalue("interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, user in USERS.items():
        monkeypatch.setattr(user, "_kernels", functools.partial(kernels.get, KERNELS + name))
    warp = kernels[f"{KERNELS}warp_kernels"]
    monkeypatch.setattr(triton_attention, "_warp_kernels", lambda: warp)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    known = set(sys.modules)
    yield torch.device("cpu")
    for name in set(sys.modules) - known:
        if is_triton(name):  # imported on the way, as the interpreter's
            del sys.modules[name]
