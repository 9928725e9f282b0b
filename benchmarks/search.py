"""Our search against the paper's procedure: time per trial, and what is found in the same time.

For every seed the paper's procedure (see `paper_procedure.py`) runs a number of trials. Ours runs
the same number of trials in the same space, and then, under the same budget, for the wall-clock
time that the paper's trials took, loading, ranking and sensitivity included:

- in a wider range, scored on the evaluation windows alone, as the paper's procedure is;
- the same, scored on the evaluation and the calibration windows: the paper's procedure has both,
  and a trial of ours is cheap enough to look at all of them;
- with the preset ``best``, whose final prune updates the weights; its time counts, too.

All profiles found are pruned anew, layer by layer, on the same calibration windows, and scored on
windows that nobody saw. Gains are over the uniform profile without an update. How much a profile
can gain at all is bounded by a search on the held-out windows themselves, which is no search that
anybody could run: ``--bound-seconds`` says how long it looks (0: not at all).
What searches say when they end (widths without a difference) is left out on both sides.

A seed takes about eight minutes of one core. The result is written after each of them, so that a
run that is stopped leaves those that it finished.

    OMP_NUM_THREADS=1 python benchmarks/search.py        # three quarters of an hour on a quiet core
    python benchmarks/search.py --seeds 1 --trials 2 --held-out-windows 8      # a look
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import optuna
from environment import describe, shared, write_result
from paper_procedure import PaperSearch, prune_in_place
from search_table import summary, table
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from hf_adaptive_sparse.calibration.data import load_batches
from hf_adaptive_sparse.compressor.presets import get_preset
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.search.evaluator import open_evaluator
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search
from hf_adaptive_sparse.search.suggesting import uniform_candidate

METRIC = "lognorm"
BEST = get_preset("best")
MANY = 100_000
"""More trials than any wall-clock limit here allows."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: the shared tiny-llava")
    parser.add_argument("--text", type=Path, help="folder with calibration and evaluation.parquet")
    parser.add_argument("--evaluation-windows", type=int, default=32)
    parser.add_argument("--held-out-windows", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--trials", type=int, default=6, help="of the paper's procedure, per seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--range", type=float, default=0.2, help="of ratios, for equal wall-clock")
    parser.add_argument("--bound-seconds", type=float, default=300.0)
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
        # A search's own clock starts when the weights are ranked.
        self.preparation = self.preparing(self.wide_space)
        shape = ModelShape.of(self.load(), self.paper_space)
        uniform = uniform_candidate(self.paper_space, shape).profile
        self.uniform, _ = self.finished(uniform)
        _, self.updating = self.finished(uniform, BEST.metric)

    def load(self) -> Any:
        """Load the dense model from disk."""
        return AutoModelForImageTextToText.from_pretrained(
            self.source, dtype=self.options.dtype
        ).eval()

    def preparing(self, space: SearchSpace) -> float:
        """Return the seconds that loading and ranking take."""
        start = perf_counter()
        model = self.load()
        shape = ModelShape.of(model, space)
        with open_evaluator(
            model,
            space,
            shape,
            uniform_candidate(space, shape),
            calibration=self.data.calibration,
            evaluation=self.data.evaluation,
            metric=METRIC,
            progress=False,
        ):
            return perf_counter() - start

    def finished(self, profile: CompressionProfile, metric: str = METRIC) -> tuple[float, float]:
        """Prune with a profile, layer by layer; return held-out perplexity and the prune's time."""
        model = self.load()
        start = perf_counter()
        prune_in_place(model, profile, self.data.calibration, metric)
        seconds = perf_counter() - start
        return perplexity(model, self.data.held_out, profile.kv_cache), seconds

    def ours(
        self, space: SearchSpace, seed: int, evaluation: Any = None, **limits: Any
    ) -> tuple[SearchResult, float]:
        """Run our search; return its result and the wall-clock time, loading included."""
        start = perf_counter()
        result = search(
            self.load(),
            self.data.calibration,
            evaluation or self.data.evaluation,
            space,
            metric=METRIC,
            seed=seed,
            compare_widths=False,
            progress=False,
            **limits,
        )
        return result, perf_counter() - start

    def within(
        self, seconds: float, space: SearchSpace, seed: int, evaluation: Any = None
    ) -> tuple[SearchResult, float]:
        """Run our search for so long, loading and ranking included."""
        left = max(1.0, seconds - self.preparation)
        return self.ours(space, seed, evaluation, n_trials=MANY, timeout_seconds=left)

    def seed(self, seed: int) -> dict[str, Any]:
        """Run all searches with one seed."""
        trials, both = self.options.trials, self.data.evaluation + self.data.calibration
        paper = PaperSearch(
            self.load, self.paper_space, self.data.calibration, self.data.evaluation, METRIC
        )
        study = paper.run(trials, seed)
        seconds = sum(paper.seconds)
        best = CompressionProfile.from_dict(study.best_trial.user_attrs["profile"])
        wide = self.wide_space
        return {
            "seed": seed,
            "paper": {
                "trials": trials,
                "seconds": seconds,
                "trial_seconds": paper.seconds,
                "best_value": study.best_value,
                "held_out": self.finished(best)[0],
            },
            "equal_trials": self._run(*self.ours(self.paper_space, seed, n_trials=trials)),
            "equal_time": self._run(*self.within(seconds, wide, seed)),
            "equal_time_both": self._run(*self.within(seconds, wide, seed, both)),
            "equal_time_best": self._run(
                *self.within(seconds - self.updating, self.paper_space, seed, both), BEST.metric
            ),
        }

    def bound(self, seconds: float) -> dict[str, Any]:
        """Search on the held-out windows themselves: what profiles of the spaces can gain."""
        return {
            name: self._run(*self.within(seconds, space, 0, self.data.held_out))
            for name, space in (("paper", self.paper_space), ("wide", self.wide_space))
        }

    def _run(self, result: SearchResult, seconds: float, metric: str = METRIC) -> dict[str, Any]:
        ran = [row for row in result.history if row["seconds"] is not None]
        rows = [row for row in ran if row["duplicate_of"] is None]
        held_out, pruning = self.finished(result.best_profile, metric)
        return {
            "trials": len(rows),
            "stopped_early": sum(row["state"] == "pruned" for row in rows),
            "failed": sum(row["state"] == "fail" for row in rows),
            "seconds": seconds,
            "pruning_seconds": pruning,
            "trial_seconds": [row["seconds"] for row in rows],
            "full_trial_seconds": [r["seconds"] for r in rows if r["state"] == "complete"],
            "reused": mean(row["reused"] or 0.0 for row in rows),
            "best_value": result.best_value,
            "uniform_value": result.baseline,
            "block_ratios": result.history[result.best_trial.number]["block_ratios"],
            "held_out": held_out,
        }


def main() -> None:
    options = parse()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    disable_progress_bar()  # a model is loaded for every trial of the paper's procedure
    comparison = Comparison(options)
    dense = perplexity(comparison.load(), comparison.data.held_out, False)
    bound = comparison.bound(options.bound_seconds) if options.bound_seconds else None
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "text")}
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        runs.append(comparison.seed(seed))
        document = {
            "model": Path(comparison.source).name,
            "settings": settings,
            "range": options.range,
            "windows": {
                name: len(getattr(comparison.data, name))
                for name in ("calibration", "evaluation", "held_out")
            },
            "environment": describe(),
            "load_average": os.getloadavg(),
            "summary": summary(runs, dense, comparison.uniform),
            "bound": bound,
            "runs": runs,
        }
        text = table(document)
        path = write_result("search", document, text)
        print(f"{text}\n\nwrote {path}", flush=True)


if __name__ == "__main__":
    main()
