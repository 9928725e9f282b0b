"""The parser of all commands."""

from __future__ import annotations

import argparse

from hf_adaptive_sparse.cli.bench import add_bench
from hf_adaptive_sparse.cli.compress import add_compress
from hf_adaptive_sparse.cli.demo import add_demo
from hf_adaptive_sparse.cli.env import add_env
from hf_adaptive_sparse.cli.evaluate import add_evaluate
from hf_adaptive_sparse.cli.hub import add_inspect, add_push
from hf_adaptive_sparse.cli.parser import Parser
from hf_adaptive_sparse.cli.prune import add_prune
from hf_adaptive_sparse.cli.report import add_report
from hf_adaptive_sparse.cli.search import add_search
from hf_adaptive_sparse.version import __version__

COMMANDS = (
    add_demo,
    add_compress,
    add_prune,
    add_search,
    add_report,
    add_evaluate,
    add_bench,
    add_inspect,
    add_push,
    add_env,
)
"""Each adds one command, in the order of the help."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="hf-adaptive-sparse",
        description="Compress vision-language models: adaptive sparsity and an adaptive KV cache.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser
