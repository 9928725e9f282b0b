"""One layer, fed with states directly: what it holds after every operation."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from hf_adaptive_sparse.kvcache.attention import pin_pair
from hf_adaptive_sparse.kvcache.buffer import RowBuffer
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.kvcache.selection import key_codec, value_codec

HEADS, WIDTH, BLOCK = 2, 16, 8
WIDTHS = [(16, 16), (8, 8), (8, 6), (4, 16), (16, 3), (2, 2)]


def states(tokens, batch=1, seed=0, dtype=torch.float32, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, HEADS, tokens, width, generator=generator)
    values = torch.randn(batch, HEADS, tokens, width, generator=generator)
    return keys.to(dtype), values.to(dtype)


def make_layer(key_bits=8, value_bits=8, block=BLOCK, group_size=64, **changes):
    return AdaptiveQuantizedLayer(key_bits, value_bits, group_size, block, layer_idx=5, **changes)


def fill(layer, tokens, batch=1, seed=0, chunk=None):
    keys, values = states(tokens, batch, seed)
    for start in range(0, tokens, chunk or tokens):
        end = start + (chunk or tokens)
        layer.update(keys[:, :, start:end], values[:, :, start:end])
    return keys, values


def contents(layer):
    """Copies of all the layer stores, encoded and not."""
    return [part.clone() for store in layer.stores() for part in (*store.parts, store.raw)]


def assert_same_contents(left, right):
    for ours, theirs in zip(contents(left), contents(right), strict=True):
        assert torch.equal(ours, theirs)


def through_codec(tensor, codec, encoded, sinks=0):
    """What a layer should return: ``encoded`` tokens behind the sinks by way of the codec."""
    if codec is None:
        return tensor
    end = sinks + encoded
    blocks = tensor[:, :, sinks:end].unflatten(-2, (-1, BLOCK))
    decoded = codec.decode(codec.encode(blocks, "test"), (BLOCK, tensor.shape[-1]), tensor.dtype)
    return torch.cat([tensor[:, :, :sinks], decoded.flatten(2, 3), tensor[:, :, end:]], dim=-2)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("key_mode", ["channel", "token"])
@pytest.mark.parametrize(("key_bits", "value_bits"), WIDTHS)
def test_update_returns_what_is_stored_prompt_included(key_bits, value_bits, key_mode, sinks):
    layer = make_layer(key_bits, value_bits, key_mode=key_mode, sink_length=sinks)
    keys, values = states(3 * BLOCK + 5, batch=2)
    got_keys, got_values = layer.update(keys, values)
    codec = key_codec(key_bits, key_mode, 64)
    assert torch.equal(got_keys, through_codec(keys, codec, 3 * BLOCK, sinks))
    codec = value_codec(value_bits, 64)
    assert torch.equal(got_values, through_codec(values, codec, 3 * BLOCK, sinks))
    assert layer.get_seq_length() == 3 * BLOCK + 5
    assert layer.get_mask_sizes(4) == (3 * BLOCK + 9, 0)
    assert layer.get_max_length() == -1


def test_a_prompt_of_200_packs_192_and_leaves_8():
    layer = AdaptiveQuantizedLayer(8, 6, residual_length=64)
    layer.update(*states(200, width=64))
    for store in (layer._quantized_keys, layer._quantized_values):
        assert (store.blocks.length, store.length) == (192, 200)
        assert store.raw.shape == (1, HEADS, 8, 64)


@pytest.mark.parametrize(("key_bits", "value_bits"), WIDTHS)
@pytest.mark.parametrize("chunk", [1, 3, BLOCK, BLOCK + 1, 100])
def test_contents_do_not_depend_on_how_tokens_arrive(key_bits, value_bits, chunk):
    whole, pieces = make_layer(key_bits, value_bits), make_layer(key_bits, value_bits)
    fill(whole, 61)
    fill(pieces, 61, chunk=chunk)
    assert_same_contents(whole, pieces)


def test_the_unquantised_tail_is_always_shorter_than_a_block():
    layer = make_layer(8, 4)
    for step in range(5 * BLOCK):
        layer.update(*states(1, seed=step))
        assert {store.raw.shape[-2] for store in layer.stores()} == {(step + 1) % BLOCK}
        assert layer.get_seq_length() == step + 1


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize(("key_bits", "value_bits"), WIDTHS)
def test_keys_and_values_are_all_tokens(key_bits, value_bits, sinks):
    """Whisper, RAG and others read them of any cache's layers."""
    layer = make_layer(key_bits, value_bits, sink_length=sinks)
    assert layer.keys is layer.values is None
    for tokens in (3, 2 * BLOCK):
        fill(layer, tokens)
        assert layer.keys.shape[-2] == layer.get_seq_length()
        for read, stored in zip((layer.keys, layer.values), layer.decode(), strict=True):
            assert torch.equal(read[0], stored[0])


def test_nothing_is_quantised_twice():
    layer = make_layer(6, 3)
    fill(layer, 5 * BLOCK + 3)
    before = [[part.clone() for part in store.parts] for store in layer.stores()]
    encoded_tokens = []
    for store in layer.stores():
        inner = store._encode

        def counting(codec, tensor, *others, inner=inner):
            encoded_tokens.append(tensor.shape[-2])
            return inner(codec, tensor, *others)

        store._encode = counting
    for step in range(300):
        layer.update(*states(1, seed=step))
    for store, parts in zip(layer.stores(), before, strict=True):
        for now, then in zip(store.parts, parts, strict=True):
            assert torch.equal(now[:, :, :5], then)
    whole_blocks = (5 * BLOCK + 3 + 300) // BLOCK * BLOCK
    assert sum(encoded_tokens) == 2 * (whole_blocks - 5 * BLOCK)


@pytest.mark.parametrize("sinks", [0, 5])
@pytest.mark.parametrize(
    ("key_bits", "value_bits", "key_mode"),
    [(16, 16, "channel"), (8, 6, "channel"), (3, 6, "token"), (16, 4, "channel")],
)
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5])
def test_crop_to_every_length_and_on(key_bits, value_bits, key_mode, length, sinks):
    for remove in range(length + 3):
        layer = make_layer(key_bits, value_bits, key_mode=key_mode, sink_length=sinks)
        fill(layer, length)
        before = [tensor.clone() for tensor in layer.decode()]
        encoded = [[part.clone() for part in store.parts] for store in layer.stores()]
        layer.crop(-remove)
        left = max(0, length - remove)
        assert layer.get_seq_length() == left
        for now, then in zip(layer.decode(), before, strict=True):
            assert torch.equal(now, then[:, :, :left])
        raw_left = [store.raw.shape[-2] for store in layer.stores()]
        blocks = [len(store.lengths) for store in layer.stores()]

        more_keys, more_values = states(BLOCK + 2, seed=9)
        keys, values = layer.update(more_keys, more_values)
        assert keys.shape[-2] == values.shape[-2] == left + BLOCK + 2
        # What was encoded stays as it was, bit for bit, in a shorter block where one was cut.
        now_decoded = layer.decode()
        for which, store in enumerate(layer.stores()):
            end = left - raw_left[which]
            assert torch.equal(now_decoded[which][:, :, :end], before[which][:, :, :end])
            for now, then in zip(store.parts, encoded[which], strict=False):
                assert torch.equal(now[:, :, : blocks[which]], then[:, :, : blocks[which]])
            assert store.length == left + BLOCK + 2
            if store.codec is not None:
                assert store.raw.shape[-2] - store.sinks < BLOCK
                assert store.sinks == min(sinks, store.length)
        if left % BLOCK == sinks == 0:
            assert not any(store.blocks.has_short_ones for store in layer.stores())


def test_crop_into_a_block_leaves_a_shorter_one_and_the_next_begins_behind_it():
    layer = make_layer(8, 4)
    fill(layer, 3 * BLOCK)
    layer.crop(-3)
    fill(layer, 2 * BLOCK + 1, seed=1, chunk=1)
    for store in layer.stores():
        assert store.lengths == (BLOCK, BLOCK, BLOCK - 3, BLOCK, BLOCK)
        assert store.raw.shape[-2] == 1
    layer.crop(-2 * BLOCK - 1 - 5)
    assert layer.stores()[0].lengths == (BLOCK, BLOCK)
    layer.crop(-1000)
    assert layer.stores()[0].length == layer.get_seq_length() == 0


def test_a_recorded_past_is_taken_back_without_cutting_blocks():
    layer = make_layer(8, 4)
    fill(layer, 2 * BLOCK)
    layer.activate_past_recording()
    for step in range(100):
        layer.update(*states(BLOCK - 1, seed=step))
        layer.crop(-(BLOCK - 2))
        for store in layer.stores():
            assert not store.blocks.has_short_ones
            assert store.raw.shape[-2] < 2 * BLOCK
    assert layer.get_seq_length() == 2 * BLOCK + 100


def test_sinks_stay_as_they_are():
    layer = make_layer(2, 2, sink_length=5)
    keys, values = fill(layer, 4 * BLOCK, chunk=3)
    for got, original in zip(layer.decode(), (keys, values), strict=True):
        assert torch.equal(got[:, :, :5], original[:, :, :5])
        assert not torch.equal(got[:, :, 5:13], original[:, :, 5:13])
    assert [store.sinks for store in layer.stores()] == [5, 5]
    assert [store.lengths for store in layer.stores()] == [(BLOCK,) * 3] * 2


def test_crop_takes_a_negative_number():
    layer = make_layer()
    layer.crop(-3)  # nothing there: nothing happens
    fill(layer, 4)
    layer.crop(0)
    assert layer.get_seq_length() == 4
    with pytest.raises(ValueError, match=r"negative number \(or 0\), got 2"):
        layer.crop(2)
    assert layer.is_croppable


operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(0, 20)),
        st.tuples(st.just("update"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 25)),
        st.tuples(st.just("reorder"), st.integers(0, 100)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 100)),
        st.tuples(st.just("mask"), st.integers(0, 100)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("record"), st.just(0)),
        st.tuples(st.just("offload"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=14,
)


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "options"),
    [
        (16, 16, {}),
        (8, 8, {}),
        (16, 6, {"sink_length": 3}),
        (8, 6, {"key_mode": "token", "sink_length": 11}),
    ],
)
@given(operations=operations, prompt=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_any_sequence_of_operations_equals_the_stock_layer(
    key_bits, value_bits, options, operations, prompt
):
    """At 16 bits equal to DynamicLayer, else within a step of it, every shape included."""
    ours, stock = make_layer(key_bits, value_bits, **options), DynamicLayer()
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
            got, expected = ours.update(*fresh), stock.update(*fresh)
            for mine, theirs, bits in zip(got, expected, (key_bits, value_bits), strict=True):
                tolerance = 0 if bits == 16 else 8.0 / (2**bits - 1)
                torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
            continue
        if name == "record":
            ours.activate_past_recording()
        if name == "copy":
            ours, stock = copy.deepcopy(ours), pickle.loads(pickle.dumps(stock))
            ours = pickle.loads(pickle.dumps(ours))
        for layer in (ours, stock):
            if name == "crop":
                layer.crop(-argument)
            elif name == "reorder":
                layer.reorder_cache(picked)
            elif name == "repeat":
                layer.batch_repeat_interleave(argument)
            elif name == "select":
                layer.batch_select_indices(picked[: 1 + argument % batch])
            elif name == "mask":
                layer.batch_select_indices(torch.arange(batch) != argument % (batch + 1))
            elif name == "offload":
                layer.offload()
                layer.prefetch()
            elif name == "reset":
                layer.reset()
        if name == "repeat" and filled:
            batch *= argument
        elif name == "select" and filled:
            batch = 1 + argument % batch
        elif name == "mask" and filled:
            batch -= argument % (batch + 1) != batch
        if batch == 0:
            return
        if filled and stock.get_seq_length() == 0:
            return  # the stock layer cannot go on from 0 tokens with another batch size
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)


def test_operations_before_the_first_update_do_nothing():
    layer = make_layer()
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    layer.offload()
    layer.prefetch()
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.nbytes == 0
    fill(layer, 3)
    assert layer.get_seq_length() == 3


def test_reset_takes_another_batch_and_dtype():
    layer = make_layer()
    fill(layer, 20)
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes, layer.keys) == (0, 0, None)
    keys, _ = layer.update(*states(9, batch=3, dtype=torch.bfloat16))
    assert keys.shape == (3, HEADS, 9, WIDTH)
    assert keys.dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [3, BLOCK + 1])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda k, v: (k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)), "got batch size 2"),
        (lambda k, v: (k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), "got batch size 1, 4 heads"),
        (lambda k, v: (k[..., :8], v), r"holds keys .* heads of 8"),
        (lambda k, v: (k, v[..., :8]), r"holds values .* heads of 8"),
        (lambda k, v: (k.half(), v.half()), "float16"),
        (lambda k, v: (k.to("meta"), v.to("meta")), "keys on cpu, got states on meta"),
        (lambda k, v: (k[0], v[0]), "shape"),
        (lambda k, v: (k, v[:, :, 1:]), "as many keys as values"),
    ],
)
def test_states_that_do_not_fit_are_refused(change, named, tokens):
    layer = make_layer(8, 6)
    keys, values = fill(layer, tokens)
    before = contents(layer)
    with pytest.raises(ValueError, match=rf"(?s)Layer 5.*{named}"):
        layer.update(*change(keys[:, :, :2], values[:, :, :2]))
    for now, then in zip(contents(layer), before, strict=True):
        assert torch.equal(now, then)
    assert layer.get_seq_length() == tokens


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_with_the_layers_number(which, bad):
    layer = make_layer()
    fill(layer, BLOCK - 2)
    before = contents(layer)
    fresh = states(2, seed=1)
    fresh[which][0, 1, 1, 7] = bad
    kind = ("keys", "values")[which]
    with pytest.raises(ValueError, match=f"{kind} of layer 5 must be finite"):
        layer.update(*fresh)
    for now, then in zip(contents(layer), before, strict=True):
        assert torch.equal(now, then)
    layer.update(*states(2, seed=1))
    assert layer.get_seq_length() == BLOCK


def test_at_16_bits_nan_comes_back_where_it_was():
    layer = make_layer(16, 16)
    keys, values = states(2 * BLOCK)
    keys[0, 0, 3, 2] = float("nan")
    got, _ = layer.update(keys, values)
    assert torch.equal(got.isnan(), keys.isnan())


def test_the_first_states_must_have_four_dimensions_too():
    keys, values = states(3)
    with pytest.raises(ValueError, match=r"values of shape \(batch, kv_heads, seq, head_dim\)"):
        make_layer().update(keys, values[0])


def test_keys_and_values_may_have_different_head_sizes():
    layer = make_layer(8, 4, group_size=16)
    keys, values = states(20, width=24)[0], states(20, width=10)[1]
    got_keys, got_values = layer.update(keys, values)
    assert (got_keys.shape[-1], got_values.shape[-1]) == (24, 10)


@pytest.mark.parametrize("inside", [True, False])
def test_a_cache_filled_in_inference_mode_goes_on_outside_and_back(inside):
    layer = make_layer(8, 16)
    with torch.inference_mode(inside):
        fill(layer, BLOCK + 3)
        layer.reorder_cache(torch.tensor([0]))
    with torch.inference_mode(not inside):
        fill(layer, BLOCK, seed=1, chunk=1)
    fill(layer, BLOCK, seed=2, chunk=3)
    assert layer.get_seq_length() == 3 * BLOCK + 3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_made_in_inference_mode_goes_on_outside(duplicate):
    layer = make_layer(8, 16)
    with torch.inference_mode():
        fill(layer, BLOCK + 3)
        copied = duplicate(layer)
    copied.crop(-2)  # so that there is room, which is written to in place
    fill(copied, 2, seed=1)
    assert copied.get_seq_length() == BLOCK + 3


def test_states_with_a_gradient_are_stored_without_it():
    layer = make_layer(8, 16)
    keys, values = (tensor.requires_grad_() for tensor in states(BLOCK + 3))
    got = layer.update(keys, values)
    assert not any(tensor.requires_grad for tensor in got)
    copy.deepcopy(layer)


def test_kvpress_contract_reads_everything_and_writes_everything():
    """What kvpress does behind a prefill: read, choose tokens per head, write back."""
    layer = make_layer(8, 6)
    fill(layer, 3 * BLOCK + 5)
    keys = layer._dequantize(layer._quantized_keys)
    values = layer._dequantize(layer._quantized_values)
    for read, stored in zip((keys, values), layer.decode(), strict=True):
        assert torch.equal(read, stored)
    whole = layer._quantize(keys[:, :, : 2 * BLOCK], axis=layer.axis_key)
    assert whole.lengths == (BLOCK, BLOCK)
    keep = torch.arange(0, 3 * BLOCK + 5, 2)
    layer._quantized_keys = layer._quantize(keys[:, :, keep], axis=layer.axis_key)
    layer._quantized_values = layer._quantize(values[:, :, keep], axis=layer.axis_value)
    layer.keys = torch.zeros(0)
    layer.values = torch.zeros(0)
    layer.cumulative_length = len(keep)

    assert layer._quantized_keys.codec.bits == 8
    assert layer._quantized_values.codec.bits == 6
    got_keys, got_values = layer.update(*states(1, seed=3))
    assert got_keys.shape[-2] == got_values.shape[-2] == len(keep) + 1 == layer.get_seq_length()
    torch.testing.assert_close(got_keys[:, :, :-1], keys[:, :, keep], rtol=0, atol=8 / 255)
    torch.testing.assert_close(got_values[:, :, :-1], values[:, :, keep], rtol=0, atol=8 / 63)
    fill(layer, 2 * BLOCK, seed=4, chunk=1)
    assert layer._quantized_keys.raw.shape[-2] < BLOCK


def test_growth_is_exact_at_first_and_bounded_by_a_64th():
    buffer = RowBuffer(torch.zeros(1, 1, 0, 4), step=8)
    assert (buffer.capacity, buffer.nbytes) == (0, 0)
    buffer.append(torch.ones(1, 1, 777, 4))
    assert buffer.capacity == 777
    assert buffer.nbytes == 777 * 4 * 4
    storages = set()
    for _ in range(5000):
        buffer.append(torch.ones(1, 1, 1, 4))
        storages.add(buffer._storage.data_ptr())
        assert buffer.capacity <= buffer.length * (1 + 1 / 64) + 8
    assert len(storages) <= 140  # log(7.4) / log(65/64) = 129 of them, not 5,000
    assert torch.all(buffer.rows == 1)


def test_rows_dropped_at_the_front_are_used_again():
    buffer = RowBuffer(torch.zeros(1, 1, 0, 2), step=4)
    buffer.append(torch.arange(20.0)[:, None].expand(1, 1, 20, 2))
    held = buffer.rows
    for number in range(20, 400):
        buffer.append(torch.full((1, 1, 1, 2), float(number)))
        buffer.drop_front(1)
        assert torch.equal(buffer.rows[0, 0, :, 0], torch.arange(number - 19.0, number + 1))
        assert buffer.capacity <= 20 + 2 * 4
    assert torch.equal(held[0, 0, :, 0], torch.arange(20.0))
    buffer.drop_front(100)
    assert (buffer.length, buffer.capacity) == (0, 0)


def test_repr_names_bits_and_tokens():
    layer = make_layer(8, 6)
    fill(layer, 3)
    assert repr(layer) == "AdaptiveQuantizedLayer(key_bits=8, value_bits=6, tokens=3)"


def test_keys_alone_can_be_quantised_anew():
    """Blocks of keys and values then differ, which no kernel reads: attention decodes both."""
    layer = make_layer()
    fill(layer, 3 * BLOCK + BLOCK // 2)
    assert pin_pair(*layer.stores()).packed is not None
    keys = layer._dequantize(layer._quantized_keys)
    layer._quantized_keys = layer._quantize(keys, axis=layer.axis_key)
    pair = pin_pair(*layer.stores())
    assert pair.packed is None
    assert pair.keys.length == pair.values.length


def test_a_batch_of_none():
    """As `DynamicCache` has it, with rows long enough for memory to be reserved."""
    layer = make_layer(block=128)
    empty = torch.zeros(0, 2, 300, 128)
    keys, values = layer.update(empty, empty)
    assert keys.shape == values.shape == empty.shape
    filled = make_layer()
    fill(filled, 2 * BLOCK, batch=2)
    filled.batch_select_indices(torch.empty(0, dtype=torch.long))
    assert all(states.shape[0] == 0 for states in contents(filled))
