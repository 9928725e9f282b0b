"""Every family of the catalogue: prune, count, save, load bit for bit, generate; see `matrix`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import cache_argument
from tests.families.catalogue import FAMILIES, Family
from tests.families.matrix import CACHE, generate, make_batch, run
from tests.families.tiny_models import tiny_model

RESULT = Path(__file__).resolve().parents[2] / "benchmarks/results/families.json"
PUBLISHED = {row["family"]: row for row in json.loads(RESULT.read_text(encoding="utf-8"))["rows"]}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_family_is_as_published(family: Family, tmp_path: Path) -> None:
    outcome = run(family, tmp_path)
    row = PUBLISHED[family.title]
    assert (outcome.status, outcome.remark) == (row["status"], row["remark"])


def test_enough_families_work_and_none_is_missing() -> None:
    titles = [family.title for family in FAMILIES]
    assert len(set(titles)) == len(titles)
    assert list(PUBLISHED) == titles
    working = {f.model_type for f in FAMILIES if PUBLISHED[f.title]["status"] == "works"}
    assert len(working) >= 30


def test_a_model_that_cannot_be_pruned_takes_the_cache(tmp_path: Path) -> None:
    family = next(f for f in FAMILIES if f.model_type == "gpt2")
    model = tiny_model(family.model_type, family.changes)
    config = has.SparsityConfig(target_sparsity=0, kv_cache=CACHE)
    has.prune(model, config, progress=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    output = generate(loaded, make_batch(family, loaded))
    assert isinstance(output[cache_argument(loaded)], has.AdaptiveQuantizedCache)
