"""The method on a trained vision-language model: every metric, the search, and the KV cache.

Two tables. The first, at one sparsity: dense, each metric uniform, the searched profile, and the
KV profiles. The second, at 30 to 70 %: wanda, sparsegpt, lognorm and lognorm + search, with the
ratios found. Calibration and search use only the calibration files; every figure is measured on
the evaluation files, which neither saw.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from typing import Any

from environment import write_result
from inputs import add_inputs, read_inputs, run_search

from hf_adaptive_sparse.compressor import Measurement
from hf_adaptive_sparse.compressor.saving import table_rows
from hf_adaptive_sparse.demo.method_table import method_table
from hf_adaptive_sparse.report import markdown_table
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.space import SearchSpace

logger = logging.getLogger(__name__)


def found(result: SearchResult, seconds: float) -> dict[str, Any]:
    """What a search found, for the JSON."""
    best = next(t for t in result.history if t["number"] == result.best_trial.number)
    return {
        "seconds": seconds,
        "trials": len(result.history),
        "uniform_one_shot_perplexity": result.baseline,
        "best_one_shot_perplexity": result.best_value,
        "best_trial": best["number"],
        "block_ratios": best["block_ratios"],
        "key_bits": best["key_bits"],
        "value_bits": best["value_bits"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--sweep-trials", type=int, default=30)
    parser.add_argument("--sweep-questions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.3, 0.4, 0.5, 0.6, 0.7])
    parser.add_argument("--name", default="method_table", help="name of the result files")
    options = parser.parse_args()
    inputs = read_inputs(options)

    result, seconds = run_search(inputs, SearchSpace(), options.trials, options.seed)
    first = method_table(
        inputs.source, inputs.data, result.best_profile, search_seconds=seconds, progress=True
    )
    joint = found(result, seconds)

    sweep: list[tuple[float, list[Measurement], dict[str, Any]]] = []
    swept = replace(inputs.data, num_questions=options.sweep_questions)
    dense = None
    for ratio in options.ratios:
        space = SearchSpace(target_sparsity=ratio, kv_bits=None)
        result, seconds = run_search(inputs, space, options.sweep_trials, options.seed)
        rows = method_table(
            inputs.source,
            swept,
            result.best_profile,
            target_sparsity=ratio,
            search_seconds=seconds,
            metrics=("wanda", "sparsegpt", "lognorm"),
            kv_caches=False,
            dense=dense,
            progress=True,
        )
        dense = rows[0]
        sweep.append((ratio, rows, found(result, seconds)))

    write_result(
        options.name,
        {
            "seed": options.seed,
            "options": {name: str(value) for name, value in vars(options).items()},
            "search_tokens": sum(batch["input_ids"].numel() for batch in inputs.searched),
            "held_out_tokens": sum(b["input_ids"].numel() for b in inputs.data.held_out),
            "table": [row.to_dict() for row in first],
            "search": joint,
            "sweep": [
                {"target_sparsity": ratio, "table": [r.to_dict() for r in rows], "search": which}
                for ratio, rows, which in sweep
            ],
        },
        tables(first, joint, sweep),
    )


def tables(
    first: list[Measurement],
    joint: dict[str, Any],
    sweep: list[tuple[float, list[Measurement], dict[str, Any]]],
) -> str:
    """The two tables as Markdown."""
    dense = first[0].perplexity
    lines = [
        "# The method, measured",
        "",
        "Written by `benchmarks/method_table.py`; machine, versions and seed are in the JSON "
        "beside this file. Perplexity and accuracy are measured on data that neither calibration "
        "nor search saw; seconds are of one run on a shared machine.",
        "",
        f"The search of the first table had {joint['trials']} trials, those of the second "
        f"{sweep[0][2]['trials'] if sweep else 0} each.",
        "",
        "## One sparsity",
        "",
        markdown_table(table_rows(first)),
        "",
        f"Ratios found per block: {_ratios(joint['block_ratios'])}. "
        f"Key bits {joint['key_bits']}, value bits {joint['value_bits']}. "
        f"On the search's own data, with one-shot masks: uniform "
        f"{joint['uniform_one_shot_perplexity']:.3f}, best "
        f"{joint['best_one_shot_perplexity']:.3f}.",
        "",
        "## From 30 to 70 %",
        "",
    ]
    rows = []
    for ratio, measured, which in sweep:
        row: dict[str, object] = {"target sparsity": f"{ratio:.0%}"}
        for one in measured:
            row[one.name] = f"{one.perplexity:.2f} ({one.perplexity / dense - 1:+.1%})"
        row["ratios found per block"] = _ratios(which["block_ratios"])
        rows.append(row)
    lines += [markdown_table(rows), "", "Accuracy on the visual questions:", ""]
    rows = [
        {
            "target sparsity": f"{ratio:.0%}",
            **{one.name: f"{one.accuracy:.1%}" for one in measured if one.accuracy is not None},
        }
        for ratio, measured, _ in sweep
    ]
    lines.append(markdown_table(rows))
    return "\n".join(lines)


def _ratios(ratios: list[float]) -> str:
    return " ".join(f"{ratio:.3f}" for ratio in ratios)


if __name__ == "__main__":
    main()
