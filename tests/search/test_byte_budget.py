"""Predicted bytes against what is really allocated and saved."""

from __future__ import annotations

import pytest
import torch
from optuna.trial import FixedTrial
from transformers import MistralConfig, MistralForCausalLM

import hf_adaptive_sparse as has
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.search.byte_budget import ByteBudget
from hf_adaptive_sparse.search.cache_bytes import CacheBytes
from hf_adaptive_sparse.search.linear_bytes import LinearBytes
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.suggesting import suggest, uniform_candidate, uniform_params
from tests.families.tiny_models import tiny_model

KV = {"kv_group_size": 16, "kv_residual_length": 8}


def fit_space(length, batch=1, **changes):
    return SearchSpace(fit_bytes="1GiB", context_length=length, batch_size=batch, **(KV | changes))


def filled(model, bits, length, prompt, batch):
    """Bytes of a cache after a prompt, and the most while it grows to ``length``."""
    keys, values = zip(*bits, strict=True)
    cache = AdaptiveQuantizedCache(model.config, fit_space(1).kv_config(keys, values))
    config = model.config
    most, tokens = 0, 0
    while tokens < length:
        count = prompt if tokens == 0 else 1
        shape = (batch, config.num_key_value_heads, count, config.head_dim)
        for layer in range(len(bits)):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
        tokens += count
        most = max(most, cache.nbytes)
    return most


MIXED = ((8, 16), (6, 2), (4, 3), (16, 4))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 23, 40])
@pytest.mark.parametrize("bits", [MIXED, ((8, 8),) * 4], ids=["mixed", "8"])
def test_no_way_of_filling_a_cache_takes_more_than_predicted(tiny_llama, length, bits):
    predicted = CacheBytes.of(tiny_llama, fit_space(length, 2)).at_most(bits)
    prompts = sorted({1, length // 2, length - 1, length} - {0})
    most = max(filled(tiny_llama, bits, length, prompt, 2) for prompt in prompts)
    assert most <= predicted
    # The room of a growing buffer of unpacked tokens is a token here, of four layers and parts.
    assert predicted <= 1.35 * most


def test_a_long_cache_is_predicted_closely(tiny_llama):
    bits = ((8, 6),) * 4
    predicted = CacheBytes.of(tiny_llama, fit_space(511)).at_most(bits)
    assert filled(tiny_llama, bits, 511, 511, 1) <= predicted
    assert predicted <= 1.02 * filled(tiny_llama, bits, 511, 511, 1)


@pytest.mark.parametrize("length", [5, 16, 60])
@pytest.mark.parametrize("bits", [((8, 4),) * 2, ((16, 16),) * 2], ids=["8, 4", "16"])
def test_a_sliding_window_bounds_the_cache(length, bits):
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
    )
    model = MistralForCausalLM(config)
    predicted = CacheBytes.of(model, fit_space(length)).at_most(bits)
    most = max(filled(model, bits, length, prompt, 1) for prompt in (1, 3, length))
    assert most <= predicted
    windows = CacheBytes.of(model, fit_space(200)).at_most(bits)
    assert windows == CacheBytes.of(model, fit_space(1000)).at_most(bits)


def test_without_kv_bits_the_plain_cache_counts(tiny_llama):
    space = SearchSpace(kv_bits=None, fit_bytes="1GiB", context_length=100, batch_size=3)
    # Four layers, keys and values, of two heads of 16 in float32.
    assert CacheBytes.of(tiny_llama, space).at_most(None) == 4 * 2 * 32 * 4 * 100 * 3


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bytes_of_a_linear_are_what_the_sparse_runtime_and_the_checkpoint_hold(bits, dtype):
    weight = torch.randn(33, 100, dtype=dtype)
    weight[torch.rand(33, 100) < 0.4] = 0
    group = {16: None, 8: None, 4: 64}[bits]
    stored = SparseWeight.from_dense(weight, bits, group)
    linear = LinearBytes(33, 100, dtype.itemsize)
    assert linear.in_memory(stored.nnz, bits) == stored.nbytes
    assert linear.on_disk(stored.nnz, bits) == sum(t.nbytes for t in stored.tensors().values())


def test_a_linear_that_loses_nothing_stays_plain():
    linear = LinearBytes(8, 16, 2)
    assert linear.in_memory(128, 16) == linear.on_disk(128, 16) == 256
    assert linear.on_disk(128, 8) < 256


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llava"])
def test_the_size_of_a_saved_model_is_predicted(name, request, tmp_path):
    model = request.getfixturevalue(name)
    space = SearchSpace(target_sparsity="free", size_bytes="300KB", kv_bits=None, blocks=2)
    if name == "tiny_llava":
        space = SearchSpace(target_sparsity="free", size_bytes="600KB", kv_bits=None, blocks=2)
    shape = ModelShape.of(model, space)
    found = uniform_candidate(space, shape)
    config = has.SparsityConfig(
        metric="magnitude",
        target_sparsity=found.mean_sparsity,
        sparsity=found.ratios,
        kv_cache=False,
    )
    has.prune(model, config, None, progress=False)
    model.save_pretrained(tmp_path)
    saved = weight_bytes_on_disk(tmp_path)
    assert saved <= found.spent.size_bytes <= space.size_bytes
    # Names and offsets in the header are counted at their longest.
    assert found.spent.size_bytes - saved < 40 * len(model.state_dict()) + 400
    assert found.spent.size_bytes >= 0.999 * space.size_bytes


def in_sparse_runtime(model, folder):
    """Bytes of parameters and buffers of a saved model that stays compressed."""
    config = has.SparsityConfig(runtime="sparse")
    loaded = type(model).from_pretrained(folder, sparsity_config=config)
    report = has.sparsity_report(loaded)
    # The report counts the offsets, which are buffers, too.
    buffers = [b for name, b in loaded.named_buffers() if not name.endswith("row_offsets")]
    buffer_bytes = sum(buffer.nbytes for buffer in buffers)
    return report.total.memory_bytes + report.other_bytes + buffer_bytes


def saved_as_found(model, space, folder):
    found = uniform_candidate(space, ModelShape.of(model, space))
    config = has.SparsityConfig(
        metric="magnitude",
        sparsity=found.ratios,
        weight_bits=dict(found.weight_bits),
        kv_cache=False,
    )
    has.prune(model, config, None, progress=False)
    model.save_pretrained(folder)
    return found


ONE_TOKEN = {"context_length": 1, "kv_bits": None}


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_memory_and_the_files_of_quantised_weights_are_predicted(tiny_llama, tmp_path, bits):
    space = SearchSpace(weight_bits=bits, size_bytes="1GB", fit_bytes="1GB", **ONE_TOKEN)
    found = saved_as_found(tiny_llama, space, tmp_path)
    saved = weight_bytes_on_disk(tmp_path)
    assert 0 <= found.spent.size_bytes - saved < 130 * len(tiny_llama.state_dict()) + 400
    held = in_sparse_runtime(tiny_llama, tmp_path)
    cache = 4 * 2 * 32 * 4  # one token in four layers, float32
    # A few kept weights may round to 0.
    assert held <= found.spent.fit_bytes - cache <= 1.005 * held


@pytest.mark.parametrize(
    ("model_type", "bits"), [("mixtral", 16), ("mixtral", 8), ("mixtral", 4), ("gpt_oss", 16)]
)
def test_the_memory_of_experts_is_predicted(model_type, bits, tmp_path):
    """Those of gpt_oss are transposed: the sparse runtime decompresses them."""
    model = tiny_model(model_type)
    space = SearchSpace(weight_bits=bits, fit_bytes="1GB", **ONE_TOKEN)
    found = saved_as_found(model, space, tmp_path)
    held = in_sparse_runtime(model, tmp_path)
    predicted = found.spent.fit_bytes - CacheBytes.of(model, space).at_most(None)
    assert held <= predicted <= 1.005 * held


SPACES = {
    "sparsity": {"target_sparsity": "free", "kv_bits": None, "size_bytes": 330_000},
    "projections": {
        "target_sparsity": "free",
        "granularity": "layer-projection",
        "kv_bits": None,
        "size_bytes": 330_000,
    },
    "all, in memory": {
        "target_sparsity": "free",
        "weight_bits": (4, 8, 16),
        "kv_bits": (2, 3, 4, 6, 8, 16),
        "kv_apart": True,
        "fit_bytes": 220_000,
        "context_length": 400,
        **KV,
    },
    "both limits": {
        "target_sparsity": "free",
        "weight_bits": (8, 16),
        "kv_bits": (4, 8),
        "fit_bytes": 320_000,
        "context_length": 400,
        "size_bytes": 250_000,
        **KV,
    },
}


@pytest.mark.parametrize("name", SPACES)
def test_every_draw_meets_the_budget_and_lands_under_it(tiny_llama, name):
    space = SearchSpace(**SPACES[name])
    shape = ModelShape.of(tiny_llama, space)
    generator = torch.Generator().manual_seed(0)
    digests = set()
    for _ in range(12):
        params = uniform_params(space, shape)
        for key in params:
            share = float(torch.rand((), generator=generator))
            if key.startswith("sparsity"):
                low, high = space.grid
                params[key] = low + round(share * (high - low) / space.step) * space.step
            elif key.startswith("weight"):
                params[key] = share * (len(space.weight_bits) - 1)
            else:
                params[key] = share * (len(space.kv_bits) - 1)
        found = suggest(FixedTrial(params), space, shape)
        digests.add(found.digest)
        limits = {n: getattr(space, n) for n in ("fit_bytes", "size_bytes")}
        spent = found.spent.to_dict()
        assert all(spent[n] <= limit for n, limit in limits.items() if limit is not None)
        nearest = max(spent[n] / limit for n, limit in limits.items() if limit is not None)
        assert 0.999 <= nearest <= 1
        ratios = found.block_ratios
        assert all(space.low - 1e-9 <= ratio <= space.high + 1e-9 for ratio in ratios)
        assert suggest(FixedTrial(params), space, shape) == found
    assert len(digests) > 6


def test_where_ratios_are_fixed_widths_fill_the_limit(tiny_llama):
    settings = {"kv_bits": (2, 3, 4, 6, 8), "kv_apart": True, "context_length": 400, **KV}
    space = SearchSpace(fit_bytes=500_000, **settings)
    shape = ModelShape.of(tiny_llama, space)
    params = dict.fromkeys(uniform_params(space, shape), 0.0)
    params |= {key: 0.5 for key in params if key.startswith("sparsity")}
    found = suggest(FixedTrial(params), space, shape)
    assert found.mean_sparsity == pytest.approx(0.5, abs=1e-5)
    assert found.spent.fit_bytes <= 500_000
    # Not one unit more could take the next width.
    budget = shape.budget
    bits = [list(pair) for pair in found.kv_cache.layer_bits(4)]
    for layer in range(4):
        for part in range(2):
            wider = [list(pair) for pair in bits]
            place = (2, 3, 4, 6, 8).index(wider[layer][part])
            if place < 4:
                wider[layer][part] = (2, 3, 4, 6, 8)[place + 1]
                spent = budget.spent(found.removed, {}, [tuple(pair) for pair in wider])
                assert spent.fit_bytes > 500_000


def test_a_limit_above_the_dense_model_leaves_it_dense(tiny_llama):
    space = SearchSpace(target_sparsity="free", size_bytes="1GB", kv_bits=None)
    found = uniform_candidate(space, ModelShape.of(tiny_llama, space))
    assert found.mean_sparsity == 0


def test_an_impossible_limit_is_refused_with_the_smallest_reachable_figure(tiny_llama):
    space = SearchSpace(target_sparsity="free", size_bytes=50_000, kv_bits=None)
    shape = ModelShape.of(tiny_llama, space)
    with pytest.raises(
        ValueError, match=r"size_bytes is 50,000 bytes, the smallest reachable"
    ) as e:
        uniform_candidate(space, shape)
    assert "kv_bits" not in str(e.value)  # files hold no cache
    assert "context" not in str(e.value)
    smallest = int(str(e.value).split("smallest reachable ")[1].split(" bytes")[0].replace(",", ""))
    least = SearchSpace(target_sparsity="free", size_bytes=smallest, kv_bits=None)
    found = uniform_candidate(least, ModelShape.of(tiny_llama, least))
    assert found.spent.size_bytes == smallest
    assert found.mean_sparsity == pytest.approx(least.high, abs=1e-3)


def test_a_limit_of_memory_that_is_refused_may_be_met_by_a_smaller_cache(tiny_llama):
    space = SearchSpace(target_sparsity="free", fit_bytes=50_000, context_length=64)
    smaller = (
        r"narrower weight_bits \(--search-weight-bits\) or kv_bits \(--kv-bits\), or a shorter"
    )
    with pytest.raises(ValueError, match=f"{smaller} context"):
        uniform_candidate(space, ModelShape.of(tiny_llama, space))


def test_an_exact_mean_and_a_limit_that_contradict_each_other_are_refused(tiny_llama):
    space = SearchSpace(target_sparsity=0.3, size_bytes=250_000, kv_bits=None)
    with pytest.raises(ValueError, match=r"No profile.*target_sparsity='free'"):
        uniform_candidate(space, ModelShape.of(tiny_llama, space))


def test_tied_weights_and_buffers_count_once(tiny_llama):
    space = SearchSpace(
        target_sparsity="free", size_bytes="1GB", fit_bytes="1GB", context_length=1, kv_bits=None
    )
    budget = ByteBudget.of(tiny_llama, space)
    dense = sum(p.nbytes for p in tiny_llama.parameters())
    buffers = sum(b.nbytes for b in tiny_llama.buffers())
    spent = budget.spent({}, {}, None)
    assert spent.fit_bytes == dense + buffers + 4 * 2 * 32 * 4
    assert dense < spent.size_bytes < dense + 10_000
