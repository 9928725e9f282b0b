"""How much faster two workers search than one, where each has its own core.

One worker searches a study alone, then two search another one together; every worker has one
thread and, where the system lets it, one core of its own. Trials are evaluated in full, so that
they cost alike. Counted are the trials between the first start and the last end; loading and
ranking, which every worker does by itself, are reported beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import IO, Any

import optuna
import torch
from environment import shared, write_result
from transformers import AutoModelForImageTextToText, AutoTokenizer

from hf_adaptive_sparse.calibration.data import load_batches
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.storage import open_storage, quiet_optuna
from hf_adaptive_sparse.search.study import STUDY_NAME, search
from hf_adaptive_sparse.search.trials import tally

WANTED = 1.8


def work(options: argparse.Namespace) -> None:
    """Be one worker: load, wait for the start, search."""
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError):  # not on every system
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[options.core]})
    source = shared("models/tiny-llava")
    model = AutoModelForImageTextToText.from_pretrained(source, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration, evaluation = (
        load_batches(
            shared(f"data/wikitext2/{name}.parquet"),
            tokenizer,
            config=model.config,
            num_samples=windows,
            sequence_length=512,
            shuffle=False,
        )
        for name, windows in (("calibration", 8), ("evaluation", options.windows))
    )
    print("ready", flush=True)
    sys.stdin.readline()
    search(
        model,
        calibration,
        evaluation,
        SearchSpace(),
        n_trials=options.trials,
        storage=options.storage,
        early_stopping=False,
        compare_widths=False,
        progress=False,
    )


def measure(workers: int, trials: int, windows: int) -> dict[str, Any]:
    """Search a new study with so many workers, and return what it took."""
    with tempfile.TemporaryDirectory() as folder:
        storage = str(Path(folder) / "study.journal")
        command = [sys.executable, __file__, "--storage", storage, "--trials", str(trials)]
        processes = [
            subprocess.Popen(
                [*command, "--windows", str(windows), "--core", str(core)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for core in range(workers)
        ]
        for process in processes:
            if _pipe(process.stdout).readline() != "ready\n":
                raise SystemExit("A worker failed; its error is above.")
        started = perf_counter()
        for process in processes:
            _pipe(process.stdin).write("go\n")
            _pipe(process.stdin).flush()
        if any(process.wait() for process in processes):
            raise SystemExit("A worker failed; its error is above.")
        seconds = perf_counter() - started
        with quiet_optuna():
            study = optuna.load_study(study_name=STUDY_NAME, storage=open_storage(storage))
        done = tally(study).completed
    first = min(trial.datetime_start for trial in done if trial.datetime_start)
    last = max(trial.datetime_complete for trial in done if trial.datetime_complete)
    span = (last - first).total_seconds()
    by_worker = [trial.user_attrs["worker"] for trial in done]
    return {
        "workers": workers,
        "trials": len(done),
        "trials_by_worker": sorted(by_worker.count(name) for name in set(by_worker)),
        "seconds_of_trials": span,
        "seconds_with_ranking": seconds,
        "trials_per_hour": 3600 * len(done) / span,
    }


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # each process was started with pipes
    return pipe


def table(result: dict[str, Any]) -> str:
    lines = [
        "# Two workers against one",
        "",
        "| workers | trials | seconds of trials | with ranking | trials per hour |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['workers']} | {row['trials']} | {row['seconds_of_trials']:.1f} "
        f"| {row['seconds_with_ranking']:.1f} | {row['trials_per_hour']:.0f} |"
        for row in result["runs"]
    ]
    lines += ["", f"Speed-up: {result['speedup']:.2f} × (wanted: {WANTED} ×)."]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60, help="trials of each study")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--storage", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.storage is not None:
        work(options)
        return
    runs = [measure(workers, options.trials, options.windows) for workers in (1, 2)]
    speedup = runs[1]["trials_per_hour"] / runs[0]["trials_per_hour"]
    result = {"runs": runs, "speedup": speedup, "wanted": WANTED, "reached": speedup >= WANTED}
    path = write_result("workers", result, table(result))
    print(table(result))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
