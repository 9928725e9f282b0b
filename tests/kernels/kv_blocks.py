"""Blocks of keys and values, their codecs, and what it is to be the same: for tests of kernels."""

import torch

from hf_adaptive_sparse.kvcache.channel import ChannelCodec
from hf_adaptive_sparse.kvcache.grouped import GroupCodec
from hf_adaptive_sparse.kvcache.transposed import TransposedCodec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CODECS = {
    "channel": lambda bits, group: ChannelCodec(bits),
    "group": GroupCodec,
    "transposed": TransposedCodec,
}
HEAD_SIZES = (64, 72, 80, 96, 128, 256)
# (tokens of a block, channels of a head, group): odd ones of each, and those of the cache.
ODD_SHAPES = [(7, 72, 1000), (33, 20, 6), (1, 1, 1), (24, 40, 16), (300, 12, 4), (500, 24, 24)]
SHAPES = [*ODD_SHAPES, *((128, width, 64) for width in HEAD_SIZES), (128, 128, 32), (128, 256, 256)]
FEW_SHAPES = [(32, 80, 64), (7, 72, 1000), (33, 20, 6), (128, 64, 64), (1, 1, 1), (24, 40, 16)]


def make_blocks(tokens, width, dtype):
    """Two heads of three blocks, tokens outermost as models have them.

    Plain ones; ones with large offsets and outliers; zeros of both signs; a token of the smallest
    numbers there are among others; only such; and from end to end of what a step can span.
    """
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 3 * tokens, 2, width, generator=generator).transpose(1, 2)
    blocks = states.unflatten(2, (3, tokens))
    blocks[0, 0, 1] = blocks[0, 0, 1] * torch.rand(width, generator=generator).mul(9).exp() - 400
    blocks[0, 0, 2] = torch.where(blocks[0, 0, 2] < 0, -0.0, 0.0)
    blocks[0, 1, 0, : tokens // 2] = blocks[0, 1, 0, : tokens // 2].abs()
    blocks[0, 1, 0, 0] *= torch.finfo(dtype).tiny
    blocks[0, 1, 1] *= torch.finfo(dtype).tiny
    blocks[0, 1, 2] = blocks[0, 1, 2].sign() * (3e4 if dtype != torch.bfloat16 else 1e34)
    return blocks.to(dtype)


def bits_of(tensor):
    """A form in which -0 differs from 0."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(bits_of(found.cpu()), bits_of(expected.cpu()))


def assert_same_parts(found, expected):
    assert len(found) == len(expected)
    for part, theirs in zip(found, expected, strict=True):
        assert_same_bits(part, theirs)


def on(device, blocks):
    """The same states on a device, with the same strides."""
    moved = torch.empty_strided(blocks.shape, blocks.stride(), dtype=blocks.dtype, device=device)
    return moved.copy_(blocks)
