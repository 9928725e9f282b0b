"""Staged output folders: complete or not at all."""

from __future__ import annotations

import errno
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hf_adaptive_sparse.staging import (
    OutputError,
    check_output,
    resumable_folder,
    staged_folder,
)

PARTIAL = "out.adaptive-sparse.partial"


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
    assert names(tmp_path / PARTIAL) == ["log"]

    with staged_folder(output, overwrite=True, keep=("log",)) as new:
        assert (new / "log").read_text() == "trial 1"
    assert names(output) == ["log"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "staged", [staged_folder, partial(resumable_folder, state_names=("log",), parts="*")]
)
def test_a_failure_with_nothing_to_resume_leaves_nothing(tmp_path: Path, staged: Any) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "out") as folder:
        (folder / "weights").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


def test_what_a_killed_run_was_writing_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / PARTIAL).mkdir()
    for name in ("log", "shard.0a1b2c3d.partial"):
        (tmp_path / PARTIAL / name).touch()
    with resumable_folder(tmp_path / "out", ("log",), parts="*.shard"):
        pass
    assert names(tmp_path / "out") == ["log"]


def test_what_is_no_part_of_the_result_does_not_outlive_the_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"state_names": ("log",), "parts": "*.shard"}
    with pytest.raises(RuntimeError), resumable_folder(tmp_path / "out", **options) as folder:
        for name in ("log", "1.shard", "card"):
            (folder / name).write_text("1")
        raise RuntimeError
    assert names(tmp_path / PARTIAL) == ["1.shard", "log"]
    (tmp_path / PARTIAL / "card").write_text("of a run that was killed")
    with resumable_folder(tmp_path / "out", **options) as folder:
        assert names(folder) == ["1.shard", "log"]


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
    with pytest.raises(OutputError, match="no folder that can be written"):
        check_output(tmp_path / "out", overwrite=False)


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="no folder that can be written"):
        check_output(tmp_path / "file" / "out", overwrite=False)


def test_a_mount_point_is_refused_before_the_work() -> None:
    with pytest.raises(OutputError, match=r"/ is a mount point.*Choose a folder inside it"):
        check_output(Path("/"), overwrite=True)


@pytest.mark.parametrize("output", [".", "..", "../here"])
def test_the_working_directory_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="is the working directory or holds it"):
        check_output(Path(output), overwrite=True)
    check_output(Path("../there"), overwrite=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stands_for_what_it_points_at(tmp_path: Path, there: bool) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    if there:
        real.mkdir()
        (real / "old").write_text("old")
    for text in ("1", "2"):
        with staged_folder(link, overwrite=True) as folder:
            (folder / "a").write_text(text)
        assert link.is_symlink()
        assert names(real) == ["a"]
        assert (real / "a").read_text() == text
        assert names(tmp_path) == ["link", "real"]


def test_folders_of_others_beside_the_output_are_left_alone(tmp_path: Path) -> None:
    for name in ("out", "out.partial", "out.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("here")
    with staged_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path / "out") == ["a"]
    assert names(tmp_path / "out.partial") == names(tmp_path / "out.previous") == ["mine"]


def test_a_rename_that_fails_says_where_the_result_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path.name == PARTIAL:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    with (
        pytest.raises(OutputError, match=f"complete and lies in .*{PARTIAL}.*resource busy"),
        staged_folder(output, overwrite=True) as folder,
    ):
        (folder / "a").write_text("1")
    assert names(output) == ["old"]
    assert names(tmp_path / PARTIAL) == ["a"]
    assert names(tmp_path) == ["out", PARTIAL]


def test_a_second_job_with_the_same_output_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staged_folder(output) as folder:
        (folder / "a").write_text("1")
        with pytest.raises(OutputError, match="Another job is writing"), staged_folder(output):
            pass
        with (
            pytest.raises(OutputError, match="Another job"),
            resumable_folder(output, ("log",), parts="*"),
        ):
            pass
    assert names(output) == ["a"]
    assert names(tmp_path) == ["out"]


def test_an_output_that_fills_up_during_the_job_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (
        pytest.raises(OutputError, match=f"complete and lies in .*{PARTIAL}.*not empty"),
        staged_folder(output) as folder,
    ):
        (folder / "a").write_text("1")
        output.mkdir()
        (output / "mine").write_text("here")
    assert names(output) == ["mine"]
    assert names(tmp_path / PARTIAL) == ["a"]


def test_an_output_that_fills_up_before_the_lock_is_taken_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, acquire = tmp_path / "out", FileLock.acquire

    def late(lock: FileLock, *args: Any, **kwargs: Any) -> Any:
        output.mkdir()
        (output / "mine").write_text("here")
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(OutputError, match="must be empty"), staged_folder(output):
        pytest.fail("the work began")
    assert names(tmp_path) == ["out"]


def test_an_empty_output_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path / "out") == ["a"]
    assert names(tmp_path) == ["out"]


def test_a_lock_that_cannot_be_had_says_so(tmp_path: Path) -> None:
    (tmp_path / "out.adaptive-sparse.lock").mkdir()
    with (
        pytest.raises(OutputError, match=r"cannot be locked by .*Is a directory.*Choose"),
        staged_folder(tmp_path / "out"),
    ):
        pytest.fail("the work began")


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc/self").exists(),
    reason="only root is told that it may write to /proc",
)
def test_a_folder_in_which_no_file_can_be_made_is_not_in_use() -> None:
    with (
        pytest.raises(OutputError, match=r"cannot be locked by /proc/.*: No such file.*Choose"),
        staged_folder(Path("/proc/out")),
    ):
        pass


def test_a_lock_file_that_cannot_be_removed_while_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_use(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    monkeypatch.setattr(Path, "unlink", in_use)
    for text in ("1", "2"):
        with staged_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "a").write_text(text)
    assert (tmp_path / "out" / "a").read_text() == "2"


def test_what_a_killed_job_left_is_found_again(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with staged_folder(tmp_path / "out", keep=("log",)) as folder:
            (folder / "log").write_text("trial 1")
            (folder / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert names(tmp_path / PARTIAL) == ["log", "weights"]
    with staged_folder(tmp_path / "out", keep=("log",)) as folder:
        assert names(folder) == ["log"]
    assert names(tmp_path) == ["out"]
