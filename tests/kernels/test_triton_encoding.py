"""The Triton kernels that encode against the codecs in torch: the same bits.

By Triton's interpreter, and on a machine with a CUDA device with ``-m gpu`` by the compiled
kernels, of more shapes. The reference is computed on the CPU, which has one set of roundings.
"""

import importlib.util
import itertools
import logging

import pytest
import torch

from hf_adaptive_sparse.kernels import encoding, triton_device, triton_encoding
from hf_adaptive_sparse.kvcache import buffer, coding
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.channel import ChannelCodec
from hf_adaptive_sparse.kvcache.fitting import scale_ends
from hf_adaptive_sparse.kvcache.grouped import GroupCodec
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.kvcache.transposed import TransposedCodec
from hf_adaptive_sparse.packing.bits import PACKED_BITS as BITS
from hf_adaptive_sparse.profiles import KVCacheConfig
from tests.conftest import llama_config
from tests.kernels.kv_blocks import (
    CODECS,
    DTYPES,
    FEW_SHAPES,
    SHAPES,
    assert_same_parts,
    make_blocks,
    on,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is optional and not installed here", allow_module_level=True)

# NumPy, which interprets, finds fault with what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CODECS)
def test_parts_are_those_of_torch(device, name, bits):
    fits = CODECS[name](bits, 64).kernel_format.fits
    # To interpret takes long, and to compile for a GPU: shapes and dtypes take turns.
    shapes, count = (SHAPES, 6) if device.type == "cuda" else (FEW_SHAPES, 1 if fits else 2)
    turns = zip(itertools.cycle(shapes), itertools.cycle(DTYPES * 3 + DTYPES[:2]))
    first = count * (BITS.index(bits) + len(BITS) * list(CODECS).index(name))
    cases = itertools.islice(turns, first, first + count)
    for (tokens, width, group), dtype in cases:
        codec = CODECS[name](bits, group)
        if name == "transposed" and bits == 2 and group == 256:
            continue  # values that are for torch
        blocks = make_blocks(tokens, width, dtype)
        assert triton_encoding.is_supported(on(device, blocks), codec.kernel_format)
        found = triton_encoding.encode(on(device, blocks), codec.kernel_format)
        assert found is not None, (tokens, width, group, dtype)
        assert_same_parts(found, codec.encode(blocks, "keys"))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("length", [5, 11, 128])
def test_sums_of_a_fit_have_the_order_of_torch(device, bits, length):
    """Near multiples of a step the fitted minimum is what rounding leaves of two large numbers."""
    generator = torch.Generator().manual_seed(length)
    shape = (1, 1, 1, length, 32)
    blocks = torch.randint(2**bits, shape, generator=generator) * 1000
    blocks = blocks + torch.randn(shape, generator=generator) / 10
    cases = [(ChannelCodec(bits), blocks)]
    if bits == 2:
        cases += [(TransposedCodec(2, length), blocks.transpose(3, 4).contiguous())]
    for codec, states in cases:
        found = triton_encoding.encode(on(device, states), codec.kernel_format)
        assert_same_parts(found, codec.encode(states, "keys"))


def test_torch_itself_encodes_alike_on_every_device(device):
    """What a kernel's failure falls back to; torch divides by numbers in another way on a GPU."""
    for (name, make), bits in itertools.product(CODECS.items(), BITS):
        blocks = make_blocks(32, 80, torch.float32)
        codec = make(bits, 64)
        assert_same_parts(codec.encode(on(device, blocks), name), codec.encode(blocks, name))
    elements = torch.randn(7, 5, 33)
    found, expected = scale_ends(elements.to(device), 3, 6), scale_ends(elements, 3, 6)
    assert_same_parts(found, expected)


@pytest.mark.parametrize("name", CODECS)
def test_what_cannot_be_stored_is_refused_in_torchs_words(device, name, monkeypatch):
    monkeypatch.setattr(encoding, "encode", lambda *arguments: None)
    codec = CODECS[name](4, 16)
    values = [("nan", DTYPES[0]), ("inf", DTYPES[1]), ("-inf", DTYPES[2])]
    for value, dtype in values:
        blocks = torch.randn(1, 2, 1, 16, 40).to(device, dtype)
        blocks[0, 1, 0, 15, 39] = float(value)
        assert triton_encoding.encode(blocks, codec.kernel_format) is None
        with pytest.raises(ValueError, match=r"keys of layer 3 must be finite"):
            coding.encode_blocks(codec, blocks, "keys of layer 3")
    blocks[0, 1, 0, 14:, 38:] = torch.tensor([[3e38, -3e38], [-3e38, 3e38]], device=device)
    assert triton_encoding.encode(blocks, codec.kernel_format) is None
    with pytest.raises(ValueError, match="elements of up to"):
        coding.encode_blocks(codec, blocks, "keys")


def test_blocks_are_read_where_they_lie(device):
    """Views at odd addresses and strides; those with channels apart are copied."""
    codec = ChannelCodec(6)
    memory = torch.randn(1, 64, 2, 51).bfloat16()
    whole = memory.transpose(1, 2).unflatten(2, (2, 32))
    for place in (slice(0, 48), slice(3, 51), slice(0, 51, 3)):
        on_it = memory.to(device).transpose(1, 2).unflatten(2, (2, 32))[..., place]
        found = triton_encoding.encode(on_it, codec.kernel_format)
        assert_same_parts(found, codec.encode(whole[..., place], "keys"))


@pytest.mark.parametrize("name", CODECS)
def test_parts_are_written_to_the_room_there_is(device, name):
    """Behind the rows of a buffer that has more; where heads lie otherwise, to new tensors."""
    codec = CODECS[name](6, 16)
    blocks = torch.randn(2, 3, 2, 16, 40).bfloat16()
    expected = codec.encode(blocks, "keys")
    for how in ("contiguous", "heads apart"):
        memory = [
            torch.full((2, 3, 7, *part.shape[3:]), 7.0).to(device, part.dtype) for part in expected
        ]
        if how == "heads apart":
            memory = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in memory]
        room = [part.narrow(2, 3, 2) for part in memory]
        found = triton_encoding.encode(on(device, blocks), codec.kernel_format, room)
        assert_same_parts(found, expected)
        is_there = how == "contiguous"
        assert all((f is part) == is_there for f, part in zip(found, room, strict=True))
        for part in memory:
            rows = part.float().cpu()
            assert (rows[:, :, :3] == 7).all()
            assert (rows[:, :, 5:] == 7).all()


def test_kernels_are_compiled_once_for_all_blocks(device, monkeypatch):
    """Of a prompt and of flushes behind it, wherever a layer's flags and its scales come to lie."""
    monkeypatch.setattr(encoding, "encode", lambda *arguments: None)
    monkeypatch.setattr(buffer, "LONG_ROW_BYTES", 1 << 20)  # heads lie as on a GPU
    monkeypatch.setattr(triton_encoding, "_compiled", compiled := {})
    config = llama_config(num_hidden_layers=3)
    cache = AdaptiveQuantizedCache(config, KVCacheConfig(bits=6, residual_length=16))
    for tokens in (80, 16, 48):
        for layer in range(3):
            states = torch.randn(1, 2, tokens, 16, device=device)
            cache.update(states, states, layer)
    assert sorted(key[0] for key in compiled) == ["channel", "transposed"]


def test_what_is_for_torch(device, monkeypatch):
    channel, group = ChannelCodec(8).kernel_format, GroupCodec(8, 1).kernel_format
    blocks = torch.randn(1, 1, 1, 16, 64, device=device)
    assert triton_encoding.is_supported(blocks, channel)
    assert not triton_encoding.is_supported(blocks, group)  # 64 groups
    assert not triton_encoding.is_supported(blocks.double(), channel)
    assert not triton_encoding.is_supported(blocks[:, :, :0], channel)
    assert not triton_encoding.is_supported(blocks.new_empty(1, 1, 1, 1025, 64), channel)
    large = TransposedCodec(8, 128).kernel_format
    assert not triton_encoding.is_supported(blocks.new_empty(1, 1, 1, 512, 128), large)
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_KERNEL", "none")
    assert not triton_encoding.is_supported(blocks, channel)


@pytest.mark.parametrize("key_mode", ["channel", "token"])
def test_a_layer_holds_the_same_with_and_without_kernels(device, key_mode, monkeypatch):
    """A prompt, tokens one by one through a flush, a crop into a block, and on."""
    monkeypatch.setattr(encoding, "encode", lambda *arguments: None)
    calls = []
    encode = triton_encoding.encode
    monkeypatch.setattr(
        triton_encoding, "encode", lambda *arguments: calls.append(1) or encode(*arguments)
    )
    held = []
    for chosen in ("auto", "none"):
        monkeypatch.setenv("HF_ADAPTIVE_SPARSE_KERNEL", chosen)
        layer = AdaptiveQuantizedLayer(6, 4, 32, 16, key_mode=key_mode, sink_length=3)
        generator = torch.Generator().manual_seed(0)
        for tokens, removed in ((70, 0), *((1, 0),) * 3, (30, -20), (40, 0)):
            states = torch.randn(2, 1, tokens, 2, 48, generator=generator).bfloat16()
            layer.update(*states.to(device).transpose(2, 3))
            layer.crop(removed)
        held.append([part for store in layer.stores() for part in (*store.parts, store.raw)])
    assert calls
    assert_same_parts(*held)


def test_a_kernel_that_fails_is_said_once_and_torch_encodes(device, monkeypatch, caplog):
    tries = []

    class Kernel:
        arg_names = ()

        def __getitem__(self, grid):
            return self

        def __call__(self, *arguments, **constants):
            tries.append(constants)
            raise RuntimeError("out of resource: shared memory")

    class Broken:
        channel_kernel = Kernel()

    monkeypatch.setattr(encoding, "encode", lambda *arguments: None)
    monkeypatch.setattr(triton_encoding, "_failures", {})
    monkeypatch.setattr(triton_encoding, "_compiled", {})
    monkeypatch.setattr(triton_encoding, "_kernels", lambda: Broken)
    triton_device.say_what_failed.cache_clear()
    codec = ChannelCodec(6)
    blocks = torch.randn(1, 2, 2, 16, 24)
    with caplog.at_level(logging.WARNING, logger=coding.__name__):
        for _ in range(2):
            found = coding.encode_blocks(codec, on(device, blocks), "keys")
            assert_same_parts(found, codec.encode(blocks, "keys"))
    assert len(tries) == 1
    (message,) = [r.getMessage() for r in caplog.records if r.name == coding.__name__]
    assert "RuntimeError: out of resource: shared memory" in message
