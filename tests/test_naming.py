"""Names that may be published."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_adaptive_sparse.naming import expanded, public_name


def test_of_a_local_path_only_the_last_part_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "secret" / "model"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (model, f"{model}/", ".", "~/secret/model"):
        assert public_name(path) == "model"
    assert public_name(tmp_path / "link") == "link"
    assert public_name("someone/model") == "someone/model"
    for removed in (tmp_path / "removed/model", "../removed/model", "a/removed/model"):
        assert public_name(removed) == "model"


def test_the_home_of_an_unknown_user_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/model") == tmp_path / "model"
    assert expanded("~nobody-here/model") == Path("~nobody-here/model")
