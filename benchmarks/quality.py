"""What do the presets of ``compress --quality`` reach at exactly the same sparsity?

Rows: dense; uniform wanda, lognorm, sparsegpt and alps; lognorm with a weight update; the presets
``paper`` and ``best``, whose profile one search found (both search the same space with the same
ranking); and the searched profile with one-shot masks, which is what the search itself saw. Every
row is pruned anew and measured on the held-out text, the rows that a person chooses between also on
the held-out visual questions. KV caches stay unquantised: `method_table.py` has them.

A gap is the mean over held-out batches of the difference in loss to the dense model, with the 95 %
interval of a bootstrap over batches. What ``best`` promises is a gap of at most 0.7 times that of
uniform sparsegpt, and answers within half a point of the dense model's.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

from environment import write_result
from inputs import Inputs, add_inputs, read_inputs, run_search
from paired import Bootstrap, Losses, held_out_losses

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor import prune
from hf_adaptive_sparse.compressor.presets import PRESETS, Preset
from hf_adaptive_sparse.evaluation.vqa import vqa_accuracy
from hf_adaptive_sparse.profiles import CalibrationConfig
from hf_adaptive_sparse.report import markdown_table
from hf_adaptive_sparse.search.result import SearchResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One model, measured.

    Attributes:
        name: What it is.
        sparsity: Ratio that is gone.
        perplexity: On the held-out text.
        gap: Mean loss above the dense model's, in nats per token.
        gap_interval: 95 % interval of ``gap``.
        gap_share: ``gap`` over that of uniform sparsegpt.
        gap_share_interval: 95 % interval of it, both gaps resampled together.
        accuracy: On the held-out questions; ``None`` where not asked.
        prune_seconds: Time of the pruning, without the search.
    """

    name: str
    sparsity: float
    perplexity: float
    gap: float
    gap_interval: tuple[float, float]
    gap_share: float
    gap_share_interval: tuple[float, float]
    accuracy: float | None
    prune_seconds: float


@dataclass(frozen=True)
class Measured:
    """What is known of a row before rows are compared."""

    name: str
    sparsity: float
    losses: Losses
    accuracy: float | None
    seconds: float


def compare(measured: Sequence[Measured], seed: int) -> list[Row]:
    """Set every row against dense and against uniform sparsegpt, on the same resampled batches."""
    by_name = {one.name: one.losses for one in measured}
    dense, rival = by_name["dense"], by_name["sparsegpt, uniform"]
    bootstrap = Bootstrap(len(dense.sums), seed)
    rows = []
    for one in measured:
        gap, gap_interval = bootstrap.gap(one.losses, dense)
        share, share_interval = bootstrap.share(one.losses, rival, dense)
        rows.append(
            Row(
                name=one.name,
                sparsity=one.sparsity,
                perplexity=one.losses.perplexity,
                gap=gap,
                gap_interval=gap_interval,
                gap_share=share,
                gap_share_interval=share_interval,
                accuracy=one.accuracy,
                prune_seconds=one.seconds,
            )
        )
    return rows


def measure_row(
    name: str, inputs: Inputs, config: SparsityConfig | None, *, questions: bool
) -> Measured:
    model = inputs.source.load_dense()
    started, sparsity = perf_counter(), 0.0
    if config is not None:
        sparsity = prune(model, config, inputs.data.calibration, progress=False).mean_sparsity
    seconds = perf_counter() - started
    losses = held_out_losses(model, inputs.data.held_out)
    accuracy = None
    if questions and inputs.data.questions is not None:
        accuracy = vqa_accuracy(
            model,
            inputs.data.processor,
            inputs.data.questions,
            num_samples=inputs.data.num_questions,
            match="prefix",
        ).accuracy
    logger.info("%s: loss %.5f, accuracy %s, %.0f s", name, losses.mean, accuracy, seconds)
    return Measured(name, sparsity, losses, accuracy, seconds)


def preset_config(preset: Preset, target: float, result: SearchResult) -> SparsityConfig:
    """The config of a preset's final prune, with the profile that was searched."""
    profile = result.best_profile.sparsity
    if profile is None:
        raise RuntimeError("The search found no sparsity profile.")
    asked = SparsityConfig(target_sparsity=target, sparsity=dict(profile.ratios))
    return preset.config(asked)


def measure_all(inputs: Inputs, target: float, trials: int | None, seed: int) -> dict[str, Any]:
    measured = [measure_row("dense", inputs, None, questions=True)]

    def uniform(metric: str, update: str | None = None, questions: bool = False) -> None:
        config = SparsityConfig(target_sparsity=target, metric=metric, weight_update=update)
        name = f"{config.method}, uniform"
        measured.append(measure_row(name, inputs, config, questions=questions))

    for metric in ("wanda", "lognorm", "sparsegpt", "alps"):
        uniform(metric, questions=metric in ("lognorm", "sparsegpt"))
    for update in ("obs", "least_squares"):
        uniform("lognorm", update)

    # One search serves both presets: their spaces and rankings are one and the same.
    best, paper = PRESETS["best"], PRESETS["paper"]
    config = SparsityConfig(target_sparsity=target)
    space = replace(best.space(config), kv_bits=None)
    if space != replace(paper.space(config), kv_bits=None):
        raise RuntimeError("The presets search different spaces: search once for each.")
    result, seconds = run_search(inputs, space, trials or best.n_trials, seed)
    for preset in (paper, best):
        config = preset_config(preset, target, result)
        name = f"quality {preset.name} ({config.method}, searched)"
        measured.append(measure_row(name, inputs, config, questions=True))
    one_shot = SparsityConfig(
        target_sparsity=target,
        metric="lognorm",
        sparsity=preset_config(paper, target, result).sparsity,
        calibration=CalibrationConfig(sequential=False),
    )
    measured.append(measure_row("lognorm, searched, one-shot", inputs, one_shot, questions=False))
    rows = compare(measured, seed)
    return {
        "target_sparsity": target,
        "seed": seed,
        "search": {
            "seconds": seconds,
            "trials": len(result.history),
            "uniform_one_shot_perplexity": result.baseline,
            "best_one_shot_perplexity": result.best_value,
            "ratios": result.best_trial.user_attrs["block_ratios"],
        },
        "held_out_tokens": sum(b["input_ids"].numel() for b in inputs.data.held_out),
        "rows": [asdict(row) for row in rows],
        "answers": answers(rows),
    }


def answers(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures that the presets are held to."""
    by_name = {row.name.partition(" (")[0]: row for row in rows}
    best, dense = by_name["quality best"], by_name["dense"]
    sequential, one_shot = by_name["quality paper"], by_name["lognorm, searched, one-shot"]
    lost = None
    if best.accuracy is not None and dense.accuracy is not None:
        lost = 100 * (dense.accuracy - best.accuracy)
    return {
        "best_gap_over_uniform_sparsegpt": best.gap_share,
        "best_gap_over_uniform_sparsegpt_interval": best.gap_share_interval,
        "wanted_at_most": 0.7,
        "best_accuracy_points_below_dense": lost,
        "wanted_points_at_most": 0.5,
        "one_shot_over_sequential_perplexity": one_shot.perplexity / sequential.perplexity - 1,
    }


def table(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        low, high = row["gap_interval"]
        shares = row["gap_share_interval"]
        share = f"{row['gap_share']:.3f}"
        if row["name"] not in ("dense", "sparsegpt, uniform"):
            share += f" ({shares[0]:.3f} … {shares[1]:.3f})"
        rows.append(
            {
                "model": row["name"],
                "sparsity": f"{row['sparsity']:.4%}",
                "perplexity": f"{row['perplexity']:.3f}",
                "gap, nats per token": f"{row['gap']:.4f} ({low:.4f} … {high:.4f})",
                "gap / uniform sparsegpt": share,
                "accuracy": "" if row["accuracy"] is None else f"{row['accuracy']:.2%}",
                "prune, s": f"{row['prune_seconds']:.0f}",
            }
        )
    found, search = result["answers"], result["search"]
    lost = found["best_accuracy_points_below_dense"]
    return "\n".join(
        [
            "# The presets, measured",
            "",
            "Written by `benchmarks/quality.py`; machine, versions and seed are in the JSON beside "
            "this file. In brackets: 95 % intervals of a bootstrap over held-out batches.",
            "",
            markdown_table(rows),
            "",
            f"`best` leaves {found['best_gap_over_uniform_sparsegpt']:.2f} of uniform sparsegpt's "
            f"gap (wanted: at most {found['wanted_at_most']})"
            + (
                ""
                if lost is None
                else f" and answers {lost:.2f} points below the dense model (wanted: at most "
                f"{found['wanted_points_at_most']})"
            )
            + ".",
            "",
            "The profile that the one-shot ranking found, applied with one-shot masks, is "
            f"{found['one_shot_over_sequential_perplexity']:+.2%} in perplexity against sequential "
            "calibration.",
            "",
            f"One search of {search['trials']} trials served both presets "
            f"({search['seconds']:.0f} s). Ratios per block: "
            f"{' '.join(f'{ratio:.3f}' for ratio in search['ratios'])}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--target-sparsity", type=float, default=0.5)
    parser.add_argument("--trials", type=int, help="default: the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="quality", help="name of the result files")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    result = measure_all(
        read_inputs(options), options.target_sparsity, options.trials, options.seed
    )
    result["options"] = {name: str(value) for name, value in vars(options).items()}
    write_result(options.name, result, table(result))


if __name__ == "__main__":
    main()
