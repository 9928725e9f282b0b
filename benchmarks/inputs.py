"""The model and the data of the benchmarks that prune, search and measure, and their options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from environment import shared

from hf_adaptive_sparse.calibration.data import Batch, load_batches
from hf_adaptive_sparse.compressor import DataSource, ModelSource
from hf_adaptive_sparse.demo.method_table import TableData
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search


def add_inputs(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add the options of `read_inputs`.

    Args:
        parser: The benchmark's parser.
        **defaults: By option, where a benchmark's own default differs.
    """
    parser.add_argument("--model", help="default: the shared tiny-llava")
    parser.add_argument("--text", help="folder with calibration.parquet and evaluation.parquet")
    parser.add_argument("--visual", help="likewise, with visual questions")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--calibration-questions", type=int, default=256)
    parser.add_argument("--search-windows", type=int, default=64)
    parser.add_argument("--evaluation-windows", type=int, help="default: all there are")
    parser.add_argument("--evaluation-questions", type=int, help="likewise")
    parser.set_defaults(**defaults)


@dataclass(frozen=True)
class Inputs:
    """Model and data: what is calibrated on, what the search sees, what is measured."""

    source: ModelSource
    searched: list[Batch]
    data: TableData


def read_inputs(options: argparse.Namespace) -> Inputs:
    source = ModelSource(options.model or shared("models/tiny-llava"), dtype=options.dtype)
    text = Path(options.text) if options.text else shared("data/wikitext2")
    visual = Path(options.visual) if options.visual else shared("data/easy-vqa")
    processor = source.load_processor()
    config = source.load().config
    windows: list[Batch] = load_batches(
        text / "calibration.parquet",
        processor,
        config=config,
        num_samples=None,
        sequence_length=options.sequence_length,
        batch_size=8,
        split="validation",
    )
    calibrated = options.calibration_windows // 8
    searched = windows[calibrated : calibrated + options.search_windows // 8]
    questions = DataSource(visual / "calibration.parquet", options.calibration_questions)
    held_out = load_batches(
        text / "evaluation.parquet",
        processor,
        config=config,
        num_samples=options.evaluation_windows,
        sequence_length=options.sequence_length,
        batch_size=8,
        split="validation",
    )
    data = TableData(
        calibration=[
            *windows[:calibrated],
            *DataSource(questions.source, questions.num_samples, batch_size=32).batches(
                processor, config, "validation"
            ),
        ],
        held_out=held_out,
        processor=processor,
        questions=DataSource(visual / "evaluation.parquet").questions(config, "validation"),
        num_questions=options.evaluation_questions,
    )
    return Inputs(source, searched, data)


def run_search(
    inputs: Inputs, space: SearchSpace, trials: int, seed: int
) -> tuple[SearchResult, float]:
    started = perf_counter()
    result = search(
        inputs.source.load_dense(),
        inputs.data.calibration,
        inputs.searched,
        space,
        n_trials=trials,
        seed=seed,
    )
    return result, perf_counter() - started
