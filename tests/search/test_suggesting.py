from __future__ import annotations

import pytest
from optuna.trial import FixedTrial

from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.suggesting import params_for, suggest, uniform_params

SPACES = [
    SearchSpace(blocks=4),
    SearchSpace(blocks=2, granularity="block-projection", kv_apart=True),
    SearchSpace(granularity="layer", kv_bits=(2, 3, 4, 6, 8, 16), kv_mean_bits=4, kv_apart=True),
]


@pytest.mark.parametrize("space", SPACES)
def test_a_search_can_start_from_any_profile_on_the_budget(tiny_llama, space):
    shape = ModelShape.of(tiny_llama, space)
    ratios = [0.55 if index % 2 else 0.45 for index in range(len(shape.groups))]
    drawn = uniform_params(space, shape)
    for index, name in enumerate(shape.kv.parameters):
        drawn[name] = (index * 0.37) % 1.0
    wanted = suggest(FixedTrial(drawn), space, shape)
    bits = wanted.kv_cache.layer_bits(shape.num_layers)
    params = params_for(space, shape, ratios, bits)
    assert set(params) == set(uniform_params(space, shape))
    found = suggest(FixedTrial(params), space, shape)
    assert found.kv_cache == wanted.kv_cache
    if space.granularity != "block-projection":  # groups of one size: already on the budget
        assert found.block_ratios == tuple(ratios)
    assert params_for(space, shape) == uniform_params(space, shape)


def test_ratios_off_the_grid_are_moved_onto_it(tiny_llama):
    space = SearchSpace(blocks=2, kv_bits=None)
    shape = ModelShape.of(tiny_llama, space)
    params = params_for(space, shape, [0.9, 0.462])
    assert params == {"sparsity_block_0": 0.55, "sparsity_block_1": 0.45}
