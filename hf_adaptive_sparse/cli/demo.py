"""The command ``demo``."""

from __future__ import annotations

import argparse
from typing import Any

from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.options import add_command, add_output
from hf_adaptive_sparse.demo.run import run_demo


def add_demo(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        run_demo_command,
        "Compress the bundled model, offline",
    )
    add_output(parser)
    parser.add_argument(
        "--trials", type=int, default=30, metavar="N", help="profiles to try (default: 30)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data and search (default: 0)")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def run_demo_command(options: argparse.Namespace) -> Answer:
    """Compress the bundled model and compare it with the dense one."""
    result = run_demo(
        options.output,
        n_trials=options.trials,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=not options.no_progress,
    )
    return Answer(result.text(), result.to_dict())
