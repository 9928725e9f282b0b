"""``--max-loss`` on the command line: the smallest model or KV cache within a loss."""

from __future__ import annotations

import json

import pytest

from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.cli.arguments import build_parser
from hf_adaptive_sparse.cli.inputs import config_of
from hf_adaptive_sparse.cli.space_arguments import loss, space_of
from hf_adaptive_sparse.compressor import compress
from hf_adaptive_sparse.compressor.data_source import DataSource, held_out_batches
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.compressor.presets import get_preset
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.profiles import CompressionProfile

KV_ALONE = ["--target-sparsity", "0", "--kv-bits", "2,4"]


@pytest.fixture
def text_file(tmp_path):
    """Text for 32 windows of a block of the KV cache each."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the fox sees dog {i * 7}.\n" for i in range(200)))
    return path


@pytest.fixture
def within(capsys, llava_folder, text_file, tmp_path):
    def call(*flags, command="search", length=128):
        arguments = [
            command, llava_folder, "--output", tmp_path / "out", "--trials", 1, "--no-progress",
            "--calibration", text_file, "--calibration-samples", 2, "--evaluation", text_file,
            "--evaluation-samples", 16, "--sequence-length", length, *flags,
        ]  # fmt: skip
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("text", "value"), [("0.5%", 0.005), (" 3 % ", 0.03), ("0.005", 0.005), ("50%", 0.5)]
)
def test_a_loss_is_a_percentage_or_a_fraction(text, value):
    assert loss(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["5", "0", "-1%", "100%", "nan", "half", "%"])
def test_other_losses_are_usage_errors(text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["search", "m", "--output", "o", f"--max-loss={text}"])
    assert stop.value.code == 2
    assert "a percentage such as 0.5%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "kl"}, "bounds the perplexity, got objective='kl'"),
        ({"timeout_seconds": 60.0}, r"no timeout_seconds \(--timeout\), got 60.0"),
    ],
)
def test_what_a_bound_excludes_is_refused_before_anything_is_loaded(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        compress("no/such/model", tmp_path / "out", max_loss=0.1, **changes)


@pytest.mark.parametrize(
    ("flags", "target"),
    [((), "free"), (("--target-sparsity", "0"), 0.0), (("--pattern", "2:4"), 0.0)],
)
def test_a_bound_leaves_the_ratios_open_unless_they_are_fixed(flags, target):
    arguments = ["compress", "m", "--output", "o", "--max-loss", "1%", *flags]
    options = build_parser().parse_args(arguments)
    config = config_of(options)
    space = space_of(options, config, get_preset("best").space(config))
    assert (space.target_sparsity, space.size_bytes) == (target, None)


def test_the_fewest_kv_bits_are_written_with_their_bound(within, tmp_path):
    code, out, _ = within("--max-loss", "20%", *KV_ALONE)
    assert code == 0
    assert "mean KV bits. Perplexity on" in out
    profile = CompressionProfile.load(tmp_path / "out/profile.json")
    assert profile.sparsity is None
    bound = json.loads((tmp_path / "out/max_loss.json").read_text())
    assert bound["unit"] == "mean KV bits"
    assert bound["held_out"]["increase"] <= bound["held_out"]["at_most"] <= 0.2
    assert profile.kv_cache.mean_bits([(32, 32)] * 4) == bound["budget"]
    # Random weights hardly attend: the search says that the widths do not differ.
    for wide, narrow in bound["indistinct_kv_bits"]:
        assert f"between {wide} and {narrow} KV bits: {narrow} taken" in out


def test_the_smallest_model_is_pruned_by_its_profile_to_its_size(
    within, capsys, llava_folder, text_file, tmp_path
):
    code, out, _ = within("--max-loss", "0.2", "--kv-bits", "none", "--json", length=32)
    assert code == 0
    found = json.loads(out)
    assert found["unit"] == "bytes on disk"
    assert found["held_out"]["at_most"] <= 0.2
    arguments = [
        "prune", llava_folder, "--output", tmp_path / "pruned", "--one-shot", "--no-progress",
        "--profile", tmp_path / "out/profile.json", "--calibration", text_file,
        "--sequence-length", 32, "--calibration-samples", 2, "--json",
    ]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    capsys.readouterr()
    size = sum(file.stat().st_size for file in (tmp_path / "pruned").glob("*.safetensors"))
    assert 0.9 * found["budget"] < size <= found["budget"]
    # What the bound was checked on is what prune --one-shot makes.
    dense = ModelSource(llava_folder).load()
    data = DataSource(str(text_file), num_samples=16, sequence_length=32)
    _, held_out = held_out_batches(data, ModelSource(llava_folder).load_processor(), dense.config)
    pruned = ModelSource(tmp_path / "pruned").load()
    increase = perplexity(pruned, held_out) / perplexity(dense, held_out) - 1
    assert increase == pytest.approx(found["held_out"]["increase"], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "4GB"], "fixed by size_bytes (--size)"),
        (["--fit", "4GB", "--context", "8"], "fixed by fit_bytes (--fit)"),
        (["--target-sparsity", "0.5"], "fixed by target_sparsity (--target-sparsity)"),
        ([*KV_ALONE, "--kv-mean-bits", "3"], "fixed by kv_mean_bits (--kv-mean-bits)"),
        ([*KV_ALONE, "--kv-split", "equal"], "--kv-split equal fixes it"),
        (["--search-weight-bits", "4,8", "--search-weight-mean", "6"], "--search-weight-mean"),
        (["--objective", "kl"], "bounds the perplexity, got objective='kl'"),
        (["--timeout", "5"], "no timeout_seconds (--timeout), got 5.0"),
        (["--target-sparsity", "0", "--kv-bits", "none"], "The space is empty"),
        (["--evaluation-samples", "4", *KV_ALONE], "at least 16 held-out windows, got 4"),
    ],
)
def test_what_contradicts_the_bound_is_refused_in_one_line(within, tmp_path, flags, message):
    code, out, err = within("--max-loss", "0.5%", *flags)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("hf-adaptive-sparse search:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_windows_that_quantise_nothing_are_refused(within):
    code, _, err = within("--max-loss", "0.5%", *KV_ALONE, length=32)
    assert code == 2
    assert "fills a block of the KV cache (residual_length=128)" in err


def test_compress_leaves_the_smallest_model_within_the_loss(within, tmp_path):
    code, out, err = within(
        "--max-loss", "20%", "--kv-bits", "none", "--workers", "2", "--json",
        command="compress", length=32,
    )  # fmt: skip
    assert code == 0
    assert "workers failed" not in err
    result = json.loads(out)
    bound = result["max_loss"]
    assert bound == json.loads((tmp_path / "out/max_loss.json").read_text())
    assert bound["held_out"]["at_most"] <= 0.2
    # The bound is of the model that was saved: pruned layer by layer, its weights updated.
    dense, compressed = (row["perplexity"] for row in result["measurements"])
    assert compressed / dense - 1 == pytest.approx(bound["held_out"]["increase"], abs=1e-5)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["metric"] == "alps"
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.9 * bound["budget"] < size <= bound["budget"]
    assert "95% confidence" in (tmp_path / "out/README.md").read_text()


def test_compress_with_a_bound_counts_the_bits_of_what_it_saves(within):
    for flags in (["--weight-bits", "8"], ["--checkpoint-format", "dense"]):
        code, _, err = within("--max-loss", "0.5%", *flags, command="compress")
        assert code == 2
        assert "A budget in bytes on disk" in err
