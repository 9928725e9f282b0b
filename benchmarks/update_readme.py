"""Write the measured table into the README, from ``results/method_table.json``.

The README's figures are never typed: they stand between two marks and a test checks that they are
what this script writes.
"""

from __future__ import annotations

import json
from pathlib import Path

from hf_adaptive_sparse.compressor import Measurement
from hf_adaptive_sparse.compressor.saving import table_rows
from hf_adaptive_sparse.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULT = ROOT / "benchmarks/results/method_table.json"
START, END = "<!-- table: method -->\n", "<!-- end -->"


def readme_table() -> str:
    """Return what stands between the marks."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    measured = [Measurement(**row) for row in result["table"]]
    machine = result["environment"]
    return (
        f"{markdown_table(table_rows(measured))}\n\n"
        f"<sub>A LLaVA-architecture model of 13 M parameters, WikiText-2 and easy-VQA test data "
        f"that neither calibration nor search saw; {machine['processor']}, {machine['threads']} "
        f"thread, seed {result['seed']}; seconds include the search. From "
        f"[benchmarks/results/method_table.md](benchmarks/results/method_table.md), which also has "
        f"30 to 70 %.</sub>\n"
    )


def updated(text: str) -> str:
    """Return the README's text with the table in its place."""
    before, rest = text.split(START)
    return before + START + readme_table() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
