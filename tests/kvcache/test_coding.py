"""The native encoding and decoding against the codecs in torch: the same bits, on every path."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_adaptive_sparse.kernels import encoding, library
from hf_adaptive_sparse.kvcache.channel import ChannelCodec
from hf_adaptive_sparse.kvcache.coding import decode_blocks, encode_blocks
from hf_adaptive_sparse.kvcache.grouped import GroupCodec
from hf_adaptive_sparse.kvcache.transposed import TransposedCodec

PATHS = library.available_paths()
BITS = (2, 3, 4, 6, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CODECS = {
    "channel": lambda bits, group: ChannelCodec(bits),
    "group": GroupCodec,
    "transposed": TransposedCodec,
}
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


def bits_of(tensor):
    """A form in which -0 differs from 0."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(bits_of(found), bits_of(expected))


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
