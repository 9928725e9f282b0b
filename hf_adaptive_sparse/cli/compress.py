"""The command ``compress``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.inputs import (
    calibration_of,
    config_of,
    evaluation_of,
    model_of,
    questions_of,
)
from hf_adaptive_sparse.cli.options import (
    SEARCHED,
    add_command,
    add_final_prune,
    add_offload,
    add_output,
    add_questions,
)
from hf_adaptive_sparse.cli.space_arguments import space_of
from hf_adaptive_sparse.compressor import (
    CompressionResult,
    PushError,
    compress,
)
from hf_adaptive_sparse.compressor.presets import DEFAULT_QUALITY, PRESETS, get_preset
from hf_adaptive_sparse.compressor.saving import table_rows
from hf_adaptive_sparse.report import text_table
from hf_adaptive_sparse.search.objectives import Goal
from hf_adaptive_sparse.search.trials import evaluated


def add_compress(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "compress", run_compress, "Search, prune and save: the whole method"
    )
    for add in (_add_quality, add_output, *SEARCHED, add_final_prune, add_offload, add_questions):
        add(parser)
    parser.set_defaults(metric=None, trials=None)
    parser.add_argument("--push-to-hub", metavar="REPO", help="push the result to this Hub repo")
    parser.add_argument("--private", action="store_true", help="make the pushed repo private")


def _add_quality(parser: argparse.ArgumentParser) -> None:
    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    parser.add_argument(
        "--quality",
        default=DEFAULT_QUALITY,
        metavar="NAME",
        help=f"method and effort (default: {DEFAULT_QUALITY}), where the options below say nothing "
        f"else. {presets}",
    )


def run_compress(options: argparse.Namespace) -> Answer:
    """Search, prune, save, and push if asked."""
    try:
        return _answer(_compress(options))
    except PushError as error:
        if options.traceback:
            raise
        return replace(_answer(error.result), error=str(error))


def _compress(options: argparse.Namespace) -> CompressionResult:
    config = config_of(options)
    base = get_preset(options.quality).space(config)
    return compress(
        model_of(options),
        options.output,
        config=config,
        quality=options.quality,
        space=space_of(options, config, base),
        n_trials=options.trials,
        objective=Goal.parse(options.objective).to_json(),
        timeout_seconds=options.timeout,
        max_loss=options.max_loss,
        workers=options.workers,
        calibration=calibration_of(options),
        evaluation=evaluation_of(options),
        questions=questions_of(options),
        storage=options.storage,
        study_name=options.study,
        seed=options.seed,
        sampler=options.sampler,
        overwrite=options.overwrite,
        offload=options.offload,
        push_to_hub=options.push_to_hub,
        private=options.private,
        progress=not options.no_progress,
    )


def _answer(result: CompressionResult) -> Answer:
    lines = [text_table(table_rows(result.measurements)), "", f"Saved to {result.output}"]
    found = result.search
    if found is not None:
        lines[1:1] = found.lines
    if found is not None and found.baseline is not None:
        masks = "one-shot " if found.space.prunes else ""
        lines.insert(
            1,
            f"Search: {masks}{found.goal.labels[0]} {found.best_value:#.5g} on the searched data, "
            f"uniform {found.baseline:#.5g}, {len(evaluated(found.history))} trials.",
        )
    if result.within is not None:
        lines[1:1] = str(result.within).splitlines()
    if result.commit_url is not None:
        lines.append(f"Pushed: {result.commit_url}")
    return Answer("\n".join(lines), result.to_dict())
