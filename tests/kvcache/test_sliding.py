"""The ring of a sliding-window layer, against transformers' own layer operation by operation."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_adaptive_sparse.kvcache.grouped import GroupCodec
from hf_adaptive_sparse.kvcache.sliding import AdaptiveSlidingWindowLayer

HEADS, WIDTH = 2, 16


def states(tokens, batch=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, HEADS, tokens, WIDTH, generator=generator)
    values = torch.randn(batch, HEADS, tokens, WIDTH, generator=generator)
    return keys.to(dtype), values.to(dtype)


def make(window, key_bits=16, value_bits=16, block=8):
    return AdaptiveSlidingWindowLayer(key_bits, value_bits, window, 64, block, layer_idx=3)


def pair(window, key_bits=16, value_bits=16, block=8):
    return make(window, key_bits, value_bits, block), DynamicSlidingWindowLayer(window)


def assert_close(got, expected, bits):
    for mine, theirs, width in zip(got, expected, bits, strict=True):
        # The states span less than 10; one step of the scale is allowed.
        tolerance = 0 if width == 16 else 10.0 / (2**width - 1)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [2, 3, 8, 16, 33, 100])
@pytest.mark.parametrize("bits", [(16, 16), (8, 6), (16, 8)])
@pytest.mark.parametrize("chunk", [1, 5, 200])
def test_it_returns_what_the_stock_layer_returns(window, bits, chunk):
    ours, stock = pair(window, *bits)
    keys, values = states(130, batch=2)
    for start in range(0, 130, chunk):
        piece = slice(start, start + chunk)
        new = keys[:, :, piece], values[:, :, piece]
        assert ours.get_mask_sizes(new[0].shape[-2]) == stock.get_mask_sizes(new[0].shape[-2])
        assert_close(ours.update(*new), stock.update(*new), bits)
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_max_length() == stock.get_max_length() == window
        assert_close(ours.decode(), (stock.keys, stock.values), bits)
        assert torch.equal(ours.keys[0], ours.decode()[0][0])


@pytest.mark.parametrize("bits", [(8, 8), (16, 16), (8, 16)])
def test_less_than_a_block_and_a_tail_lie_outside_the_window(bits):
    window, block = 64, 8
    layer = make(window, *bits, block)
    layer.update(*states(500))
    for step in range(300):
        layer.update(*states(1, seed=step))
        for store in layer.stores():
            assert window - 1 <= store.length < window - 1 + block
            limit = (window + 2 * block) * HEADS * WIDTH * 4
            assert store.nbytes <= limit * (1 if store.codec is None else 0.6)


def test_a_long_prompt_leaves_the_window_alone():
    layer = make(64, 8, 8, 16)
    keys, values = layer.update(*states(1000))
    assert keys.shape[-2] == values.shape[-2] == 1000
    assert layer.get_seq_length() == 1000
    assert all(store.length < 64 + 16 for store in layer.stores())
    assert [sum(store.lengths) % 16 for store in layer.stores()] == [0, 0]


@pytest.mark.parametrize("window", [4, 16, 40])
def test_blocks_are_short_where_the_window_is(window):
    layer = make(window, 8, 8, block=128)
    assert layer.residual_length == window // 4
    assert make(4096, block=128).residual_length == 128
    assert make(2, block=128).residual_length == 1


def test_keys_may_share_a_step_by_token():
    layer = AdaptiveSlidingWindowLayer(4, 8, 32, 64, 8, key_mode="token")
    keys, values = states(8)
    codec = GroupCodec(4, 64)
    parts = codec.encode(keys[:, :, None], "keys")
    expected = codec.decode(parts, (8, WIDTH), keys.dtype)[:, :, 0]
    assert torch.equal(layer.update(keys, values)[0], expected)


def test_what_update_returned_survives_the_ring():
    layer = make(16, 8, 16, block=4)
    keys, values = layer.update(*states(30))
    kept = keys.clone(), values.clone()
    for step in range(60):
        layer.update(*states(1, seed=step))
    assert torch.equal(keys, kept[0])
    assert torch.equal(values, kept[1])


def test_crop_needs_the_past_once_the_window_is_full():
    layer = make(8, 8, 8)
    layer.update(*states(7))
    layer.crop(-2)
    assert layer.get_seq_length() == 5
    layer.update(*states(4))
    with pytest.raises(RuntimeError, match=r"Layer 3 .* window of 8.*activate_past_recording"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        make(8).crop(1)


@pytest.mark.parametrize("bits", [(16, 16), (8, 6)])
@pytest.mark.parametrize("window", [5, 16, 33])
def test_recorded_past_is_cropped_like_the_stock_layers(bits, window):
    ours, stock = pair(window, *bits)
    for layer in (ours, stock):
        layer.update(*states(40, batch=2))
        layer.activate_past_recording()
    for step, (fed, taken) in enumerate([(5, 3), (1, 0), (7, 7), (4, 0), (6, 2), (9, 8)] * 4):
        new = states(fed, batch=2, seed=step)
        assert ours.get_mask_sizes(fed) == stock.get_mask_sizes(fed)
        assert_close(ours.update(*new), stock.update(*new), bits)
        ours.crop(-taken)
        stock.crop(-taken)
        assert ours.get_seq_length() == stock.get_seq_length()
        assert_close(
            [t[:, :, 1 - window :] for t in ours.decode()], (stock.keys, stock.values), bits
        )


operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 25)),
        st.tuples(st.just("update"), st.just(1)),
        st.tuples(st.just("rollback"), st.integers(0, 6)),
        st.tuples(st.just("reorder"), st.integers(0, 100)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 100)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("offload"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=14,
)


@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (16, 6)])
@given(operations=operations, prompt=st.integers(1, 40), window=st.sampled_from([2, 7, 16, 24]))
@settings(max_examples=100, deadline=None)
def test_any_sequence_of_operations_equals_the_stock_layer(bits, operations, prompt, window):
    ours, stock = pair(window, *bits)
    batch = 2
    for layer in (ours, stock):
        layer.update(*states(prompt, batch))
    for number, (name, argument) in enumerate(operations):
        if batch > 8 and name == "repeat":
            continue
        filled = stock.get_seq_length() > 0
        picked = torch.randint(
            0, batch, (batch,), generator=torch.Generator().manual_seed(argument)
        )
        if name == "update":
            fresh = states(argument, batch, seed=number)
            assert ours.get_mask_sizes(argument) == stock.get_mask_sizes(argument)
            assert_close(ours.update(*fresh), stock.update(*fresh), bits)
        elif name == "rollback":  # as assisted decoding does: record, feed, take back
            for layer in (ours, stock):
                layer.activate_past_recording()
            fresh = states(argument + 1, batch, seed=number)
            assert_close(ours.update(*fresh), stock.update(*fresh), bits)
            for layer in (ours, stock):
                layer.crop(-argument)
                layer.record_past = False
        elif name == "copy":
            ours, stock = pickle.loads(pickle.dumps(ours)), copy.deepcopy(stock)
        else:
            for layer in (ours, stock):
                if name == "reorder":
                    layer.reorder_cache(picked)
                elif name == "repeat":
                    layer.batch_repeat_interleave(argument)
                elif name == "select":
                    layer.batch_select_indices(picked[: 1 + argument % batch])
                elif name == "offload":
                    layer.offload()
                    layer.prefetch()
                elif name == "reset":
                    layer.reset()
            if name == "repeat" and filled:
                batch *= argument
            elif name == "select" and filled:
                batch = 1 + argument % batch
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)
