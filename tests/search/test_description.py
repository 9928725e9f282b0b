"""What a profile changes in each layer, and the bytes that it leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.description import candidate_bytes, layer_settings
from hf_adaptive_sparse.search.linear_bytes import LinearBytes

NAMES = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("q", "up")]
KV = KVCacheConfig(key_bits=(8, 6, 8), value_bits=(8, 6, 8))
PROFILE = Candidate(
    block_ratios=(0.5,),
    removed=dict.fromkeys(NAMES, 10),
    numel=dict.fromkeys(NAMES, 20),
    kv_cache=KV,
    mean_kv_bits=22 / 3,
)


def settings(candidate):
    return layer_settings(candidate, "model.layers", 3)


@pytest.mark.parametrize(
    "change",
    [
        {"removed": PROFILE.removed | {NAMES[3]: 11}},
        {"weight_bits": {NAMES[2]: 8}},
        {"kv_cache": replace(KV, key_bits=(8, 8, 8))},
        {"kv_cache": replace(KV, value_bits=(8, 8, 8))},
    ],
)
def test_only_the_layer_that_changes_has_other_settings(change):
    before, after = settings(PROFILE), settings(replace(PROFILE, **change))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


@pytest.mark.parametrize("field", ["group_size", "residual_length", "sink_length"])
def test_what_all_layers_share_changes_all(field):
    after = settings(replace(PROFILE, kv_cache=replace(KV, **{field: 32})))
    assert all(a != b for a, b in zip(settings(PROFILE), after, strict=True))


def test_a_cache_that_is_left_alone_is_another_setting():
    assert settings(replace(PROFILE, kv_cache=None))[0] != settings(PROFILE)[0]


def test_bytes_are_those_of_each_linear_in_its_format():
    linears = dict.fromkeys(NAMES, LinearBytes(4, 5, value_bytes=2))
    # A row of the bitmask is a byte, and a scale per row and group two.
    assert candidate_bytes(PROFILE, linears) == 6 * (10 * 2 + 4)
    quantised = replace(PROFILE, weight_bits={NAMES[0]: 4, NAMES[1]: 8})
    assert candidate_bytes(quantised, linears) == 4 * (20 + 4) + (5 + 4 + 8) + (10 + 4 + 8)
    dense = replace(PROFILE, removed={})
    assert candidate_bytes(dense, linears) == 120 * 2
