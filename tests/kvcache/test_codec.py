"""The codecs, all of them over one matrix: error bound, exactness, size formula, refusals."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.kvcache.affine import round_down, round_up
from hf_adaptive_sparse.kvcache.channel import ChannelCodec
from hf_adaptive_sparse.kvcache.grouped import GroupCodec
from hf_adaptive_sparse.kvcache.selection import key_codec, value_codec
from hf_adaptive_sparse.kvcache.transposed import TransposedCodec
from hf_adaptive_sparse.packing.bits import unpack

BITS = (2, 3, 4, 6, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def channel(bits, group_size=64):
    return ChannelCodec(bits)


CODECS = [channel, GroupCodec, TransposedCodec]
FITTED_BITS = (2, 3)


def half_unit(values, dtype):
    """Half a unit in the last place of ``values`` as ``dtype``, and never less than the tiniest."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps / 2


def scales(codec, parts, shape):
    """Step and minimum as stored, for every element ``(..., tokens, head_dim)``, in float64."""
    if isinstance(codec, ChannelCodec):
        return parts.step.double().unsqueeze(-2), parts.minimum.double().unsqueeze(-2)
    group = min(codec.group_size, shape[1])

    def spread(metadata):
        return metadata.double().repeat_interleave(group, -1)[..., : shape[1]]

    if isinstance(codec, GroupCodec):
        return spread(parts.step), spread(parts.minimum)
    step_base, step_unit, min_base, min_unit = parts.scales.double()[..., None, None].unbind(-3)
    step = step_base + step_unit * parts.step_codes.double().transpose(-1, -2)
    return spread(step), spread(min_base + min_unit * parts.min_codes.double().transpose(-1, -2))


def assert_within_bound(states, codec, parts, restored):
    shape = states.shape[-2:]
    step, _ = scales(codec, parts, shape)
    error = (states.double() - restored.double()).abs()
    # Computing in float32 adds a few roundings of the largest term.
    arithmetic = torch.finfo(torch.float32).eps
    largest = states.double().abs().amax(dim=(-1, -2), keepdim=True)
    slack = half_unit(restored.double(), states.dtype) + 8 * arithmetic * (largest + 255 * step)
    assert torch.all(error <= step / 2 + slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("make", CODECS)
@given(
    seed=st.integers(0, 2**31 - 1),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 30.0, 2000.0]),
    offset=st.sampled_from([0.0, 1.0, -7.3, 150.0, -4000.0]),
)
@settings(max_examples=15, deadline=None)
def test_error_stays_within_the_stated_bound(make, bits, dtype, seed, scale, offset):
    generator = torch.Generator().manual_seed(seed)
    states = (torch.randn(2, 1, 2, 7, 20, generator=generator) * scale + offset).to(dtype)
    codec = make(bits, 8)
    parts = codec.encode(states, "keys")
    restored = codec.decode(parts, (7, 20), dtype)
    assert restored.dtype == dtype
    assert_within_bound(states, codec, parts, restored)
    _, minimum = scales(codec, parts, (7, 20))
    assert torch.all(minimum <= states.double() + 1e-6 * states.double().abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.125, 3.140625, -6e4, 2.0**-20])
@pytest.mark.parametrize("make", CODECS)
@pytest.mark.parametrize("bits", BITS)
def test_blocks_of_equal_elements_are_exact(make, bits, dtype, value):
    if dtype.itemsize > 2:  # metadata are float16 then
        value = float(torch.tensor(value, dtype=torch.float16))
    states = torch.full((2, 1, 1, 3, 20), value, dtype=dtype)
    codec = make(bits, 8)
    assert torch.equal(codec.decode(codec.encode(states, "keys"), (3, 20), dtype), states)


@pytest.mark.parametrize("make", CODECS)
@pytest.mark.parametrize("bits", BITS)
def test_the_extremes_of_float16_survive(make, bits):
    highest = torch.finfo(torch.float16).max
    states = torch.tensor([-highest, 0.0, highest], dtype=torch.float16).repeat(1, 1, 1, 4, 1)
    states[..., 3, :] = -states[..., 3, :]
    codec = make(bits, 64)
    restored = codec.decode(codec.encode(states, "keys"), (4, 3), torch.float16)
    assert torch.isfinite(restored).all()
    assert (restored.float() - states.float()).abs().max() <= 2 * highest / (2**bits - 1)


@pytest.mark.parametrize("head_dim", [1, 5, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("group_size", [16, 64, 1000])
@pytest.mark.parametrize("make", CODECS)
def test_size_formula_and_shapes(make, head_dim, group_size):
    torch.manual_seed(0)
    for tokens, bits in itertools.product((1, 7, 32), BITS):
        states = torch.randn(2, 3, 2, tokens, head_dim, dtype=torch.bfloat16)
        codec = make(bits, group_size)
        parts = codec.encode(states, "keys")
        assert all(part.shape[:3] == (2, 3, 2) for part in parts)
        stored_bytes = sum(part.numel() * part.element_size() for part in parts)
        assert stored_bytes == 2 * 3 * 2 * codec.block_size_bytes(tokens, head_dim)
        groups = -(-head_dim // min(group_size, head_dim))
        rows = tokens * -(-head_dim * bits // 8)
        formula = {
            "ChannelCodec": rows + 4 * head_dim,
            "GroupCodec": rows + 4 * groups * tokens,
            "TransposedCodec": head_dim * -(-tokens * bits // 8) + 2 * groups * tokens + 8,
        }
        assert codec.block_size_bytes(tokens, head_dim) == formula[type(codec).__name__]
        restored = codec.decode(parts, (tokens, head_dim), states.dtype)
        assert restored.shape == states.shape
        if bits > max(FITTED_BITS):
            assert_within_bound(states, codec, parts, restored)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("make", CODECS)
def test_a_block_depends_on_itself_alone(make, bits):
    states = torch.randn(2, 3, 4, 9, 24)
    codec = make(bits, 16)
    together = codec.encode(states, "keys")
    for block in range(4):
        alone = codec.encode(states[1:, 2:, block : block + 1], "keys")
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[1:, 2:, block : block + 1], part)


@pytest.mark.parametrize("bits", BITS)
def test_a_tokens_codes_are_its_own_where_they_are_per_token(bits):
    """Per channel a shared offset costs nothing, per token it stretches the scale."""
    states = torch.randn(1, 1, 1, 32, 16) + 100 * torch.randn(16)
    errors = [
        (codec.decode(codec.encode(states, "keys"), (32, 16), torch.float32) - states).norm()
        for codec in (ChannelCodec(bits), GroupCodec(bits, 16))
    ]
    assert errors[0] < errors[1] / 10


@pytest.mark.parametrize("bits", BITS)
def test_values_are_packed_along_tokens(bits):
    states = torch.randn(1, 2, 1, 16, 8)
    codec = TransposedCodec(bits, 64)
    parts = codec.encode(states, "values")
    codes = unpack(parts.codes, bits, 16)
    step, minimum = scales(codec, parts, (16, 8))
    expected = ((states - minimum) / step).round().clamp(0, 2**bits - 1)
    assert (codes.transpose(-1, -2) - expected).abs().max() <= 1
    assert codes.shape == (1, 2, 1, 8, 16)


@pytest.mark.parametrize("make", CODECS)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 63, 70])
def test_nan_and_inf_are_refused_by_name(make, bits, bad, position):
    states = torch.randn(1, 2, 1, 4, 72)
    states[0, 1, 0, 2, position] = bad
    with pytest.raises(ValueError, match=r"keys of layer 3 must be finite.*16 bits"):
        make(bits, 64).encode(states, "keys of layer 3")


@pytest.mark.parametrize("make", CODECS)
def test_what_float16_metadata_cannot_hold_is_refused_by_name(make):
    states = torch.randn(1, 1, 1, 4, 8) * 1e6
    with pytest.raises(ValueError, match=r"keys of layer 3 .*65504"):
        make(8, 64).encode(states, "keys of layer 3")
    restored = make(8, 64)
    parts = restored.encode(states.bfloat16(), "keys of layer 3")
    assert torch.isfinite(restored.decode(parts, (4, 8), torch.bfloat16)).all()


def test_sixteen_bits_have_no_codec():
    assert key_codec(16, "channel", 64) is value_codec(16, 64) is None
    assert key_codec(4, "token", 32) == GroupCodec(4, 32)
    assert key_codec(4, "channel", 32) == ChannelCodec(4)
    assert value_codec(4, 32) == TransposedCodec(4, 32)
    with pytest.raises(ValueError, match=r"key_mode must be one of channel, token, got 'row'"):
        key_codec(8, "row", 64)


@pytest.mark.parametrize("make", CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_bits_are_more_exact(make, dtype):
    torch.manual_seed(0)
    states = torch.randn(1, 4, 2, 64, 64, dtype=dtype)

    def error(bits):
        codec = make(bits, 64)
        restored = codec.decode(codec.encode(states, "keys"), (64, 64), dtype)
        return float((restored.float() - states.float()).norm() / states.float().norm())

    errors = [error(bits) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("make", [GroupCodec, TransposedCodec])
def test_smaller_groups_are_more_exact(make):
    torch.manual_seed(0)
    states = torch.randn(1, 4, 1, 64, 64)

    def error(group_size):
        codec = make(4, group_size)
        return (codec.decode(codec.encode(states, ""), (64, 64), states.dtype) - states).norm()

    assert error(16) < error(32) < error(64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(values=st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=20))
def test_rounding_in_one_direction_is_the_nearest_on_that_side(dtype, values):
    exact = torch.tensor(values)
    above, below = round_up(exact, dtype), round_down(exact, dtype)
    assert torch.all(below.float() <= exact)
    assert torch.all(exact <= above.float())
    nearest = exact.to(dtype)
    assert torch.all((nearest == above) | (nearest == below))
    representable = nearest.float() == exact
    assert torch.equal(above[representable], nearest[representable])
    assert torch.equal(below[representable], nearest[representable])
