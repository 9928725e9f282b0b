"""The README's code runs: every block below a ``<!-- runs -->`` mark, in order, as one program."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
UPDATE = README.with_name("benchmarks") / "update_readme.py"
BLOCK = re.compile(r"<!-- runs -->\n```python\n(.*?)```", re.DOTALL)


def test_code_blocks_run(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "0.5000 of the decoder's weights are gone" in printed
    assert "bytes" in printed


def test_the_table_is_what_the_benchmark_measured() -> None:
    spec = importlib.util.spec_from_file_location("update_readme", UPDATE)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = README.read_text(encoding="utf-8")
    assert script.updated(text) == text
