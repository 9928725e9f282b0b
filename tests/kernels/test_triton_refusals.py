"""What a GPU's kernels refuse to quantise, of which a cache tells once per forward pass."""

import copy
import importlib.util
import math
import pickle

import pytest
import torch

from hf_adaptive_sparse.kernels import encoding
from hf_adaptive_sparse.kvcache import refusals
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.kvcache.rounding import NonFiniteError
from hf_adaptive_sparse.profiles import KVCacheConfig
from tests.conftest import llama_config

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is optional and not installed here", allow_module_level=True)

# NumPy, which interprets, finds fault with what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def only_triton(monkeypatch):
    monkeypatch.setattr(encoding, "encode", lambda *arguments: None)


@pytest.fixture
def cache():
    profile = KVCacheConfig(bits=(8, 16, 6), residual_length=16)
    return AdaptiveQuantizedCache(llama_config(num_hidden_layers=3), profile)


@pytest.fixture
def feed(cache, device):
    """Update layers of the cache with 32 tokens each, some of them with a bad number."""

    def feed(layers, bad=(), number=math.nan):
        for layer in layers:
            states = torch.randn(1, 2, 32, 16, device=device)
            if layer in bad:
                states[0, 1, 3, :2] = torch.tensor([number, -number])
            cache.update(states, states, layer)

    return feed


@pytest.mark.parametrize("number", [math.nan, math.inf, 3e38])
def test_the_last_layer_tells_for_all(cache, feed, number):
    feed(range(3))
    feed(range(2), bad=[0], number=number)
    with pytest.raises(NonFiniteError, match=r"keys of layer 0 must be finite .* its reset\(\)"):
        feed([2])
    cache.reset()
    feed(range(3))
    assert cache.get_seq_length() == 32
    assert all(states.isfinite().all() for states in cache.layers[0].decode())


def test_the_next_pass_tells_where_the_last_layer_was_left_out(feed):
    feed([0, 1], bad=[0])
    with pytest.raises(NonFiniteError, match="keys of layer 0"):
        feed([0])


@pytest.mark.parametrize("read", [copy.deepcopy, pickle.dumps, AdaptiveQuantizedCache.state_dict])
def test_what_was_not_told_yet_is_told_before_copies_are_made(cache, feed, read):
    feed([0, 1], bad=[0])
    with pytest.raises(NonFiniteError, match="keys of layer 0"):
        read(cache)
    read(cache)


def test_copies_share_no_flags(cache, feed):
    feed(range(3))
    twin = copy.deepcopy(cache)
    feed([0, 1], bad=[0])
    states = cache.layers[0].decode()[0][:, :, :32].clone()
    twin.update(states, states, 2)
    assert not twin.layers[0].refusals.are_unread
    assert twin.layers[2].refusals is twin.layers[0].refusals


def test_more_states_than_flags(feed, monkeypatch):
    monkeypatch.setattr(refusals, "_FLAGS", 3)
    for _ in range(3):
        feed(range(3))
    with pytest.raises(NonFiniteError, match="keys of layer 2"):
        feed(range(3), bad=[2], number=math.inf)
    feed(range(2))


def test_a_layer_by_itself_keeps_what_it_held(device):
    layer = AdaptiveQuantizedLayer(8, 8, residual_length=16, layer_idx=5)
    states = torch.randn(1, 2, 32, 16, device=device)
    layer.update(states, states)
    with pytest.raises(NonFiniteError, match="values of layer 5 must be finite"):
        layer.update(states, states * math.inf)
    assert layer.get_seq_length() == 32
