"""Packing is exact for every width and length, and takes the bytes its formula says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.packing.bits import PACKED_BITS, pack, packed_size_bytes, unpack

shapes = st.lists(st.integers(0, 4), max_size=2)


def stream_by_hand(codes: list[int], bits: int) -> list[int]:
    """The little-endian bit stream, one bit at a time."""
    stream = [(code >> bit) & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [
        sum(stream[start + bit] << bit for bit in range(8)) for start in range(0, len(stream), 8)
    ]


@given(
    bits=st.sampled_from(PACKED_BITS), shape=shapes, count=st.integers(0, 67), seed=st.integers()
)
@settings(max_examples=300, deadline=None)
def test_roundtrip_is_exact_and_takes_the_stated_bytes(bits, shape, count, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    codes = torch.randint(0, 2**bits, (*shape, count), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, packed_size_bytes(count, bits))
    assert packed_size_bytes(count, bits) == -(-count * bits // 8)
    unpacked = unpack(packed, bits, count)
    assert unpacked.dtype == torch.uint8
    assert unpacked.shape == codes.shape
    assert torch.equal(unpacked, codes)


@given(bits=st.sampled_from(PACKED_BITS), data=st.data())
@settings(max_examples=200, deadline=None)
def test_bytes_are_the_little_endian_stream(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == stream_by_hand(codes, bits)


def test_six_bits_put_four_codes_into_three_bytes():
    packed = pack(torch.tensor([0b000001, 0b000011, 0b100000, 0b111110], dtype=torch.uint8), 6)
    assert packed.tolist() == [0b11_000001, 0b0000_0000, 0b111110_10]


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_strided_input_gives_the_same_bytes(bits):
    codes = torch.randint(0, 2**bits, (3, 40, 5), dtype=torch.uint8)
    across, along = codes.transpose(1, 2), codes.transpose(1, 2).contiguous()
    assert torch.equal(pack(across, bits), pack(along, bits))
    buffer = torch.zeros((3, 9, packed_size_bytes(40, bits)), dtype=torch.uint8)
    buffer[:, :5] = pack(along, bits)
    assert torch.equal(unpack(buffer[:, :5], bits, 40), along)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_inputs_are_not_modified(bits):
    codes = torch.randint(0, 2**bits, (2, 24), dtype=torch.uint8)
    before = codes.clone()
    packed = pack(codes, bits)
    packed_before = packed.clone()
    unpack(packed, bits, 24)
    assert torch.equal(codes, before)
    assert torch.equal(packed, packed_before)


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 16])
def test_other_widths_are_refused_by_name(bits):
    with pytest.raises(ValueError, match=f"2, 3, 4, 6, 8 bits, got {bits}"):
        packed_size_bytes(8, bits)
    with pytest.raises(ValueError, match=f"got {bits}"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"got {bits}"):
        unpack(torch.zeros(8, dtype=torch.uint8), bits, 8)


def test_wrong_tensors_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        pack(torch.zeros(8), 4)
    with pytest.raises(TypeError, match="uint8"):
        unpack(torch.zeros(8), 4, 16)
    with pytest.raises(ValueError, match="scalar"):
        pack(torch.tensor(1, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="5 codes of 6 bits take 4 bytes, got 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 6, 5)
    with pytest.raises(ValueError, match=">= 0"):
        packed_size_bytes(-1, 4)
