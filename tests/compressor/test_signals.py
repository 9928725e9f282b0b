"""The command line when it is ended from outside."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.staging import staged_folder


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_what_ends_a_process_leaves_nothing_unfinished(
    capsys, monkeypatch, tmp_path: Path, sent: str, code: int
) -> None:
    number = signal.Signals[sent]

    def ended(options: object) -> None:
        with staged_folder(tmp_path / "out", keep=("search.journal",)) as folder:
            (folder / "search.journal").touch()
            (folder / "model.safetensors").touch()
            signal.raise_signal(number)

    monkeypatch.setattr("hf_adaptive_sparse.cli.search.run_search", ended)
    partial = tmp_path / "out.adaptive-sparse.partial"
    before = signal.signal(number, signal.SIG_DFL)  # nohup has it ignored
    try:
        assert main(["search", "model", "--output", str(tmp_path / "out")]) == code
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == (
        f"hf-adaptive-sparse: interrupted; the same command goes on from what is in {partial}.\n"
    )
    assert list(tmp_path.iterdir()) == [partial]
    assert [path.name for path in partial.iterdir()] == ["search.journal"]


def test_signals_that_are_ignored_or_handled_already_stay_so(monkeypatch) -> None:
    def command(options: object) -> Answer:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        return Answer("done", {})

    received: list[int] = []
    monkeypatch.setattr("hf_adaptive_sparse.cli.env.run_env", command)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    own = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        assert main(["env"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, own)
    assert received == [signal.SIGTERM]
