"""Every family of the catalogue: prune, count, save, load bit for bit, generate; see `matrix`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families.catalogue import FAMILIES, Family
from tests.families.matrix import run

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
