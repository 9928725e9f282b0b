"""Which sampler finds the best profile at an equal number of forward tokens.

Every sampler searches the paper's space, with the search's own early stopping, until the tokens are
spent; the uniform profile is the first trial of each, and its tokens count. The weights are ranked
once for all. Told are the changes of perplexity against uniform on the data that were searched and
on as many others, for the profile that was best when a share of the tokens was spent. The figures
depend on no clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import mean, stdev
from time import perf_counter
from typing import Any, NamedTuple

import optuna
import torch
from environment import RESULTS, shared, write_result
from optuna.trial import FixedTrial, FrozenTrial
from transformers import AutoModelForImageTextToText, AutoTokenizer

from hf_adaptive_sparse.calibration.data import Batch, load_batches
from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.evaluator import Evaluator, open_evaluator
from hf_adaptive_sparse.search.runner import TrialRunner
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER, sampler_names
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.storage import quiet_optuna
from hf_adaptive_sparse.search.suggesting import suggest, uniform_candidate, uniform_params
from hf_adaptive_sparse.search.trials import UNIFORM, tally

SHARES = (0.25, 0.5, 1.0)
SETTINGS = ("seeds", "trials", "windows", "held_out", "sequence_length")


class Parts(NamedTuple):
    """What every search of a process uses."""

    evaluator: Evaluator
    space: SearchSpace
    shape: ModelShape
    held_out: list[Batch]


def search_with(name: str, seed: int, parts: Parts, budget_batches: int) -> dict[str, Any]:
    """Search with one sampler and seed, and return the best profile at each share of the budget."""
    evaluator, space, shape, _ = parts
    study = optuna.create_study()
    study.enqueue_trial(uniform_params(space, shape), user_attrs={UNIFORM: True})
    runner = TrialRunner(study, space, shape, evaluator, seed, name)
    spent, wanted = 0, 0
    best_at: dict[float, FrozenTrial | None] = {}
    best = None
    while spent < budget_batches and wanted < 20 * budget_batches:
        wanted += 1
        runner.run(wanted, progress=False)
        count = tally(study)
        done = (*count.completed, *count.stopped)
        spent = sum(trial.user_attrs["batches"] for trial in done)
        if spent <= budget_batches or best is None:
            best = count.best
        for share in SHARES:
            if spent <= share * budget_batches or share not in best_at:
                best_at[share] = best
        if count.attempts < wanted:  # the space is exhausted
            break
    return {"trials": wanted, "best": best_at}


_stack = contextlib.ExitStack()
_prepared: list[Parts] = []


def prepare(options: argparse.Namespace) -> Parts:
    """Load and rank, once in each process; the masks stay until it ends."""
    if _prepared:
        return _prepared[0]
    source = shared("models/tiny-llava")
    model = AutoModelForImageTextToText.from_pretrained(source, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    load = partial(
        load_batches,
        processor=tokenizer,
        config=model.config,
        sequence_length=options.sequence_length,
        shuffle=False,
    )
    calibration = load(shared("data/wikitext2/calibration.parquet"), num_samples=16)
    windows = load(
        shared("data/wikitext2/evaluation.parquet"), num_samples=options.windows + options.held_out
    )
    space = SearchSpace()
    shape = ModelShape.of(model, space)
    evaluator = _stack.enter_context(
        open_evaluator(
            model,
            space,
            shape,
            uniform_candidate(space, shape),
            calibration=calibration,
            evaluation=windows[: options.windows],
            metric="lognorm",
            progress=False,
        )
    )
    _prepared.append(Parts(evaluator, space, shape, windows[options.windows :]))
    return _prepared[0]


def perplexity_on(parts: Parts, candidate: Candidate) -> float:
    losses = parts.evaluator.losses(candidate, parts.held_out)
    return math.exp(sum(loss for loss, _ in losses) / sum(count for _, count in losses))


def run(job: tuple[str, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one sampler with one seed in this process."""
    name, seed = job
    torch.set_num_threads(1)
    started = perf_counter()
    with quiet_optuna():
        parts = prepare(options)
        evaluator, space, shape, _ = parts
        reference = perplexity_on(parts, evaluator.uniform)
        uniform = evaluator(evaluator.uniform).value
        found = search_with(name, seed, parts, options.trials * options.windows)
        rows = []
        for share, best in found["best"].items():
            candidate = suggest(FixedTrial(best.params), space, shape)
            rows.append(
                {
                    "sampler": name,
                    "seed": seed,
                    "share": share,
                    "trials": found["trials"],
                    "searched_percent": 100 * (best.value / uniform - 1),
                    "held_out_percent": 100 * (perplexity_on(parts, candidate) / reference - 1),
                    "seconds": perf_counter() - started,
                }
            )
    print(f"{name} {seed}: {rows[-1]['searched_percent']:+.3f} %", file=sys.stderr, flush=True)
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means and standard deviations over the seeds, best first at the whole budget."""
    table = []
    for name in dict.fromkeys(row["sampler"] for row in rows):
        entry: dict[str, Any] = {"sampler": name}
        for share in SHARES:
            at = [row for row in rows if row["sampler"] == name and row["share"] == share]
            for kind in ("searched", "held_out"):
                figures = [row[f"{kind}_percent"] for row in at]
                entry[f"{kind}_{share:g}"] = mean(figures)
                entry[f"{kind}_{share:g}_sd"] = stdev(figures) if len(figures) > 1 else 0.0
        entry["trials"] = mean(row["trials"] for row in rows if row["sampler"] == name)
        table.append(entry)
    return sorted(table, key=lambda entry: entry["searched_1"])


def render(result: dict[str, Any]) -> str:
    settings = result["settings"]
    lines = [
        "# Samplers at equal forward tokens",
        "",
        f"Change of perplexity against uniform in percent, mean ± standard deviation over "
        f"{settings['seeds']} seeds; the whole budget is {result['budget_tokens']:,} tokens "
        f"({settings['trials']} trials in full).",
        "",
        "| sampler | trials | searched, 25 % | 50 % | 100 % | held-out, 100 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["summary"]:
        cells = [f"{row[f'searched_{share:g}']:+.3f}" for share in SHARES[:2]]
        cells += [
            f"{row[f'{k}_1']:+.3f} ± {row[f'{k}_1_sd']:.3f}" for k in ("searched", "held_out")
        ]
        lines.append(f"| {row['sampler']} | {row['trials']:.0f} | {' | '.join(cells)} |")
    lines += ["", f"Best on the searched data: {result['winner']}. Default: {DEFAULT_SAMPLER}."]
    return "\n".join(lines)


def earlier_rows(settings: dict[str, Any], again: set[str]) -> list[dict[str, Any]]:
    """Return what an earlier run with the same settings found of other samplers."""
    path = RESULTS / "samplers.json"
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["settings"] != settings:
        return []
    return [row for row in earlier["rows"] if row["sampler"] not in again]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", nargs="+", default=list(sampler_names()))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=50, help="the budget, in full trials")
    parser.add_argument("--windows", type=int, default=12, help="searched windows")
    parser.add_argument("--held-out", type=int, default=48, help="other windows")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = parse()
    # Seed by seed, so that a run that is cut short has compared all samplers alike.
    jobs = [(name, seed) for seed in range(options.seeds) for name in options.samplers]
    settings = {key: value for key, value in vars(options).items() if key in SETTINGS}
    rows = earlier_rows(settings, set(options.samplers))
    with ProcessPoolExecutor(options.processes) as pool:
        rows += [row for part in pool.map(partial(run, options=options), jobs) for row in part]
    summary = summarise(rows)
    result = {
        "settings": settings,
        "budget_tokens": options.trials * options.windows * options.sequence_length,
        "summary": summary,
        "winner": summary[0]["sampler"],
        "rows": rows,
    }
    path = write_result("samplers", result, render(result))
    print(render(result))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
