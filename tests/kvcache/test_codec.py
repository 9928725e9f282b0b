"""The codecs: error bound, exactness where promised, size formula, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.kvcache.codec import (
    GroupCodec,
    RawCodec,
    codec_for,
    dequantize,
    quantize,
)

BITS = (2, 3, 4, 6, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def half_unit(values, dtype):
    """Half a unit in the last place of ``values`` as ``dtype``, and never less than the tiniest."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps / 2


def assert_within_bound(states, restored, step):
    exact, result, width = states.double(), restored.double(), step.double()
    error = (exact - result).abs()
    # Computing in float32 (float64 for float64) adds a few roundings of the largest term.
    arithmetic = torch.finfo(torch.promote_types(states.dtype, torch.float32)).eps
    largest = exact.abs().amax(-1, keepdim=True)
    slack = half_unit(result, states.dtype) + 4 * arithmetic * largest
    assert torch.all(error <= width / 2 * (1 + 300 * arithmetic) + slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@given(
    seed=st.integers(0, 2**31 - 1),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 30.0, 2000.0]),
    offset=st.sampled_from([0.0, 1.0, -7.3, 150.0, -4000.0]),
)
@settings(max_examples=25, deadline=None)
def test_error_stays_within_the_stated_bound(bits, dtype, seed, scale, offset):
    generator = torch.Generator().manual_seed(seed)
    states = (torch.randn(5, 3, 16, generator=generator) * scale + offset).to(dtype)
    quantized = quantize(states, bits)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.codes.max() <= 2**bits - 1
    assert quantized.step.dtype == quantized.minimum.dtype == dtype
    assert torch.equal(quantized.minimum, states.amin(-1))
    assert_within_bound(states, dequantize(quantized), quantized.step[..., None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.125, 3.14159, -6e4, 1e-7])
def test_groups_of_equal_elements_are_exact(dtype, value):
    states = torch.full((2, 1, 3, 20), value, dtype=dtype)
    codec = GroupCodec(bits=2, group_size=8)
    assert torch.equal(codec.decode(codec.encode(states, "keys"), 20), states)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtypes_extremes_survive(dtype):
    highest = torch.finfo(dtype).max
    states = torch.tensor([[[-highest, 0.0, highest]]], dtype=dtype)
    if dtype == torch.float16:
        quantized = quantize(states, 8)
        restored = dequantize(quantized)
        assert torch.isfinite(restored).all()
        assert_within_bound(states, restored, quantized.step[..., None])
    else:  # the range itself overflows what it is computed in
        with pytest.raises(ValueError, match="finite"):
            quantize(states, 8)
    tiny = torch.tensor([[[0.0, torch.finfo(dtype).smallest_normal]]], dtype=dtype)
    restored = dequantize(quantize(tiny, 8))
    assert torch.isfinite(restored).all()
    assert restored.abs().max() <= 2 * torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [1, 5, 64, 72, 80, 96, 128, 160])
@pytest.mark.parametrize("group_size", [16, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_size_formula_and_shorter_last_groups(bits, head_dim, group_size, dtype):
    torch.manual_seed(0)
    states = torch.randn(2, 3, 7, head_dim, dtype=dtype)
    codec = GroupCodec(bits, group_size)
    parts = codec.encode(states, "keys")
    assert all(part.shape[:3] == states.shape[:3] for part in parts)
    stored_bytes = sum(part.numel() * part.element_size() for part in parts)
    assert stored_bytes == 2 * 3 * 7 * codec.token_size_bytes(head_dim, dtype.itemsize)
    group = min(group_size, head_dim)
    groups = -(-head_dim // group)
    expected = -(-head_dim * bits // 8) + 2 * groups * dtype.itemsize
    assert codec.token_size_bytes(head_dim, dtype.itemsize) == expected

    restored = codec.decode(parts, head_dim)
    assert restored.dtype == dtype
    step = parts[1].repeat_interleave(group, dim=-1)[..., :head_dim]
    assert_within_bound(states, restored, step)


@pytest.mark.parametrize("bits", BITS)
def test_a_tokens_code_depends_on_that_token_alone(bits):
    states = torch.randn(1, 2, 9, 24)
    codec = GroupCodec(bits, group_size=16)
    together = codec.encode(states, "keys")
    for token in range(9):
        alone = codec.encode(states[:, :, token : token + 1], "keys")
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[:, :, token : token + 1], part)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 63, 70])
def test_nan_and_inf_are_refused_by_name(bad, position):
    states = torch.randn(1, 2, 4, 72)
    states[0, 1, 2, position] = bad
    with pytest.raises(ValueError, match=r"keys of layer 3 must be finite.*16 bits"):
        GroupCodec(8, 64).encode(states, "keys of layer 3")


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_bits_are_bit_exact_nan_included(dtype):
    states = torch.randn(2, 2, 3, 8).to(dtype)
    states[0, 0, 0, 0], states[1, 1, 1, 1] = float("nan"), -0.0
    codec = codec_for(16, group_size=64)
    assert codec == RawCodec()
    assert codec.is_lossless
    restored = codec.decode(codec.encode(states, "keys"), 8)
    assert restored.view(torch.uint8).equal(states.view(torch.uint8))
    assert codec.token_size_bytes(8, dtype.itemsize) == 8 * dtype.itemsize


def test_more_bits_are_more_exact():
    torch.manual_seed(0)
    states = torch.randn(1, 4, 64, 64, dtype=torch.bfloat16)

    def error(bits):
        codec = codec_for(bits, group_size=64)
        return (codec.decode(codec.encode(states, "keys"), 64).float() - states.float()).norm()

    errors = [error(bits) for bits in (2, 3, 4, 6, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert errors[-2] / states.float().norm() < 0.01


def test_smaller_groups_are_more_exact():
    torch.manual_seed(0)
    states = torch.randn(1, 4, 64, 64)

    def error(group_size):
        codec = GroupCodec(4, group_size)
        return (codec.decode(codec.encode(states, "keys"), 64) - states).norm()

    assert error(16) < error(32) < error(64)
