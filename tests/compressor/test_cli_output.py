"""What the command line prints: its help, and results to whatever stdout is."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Iterator

import pytest

from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.arguments import build_parser


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


@pytest.mark.parametrize(("name", "parser"), list(commands()))
def test_the_help_tells_every_default_in_ascii(name: str, parser: argparse.ArgumentParser) -> None:
    assert parser.format_help().isascii()
    for action in parser._actions:
        if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS):
            assert "default: " in (action.help or ""), (name, action.option_strings)


def answers(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    answer = Answer(text, {"rows": [{"value": math.inf}, {"value": 1.5}], "spread": (math.nan, 2)})
    monkeypatch.setattr("hf_adaptive_sparse.cli.env.run_env", lambda options: answer)


def test_json_has_no_numbers_that_json_has_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, "text")
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"rows": [{"value": None}, {"value": 1.5}], "spread": [None, 2]}


def test_what_the_encoding_lacks_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "50.00 – 51 %")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert main(["env"]) == 0
    assert printed.getvalue().split(os.linesep.encode())[0] == b"50.00 ? 51 %"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_stdout_that_is_full_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, "text")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match="2"):
            main(["env"])
    assert "the result cannot be printed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compress M", "compress: the following arguments are required: --output. See "),
        ("compress M --ouput d", "required: --output (did you mean --output for --ouput?). See "),
        (
            "compress --output d M --target_sparsity=0.5",
            "compress: unrecognized arguments: --target_sparsity=0.5 (did you mean "
            "--target-sparsity for --target_sparsity?). See hf-adaptive-sparse compress --help.",
        ),
        ("compress M --output d --zzz", "unrecognized arguments: --zzz. See "),
        ("push DIR REPO more", "push: unrecognized arguments: more. See "),
        ("compres M --revision 1", "invalid choice: 'compres'"),
        ("", "required: COMMAND. See hf-adaptive-sparse --help."),
    ],
)
def test_bad_usage_is_one_line(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "did you mean" not in line or "did you mean" in said
