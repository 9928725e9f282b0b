"""The command ``search``."""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.inputs import model_of, plan_of
from hf_adaptive_sparse.cli.options import SEARCHED, add_command, add_output
from hf_adaptive_sparse.cli.space_arguments import space_of
from hf_adaptive_sparse.compressor import (
    SearchPlan,
    search_study,
    search_to_folder,
    search_within_to_folder,
)
from hf_adaptive_sparse.compressor.presets import DEFAULT_QUALITY, get_preset
from hf_adaptive_sparse.report import text_table
from hf_adaptive_sparse.search.loss_budgets import budget_text
from hf_adaptive_sparse.search.result import PROFILE_FILE
from hf_adaptive_sparse.search.trials import evaluated


def add_search(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "search",
        run_search,
        "Search a profile without pruning. Started several times with one --storage and --study, "
        "on one machine or many, all work on one search",
    )
    add_output(parser, required=False)
    for add in SEARCHED:
        add(parser)


def run_search(options: argparse.Namespace) -> Answer:
    """Search a profile and write it."""
    target = 0.5 if options.target_sparsity is None else options.target_sparsity
    config = SparsityConfig(target_sparsity=target, metric=options.metric)
    base = get_preset(DEFAULT_QUALITY).space(config)
    plan = plan_of(options, space_of(options, config, base))
    if plan.max_loss is not None:
        return _run_within(options, plan)
    model, progress = model_of(options), not options.no_progress
    if options.output is not None:
        result = search_to_folder(
            model,
            options.output,
            plan,
            workers=options.workers,
            overwrite=options.overwrite,
            progress=progress,
        )
        where = f"Profile written to {os.path.join(options.output, PROFILE_FILE)}"
    elif options.storage is not None:
        result = search_study(model, plan, workers=options.workers, progress=progress)
        where = f"Study {result.study.study_name!r}; --output DIR writes its profile to a folder."
    else:
        raise ValueError("Give --output DIR, or --storage for a study, or both; got neither.")
    uniform = "failed" if result.baseline is None else f"{result.baseline:#.5g}"
    masks = "one-shot masks; " if result.space.prunes else ""
    text = (
        f"Best {result.goal.labels[0]} {result.best_value:#.5g} ({masks}uniform: "
        f"{uniform}) in {len(evaluated(result.history))} trials.\n{where}"
    )
    text += "".join(f"\n{line}" for line in result.lines)
    if result.goal.is_front:
        labels = result.goal.labels
        front = [
            {"trial": point.trial, **dict(zip(labels, point.values.values(), strict=True))}
            for point in result.pareto
        ]
        text += "\n\n" + text_table(front)
    return Answer(text, result.to_dict())


def _run_within(options: argparse.Namespace, plan: SearchPlan) -> Answer:
    if options.output is None:
        raise ValueError("--max-loss needs --output DIR: the profile found is written there.")
    found = search_within_to_folder(
        model_of(options),
        options.output,
        plan,
        workers=options.workers,
        overwrite=options.overwrite,
        progress=not options.no_progress,
    )
    rows = [
        {
            "budget": budget_text(budget, found.unit),
            "perplexity, evaluation data": "failed" if math.isinf(loss) else f"{loss:+.3%}",
        }
        for budget, loss in sorted(found.tried.items())
    ]
    where = f"Profile written to {os.path.join(options.output, PROFILE_FILE)}"
    if plan.space.prunes:
        where += (
            f"\nThe bound is that of one-shot masks: prune MODEL --one-shot --metric "
            f"{options.metric} --profile {os.path.join(options.output, PROFILE_FILE)}"
        )
    return Answer(f"{found}\n\n{text_table(rows)}\n\n{where}", found.to_dict())
