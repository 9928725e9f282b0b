"""The native encoding and decoding against the codecs in torch: the same bits, on every path."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from hf_adaptive_sparse.kernels import encoding, library
from hf_adaptive_sparse.kvcache.channel import ChannelCodec
from hf_adaptive_sparse.kvcache.coding import (
    decode_blocks,
    empty_parts,
    encode_blocks,
    encode_into,
)
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from tests.kernels.kv_blocks import CODECS, DTYPES, assert_same_bits

PATHS = library.available_paths()
BITS = (2, 3, 4, 6, 8)
# (tokens of a block, channels of a head, group): usual ones, and odd ones of each.
SHAPES = [(128, 64, 64), (64, 128, 32), (128, 80, 64), (7, 72, 1000), (33, 20, 6), (1, 1, 1)]

pytestmark = pytest.mark.skipif(not PATHS, reason="the native kernels are not built here")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, request.param)
    return request.param


def make_blocks(tokens, width, dtype, seed=0):
    """Two sequences, three heads and blocks, tokens outermost as models have them.

    Plain ones; ones with large offsets and outliers; one of zeros of both signs, one of the
    smallest numbers there are, and one from end to end of what a step can span.
    """
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 3 * tokens, 3, width, generator=generator).transpose(1, 2)
    blocks = states.unflatten(2, (3, tokens))
    blocks[:, 1] = blocks[:, 1] * torch.rand(width, generator=generator).mul(9).exp() - 400
    blocks[0, 2, 0] = torch.where(blocks[0, 2, 0] < 0, -0.0, 0.0)
    blocks[0, 2, 1] *= torch.finfo(dtype).tiny
    blocks[0, 2, 2] = blocks[0, 2, 2].sign() * (3e4 if dtype != torch.bfloat16 else 1e35)
    return blocks.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_parts_and_states_are_those_of_torch(path, name, dtype):
    for bits, (tokens, width, group) in itertools.product(BITS, SHAPES):
        codec = CODECS[name](bits, group)
        blocks = make_blocks(tokens, width, dtype)
        expected = codec.encode(blocks, "keys")
        found = encoding.encode(blocks, codec.kernel_format)
        for part, theirs in zip(found, expected, strict=True):
            assert_same_bits(part, theirs)
        states = codec.decode(expected, (tokens, width), dtype).flatten(2, 3)
        output = torch.full_like(states, 77)
        assert encoding.decode(found, codec.kernel_format, tokens, output)
        assert_same_bits(output, states)


class NewCodec(ChannelCodec):
    """A codec that no kernel knows."""

    kernel_format = None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("codec_type", [*CODECS.values(), lambda bits, group: NewCodec(bits)])
def test_parts_are_written_between_others(path, codec_type, dtype):
    codec, blocks = codec_type(6, 64), torch.randn(2, 3, 3, 32, 40).to(dtype)
    expected = codec.encode(blocks, "keys")
    empty = empty_parts(codec, blocks)
    assert type(empty) is type(expected)
    # Five rows, the heads of a row side by side; blocks go to rows 1 to 3.
    rows = [part.new_full((5, 2, 3, *part.shape[3:]), 77).movedim(0, 2) for part in empty]
    encode_into(codec, blocks, [part[:, :, 1:4] for part in rows], "keys")
    for part, theirs in zip(rows, expected, strict=True):
        assert_same_bits(part[:, :, 1:4].contiguous(), theirs)
        assert (part[:, :, ::4] == 77).all()
    if codec.kernel_format and dtype == torch.bfloat16:
        with pytest.raises(ValueError, match=r"are encoded to contiguous torch.uint8 \(2, 3, 3"):
            encode_into(codec, blocks, [part[:, :, :2] for part in rows], "keys")
    blocks[0, 1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="keys of layer 3 must be finite"):
        encode_into(codec, blocks, [part[:, :, 1:4] for part in rows], "keys of layer 3")


@pytest.mark.parametrize("name", CODECS)
def test_short_blocks_are_written_side_by_side(path, name):
    codec = CODECS[name](6, 64)
    blocks = make_blocks(32, 40, torch.bfloat16)
    lengths = (32, 1, 19)
    parts = encode_blocks(codec, blocks, "keys")
    expected = [
        codec.decode(parts, (32, 40), blocks.dtype)[:, :, i, :n] for i, n in enumerate(lengths)
    ]
    output = blocks.new_zeros(2, 60, 3, 40).transpose(1, 2)  # room behind, tokens outermost
    decode_blocks(codec, parts, 32, output[:, :, 4:56], lengths)
    assert_same_bits(output[:, :, 4:56].contiguous(), torch.cat(expected, dim=2))
    assert not output[:, :, :4].any()
    assert not output[:, :, 56:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_what_cannot_be_stored_is_refused_in_torchs_words(path, name, dtype):
    for bits, value in itertools.product((2, 4, 8), (float("nan"), float("inf"), -float("inf"))):
        codec = CODECS[name](bits, 16)
        blocks = torch.randn(1, 2, 2, 16, 40).to(dtype)
        blocks[0, 1, 1, 15, 39] = value
        assert encoding.encode(blocks, codec.kernel_format) is None
        with pytest.raises(ValueError, match=r"keys of layer 3 must be finite"):
            encode_blocks(codec, blocks, "keys of layer 3")
    if dtype != torch.float16:
        blocks[0, 1, 1, 14:, 38:] = torch.finfo(dtype).max * torch.tensor([[1, -1], [-1, 1]])
        assert encoding.encode(blocks, codec.kernel_format) is None
        with pytest.raises(ValueError, match="elements of up to"):
            encode_blocks(codec, blocks, "keys")


def test_other_dtypes_and_sizes_are_for_torch(path):
    codec = ChannelCodec(8)
    for blocks in (torch.randn(1, 1, 1, 4, 8).double(), torch.randn(1, 1, 1, 1025, 2)):
        assert encoding.encode(blocks, codec.kernel_format) is None
        parts = encode_blocks(codec, blocks, "keys")
        tokens, width = blocks.shape[3:]
        output = torch.empty_like(blocks[:, :, 0])
        decode_blocks(codec, parts, tokens, output)
        assert torch.equal(output, codec.decode(parts, (tokens, width), blocks.dtype)[:, :, 0])


@pytest.mark.parametrize("key_mode", ["channel", "token"])
def test_a_layer_holds_the_same_with_and_without_kernels(path, key_mode, monkeypatch):
    """A prompt, tokens one by one through a flush, a crop into a block, and on."""
    held = []
    for chosen in (path, "none"):
        monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, chosen)
        layer = AdaptiveQuantizedLayer(6, 3, 32, 16, key_mode=key_mode, sink_length=3)
        generator = torch.Generator().manual_seed(0)
        for tokens, removed in ((70, 0), *((1, 0),) * 16, (5, -30), (40, 0)):
            states = torch.randn(2, 2, 2, tokens, 48, generator=generator).to(torch.bfloat16)
            layer.update(*states)
            layer.crop(removed)
        parts = [part for store in layer.stores() for part in (*store.parts, store.raw)]
        held.append([*parts, *layer.decode()])
    for native, reference in zip(*held, strict=True):
        assert_same_bits(native, reference)


def test_the_call_structure_is_that_of_the_library():
    assert library.library().has_encode_call_size_bytes() == ctypes.sizeof(encoding._Call)
