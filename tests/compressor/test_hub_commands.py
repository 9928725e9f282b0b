"""compress --push-to-hub, inspect and evaluate by repo id, through the real client over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import WRITER, running_hub

REPO = "user/tiny-half"
ROOT = Path(__file__).resolve().parents[2]

# In a process of its own, since the client reads where the Hub is when it is imported.
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
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": WRITER,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

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
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps([[*map(str, command), "--json"] for command in commands]),
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        made, seen, row = map(json.loads, done.stdout.split("\0")[:-1])
        assert REPO in made["commit_url"]
        assert seen["kv_cache"] is not None
        assert seen["target_sparsity"] == 0.5
        assert row["sparsity"] == pytest.approx(0.5, abs=1e-4)
