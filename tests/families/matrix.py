"""What the matrix holds every family to, step by step, and what came of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import (
    cache_argument,
    dense_expert_weights,
    prunable_weights,
)
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.runtime.conversion import sparse_linears
from tests.families.catalogue import FIRST, PROMPT, Family
from tests.families.tiny_models import (
    FIRST_TEXT_TOKEN,
    VOCABULARY,
    feature_tokens,
    tiny_model,
)

NEW_TOKENS = 6
RATIO = 0.47
CACHE = has.KVCacheConfig(bits=8, group_size=4, residual_length=4)


def make_batch(family: Family, model: PreTrainedModel) -> dict[str, Any]:
    features = family.form(model.config)
    count = family.tokens
    if count is None:
        count = feature_tokens(model, family.kind, features) if features else 0
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(FIRST_TEXT_TOKEN, VOCABULARY, (1, PROMPT + count), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **features}
    if count:
        token = attrgetter(family.placeholder)(model.config)
        ids[:, FIRST : FIRST + count] = token
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            number = {"image": 1, "video": 2, "audio": 3}[family.kind]
            batch["mm_token_type_ids"] = (ids == token).long() * number
    return batch


@dataclass(frozen=True)
class Outcome:
    """What came of one family.

    Attributes:
        status: ``"works"``, ``"works, with a limit"`` or ``"refused"``.
        remark: The limit, or the reason.
        pruned: Weights that were pruned, of one tiny model.
        cache: Class of the cache that ``generate()`` used.
    """

    status: str
    remark: str = ""
    pruned: int = 0
    cache: str = ""


def run(family: Family, folder: Path) -> Outcome:
    """Prune, count, save, load and generate; whatever does not hold is an AssertionError."""
    model = tiny_model(family.model_type, family.changes)
    batch = make_batch(family, model)
    config = has.SparsityConfig(
        target_sparsity=RATIO,
        kv_cache=CACHE,
        calibration=has.CalibrationConfig(min_expert_tokens=1),  # a prompt is all there is
    )
    try:
        report = has.prune(model, config, [batch], progress=False)
    except ValueError as refusal:
        return Outcome("refused", str(refusal).partition(" (")[0])
    weights = prunable_weights(model)
    assert [entry.name for entry in report.modules] == list(weights)
    for entry in report.modules:
        weight = weights[entry.name].weight
        assert int((weight == 0).sum()) == entry.removed == round(RATIO * weight.numel())
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    assert_equal_bits(model.state_dict(), loaded.state_dict())
    limits = [family.limit] if family.limit else []
    experts = dense_expert_weights(model)
    if experts:
        limits.append("expert weights stay dense")
    cache = check_generation(loaded, batch)
    check_sparse_runtime(loaded, folder, batch)
    own = [isinstance(layer, AdaptiveQuantizedLayer) for layer in cache.layers]
    assert any(own)
    if not all(own):
        limits.append("linear and cross-attention layers keep transformers' cache")
    return Outcome(
        "works, with a limit" if limits else "works",
        "; ".join(limits),
        report.numel,
        type(cache).__name__,
    )


def assert_equal_bits(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> None:
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name


def check_generation(model: PreTrainedModel, batch: Mapping[str, Any]) -> AdaptiveQuantizedCache:
    """Generate with the model's own cache, with that at 16 bits, and with none of ours.

    16 bits must give the scores of the plain cache, 8 bits nearly those but not the same, or
    nothing was quantised.
    """
    caches, scores = [], []
    for profile in (None, replace(CACHE, bits=16, key_bits=None, value_bits=None), CACHE):
        model.config.quantization_config.kv_cache = profile
        output = generate(model, batch)
        caches.append(output[cache_argument(model)])
        scores.append(torch.stack(output.logits))
    plain, exact, quantised = scores
    assert torch.allclose(plain, exact, atol=1e-4)
    assert not torch.equal(quantised, plain)
    assert torch.allclose(quantised[0], plain[0], atol=0.05 * float(plain[0].std()))
    *others, cache = (getattr(cache, "self_attention_cache", cache) for cache in caches)
    assert [isinstance(other, AdaptiveQuantizedCache) for other in others] == [False, True]
    assert isinstance(cache, AdaptiveQuantizedCache)
    return cache


def check_sparse_runtime(dense: PreTrainedModel, folder: Path, batch: Mapping[str, Any]) -> None:
    """Load with the weights kept sparse in memory: every linear is, and the scores stay."""
    config = has.SparsityConfig(runtime="sparse")
    sparse = type(dense).from_pretrained(folder, sparsity_config=config).eval()
    weights = prunable_weights(dense)
    linears = {name for name, weight in weights.items() if isinstance(weight, nn.Linear)}
    assert set(sparse_linears(sparse)) == linears
    expected, found = (generate(model, batch) for model in (dense, sparse))
    assert torch.allclose(
        found.logits[0], expected.logits[0], atol=0.01 * float(expected.logits[0].std())
    )


def generate(model: PreTrainedModel, batch: Mapping[str, Any]) -> Any:
    return model.generate(
        **batch,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
