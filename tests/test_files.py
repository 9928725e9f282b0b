"""Files that are replaced as a whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from hf_adaptive_sparse.files import replacing


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with replacing(target) as first:
        first.write_text("first")
        with replacing(target) as second:
            second.write_text("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_writer_that_fails_removes_its_own_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with replacing(target) as first:
        first.write_text("first")
        with pytest.raises(RuntimeError), replacing(target) as second:
            second.write_text("second")
            raise RuntimeError
        assert first.exists()
        assert not target.exists()
    assert list(tmp_path.iterdir()) == [target]


def test_the_mode_is_that_of_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as partial:
            partial.write_text("here")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: .*file'"),
        replacing(tmp_path / "file"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
