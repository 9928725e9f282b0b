"""The command ``evaluate``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from hf_adaptive_sparse.checkpoint.config import our_config
from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.inputs import evaluation_of, kv_config, model_of, questions_of
from hf_adaptive_sparse.cli.options import (
    OWN_PROFILE,
    add_batches,
    add_command,
    add_evaluation,
    add_kv_bits,
    add_model,
    add_questions,
)
from hf_adaptive_sparse.compressor import evaluate, evaluate_tasks
from hf_adaptive_sparse.compressor.saving import table_rows
from hf_adaptive_sparse.compressor.tasks import task_rows
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice
from hf_adaptive_sparse.evaluation.tasks.task import Setting, known_tasks
from hf_adaptive_sparse.report import text_table

OF_TASKS = ("task_data", "task_samples", "task_batch_size", "results")
OF_DATA = ("evaluation", "evaluation_samples", "questions", "batch_size")


def add_evaluate(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "evaluate", run_evaluate, "Measure perplexity, answers and bytes of a model"
    )
    for add in (add_model, add_evaluation, add_questions, add_batches):
        add(parser)
    add_kv_bits(parser, "the model's own profile")
    parser.set_defaults(default_of=parser.get_default)
    tasks = parser.add_argument_group("benchmarks, with their official scoring")
    tasks.add_argument(
        "--tasks",
        metavar="NAMES",
        help=f"run these benchmarks instead, joined by commas: {', '.join(known_tasks())}",
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
        "--task-batch-size",
        type=int,
        default=8,
        metavar="N",
        help="questions per batch (default: 8)",
    )
    tasks.add_argument(
        "--results",
        type=os.path.expanduser,
        metavar="DIR",
        help="write outcomes here as they come; a stopped run resumes from them",
    )


def run_evaluate(options: argparse.Namespace) -> Answer:
    """Measure a model, by benchmarks if any are named."""
    if options.tasks is not None:
        theirs = "--task-data, --task-samples and --task-batch-size"
        _check_not_given(options, OF_DATA, f"is not for --tasks, which have {theirs}")
        return _run_tasks(options)
    _check_not_given(options, OF_TASKS, "needs --tasks")
    row = evaluate(
        model_of(options),
        evaluation=evaluation_of(options),
        questions=questions_of(options),
        kv_cache=_kv_choice(options),
        progress=not options.no_progress,
    )
    return Answer(text_table(table_rows([row])), row.to_dict())


def _check_not_given(options: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(options, name) != options.default_of(name):
            raise ValueError(f"--{name.replace('_', '-')} {why}.")


def _run_tasks(options: argparse.Namespace) -> Answer:
    found = evaluate_tasks(
        model_of(options),
        list(dict.fromkeys(name.strip() for name in options.tasks.split(","))),
        data=task_data(options.task_data),
        setting=Setting(kv_cache=_kv_choice(options), sequence_length=options.sequence_length),
        batch_size=options.task_batch_size,
        num_samples=options.task_samples,
        results=options.results,
        progress=not options.no_progress,
    )
    data = {"tasks": [result.to_dict() for result in found]}
    return Answer(text_table(task_rows(found)), data)


def task_data(pairs: list[str]) -> dict[str, str]:
    """Parse ``TASK=DATA`` pairs.

    Raises:
        ValueError: If a pair is not of that form.
    """
    split = [pair.partition("=") for pair in pairs]
    for pair, (task, _, source) in zip(pairs, split, strict=True):
        if not task or not source:
            raise ValueError(
                f"--task-data must be TASK=DATA, such as vqav2=questions.parquet, got {pair!r}."
            )
    return {task: source for task, _, source in split}


def _kv_choice(options: argparse.Namespace) -> KVCacheChoice:
    """Return the model's own KV profile, with other bits where they are given."""
    if options.kv_bits == OWN_PROFILE:
        return None
    if options.kv_bits is None:
        return False
    own = our_config(model_of(options).load_config())
    return kv_config(options.kv_bits, None if own is None else own.kv_profile)
