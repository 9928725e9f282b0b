"""The folder that a job writes, which must not hold what the job reads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hf_adaptive_sparse.compressor.data_source import DataSource
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.naming import expanded
from hf_adaptive_sparse.staging import OutputError, check_output


def checked_target(
    output: str | os.PathLike[str], reads: Iterable[object], *, overwrite: bool
) -> Path:
    """Return the folder to write, after the checks that need no work.

    Args:
        output: As the caller named it.
        reads: Model and data of the job: sources, names or paths; what is none of them is in
            memory.
        overwrite: Replace what the folder holds.

    Raises:
        OutputError: As `check_output`, or if the folder is, or holds, what the job reads, which
            would be gone when the job is done.
    """
    target = expanded(output)
    check_output(target, overwrite=overwrite)
    for path in _local_paths(reads):
        if path.resolve().is_relative_to(target.resolve()):
            raise OutputError(
                f"The output folder {target} is replaced as a whole, but the job reads {path}, "
                "which would be gone. Choose another output folder."
            )
    return target


def _local_paths(reads: Iterable[object]) -> Iterable[Path]:
    for source in reads:
        if isinstance(source, ModelSource):
            source = source.name
        elif isinstance(source, DataSource):
            source = source.source
        if isinstance(source, str | os.PathLike) and expanded(source).exists():
            yield expanded(source)
