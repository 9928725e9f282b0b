"""The README's code runs: every block below a ``<!-- runs -->`` mark, in order, as one program."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"<!-- runs -->\n```python\n(.*?)```", re.DOTALL)


def test_code_blocks_run(capsys) -> None:
    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "0.5000 of the decoder's weights are gone" in printed
    assert "bytes" in printed
