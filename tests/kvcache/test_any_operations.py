"""Any sequence of operations on a whole cache leaves what it would leave on a ``DynamicCache``.

At 16 bits exactly, at fewer within a step, for full-attention and sliding-window layers together;
and attention over the packed blocks is that over the decoded ones after every one of them. A few
hundred sequences by default; ``HF_ADAPTIVE_SPARSE_FUZZ_EXAMPLES=10000`` tries that many for each of
the profiles.
"""

import copy
import io
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, Gemma3TextConfig

from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.profiles import KVCacheConfig

EXAMPLES = int(os.environ.get("HF_ADAPTIVE_SPARSE_FUZZ_EXAMPLES", "40"))
WINDOW, HEADS, WIDTH = 12, 2, 16
CONFIG = Gemma3TextConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2 * HEADS,
    num_key_value_heads=HEADS,
    head_dim=WIDTH,
    sliding_window=WINDOW,
    layer_types=["full_attention", "sliding_attention", "full_attention"],
)
PROFILES = {
    "16 bits": KVCacheConfig(bits=16, residual_length=8),
    "mixed": KVCacheConfig(key_bits=(8, 8, 16), value_bits=(6, 8, 8), residual_length=8),
    "by token": KVCacheConfig(bits=8, residual_length=8, key_mode="token", sink_length=3),
}

operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 20)),
        st.tuples(st.just("update"), st.just(1)),
        st.tuples(st.just("update"), st.just(1)),
        st.tuples(
            st.sampled_from(
                ["crop", "reorder", "repeat", "select", "mask", "copy", "move", "reset", "record"]
            ),
            st.integers(0, 100),
        ),
    ),
    max_size=20,
)


class Both:
    """Our cache and the stock one, which get the same operations."""

    def __init__(self, profile):
        self.profile = profile
        self.ours = AdaptiveQuantizedCache(CONFIG, profile)
        self.stock = DynamicCache(config=CONFIG)
        self.batch = 2
        self.records = False
        self.fed = 0  # tokens since the last crop or since the past is recorded
        self.generator = torch.Generator().manual_seed(0)

    @property
    def tokens(self):
        return self.stock.get_seq_length()

    def random(self, batch, heads, tokens):
        return torch.randn(batch, heads, tokens, WIDTH, generator=self.generator)

    def update(self, count):
        bits = self.profile.layer_bits(CONFIG.num_hidden_layers)
        for layer, layer_bits in enumerate(bits):
            fresh = [self.random(self.batch, HEADS, count) for _ in range(2)]
            got = self.ours.update(*fresh, layer)
            expected = self.stock.update(*fresh, layer)
            self.attend(got, self.random(self.batch, 2 * HEADS, 1))
            for mine, theirs, width in zip(got, expected, layer_bits, strict=True):
                bound = 0 if width == 16 else 8.0 / (2**width - 1)
                torch.testing.assert_close(mine, theirs, rtol=0, atol=bound)
        self.fed += count

    def attend(self, got, query):
        """Over the views, by a kernel where there is one, and over what they decode to."""
        packed = scaled_dot_product_attention(query, *got, enable_gqa=True)
        decoded = [states + 0 for states in got]
        expected = scaled_dot_product_attention(query, *decoded, enable_gqa=True)
        torch.testing.assert_close(packed, expected, rtol=1e-3, atol=2e-3)

    def crop(self, number):
        """Return whether the sequence goes on."""
        full = self.tokens >= WINDOW
        if full and not self.records:
            for cache in (self.ours, self.stock):
                with pytest.raises(RuntimeError, match="activate_past_recording"):
                    cache.crop(-1)
            return False
        count = number % (self.fed + 1 if full else self.tokens + 3)
        for cache in (self.ours, self.stock):
            cache.crop(-count)
        self.fed = 0
        return self.tokens > 0  # the stock layers keep shapes of 0 tokens

    def select(self, indices):
        for cache in (self.ours, self.stock):
            cache.batch_select_indices(indices)
        self.batch = len(torch.arange(self.batch)[indices])

    def copy(self, number):
        if number % 3 == 0:
            self.ours = copy.deepcopy(self.ours)
        elif number % 3 == 1:
            self.ours = pickle.loads(pickle.dumps(self.ours))
        else:
            file = io.BytesIO()
            torch.save(self.ours.state_dict(), file)
            file.seek(0)
            self.ours = AdaptiveQuantizedCache(CONFIG, self.profile)
            self.ours.load_state_dict(torch.load(file, weights_only=True))

    def apply(self, name, number):
        """Return whether the sequence goes on."""
        picked = torch.randint(0, self.batch, (self.batch,), generator=self.generator)
        if name == "update":
            self.update(number)
        elif name == "copy":
            self.copy(number)
        elif name == "move":
            for layer in self.ours.layers:
                layer.offload()
                layer.prefetch()
        elif name == "record":
            self.records, self.fed = True, 0
            for cache in (self.ours, self.stock):
                cache.activate_past_recording()
        elif name == "reset":
            for cache in (self.ours, self.stock):
                cache.reset()
            self.batch, self.fed = 1 + number % 3, 0
        elif self.tokens == 0:
            pass  # there is nothing to choose from
        elif name == "crop":
            return self.crop(number)
        elif name == "reorder":
            for cache in (self.ours, self.stock):
                cache.reorder_cache(picked)
        elif name == "repeat" and self.batch < 6:
            for cache in (self.ours, self.stock):
                cache.batch_repeat_interleave(1 + number % 2)
            self.batch *= 1 + number % 2
        elif name == "select":
            self.select(picked[: 1 + number % self.batch])
        elif name == "mask" and self.batch > 1:
            self.select(torch.arange(self.batch) != number % self.batch)
        return True

    def compare(self):
        for layer in range(CONFIG.num_hidden_layers):
            assert self.ours.get_seq_length(layer) == self.stock.get_seq_length(layer)
            sizes = [cache.get_mask_sizes(3, layer) for cache in (self.ours, self.stock)]
            assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", PROFILES)
@given(operations=operations)
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_sequence_of_operations_leaves_what_a_dynamic_cache_holds(name, operations):
    both = Both(PROFILES[name])
    both.update(3)
    for operation in operations:
        if not both.apply(*operation):
            return
        both.compare()
    both.update(1)
