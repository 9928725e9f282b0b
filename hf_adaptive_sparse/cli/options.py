"""The options that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.space_arguments import add_space, widths
from hf_adaptive_sparse.compressor import DataSource
from hf_adaptive_sparse.packing.weight_codes import default_group_size
from hf_adaptive_sparse.profiles import MIN_EXPERT_TOKENS
from hf_adaptive_sparse.pruning.metrics import METRICS
from hf_adaptive_sparse.pruning.solvers import WEIGHT_UPDATES
from hf_adaptive_sparse.search.data import EVALUATION_SAMPLES
from hf_adaptive_sparse.search.objectives import OBJECTIVES, objective_label
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER, sampler_names

Runner = Callable[[argparse.Namespace], Answer]

OWN_PROFILE: tuple[int, ...] = ()
"""Value of ``--kv-bits`` where it is not given: what the model or the profile says."""


def add_command(commands: Any, name: str, runner: Runner, text: str) -> argparse.ArgumentParser:
    """Add a command with the options that all commands have, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=runner)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--traceback", action="store_true", help="show the full traceback of an input error"
    )
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model and how it is loaded."""
    parser.add_argument("model", metavar="MODEL", help="Hub repo or local folder")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--dtype", default="auto", help="dtype to load in (default: as stored)")
    parser.add_argument(
        "--device-map",
        help="as in transformers, for example cuda:1 (default: the visible GPUs, if any)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def add_output(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the folder that a command writes."""
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="DIR",
        required=required,
        help="folder to write",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the content of DIR when the job is done"
    )


def add_pruning(parser: argparse.ArgumentParser) -> None:
    """Add ratio and metric."""
    parser.add_argument(
        "--target-sparsity",
        type=float,
        metavar="RATIO",
        help="mean fraction of the decoder's weights to remove (default: 0.5; in a search under a "
        "budget in bytes: free)",
    )
    parser.add_argument(
        "--metric",
        default="lognorm",
        help=f"{_names(updates=False)}, which score weights; {_names(updates=True)}, which also "
        "update those that stay (default: lognorm; compress takes that of its --quality)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of samples and search (default: 0)"
    )


def _names(*, updates: bool) -> str:
    """Return the metrics that update weights, or those that only score them."""
    return ", ".join(name for name, metric in METRICS.items() if metric.updates_weights is updates)


def add_final_prune(parser: argparse.ArgumentParser) -> None:
    """Add the options of the final prune."""
    parser.add_argument(
        "--pattern",
        default="unstructured",
        help="unstructured, or n:m such as 2:4 (default: unstructured)",
    )
    parser.add_argument(
        "--weight-update",
        metavar="UPDATE",
        help=f"update of the kept weights after the metric's mask: {' or '.join(WEIGHT_UPDATES)} "
        "(default: none)",
    )
    parser.add_argument(
        "--one-shot",
        action="store_true",
        help="calibrate all layers on the dense model's activations, instead of each on the output "
        "of the pruned layers before it",
    )
    parser.add_argument(
        "--min-expert-tokens",
        type=int,
        default=MIN_EXPERT_TOKENS,
        metavar="N",
        help="experts that saw fewer calibration tokens are scored without data (default: "
        f"{MIN_EXPERT_TOKENS})",
    )
    parser.add_argument(
        "--checkpoint-format",
        default="bitmask",
        help="bitmask (small), or dense (zeros stored; loads without this package) (default: "
        "bitmask)",
    )
    parser.add_argument(
        "--weight-bits",
        type=weight_bits,
        metavar="BITS",
        help="bits of the kept weights: 16, 12 (bfloat16, without loss), 8 or 4 for all, or "
        "GLOB=BITS joined by commas (default: 16)",
    )
    parser.add_argument(
        "--weight-group-size",
        type=int,
        metavar="N",
        help="columns that share a scale at 8 and 4 bits (default: the whole row at 8, "
        f"{default_group_size(4)} at 4)",
    )


def add_kv_bits(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the KV cache's bits by layer; ``default`` says what applies without the option."""
    parser.add_argument(
        "--kv-bits",
        type=widths,
        default=OWN_PROFILE,
        metavar="BITS",
        help="bits of the KV cache: one width for all layers, one per layer joined by commas, or "
        f"none (default: {default})",
    )


def add_offload(parser: argparse.ArgumentParser) -> None:
    """Add the option to prune from disk."""
    parser.add_argument(
        "--offload",
        action="store_true",
        help="leave the weights in the checkpoint's files and hold one decoder layer in memory at "
        "a time: slower; an interrupted run resumes at the layer it had reached",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the calibration data."""
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="Hub dataset (name:config:split) or parquet, jsonl or text file of text, questions or "
        "conversations (default: WikiText-2, training split)",
    )
    parser.add_argument(
        "--calibration-samples",
        type=int,
        default=DataSource.num_samples,
        metavar="N",
        help=f"windows, questions or conversations of them (default: {DataSource.num_samples})",
    )


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the evaluation data."""
    parser.add_argument(
        "--evaluation",
        metavar="DATA",
        help="Hub dataset (name:config:split) or parquet, jsonl or text file to evaluate on "
        "(default: WikiText-2, validation split)",
    )
    parser.add_argument(
        "--evaluation-samples",
        type=int,
        default=EVALUATION_SAMPLES,
        metavar="N",
        help=f"windows, questions or conversations of them (default: {EVALUATION_SAMPLES})",
    )


def add_questions(parser: argparse.ArgumentParser) -> None:
    """Add visual questions."""
    parser.add_argument(
        "--questions",
        metavar="DATA",
        help="questions to answer: columns image (or video, audio), question, answer; of "
        "conversations the first question",
    )


def add_batches(parser: argparse.ArgumentParser) -> None:
    """Add how data are cut into batches."""
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens per window of text (default: the model's context, 2048 at most)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="windows, questions or conversations per batch (default: 1)",
    )


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a search."""
    add_space(parser)
    parser.add_argument(
        "--trials",
        type=int,
        default=50,
        metavar="N",
        help="profiles to try (default: 50; compress takes that of its --quality)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="start no further trial after this time (default: no limit)",
    )
    parser.add_argument(
        "--objective",
        default="perplexity",
        metavar="WHAT",
        help=f"what to minimise: {', '.join(map(_described, OBJECTIVES))}; "
        "perplexity=0.5,kl=0.5 for a weighted sum; perplexity,bytes for a Pareto front "
        "(default: perplexity)",
    )
    parser.add_argument(
        "--storage",
        type=os.path.expanduser,
        metavar="URL",
        help="Optuna storage such as postgresql://HOST/NAME or redis://HOST, or path of a journal "
        "or SQLite file (default: a journal in DIR)",
    )
    parser.add_argument(
        "--sampler",
        default=DEFAULT_SAMPLER,
        metavar="NAME",
        help=f"{', '.join(sampler_names())} (default: {DEFAULT_SAMPLER})",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes to search with on this machine, each on a GPU of its own if there are "
        "enough (default: 1)",
    )
    parser.add_argument(
        "--study",
        metavar="NAME",
        help="name of the study in the storage (default: hf-adaptive-sparse)",
    )


def _described(objective: str) -> str:
    """Return the name of an objective, with its label where that says something else."""
    label = objective_label(objective)
    return objective if label == objective else f"{objective} ({label})"


def weight_bits(text: str) -> int | dict[str, int]:
    """Parse the value of ``--weight-bits``.

    Raises:
        argparse.ArgumentTypeError: If it is neither a number nor ``GLOB=BITS`` joined by commas.
    """
    try:
        if "=" not in text:
            return int(text)
        pairs = (part.rpartition("=") for part in text.split(","))
        return {glob.strip(): int(bits) for glob, _, bits in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            "must be 16, 12, 8, 4, or GLOB=BITS joined by commas, such as '*.mlp.*=8'; got "
            f"{text!r}"
        ) from None


CALIBRATED = (add_model, add_pruning, add_calibration, add_batches)
SEARCHED = (*CALIBRATED, add_evaluation, add_search_options)
