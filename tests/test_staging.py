"""Staged output folders: complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_adaptive_sparse.staging import OutputError, check_output, staged_folder


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_output_appears_only_when_the_body_is_done(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with staged_folder(output) as folder:
        (folder / "a").write_text("1")
        assert not output.exists()
    assert names(output) == ["a"]
    assert names(output.parent) == ["out"]


def test_a_failure_keeps_the_old_output_and_what_resumes(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(output, overwrite=True, keep=("log",)) as new:
        (new / "log").write_text("trial 1")
        (new / "weights").write_text("half")
        (new / "sub").mkdir()
        raise RuntimeError
    assert names(output) == ["old"]
    assert names(tmp_path / "out.partial") == ["log"]

    with staged_folder(output, overwrite=True, keep=("log",)) as new:
        assert (new / "log").read_text() == "trial 1"
    assert names(output) == ["log"]
    assert names(tmp_path) == ["out"]


def test_a_failure_with_nothing_to_resume_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out") as folder:
        (folder / "weights").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


def test_a_folder_that_is_not_empty_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"must be empty.*--overwrite"):
        check_output(tmp_path, overwrite=False)
    check_output(tmp_path, overwrite=True)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="must be a folder"):
        check_output(tmp_path / "file", overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "out", overwrite=False)


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "file" / "out", overwrite=False)
