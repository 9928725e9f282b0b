"""``--quality``: what a preset fills in, and what it leaves to the caller."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.compressor import DataSource, compress
from hf_adaptive_sparse.compressor.presets import DEFAULT_QUALITY, PRESETS, get_preset
from hf_adaptive_sparse.search.space import SearchSpace

TINY_SPACE = SearchSpace(sparsity_range=0.0, kv_bits=None)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_frozen_valid_and_named(name: str) -> None:
    preset = get_preset(name)
    assert preset.name == name
    assert preset.config().metric == preset.metric
    assert preset.space(preset.config()).searches_sparsity
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.n_trials = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        PRESETS[name] = preset  # type: ignore[index]


def test_paper_is_the_papers_method() -> None:
    paper = get_preset("paper")
    config = paper.config()
    assert (config.metric, config.weight_update, paper.n_trials) == ("lognorm", None, 50)
    assert paper.space(config) == SearchSpace(
        target_sparsity=0.5, sparsity_range=0.05, step=0.025, blocks=8, kv_bits=(6, 8)
    )


def test_best_updates_the_weights() -> None:
    assert get_preset("best").config().method == "alps"


def test_a_preset_fills_in_only_what_was_not_asked_for() -> None:
    best = get_preset("best")
    asked = SparsityConfig(target_sparsity=0.3, modules_to_not_convert=["*.o_proj"])
    config = best.config(asked)
    assert config.metric == "alps"
    assert config.target_sparsity == best.space(config).target_sparsity == 0.3
    assert config.modules_to_not_convert == ["*.o_proj"]
    assert config.passed == asked.passed
    assert best.config(SparsityConfig(metric="lognorm")).method == "lognorm"
    assert best.config(SparsityConfig(weight_update="obs")).method == "lognorm + obs"
    pattern = best.config(SparsityConfig(pattern="2:4"))
    assert pattern.method == "alps"
    assert best.space(pattern).prunes is False


def test_an_unknown_quality_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quality must be one of best, paper; got 'fast'\."):
        compress(tmp_path / "no-model", tmp_path / "out", quality="fast")


@pytest.mark.parametrize(("quality", "metric"), [(DEFAULT_QUALITY, "alps"), ("paper", "lognorm")])
def test_compress_prunes_as_the_quality_says(
    llava_folder: Path, text_file: Path, tmp_path: Path, quality: str, metric: str
) -> None:
    data = DataSource(text_file, num_samples=8, sequence_length=32, batch_size=4)
    result = compress(
        llava_folder,
        tmp_path / "out",
        quality=quality,
        space=TINY_SPACE,
        calibration=data,
        evaluation=data,
        progress=False,
    )
    assert result.config.metric == metric
    assert result.report.mean_sparsity == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ([], "alps"),
        (["--quality", "paper"], "lognorm"),
        (["--metric", "wanda"], "wanda"),
        (["--quality", "paper", "--weight-update", "obs"], "lognorm + obs"),
    ],
)
def test_the_command_line_lets_options_outrank_the_quality(
    llava_folder: Path,
    text_file: Path,
    tmp_path: Path,
    options: list[str],
    method: str,
) -> None:
    out = tmp_path / "out"
    code = main(
        [
            "compress", str(llava_folder), "--output", str(out), "--trials", "1",
            "--calibration", str(text_file), "--evaluation", str(text_file),
            "--calibration-samples", "8", "--evaluation-samples", "4", "--sequence-length", "32",
            "--no-progress", *options,
        ]
    )  # fmt: skip
    assert code == 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    found = [config["metric"], config.get("weight_update")]
    assert " + ".join(part for part in found if part) == method


def test_the_help_names_every_quality(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.summary}" in text
