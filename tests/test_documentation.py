"""What the documentation says to run, runs: its commands, its Python, and the README's tables.

Commands are parsed, not executed. The guides' Python runs as written, against a Hub that has the
bundled model under the name that they use.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from hf_adaptive_sparse.cli.arguments import build_parser
from tests.conftest import DEMO_CHECKPOINT
from tests.hub_server import run_online, running_hub

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GUIDES = ROOT / "docs/guides"
UPDATE = ROOT / "benchmarks/update_readme.py"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])

RUNS = re.compile(r"<!-- runs -->\n```python\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(hf-adaptive-sparse [a-z]+ [^`…]+)`")
"""One with arguments; what only names a command need not be complete."""
OPTIONS = re.compile(r"`(--[^`]+)`")
FOREIGN = {"--model_args"}
"""Of other programs."""
VALUES = {"STORAGE": "study.journal", "STUDY": "study.journal"}
"""Placeholders whose value must look like one."""


def commands(page: Path) -> list[str]:
    """Every command line of ours on a page, without what the shell alone reads."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in SHELL.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            program = line.partition("#")[0].rstrip(" &")
            if "hf-adaptive-sparse " in program and "pip install" not in program:
                found.append(program[program.index("hf-adaptive-sparse ") :])
    return found + INLINE.findall(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page: Path) -> None:
    parser = build_parser()
    for command in commands(page):
        words = [VALUES.get(word, word) for word in shlex.split(command)[1:]]
        options = parser.parse_args(words)
        assert options.command == words[0], command


def test_options_that_are_named_exist() -> None:
    commands = build_parser()._subparsers._group_actions[0].choices.values()
    known = {option for command in commands for option in command._option_string_actions}
    named = set()
    for page in (README, *GUIDES.glob("*.md")):
        for inline in OPTIONS.findall(page.read_text(encoding="utf-8")):
            named |= {word for word in inline.split() if word.startswith("--")}
    assert len(named) >= 20
    assert named <= known | FOREIGN


def test_commands_are_found() -> None:
    assert len(commands(README)) >= 4
    assert sum(len(commands(page)) for page in GUIDES.glob("*.md")) >= 20


def test_the_readmes_code_runs(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = RUNS.findall(README.read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "0.5000 of the decoder's weights are gone" in printed
    assert "bytes" in printed


def test_the_guides_code_runs(tmp_path) -> None:
    """In the order in which a reader would: compress, push, and serve what was pushed."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    (tmp_path / "text.txt").write_text("a red square is to the left of a blue disc.\n" * 400)
    steps = [f"import os\nos.chdir({str(tmp_path)!r})\n"]
    steps += blocks_of("compress.md")
    load, push, plain = blocks_of("push.md")
    steps += ["import hf_adaptive_sparse as has\n", push, load, plain]
    steps += blocks_of("serve.md")
    # The test's Hub has models alone, and one person who may write.
    script = "\n".join(steps).replace("Salesforce/wikitext:wikitext-2-raw-v1:train", "text.txt")
    script = script.replace('"me/', '"user/')
    files = {path.name: path.read_bytes() for path in DEMO_CHECKPOINT.iterdir()}
    with running_hub() as hub:
        hub.add_repo("llava-hf/llava-1.5-7b-hf", files)
        printed = run_online(hub, tmp_path / "home", script)
        assert "model.safetensors" in hub.files("user/llava-7b-half")
    saved = json.loads((tmp_path / "llava-7b-half-plain/config.json").read_text())
    assert "quantization_config" not in saved
    rows = [line.split() for line in printed.splitlines()]
    assert [row[0] for row in rows if row[0] in ("dense", "compressed")] == ["dense", "compressed"]
    assert "What is in the picture?" in printed


def blocks_of(guide: str) -> list[str]:
    return PYTHON.findall((GUIDES / guide).read_text(encoding="utf-8"))


def test_the_tables_are_what_the_benchmarks_measured() -> None:
    spec = importlib.util.spec_from_file_location("update_readme", UPDATE)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = README.read_text(encoding="utf-8")
    assert script.updated(text) == text
