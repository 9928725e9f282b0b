"""compress --push-to-hub, inspect and evaluate by repo id, through the real client over HTTP."""

from __future__ import annotations

import json
import re
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


REFUSED = """
import contextlib, io, json, sys
from hf_adaptive_sparse.cli import main

said = {}
for repo in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = main(["evaluate", repo, "--no-progress"])
    said[repo] = [code, stderr.getvalue().splitlines()[-1]]
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_repo_that_is_not_whole_is_refused_as_a_folder_is(
    llava_folder: Path, tmp_path: Path
) -> None:
    whole = {path.name: path.read_bytes() for path in llava_folder.iterdir()}
    config = {**json.loads(whole["config.json"]), "quantization_config": {"quant_method": ["x"]}}
    repos = {
        "user/generation": (
            {**whole, "generation_config.json": b"[]"},
            "generation_config.json of .* is not a JSON object",
        ),
        "user/method": (
            {**whole, "config.json": json.dumps(config).encode()},
            "quant_method in config.json of .* must be text",
        ),
        "user/mute": (
            {name: whole[name] for name in ("config.json", "model.safetensors")},
            "user/mute has no tokenizer or processor. Save the model's own there",
        ),
    }
    with running_hub() as hub:
        for name, (files, _) in repos.items():
            hub.add_repo(name, files)
        said = json.loads(run_online(hub, tmp_path / "home", REFUSED, json.dumps(list(repos))))
    for name, (_, message) in repos.items():
        code, line = said[name]
        assert code == 2
        assert re.search(message, line)
