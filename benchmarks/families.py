"""Which families work: runs the matrix of ``tests/families`` and writes its table.

Afterwards ``update_readme.py`` puts the summary into the README.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import transformers
from environment import write_result

from hf_adaptive_sparse.report import markdown_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.families.catalogue import FAMILIES
from tests.families.matrix import run

INTRODUCTION = """# Families of models

A tiny random model of each family, fed what is named beside it, goes through: pruning with
`lognorm` calibrated on its features, exact counts, saving, loading bit for bit, and `generate()`
with the adaptive cache, which at 16 bits must give the scores of transformers' own. Loaded with
`runtime="sparse"`, every pruned linear stays sparse (experts are decompressed) and the scores are
those of the dense runtime.

"""


def main() -> None:
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(family, Path(folder))
        rows.append({"family": family.title, "fed": family.kind, **asdict(outcome)})
        print(f"{family.title}: {outcome.status}", flush=True)
    table = markdown_table(
        [{key: row[key] for key in ("family", "fed", "status", "remark")} for row in rows]
    )
    write_result("families", {"rows": rows}, INTRODUCTION + table)


if __name__ == "__main__":
    main()
