"""Our search against the paper's procedure: time per trial, and what is found in the same time.

For every seed the paper's procedure (see `paper_procedure.py`) runs a number of trials. Ours runs
the same number of trials in the same space, and then, under the same budget but in a wider range,
for the wall-clock time that the paper's trials took, ranking and sensitivity included: once with a
ratio per block, as the paper has it, and once with a ratio per linear. All profiles found are
pruned anew, layer by layer, on the same calibration windows, and scored on windows that nobody saw.

    python benchmarks/search.py              # 15 to 20 minutes on two quiet cores
    python benchmarks/search.py --seeds 1 --trials 3 --held-out-windows 8      # a look
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import optuna
from environment import shared, write_result
from paper_procedure import PaperSearch, pruned_perplexity
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from hf_adaptive_sparse.calibration.data import load_batches
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.search.candidate import uniform_candidate
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search

METRIC = "lognorm"
KINDS = ("paper", "equal_trials", "equal_time", "equal_time_fine")
MANY = 100_000
"""More trials than any wall-clock limit here allows."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: the shared tiny-llava")
    parser.add_argument("--text", type=Path, help="folder with calibration and evaluation.parquet")
    parser.add_argument("--evaluation-windows", type=int, default=32)
    parser.add_argument("--held-out-windows", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--trials", type=int, default=8, help="of the paper's procedure, per seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--range", type=float, default=0.1, help="of ratios, for equal wall-clock")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


class Data:
    """The windows: calibration twice as many as evaluation; held-out ones from the rest."""

    def __init__(self, options: argparse.Namespace, source: Path, config: Any) -> None:
        tokenizer = AutoTokenizer.from_pretrained(source)
        text = options.text or shared("data/wikitext2")
        count = options.evaluation_windows

        def windows(name: str, number: int) -> list[Any]:
            return load_batches(
                text / f"{name}.parquet",
                tokenizer,
                config=config,
                num_samples=number,
                sequence_length=options.sequence_length,
                shuffle=False,
            )

        found = windows("calibration", 3 * count)
        self.calibration, self.evaluation = found[: 2 * count], found[2 * count :]
        self.held_out = windows("evaluation", options.held_out_windows)


class Comparison:
    """What the runs share: how models are loaded, and the scores of finished profiles."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = options.model or shared("models/tiny-llava")
        self.data = Data(options, self.source, self.load().config)
        self.paper_space = SearchSpace()
        self.wide_space = SearchSpace(sparsity_range=options.range)
        self.fine_space = replace(self.wide_space, granularity="layer-projection")

    def load(self) -> Any:
        """Load the dense model from disk."""
        return AutoModelForImageTextToText.from_pretrained(
            self.source, dtype=self.options.dtype
        ).eval()

    def held_out(self, profile: CompressionProfile) -> float:
        """Return the held-out perplexity of a profile, pruned layer by layer."""
        return pruned_perplexity(
            self.load(), profile, self.data.calibration, self.data.held_out, METRIC
        )

    def ours(self, space: SearchSpace, seed: int, **limits: Any) -> tuple[SearchResult, float]:
        """Run our search; return its result and the wall-clock time, loading included."""
        start = perf_counter()
        result = search(
            self.load(),
            self.data.calibration,
            self.data.evaluation,
            space,
            metric=METRIC,
            seed=seed,
            progress=False,
            **limits,
        )
        return result, perf_counter() - start

    def seed(self, seed: int) -> dict[str, Any]:
        """Run all three searches with one seed."""
        trials = self.options.trials
        paper = PaperSearch(
            self.load, self.paper_space, self.data.calibration, self.data.evaluation, METRIC
        )
        study = paper.run(trials, seed)
        paper_seconds = sum(paper.seconds)
        equal, equal_seconds = self.ours(self.paper_space, seed, n_trials=trials)
        timed = {
            kind: self.ours(space, seed, n_trials=MANY, timeout_seconds=paper_seconds)
            for kind, space in zip(KINDS[2:], (self.wide_space, self.fine_space), strict=True)
        }
        best = CompressionProfile.from_dict(study.best_trial.user_attrs["profile"])
        return {
            "seed": seed,
            "paper": {
                "trials": trials,
                "seconds": paper_seconds,
                "trial_seconds": paper.seconds,
                "best_value": study.best_value,
                "held_out": self.held_out(best),
            },
            "equal_trials": self._run(equal, equal_seconds),
            **{kind: self._run(*found) for kind, found in timed.items()},
        }

    def _run(self, result: SearchResult, seconds: float) -> dict[str, Any]:
        rows = [row for row in result.history if row["duplicate_of"] is None]
        return {
            "trials": len(rows),
            "stopped_early": sum(row["state"] == "pruned" for row in rows),
            "failed": sum(row["state"] == "fail" for row in rows),
            "seconds": seconds,
            "trial_seconds": [row["seconds"] for row in rows],
            "full_trial_seconds": [r["seconds"] for r in rows if r["state"] == "complete"],
            "reused": mean(row["reused"] or 0.0 for row in rows),
            "best_value": result.best_value,
            "uniform_value": result.baseline,
            "block_ratios": result.history[result.best_trial.number]["block_ratios"],
            "held_out": self.held_out(result.best_profile),
        }


def summary(runs: Sequence[Mapping[str, Any]], dense: float, uniform: float) -> dict[str, Any]:
    """Return the figures asked for."""
    paper_trial = median(s for run in runs for s in run["paper"]["trial_seconds"])
    timed = [run["equal_time"] for run in runs]  # the paper's eight blocks, our defaults
    full = median(s for run in timed for s in run["full_trial_seconds"])
    typical = median(s for run in timed for s in run["trial_seconds"])
    gains = {kind: [uniform - run[kind]["held_out"] for run in runs] for kind in KINDS}
    return {
        "held_out_dense": dense,
        "held_out_uniform": uniform,
        "paper_trial_seconds": paper_trial,
        "full_trial_seconds": full,
        "median_trial_seconds": typical,
        "full_trial_speedup": paper_trial / full,
        "median_trial_speedup": paper_trial / typical,
        "held_out": {kind: mean(r[kind]["held_out"] for r in runs) for kind in gains},
        "gain_over_uniform": {kind: mean(values) for kind, values in gains.items()},
        "gain_stdev": {k: stdev(v) if len(v) > 1 else 0.0 for k, v in gains.items()},
        "gain_over_paper": {k: mean(v) / mean(gains["paper"]) for k, v in gains.items()},
    }


def table(document: Mapping[str, Any]) -> str:
    """Return the result for people."""
    figures, runs = document["summary"], document["runs"]
    names = {
        "paper": "the paper's procedure",
        "equal_trials": "ours, the same space and number of trials",
        "equal_time": f"ours, the same time, ± {document['range']:g} per block",
        "equal_time_fine": f"ours, the same time, ± {document['range']:g} per linear",
    }
    lines = [
        "# Our search against the paper's procedure",
        "",
        f"{document['model']}, mean sparsity exactly 50 %, mean KV bits 7, {len(runs)} seeds; "
        f"{document['windows']['calibration']} calibration, {document['windows']['evaluation']} "
        f"evaluation and {document['windows']['held_out']} held-out windows of "
        f"{document['settings']['sequence_length']} tokens. Held-out perplexity after pruning "
        f"layer by layer: dense {figures['held_out_dense']:.3f}, uniform "
        f"{figures['held_out_uniform']:.3f}.",
        "",
        "| search | trials | seconds | held-out perplexity | gain over uniform (stdev) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, name in names.items():
        lines.append(
            f"| {name} | {mean(r[kind]['trials'] for r in runs):.0f} "
            f"| {mean(r[kind]['seconds'] for r in runs):.1f} "
            f"| {figures['held_out'][kind]:.3f} "
            f"| {figures['gain_over_uniform'][kind]:.3f} ({figures['gain_stdev'][kind]:.3f}) |"
        )
    lines += [
        "",
        "| time per trial | seconds | the paper's trial takes |",
        "| --- | ---: | ---: |",
        f"| the paper's procedure | {figures['paper_trial_seconds']:.2f} | |",
        f"| ours, evaluated in full | {figures['full_trial_seconds']:.2f} "
        f"| {figures['full_trial_speedup']:.1f} × as long |",
        f"| ours, median trial | {figures['median_trial_seconds']:.3f} "
        f"| {figures['median_trial_speedup']:.1f} × as long |",
        "",
        f"In the same time ours gains {figures['gain_over_paper']['equal_time']:.2f} × (per block) "
        f"and {figures['gain_over_paper']['equal_time_fine']:.2f} × (per linear) what the paper's "
        "procedure gains over uniform (means of the seeds).",
    ]
    return "\n".join(lines)


def main() -> None:
    options = parse()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    disable_progress_bar()  # a model is loaded for every trial of the paper's procedure
    comparison = Comparison(options)
    model = comparison.load()
    dense = perplexity(model, comparison.data.held_out, False)
    space = comparison.paper_space
    even = uniform_candidate(space, ModelShape.of(model, space)).profile
    uniform = comparison.held_out(even)
    runs = []
    for seed in range(options.seeds):
        runs.append(comparison.seed(seed))
        print({k: (v["held_out"] if isinstance(v, dict) else v) for k, v in runs[-1].items()})
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "text")}
    document = {
        "model": Path(comparison.source).name,
        "settings": settings,
        "range": options.range,
        "windows": {
            name: len(getattr(comparison.data, name))
            for name in ("calibration", "evaluation", "held_out")
        },
        "summary": summary(runs, dense, uniform),
        "runs": runs,
    }
    text = table(document)
    path = write_result("search", document, text)
    print(f"{text}\n\nwrote {path}")


if __name__ == "__main__":
    main()
