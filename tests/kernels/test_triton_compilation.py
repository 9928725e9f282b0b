"""The Triton kernels compile for NVIDIA's GPUs; that needs none.

Triton's interpreter, which the contract test uses, accepts what the compiler refuses, and does not
know of registers and shared memory.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

# In a process of its own: that of the tests may hold kernels made for the interpreter.
PROGRAM = """
import json
import re
import sys
import traceback
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from hf_adaptive_sparse.kernels import (
    triton_decode_kernels, triton_decode_plan, triton_encode_kernels, triton_encode_plan,
    triton_kernels, triton_plan, triton_sparse, triton_sparse_kernels, triton_warp_kernels,
)
from hf_adaptive_sparse.kernels.encoding import empty_parts
from hf_adaptive_sparse.kernels.packed import PackedBlocks, PackedCache, PackedKeys, PackedValues
from hf_adaptive_sparse.kvcache.selection import key_codec, value_codec
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight

NAMES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32",
}

def compile_for(capability, function, arguments, constants, options):
    signature, fixed, attributes = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            fixed[(place,)] = constants[name]
        elif isinstance(arguments[place], torch.Tensor):
            signature[name] = NAMES[arguments[place].dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(arguments[place], float) else "i32"
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=attributes)
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert kernel.asm["cubin"]
    if not options.get("enable_fp_fusion", True):  # what is to be exact to the last bit
        inexact = ("fma.", ".ftz", "div.full", ".approx")
        found = [w for w in inexact if w in kernel.asm["ptx"]]
        assert not found, found
    if constants.get("NATIVE") and "KEY_UNIT" in constants:
        check_threads(kernel.asm["ttgir"])
    return kernel.metadata.shared

def check_threads(ttgir):
    # What threads do together is right only where each has its own column of the tensors.
    layouts = dict(re.findall(r"^(#\\w+) = #ttg.blocked<(.*)>$", ttgir, re.MULTILINE))
    together = [line for line in ttgir.splitlines() if "sync." in line and "inline_asm" in line]
    assert len(together) > 20
    for line in together:
        (layout,) = set(re.findall(r", (#\\w+)>", line))
        assert "threadsPerWarp = [1, 32], warpsPerCTA = [1, 1]" in layouts[layout], line

def shared_bytes(case):
    dtype, width = getattr(torch, case["dtype"]), case["head_dim"]
    states = torch.randn(1, 1, 2, 128, width).to(dtype)
    mode, group, bits = case.get("key_mode", "channel"), case.get("group", 64), case["bits"]
    keys = PackedKeys(
        bits, *key_codec(bits, mode, group).encode(states, "keys"),
        group=None if mode == "channel" else group,
    )
    values = PackedValues(bits, *value_codec(bits, group).encode(states, "values"), group=group)
    raw = torch.randn(1, 1, 3, width).to(dtype)
    blocks = PackedBlocks(keys, values, 128, lengths=case.get("lengths"))
    cache = PackedCache(blocks, raw, raw)
    query = torch.randn(1, case.get("heads", 4), case.get("queries", 1), width).to(dtype)
    mask = None
    if "mask" in case:
        mask = torch.ones(1, 1, query.shape[2], cache.length).to(getattr(torch, case["mask"]))
    call, partial = triton_plan.prepare(query, cache, mask, case.get("is_causal", False), 0.125)
    capability = case["capability"]
    constants = {"VALUE_DIM": width, "VALUE_PAD": call.variant.constants["VALUE_PAD"], "CHUNK": 16}
    compile_for(
        capability, triton_kernels.combine_kernel, (partial, query, 3, 4), constants,
        {"num_warps": 4},
    )
    variant = call.variant
    assert variant.name == case.get("kernel", "split")
    kernel = triton_kernels.split_kernel
    if variant.name == "warp":
        kernel = triton_warp_kernels.warp_kernel
    return compile_for(capability, kernel, call.arguments, variant.constants, variant.options)

class Recorder:  # takes launches as the kernels would
    def __init__(self):
        self.launches = []

    def __getattr__(self, name):
        self.name = name
        return self

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, num_warps, **constants):
        self.arg_names = [str(i) for i in range(len(arguments))]
        self.launches.append((self.name, arguments, constants, {"num_warps": num_warps}))

def shared_bytes_of_sparse(case):
    dense = torch.randn(64, case["columns"]).relu().to(getattr(torch, case["dtype"]))
    weight = SparseWeight.from_dense(dense, case.get("bits", 16), case.get("group"))
    recorder = Recorder()
    triton_sparse._kernels = lambda: recorder
    if case["tokens"]:
        triton_sparse.linear(dense[:case["tokens"]], weight, dense[0, :64])
    else:
        triton_sparse.decompress(weight, 0, 64, dense)
    return max(
        compile_for(case["capability"], getattr(triton_sparse_kernels, name), *launch)
        for name, *launch in recorder.launches
    )

def shared_bytes_of_coding(case, mode):
    bits, group, tokens = case["bits"], case.get("group", 64), case.get("block", 128)
    codec = value_codec(bits, group) if mode == "value" else key_codec(bits, mode, group)
    states = torch.zeros(1, 2 * tokens, 2, case["head_dim"], dtype=getattr(torch, case["dtype"]))
    blocks = states.transpose(1, 2).unflatten(2, (2, tokens))
    parts = empty_parts(blocks, codec.kernel_format)
    if "encode" in case:
        refused = torch.zeros(1, dtype=torch.int32)
        call = triton_encode_plan.prepare(blocks, codec.kernel_format, parts, refused, 2)
        kernels = triton_encode_kernels
    else:
        output, lengths = states.transpose(1, 2), case.get("lengths")
        call = triton_decode_plan.prepare(parts, codec.kernel_format, tokens, output, lengths)
        kernels = triton_decode_kernels
    constants = dict(call.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    function = getattr(kernels, call.kernel + "_kernel")
    return compile_for(case["capability"], function, call.arguments, constants, options)

def shared_bytes_of_any(case):
    mode = case.get("encode") or case.get("decode")
    if mode:
        return shared_bytes_of_coding(case, mode)
    return shared_bytes_of_sparse(case) if "tokens" in case else shared_bytes(case)

for line in sys.stdin:
    case = json.loads(line)
    if "lengths" in case:
        case["lengths"] = tuple(case["lengths"])
    try:
        print(json.dumps(shared_bytes_of_any(case)), flush=True)
    except Exception:
        print(json.dumps(traceback.format_exc()[-3000:]), flush=True)
"""

SHARED_BYTES = 99 * 1024
"""Shared memory of a program on the smallest supported GPUs, of compute capability 8.6 and 8.9."""

CASES = [
    {"capability": 80, "dtype": "bfloat16", "head_dim": 72, "bits": 6, "mask": "bool"},
    {"capability": 90, "dtype": "bfloat16", "head_dim": 128, "bits": 6, "heads": 9},
    {"capability": 90, "dtype": "bfloat16", "head_dim": 128, "bits": 6, "kernel": "warp"},
    {
        "capability": 80,
        "dtype": "float16",
        "head_dim": 64,
        "bits": 4,
        "mask": "bool",
        "kernel": "warp",
    },
    {
        "capability": 80,
        "dtype": "float16",
        "head_dim": 72,
        "bits": 3,
        "heads": 20,
        "mask": "float16",
        "queries": 2,
    },
    {
        "capability": 90,
        "dtype": "bfloat16",
        "head_dim": 128,
        "bits": 4,
        "key_mode": "token",
        "group": 32,
        "is_causal": True,
    },
    {"capability": 90, "dtype": "bfloat16", "head_dim": 128, "bits": 2, "heads": 40},
    {"capability": 80, "dtype": "bfloat16", "head_dim": 200, "bits": 8, "lengths": [128, 7]},
    {
        "capability": 80,
        "dtype": "bfloat16",
        "head_dim": 256,
        "bits": 8,
        "lengths": [128, 7],
        "kernel": "warp",
    },
    {"capability": 90, "dtype": "float32", "head_dim": 64, "bits": 6},
    {"capability": 80, "dtype": "float32", "head_dim": 256, "bits": 3, "key_mode": "token"},
    {"capability": 90, "dtype": "bfloat16", "columns": 4096, "tokens": 1},
    {"capability": 80, "dtype": "float16", "columns": 1032, "tokens": 1, "bits": 4, "group": 96},
    {"capability": 80, "dtype": "bfloat16", "columns": 1024, "tokens": 4, "bits": 8, "group": 64},
    {"capability": 90, "dtype": "float32", "columns": 1024, "tokens": 3},
    {"capability": 90, "dtype": "float16", "columns": 4096, "tokens": 8, "bits": 8},
    {"capability": 90, "dtype": "bfloat16", "columns": 4096, "tokens": 0, "bits": 4},
    {"capability": 80, "dtype": "float32", "columns": 4096, "tokens": 0, "bits": 8},
    {"capability": 90, "dtype": "bfloat16", "head_dim": 128, "bits": 6, "encode": "channel"},
    {"capability": 80, "dtype": "float16", "head_dim": 80, "bits": 3, "encode": "channel"},
    {"capability": 90, "dtype": "bfloat16", "head_dim": 128, "bits": 6, "encode": "value"},
    {
        "capability": 80,
        "dtype": "float32",
        "head_dim": 256,
        "bits": 2,
        "encode": "value",
        "group": 128,
    },
    {
        "capability": 80,
        "dtype": "float16",
        "head_dim": 256,
        "bits": 6,
        "encode": "value",
        "group": 256,
    },
    {"capability": 90, "dtype": "float16", "head_dim": 72, "bits": 4, "encode": "token"},
    {"capability": 90, "dtype": "bfloat16", "head_dim": 128, "bits": 8, "decode": "channel"},
    {"capability": 80, "dtype": "float16", "head_dim": 72, "bits": 3, "decode": "channel"},
    {"capability": 90, "dtype": "bfloat16", "head_dim": 128, "bits": 6, "decode": "token"},
    {
        "capability": 80,
        "dtype": "float32",
        "head_dim": 50,
        "bits": 2,
        "decode": "token",
        "group": 6,
    },
    {
        "capability": 90,
        "dtype": "bfloat16",
        "head_dim": 128,
        "bits": 6,
        "decode": "value",
        "lengths": [128, 7],
    },
    {"capability": 80, "dtype": "float32", "head_dim": 256, "bits": 4, "decode": "value"},
    {
        "capability": 80,
        "dtype": "float16",
        "head_dim": 80,
        "bits": 3,
        "decode": "value",
        "block": 1000,
    },
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.strip()],
        input="\n".join(map(json.dumps, CASES)),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is optional")
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: CASES[index]["dtype"])
def test_kernels_compile_and_fit(outcomes, index):
    outcome = outcomes[index]
    if isinstance(outcome, str) and "ptxas" in outcome and "No such file" in outcome:
        pytest.skip("this Triton has no assembler for NVIDIA's GPUs")
    assert isinstance(outcome, int), outcome
    assert outcome <= SHARED_BYTES, CASES[index]
