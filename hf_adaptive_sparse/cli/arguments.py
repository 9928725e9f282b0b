"""The arguments of every command: what is asked, and which function answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from hf_adaptive_sparse.cli import commands as run
from hf_adaptive_sparse.cli.bench import run_bench
from hf_adaptive_sparse.cli.space_arguments import add_space, widths
from hf_adaptive_sparse.compressor.presets import DEFAULT_QUALITY, QUALITIES
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER, sampler_names
from hf_adaptive_sparse.version import __version__

Runner = Callable[[argparse.Namespace], run.Answer]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="hf-adaptive-sparse",
        description="Compress vision-language models: adaptive sparsity and an adaptive KV cache.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _demo,
        _compress,
        _prune,
        _search,
        _report,
        _evaluate,
        _bench,
        _inspect,
        _push,
        _env,
    ):
        add(commands)
    return parser


def _command(commands: Any, name: str, runner: Runner, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=runner)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--traceback", action="store_true", help="show the full traceback of an input error"
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub repo or local folder")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--dtype", default="auto", help="dtype to load in (default: as stored)")
    parser.add_argument(
        "--device-map",
        help="as in transformers, for example cuda:1 (default: the visible GPUs, if any)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def _add_quality(parser: argparse.ArgumentParser) -> None:
    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in QUALITIES.items())
    parser.add_argument(
        "--quality",
        default=DEFAULT_QUALITY,
        metavar="NAME",
        help=f"method and effort (default: {DEFAULT_QUALITY}), where the options below say nothing "
        f"else. {presets}",
    )


def _add_output(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--output", metavar="DIR", required=required, help="folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is in DIR when the job is done"
    )


def _add_pruning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target-sparsity",
        type=float,
        metavar="RATIO",
        help="mean fraction of the decoder's weights to remove (default: 0.5; free under a "
        "budget in bytes)",
    )
    parser.add_argument(
        "--metric",
        default="lognorm",
        help="lognorm, wanda, ria or magnitude, which score weights; sparsegpt or alps, which "
        "also update those that stay (default: lognorm; of compress: the quality's)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of samples and search")


def _add_final_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pattern", default="unstructured", help="unstructured, or n:m such as 2:4"
    )
    parser.add_argument(
        "--weight-update",
        metavar="UPDATE",
        help="what the kept weights do after the metric's mask: obs or least_squares "
        "(default: nothing)",
    )
    parser.add_argument(
        "--one-shot",
        action="store_true",
        help="calibrate on the dense model's activations instead of layer after pruned layer",
    )
    parser.add_argument(
        "--checkpoint-format",
        default="bitmask",
        help="bitmask (small), or dense (zeros stored; loads without this package)",
    )
    parser.add_argument(
        "--weight-bits",
        type=weight_bits,
        metavar="BITS",
        help="bits of the kept weights: 16, 8 or 4 for all, or GLOB=BITS joined by commas "
        "(default: 16)",
    )
    parser.add_argument(
        "--weight-group-size",
        type=int,
        metavar="N",
        help="columns that share a scale at 8 and 4 bits (default: the whole row at 8, 64 at 4)",
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="Hub dataset (name:config:split) or parquet, jsonl or text file "
        "(default: WikiText-2, training split)",
    )
    parser.add_argument(
        "--calibration-samples", type=int, default=128, metavar="N", help="windows or questions"
    )


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluation",
        metavar="DATA",
        help="likewise, to evaluate on (default: WikiText-2, validation split)",
    )
    parser.add_argument(
        "--evaluation-samples", type=int, default=64, metavar="N", help="windows or questions"
    )


def _add_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--questions",
        metavar="DATA",
        help="visual questions to answer: columns image, question, answer",
    )


def _add_batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens per window of text (default: the model's context, 2048 at most)",
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows per batch")


def _add_search(parser: argparse.ArgumentParser) -> None:
    add_space(parser)
    parser.add_argument(
        "--trials",
        type=int,
        default=50,
        metavar="N",
        help="default: 50; of compress: the quality's",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="start no further trial after so long (default: no limit)",
    )
    parser.add_argument(
        "--objective",
        default="perplexity",
        metavar="WHAT",
        help="what to minimise: perplexity, answers, kl or accuracy (questions missed); "
        "perplexity=0.5,kl=0.5 for a weighted sum; perplexity,bytes for a Pareto front "
        "(default: perplexity)",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="Optuna storage such as postgresql://… or redis://…, or path of a journal or SQLite "
        "file (default: a journal in DIR)",
    )
    parser.add_argument(
        "--sampler",
        default=DEFAULT_SAMPLER,
        metavar="NAME",
        help=f"{', '.join(sampler_names())} (default: {DEFAULT_SAMPLER})",
    )
    parser.add_argument(
        "--study",
        metavar="NAME",
        help="name of the study in the storage (default: hf-adaptive-sparse)",
    )


_CALIBRATED = (_add_model, _add_pruning, _add_calibration, _add_batches)
_SEARCHED = (*_CALIBRATED, _add_evaluation, _add_search)


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
            f"must be 16, 8, 4, or GLOB=BITS joined by commas, such as '*.mlp.*=8'; got {text!r}"
        ) from None


def _demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        run.run_demo_command,
        "Compress the bundled model, offline",
    )
    _add_output(parser)
    parser.add_argument("--trials", type=int, default=30, metavar="N", help="default: 30")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and search")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def _compress(commands: Any) -> None:
    parser = _command(
        commands, "compress", run.run_compress, "Search, prune and save: the whole method"
    )
    for add in (_add_quality, _add_output, *_SEARCHED, _add_final_prune, _add_questions):
        add(parser)
    parser.set_defaults(metric=None, trials=None)
    parser.add_argument("--push-to-hub", metavar="REPO", help="push the result to this Hub repo")
    parser.add_argument("--private", action="store_true", help="make the pushed repo private")


def _prune(commands: Any) -> None:
    parser = _command(
        commands, "prune", run.run_prune, "Prune at uniform ratios, or by a profile, and save"
    )
    for add in (_add_output, *_CALIBRATED, _add_final_prune):
        add(parser)
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep one decoder layer in memory at a time: slower to read, and an interrupted run "
        "goes on with the layer it had reached",
    )
    parser.add_argument(
        "--profile", metavar="FILE", help="profile.json of a search, instead of uniform ratios"
    )
    parser.add_argument(
        "--sparsity",
        action="append",
        default=[],
        metavar="GLOB=RATIO",
        help="ratio of the modules that match; may be repeated; the others stay dense",
    )


def _search(commands: Any) -> None:
    parser = _command(
        commands,
        "search",
        run.run_search,
        "Search a profile without pruning. Started several times with one --storage and --study, "
        "on one machine or many, all work on one search",
    )
    _add_output(parser, required=False)
    for add in _SEARCHED:
        add(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes to search with on this machine; a GPU each, as far as there are enough",
    )


def _report(commands: Any) -> None:
    parser = _command(
        commands, "report", run.run_report, "Write a search's report: one HTML page, and its plots"
    )
    parser.add_argument(
        "source",
        metavar="STUDY",
        help="folder that search or compress wrote, journal or SQLite file, or storage URL",
    )
    parser.add_argument(
        "--study", metavar="NAME", help="study in the storage (default: the only one there)"
    )
    parser.add_argument(
        "--output", metavar="DIR", default="report", help="folder to write (default: report)"
    )


def _evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", run.run_evaluate, "Measure perplexity, answers and bytes of a model"
    )
    for add in (_add_model, _add_evaluation, _add_questions, _add_batches):
        add(parser)
    parser.add_argument(
        "--kv-bits",
        type=widths,
        metavar="BITS",
        help="one width for all layers, one per layer joined by commas, or none "
        "(default: the model's own profile)",
    )
    parser.set_defaults(kv_bits=run.OWN_PROFILE)
    tasks = parser.add_argument_group("benchmarks, with their official scoring")
    tasks.add_argument(
        "--tasks",
        metavar="NAMES",
        help="run these instead, joined by commas: wikitext2, vqav2, textvqa, scienceqa",
    )
    tasks.add_argument(
        "--task-data",
        action="append",
        default=[],
        metavar="TASK=DATA",
        help="dataset or local file with the columns of the task's usual one; may be repeated",
    )
    tasks.add_argument("--task-samples", type=int, metavar="N", help="only the first N items")
    tasks.add_argument(
        "--task-batch-size", type=int, default=8, metavar="N", help="questions per batch"
    )
    tasks.add_argument(
        "--results",
        metavar="DIR",
        help="write outcomes here as they come; a run that was stopped goes on from them",
    )


def _bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        run_bench,
        "Measure a model on this machine: bytes, load time, tokens per second, memory bandwidth",
    )
    parser.add_argument("model", metavar="MODEL", help="Hub repo or local folder")
    parser.add_argument("--dense", metavar="MODEL", help="the dense model, to measure beside it")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--dtype", default="auto", help="dtype to load in (default: as stored)")
    parser.add_argument("--device-map", help="as in transformers, for example auto")
    parser.add_argument(
        "--runtime",
        choices=("sparse", "dense", "both"),
        default="both",
        help="runtime of a compressed model (default: both, one after the other)",
    )
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default: 512")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="default: 32")


def _inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        run.run_inspect,
        "Show how a checkpoint is compressed, without downloading its weights",
    )
    parser.add_argument("model", metavar="REPO", help="Hub repo or local folder")
    parser.add_argument("--revision", help="branch, tag or commit")


def _push(commands: Any) -> None:
    parser = _command(commands, "push", run.run_push, "Push a compressed model's folder to the Hub")
    parser.add_argument("folder", metavar="DIR", help="folder that compress or prune wrote")
    parser.add_argument("repo", metavar="REPO", help="Hub repo, such as me/my-model")
    parser.add_argument("--private", action="store_true", help="make the repo private")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--message", help="commit message")


def _env(commands: Any) -> None:
    _command(commands, "env", run.run_env, "Show what is installed and which kernels are in use")
