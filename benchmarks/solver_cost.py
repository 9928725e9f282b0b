"""What does updating the weights of one linear cost, in time and memory?

A linear ``(out, in)`` with a synthetic Hessian of correlated inputs: the mask alone (wanda), OBS on
that mask, least squares on it, sparsegpt and alps. Sizes are those of a down projection of a 7 B
model (4096 x 11008), divided by ``--divisor``; time goes with the cube of the size and memory with
its square, and the table says what that makes of a whole one. Each method runs in a process of its
own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from environment import write_result

from hf_adaptive_sparse.evaluation.resource_meter import ResourceMeter
from hf_adaptive_sparse.pruning.metrics import check_scores, get_metric
from hf_adaptive_sparse.pruning.output_loss import OutputLoss
from hf_adaptive_sparse.pruning.patterns import UNSTRUCTURED
from hf_adaptive_sparse.pruning.ranking import mask_from_scores, removal_count
from hf_adaptive_sparse.pruning.solvers import SOLVERS, WEIGHT_UPDATES
from hf_adaptive_sparse.report import markdown_table

OUT, IN = 4096, 11008
METHODS = ("wanda", "obs", "least_squares", "sparsegpt", "alps")


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and a Hessian ``(in, in)`` whose spectrum falls off as 1 / rank."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    inputs = torch.randn(columns, columns, generator=generator)
    inputs *= torch.arange(1, columns + 1).rsqrt().unsqueeze(1)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = inputs @ mixing
    return weight, inputs.t() @ inputs


def run(method: str, rows: int, columns: int, seed: int) -> dict[str, Any]:
    weight, hessian = problem(rows, columns, seed)
    norm, judge = hessian.diagonal().sqrt(), OutputLoss(hessian.clone())
    with ResourceMeter() as measured:
        if method in SOLVERS:
            count = removal_count(weight.numel(), 0.5)
            new, _ = SOLVERS[method](weight, OutputLoss(hessian), count, UNSTRUCTURED)
        else:
            removed = mask_from_scores(check_scores(get_metric("wanda")).score(weight, norm), 0.5)
            new = weight.masked_fill(removed, 0.0)
            if method in WEIGHT_UPDATES:
                new = WEIGHT_UPDATES[method](weight, removed, OutputLoss(hessian))
    return {
        "method": method,
        "seconds": measured.seconds,
        "peak_bytes": measured.peak_rss_bytes - measured.start_rss_bytes,
        "relative_loss": judge.of(weight - new) / judge.of(weight),
    }


def table(result: dict[str, Any]) -> str:
    scale = result["divisor"]
    hessian = 4 * result["columns"] ** 2
    rows = [
        {
            "method": row["method"],
            "seconds": f"{row['seconds']:.2f}",
            "output loss, relative": f"{row['relative_loss']:.4f}",
            "memory beyond H and W, in H": f"{row['peak_bytes'] / hessian:.2f}",
            f"{OUT} x {IN}, extrapolated": f"{row['seconds'] * scale**3 / 60:.0f} min, "
            f"{row['peak_bytes'] * scale**2 / 2**30:.1f} GiB",
        }
        for row in result["rows"]
    ]
    return "\n".join(
        [
            "# What updating the weights of one linear costs",
            "",
            f"Written by `benchmarks/solver_cost.py` for {result['rows_columns']}, 50 %, "
            f"{result['threads']} threads, a synthetic Hessian. The last column scales time by "
            f"{scale}³ and memory by {scale}²; it was not measured. H is the Hessian.",
            "",
            markdown_table(rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--divisor", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, help="run one, and print JSON")
    options = parser.parse_args()
    rows, columns = OUT // options.divisor, IN // options.divisor
    if options.method is not None:
        print(json.dumps(run(options.method, rows, columns, options.seed)))
        return
    found = []
    for method in METHODS:
        command = [sys.executable, __file__, "--method", method]
        command += ["--divisor", str(options.divisor), "--seed", str(options.seed)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    result = {
        "seed": options.seed,
        "divisor": options.divisor,
        "columns": columns,
        "rows_columns": f"{rows} x {columns}",
        "threads": torch.get_num_threads(),
        "rows": found,
    }
    write_result("solver_cost", result, table(result))


if __name__ == "__main__":
    main()
