"""compress --push-to-hub, inspect and evaluate by repo id, through the real client over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hub_server import run_online, running_hub

REPO = "user/tiny-half"

PROGRAM = """
import json, sys
from hf_adaptive_sparse.cli import main

for command in json.load(sys.stdin):
    if main(command) != 0:
        sys.exit(command[0] + " failed")
    print(end="\\0")
"""


@pytest.mark.slow
def test_compress_push_inspect_evaluate(
    llava_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    with running_hub() as hub:
        data = ["--evaluation", text_file, "--evaluation-samples", 4, "--sequence-length", 32]
        commands = [
            [
                "compress", llava_folder, "--output", tmp_path / "out", "--trials", 2,
                "--no-progress", "--calibration", text_file, "--calibration-samples", 8,
                "--push-to-hub", REPO, *data,
            ],
            ["inspect", REPO],
            ["evaluate", REPO, "--no-progress", *data],
        ]  # fmt: skip
        lines = json.dumps([[*map(str, command), "--json"] for command in commands])
        said = run_online(hub, tmp_path / "home", PROGRAM, lines)
        made, seen, row = map(json.loads, said.split("\0")[:-1])
        assert REPO in made["commit_url"]
        assert seen["kv_cache"] is not None
        assert seen["target_sparsity"] == 0.5
        assert row["sparsity"] == pytest.approx(0.5, abs=1e-4)
