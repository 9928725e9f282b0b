"""No job removes what it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.compressor.data_source import DataSource
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.compressor.targets import checked_target
from hf_adaptive_sparse.staging import OutputError


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("prune", []),
        ("prune", ["--offload"]),
        ("search", []),
        ("search", ["--max-loss", "1%"]),
        ("compress", []),
    ],
)
def test_a_model_is_not_replaced_by_what_is_made_of_it(
    capsys: pytest.CaptureFixture[str], llava_folder: Path, command: str, options: list[str]
) -> None:
    before = {path.name: path.read_bytes() for path in llava_folder.iterdir()}
    link = llava_folder.with_name("link")
    link.symlink_to(llava_folder)
    arguments = [command, str(llava_folder), "--output", str(link), "--overwrite", *options]
    assert main(arguments) == 2
    assert "is replaced as a whole, but the job reads" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in llava_folder.iterdir()} == before


def test_data_and_models_within_the_output_stay(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "model").mkdir(parents=True)
    (output / "text.txt").write_text("text")
    for read in (
        ModelSource(output / "model"),
        output / "text.txt",
        str(output / "text.txt"),
        DataSource(output / "text.txt"),
    ):
        with pytest.raises(OutputError, match=r"Choose another output folder"):
            checked_target(output, (None, read), overwrite=True)
    beside = tmp_path / "beside.txt"
    beside.write_text("text")
    others = (ModelSource("owner/name"), "name:config:split", DataSource(None), [{}], beside)
    assert checked_target(output, others, overwrite=True) == output
    inside = (ModelSource(tmp_path),)
    assert checked_target(output, inside, overwrite=True) == output
