"""What a GPU's kernels refuse to quantise, of which a cache tells once per forward pass."""

import copy
import importlib.util
import math
import pickle

import pytest
import torch

from hf_adaptive_sparse.errors import NonFiniteError
from hf_adaptive_sparse.kernels import encoding
from hf_adaptive_sparse.kvcache import refusals
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
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


@pytest.mark.parametrize(
    "read",
    [
        copy.deepcopy,
        pickle.dumps,
        AdaptiveQuantizedCache.state_dict,
        lambda cache: copy.deepcopy(cache.layers[0]),
    ],
)
def test_what_means_nothing_is_not_copied(cache, feed, read):
    feed([0, 1], bad=[0])
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="keys of layer 0"):
            read(cache)
    with pytest.raises(NonFiniteError, match="keys of layer 0"):
        feed([2])


def reset(cache, state):
    cache.reset()


@pytest.mark.parametrize("empty", [reset, AdaptiveQuantizedCache.load_state_dict])
@pytest.mark.parametrize("is_told", [True, False])
def test_refusals_last_until_the_contents_are_replaced(cache, feed, empty, is_told):
    state = cache.state_dict()
    feed([0, 1], bad=[0])  # and the pass ends here
    if is_told:
        for _ in range(2):
            with pytest.raises(NonFiniteError, match="keys of layer 0"):
                feed([2])
    empty(cache, state)
    feed(range(3))
    assert all(states.isfinite().all() for states in cache.layers[0].decode())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_told_of_their_own(cache, feed, duplicate):
    feed(range(3))
    twin = duplicate(cache)
    feed([0, 1], bad=[0])
    states = torch.ones(1, 2, 32, 16, device=cache.layers[2].device)
    twin.update(states, states, 2)
    twin.update(states, states, 0)
    twin.update(states * math.nan, states, 1)  # 16 bits
    twin.update(states, states * math.nan, 0)
    with pytest.raises(NonFiniteError, match="values of layer 0"):
        twin.update(states, states, 2)


def test_a_copy_of_a_layer_waits_for_itself(cache, feed):
    feed(range(3))
    layer = copy.deepcopy(cache.layers[0])
    states = torch.ones(1, 2, 32, 16, device=layer.device)
    with pytest.raises(NonFiniteError, match="keys of layer 0"):
        layer.update(states * math.nan, states)
    assert layer.get_seq_length() == 32


def test_more_states_than_flags(feed, monkeypatch):
    monkeypatch.setattr(refusals, "_FLAGS", 3)
    for _ in range(3):
        feed(range(3))
    with pytest.raises(NonFiniteError, match="keys of layer 2"):
        feed(range(3), bad=[2], number=math.inf)


def test_a_layer_by_itself_keeps_what_it_held(device):
    layer = AdaptiveQuantizedLayer(8, 8, residual_length=16, layer_idx=5)
    states = torch.randn(1, 2, 32, 16, device=device)
    layer.update(states, states)
    with pytest.raises(NonFiniteError, match="values of layer 5 must be finite"):
        layer.update(states, states * math.inf)
    assert layer.get_seq_length() == 32
