"""The demo: the main job on the bundled model, offline, and the table that shows what it bought."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from hf_adaptive_sparse.calibration.data import Row
from hf_adaptive_sparse.compressor import (
    CompressionResult,
    DataSource,
    Measurement,
    ModelSource,
    compress,
)
from hf_adaptive_sparse.compressor.saving import table_rows
from hf_adaptive_sparse.demo.method_table import TableData, method_table
from hf_adaptive_sparse.demo.scenes import write_parquet
from hf_adaptive_sparse.evaluation.answering import generate_answers
from hf_adaptive_sparse.report import text_table

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The bundled model: LLaVA architecture, trained by ``train.py`` beside it."""

SEQUENCE_LENGTH = 256
QUESTIONS = 200


@dataclass(frozen=True)
class DemoAnswer:
    """One question about one picture, answered by both models."""

    question: str
    expected: str
    dense: str
    compressed: str


@dataclass(frozen=True)
class DemoResult:
    """What :func:`run_demo` did.

    Attributes:
        compression: The main job's result.
        table: The method's table, on data that no step before it saw.
        answer: The question that was asked at the end.
        seconds: Wall-clock time of everything.
    """

    compression: CompressionResult
    table: Sequence[Measurement]
    answer: DemoAnswer
    seconds: float

    def text(self) -> str:
        """Return the table and the answer, for a person."""
        answer = self.answer
        return "\n".join(
            [
                text_table(table_rows(self.table)),
                "",
                f"Question about one picture: {answer.question}",
                f"  dense model:      {answer.dense}",
                f"  compressed model: {answer.compressed}",
                f"  (right answer:    {answer.expected})",
                "",
                f"The compressed model is in {self.compression.output}, a complete Hub repo. "
                f"{self.seconds:.0f} s in all.",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "compression": self.compression.to_dict(),
            "table": [row.to_dict() for row in self.table],
            "answer": vars(self.answer),
            "seconds": self.seconds,
        }


def run_demo(
    output: str | os.PathLike[str],
    *,
    n_trials: int = 30,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> DemoResult:
    """Compress the bundled model and measure every step of the method on it.

    Args:
        output: Folder for the compressed model, complete or not at all.
        n_trials: Trials of the search.
        seed: Seed of the generated data and of the search.
        overwrite: Replace what is in ``output`` when the job is done.
        progress: Show progress bars on stderr.

    Raises:
        OSError: If ``output`` cannot be written.
    """
    started = perf_counter()
    source = ModelSource(CHECKPOINT)
    processor = source.load_processor()
    config = source.load().config
    with tempfile.TemporaryDirectory() as folder:
        # Twice the lines of one set: compress holds out half of what it evaluates on.
        seen = write_parquet(Path(folder, "seen"), visual_questions=QUESTIONS, seed=seed)
        unseen = write_parquet(Path(folder, "unseen"), visual_questions=QUESTIONS, seed=seed + 1)

        def data(path: Path, samples: int) -> DataSource:
            return DataSource(path, samples, SEQUENCE_LENGTH, batch_size=16, seed=seed)

        calibration = [
            *data(seen["text/calibration"], 64).batches(processor, config, "train"),
            *data(seen["visual/calibration"], 128).batches(processor, config, "train"),
        ]
        compression = compress(
            source,
            output,
            quality="paper",
            n_trials=n_trials,
            calibration=DataSource(calibration, name="generated text and scenes"),
            evaluation=data(seen["text/evaluation"], 64),
            questions=data(seen["visual/evaluation"], QUESTIONS),
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
        questions = data(unseen["visual/evaluation"], QUESTIONS).questions(config, "validation")
        if compression.search is None or questions is None:
            raise RuntimeError("The demo's data or space do not fit its model.")
        table = method_table(
            source,
            TableData(
                calibration=calibration,
                held_out=data(unseen["text/evaluation"], 128).batches(
                    processor, config, "validation"
                ),
                processor=processor,
                questions=questions,
            ),
            compression.search.best_profile,
            search_seconds=sum(trial["seconds"] or 0.0 for trial in compression.search.history),
        )
        answer = _ask_both(compression.output, next(iter(questions)), processor)
    return DemoResult(compression, table, answer, perf_counter() - started)


def _ask_both(compressed: Path, row: Row, processor: Any) -> DemoAnswer:
    """Ask the dense model, and the compressed one as its folder gives it back."""
    dense_answer, compressed_answer = (
        generate_answers(ModelSource(folder).load(), processor, [row])[0].text
        for folder in (CHECKPOINT, compressed)
    )
    return DemoAnswer(row["question"], row["answers"][0], dense_answer, compressed_answer)
