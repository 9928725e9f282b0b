"""The Triton kernels that decode against the codecs in torch: the same bits.

By Triton's interpreter, and on a machine with a CUDA device with ``-m gpu`` by the compiled
kernels, of more shapes. The reference is computed on the CPU, which has one set of roundings.
"""

import importlib.util
import itertools
import logging

import pytest
import torch

from hf_adaptive_sparse.kernels import encoding, triton_decoding, triton_device
from hf_adaptive_sparse.kvcache import coding
from hf_adaptive_sparse.kvcache.channel import ChannelCodec
from hf_adaptive_sparse.kvcache.grouped import GroupCodec
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.kvcache.transposed import TransposedCodec
from hf_adaptive_sparse.packing.bits import PACKED_BITS as BITS
from tests.kernels.kv_blocks import (
    CODECS,
    DTYPES,
    FEW_SHAPES,
    SHAPES,
    assert_same_bits,
    assert_same_parts,
    make_blocks,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is optional and not installed here", allow_module_level=True)

# NumPy, which interprets, finds fault with what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Blocks whose rows are a few units, or less than one, and the cache's shortest.
SMALL_SHAPES = [(16, 16, 64), (8, 8, 8), (16, 128, 64), (4, 32, 64), (3, 5, 2), (128, 1, 1)]


@pytest.fixture
def without_native_kernels(monkeypatch):
    monkeypatch.setattr(encoding, "decode", lambda *arguments: False)


def encode(codec, blocks, device):
    return tuple(part.contiguous().to(device) for part in codec.encode(blocks, "keys"))


def decoded(codec, parts, shape, dtype):
    """What torch makes of parts, on the CPU, blocks one behind the other."""
    return codec.decode(tuple(part.cpu() for part in parts), shape, dtype).flatten(2, 3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CODECS)
def test_states_are_those_of_torch(device, name, bits):
    # To interpret takes long, and to compile for a GPU: dtypes take turns, and there shapes, too.
    first = BITS.index(bits) + len(BITS) * list(CODECS).index(name)
    shapes = [*FEW_SHAPES, *SMALL_SHAPES]
    if device.type == "cuda":
        shapes = [*SHAPES, *SMALL_SHAPES][first % 2 :: 2]
    dtypes = itertools.islice(itertools.cycle(DTYPES), first, first + len(shapes))
    for (tokens, width, group), dtype in zip(shapes, dtypes, strict=True):
        codec = CODECS[name](bits, group)
        parts = encode(codec, make_blocks(tokens, width, dtype), device)
        expected = decoded(codec, parts, (tokens, width), dtype)
        output = torch.full(expected.shape, 77, dtype=dtype, device=device)
        assert triton_decoding.is_supported(parts, codec.kernel_format, tokens, output)
        triton_decoding.decode(parts, codec.kernel_format, tokens, output)
        assert_same_bits(output, expected)


@pytest.mark.usefixtures("without_native_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_what_lies_beside_is_left_alone(device, name, dtype):
    """Short blocks side by side, in a view at an odd address; parts are views, too."""
    codec, lengths = CODECS[name](6, 64), (32, 1, 19)
    parts = encode(codec, make_blocks(32, 40, dtype), device)
    expected = codec.decode(tuple(part.cpu() for part in parts), (32, 40), dtype)
    expected = torch.cat([expected[:, :, i, :n] for i, n in enumerate(lengths)], dim=2)
    padded = [torch.cat([part[:, :, :1], part, part[:, :, :2]], dim=2) for part in parts]
    views = tuple(part[:, :, 1:-2] for part in padded)
    memory = torch.full((1, 60, 2, 51), 77, dtype=dtype, device=device)
    output = memory.transpose(1, 2)[:, :, 4:56, 3:43]
    coding.decode_blocks(codec, views, 32, output, lengths)
    assert_same_bits(output.contiguous(), expected)
    output.fill_(77)
    assert bool((memory == 77).all())


@pytest.mark.parametrize("name", CODECS)
def test_each_of_many_heads_and_sequences_is_its_own(device, name):
    codec = CODECS[name](4, 16)
    blocks = torch.randn(3, 5, 4, 16, 24).half()
    parts = encode(codec, blocks, device)
    output = torch.empty(5, 3, 64, 24, dtype=torch.half, device=device).transpose(0, 1)
    triton_decoding.decode(parts, codec.kernel_format, 16, output)
    assert_same_bits(output.contiguous(), decoded(codec, parts, (16, 24), torch.half))
    # Steps and minima that do not lie alike.
    apart = (parts[0], parts[1], parts[2].transpose(0, 1).contiguous().transpose(0, 1), *parts[3:])
    triton_decoding.decode(apart, codec.kernel_format, 16, output.fill_(77))
    assert_same_bits(output.contiguous(), decoded(codec, parts, (16, 24), torch.half))


def test_what_is_for_torch(device, monkeypatch):
    codec = ChannelCodec(8)
    how = codec.kernel_format
    parts = encode(codec, torch.randn(1, 1, 2, 16, 64), device)
    output = torch.empty(1, 1, 32, 64, device=device)
    assert triton_decoding.is_supported(parts, how, 16, output)
    assert not triton_decoding.is_supported(parts, how, 16, output.double())
    assert not triton_decoding.is_supported(parts, how, 16, output.bfloat16())  # of other states
    assert not triton_decoding.is_supported(parts, how, 16, output[:, :, :0])
    assert not triton_decoding.is_supported(parts, how, 8, output)
    turned = output.transpose(2, 3).contiguous().transpose(2, 3)
    assert not triton_decoding.is_supported(parts, how, 16, turned)
    apart = (parts[0].transpose(3, 4).contiguous().transpose(3, 4), *parts[1:])
    assert not triton_decoding.is_supported(apart, how, 16, output)
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_KERNEL", "none")
    assert not triton_decoding.is_supported(parts, how, 16, output)


@pytest.mark.usefixtures("without_native_kernels")
@pytest.mark.parametrize("key_mode", ["channel", "token"])
def test_a_layer_gives_the_same_with_and_without_kernels(device, key_mode, monkeypatch):
    """A prompt, tokens one by one through a flush, a crop into a block, and on."""
    calls = []
    decode = triton_decoding.decode
    monkeypatch.setattr(
        triton_decoding, "decode", lambda *arguments: calls.append(1) or decode(*arguments)
    )
    given = []
    for chosen in ("auto", "none"):
        monkeypatch.setenv("HF_ADAPTIVE_SPARSE_KERNEL", chosen)
        layer = AdaptiveQuantizedLayer(6, 4, 32, 16, key_mode=key_mode, sink_length=3)
        generator = torch.Generator().manual_seed(0)
        given.append([])
        for tokens, removed in ((70, 0), *((1, 0),) * 3, (30, -20), (40, 0)):
            states = torch.randn(2, 1, tokens, 2, 48, generator=generator).bfloat16()
            layer.update(*states.to(device).transpose(2, 3))
            layer.crop(removed)
            given[-1] += layer.decode()
    assert calls
    assert_same_parts(*given)


@pytest.mark.usefixtures("without_native_kernels")
def test_a_kernel_that_fails_is_said_once_and_torch_decodes(device, monkeypatch, caplog):
    tries = []

    class Kernel:
        arg_names = ()

        def __getitem__(self, grid):
            return self

        def __call__(self, *arguments, **constants):
            tries.append(constants)
            raise RuntimeError("out of resource: shared memory")

    class Broken:
        transposed_kernel = Kernel()

    monkeypatch.setattr(triton_decoding, "_failures", {})
    monkeypatch.setattr(triton_decoding, "_compiled", {})
    monkeypatch.setattr(triton_decoding, "_kernels", lambda: Broken)
    triton_device.say_what_failed.cache_clear()
    codec = TransposedCodec(6, 8)
    parts = encode(codec, torch.randn(1, 2, 2, 16, 24), device)
    expected = decoded(codec, parts, (16, 24), torch.float32)
    with caplog.at_level(logging.WARNING, logger=coding.__name__):
        for _ in range(2):
            output = torch.empty_like(expected, device=device)
            coding.decode_blocks(codec, parts, 16, output)
            assert_same_bits(output, expected)
    assert len(tries) == 1
    (message,) = [r.getMessage() for r in caplog.records if r.name == coding.__name__]
    assert "RuntimeError: out of resource: shared memory" in message


def test_any_group_is_served(device):
    """Encoding holds all groups of a token at once; decoding does not."""
    codec = GroupCodec(8, 1)
    parts = encode(codec, torch.randn(1, 1, 1, 16, 64), device)
    output = torch.empty(1, 1, 16, 64, device=device)
    assert triton_decoding.is_supported(parts, codec.kernel_format, 16, output)
    triton_decoding.decode(parts, codec.kernel_format, 16, output)
    assert_same_bits(output, decoded(codec, parts, (16, 64), torch.float32))
