"""``bench``: a table of honest figures, from processes of their own."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, MambaConfig

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.cli.options import weight_bits
from hf_adaptive_sparse.compressor import ModelSource, bench, bench_process, benching
from hf_adaptive_sparse.compressor.bench_process import decoder_bytes, measure
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk


@pytest.fixture
def folders(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> tuple[Path, Path]:
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = has.SparsityConfig(metric="magnitude", kv_cache=8, weight_bits=8)
    apply_config(tiny_llama, config, progress=False)
    tiny_llama.save_pretrained(tmp_path / "compressed")
    return tmp_path / "compressed", tmp_path / "dense"


@pytest.mark.slow
def test_the_command_measures_both_runtimes_and_the_dense_model(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    compressed, dense = map(str, folders)
    options = ["--prompt-tokens", "8", "--new-tokens", "24"]  # of 2, noise may leave no time
    assert main(["bench", compressed, "--dense", dense, "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    sparse, decompressed, original = found["rows"]
    assert [row["runtime"] for row in found["rows"]] == ["sparse", "dense", "dense"]
    assert sparse["name"] == decompressed["name"] == compressed
    assert sparse["disk_bytes"] == weight_bytes_on_disk(compressed) < original["disk_bytes"]
    assert sparse["memory_bytes"] < decompressed["memory_bytes"] == original["memory_bytes"]
    assert sparse["read_bytes_per_token"] < decompressed["read_bytes_per_token"]
    for row in found["rows"]:
        assert row["decode_tokens_per_second"] > 0
        assert row["first_token_seconds"] >= row["load_seconds"] > 0
        share = row["decode_tokens_per_second"] * row["read_bytes_per_token"]
        assert row["bandwidth_share"] == pytest.approx(share / found["bytes_per_second"])


def test_what_a_token_reads_is_the_decoder_and_the_head(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = sum(t.nbytes for t in (*tiny_llama.parameters(), *tiny_llama.buffers()))
    assert decoder_bytes(tiny_llama) == everything  # the embedding is the head as well
    tiny_llama.config.tie_word_embeddings = False
    tiny_llama.lm_head = torch.nn.Linear(64, 128, bias=False)
    embedding = tiny_llama.model.embed_tokens.weight.nbytes
    assert decoder_bytes(tiny_llama) == everything - embedding + tiny_llama.lm_head.weight.nbytes


def test_the_child_measures_what_it_was_asked_for(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_process, "_READ_BYTES", 1 << 16)
    task = {
        "source": {"name": str(folders[0])},
        "runtime": "sparse",
        "compressed": True,
        "prompt_tokens": 4,
        "new_tokens": 2,
    }
    sparse, dense = measure(task), measure(task | {"runtime": "dense"})
    assert (sparse["runtime"], sparse["reason"]) == ("sparse", "it was asked for")
    assert (sparse["adaptive_cache"], dense["adaptive_cache"]) == (True, False)
    assert sparse["memory_bytes"] < dense["memory_bytes"]
    assert sparse["load_peak_bytes"] >= 0


def measure_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_process, "_READ_BYTES", 1 << 16)

    def run(_command: object, *, input: str, **_options: object) -> object:
        found = json.dumps(bench_process.measure(json.loads(input)))
        return subprocess.CompletedProcess([], 0, found)

    monkeypatch.setattr(benching.subprocess, "run", run)


def test_no_decode_speed_is_made_up_where_decoding_took_no_measurable_time(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    measure_in_this_process(monkeypatch)
    monkeypatch.setattr(bench_process, "_best", lambda function: 0.5)
    arguments = ["bench", str(folders[1]), "--prompt-tokens", "4", "--new-tokens", "2"]
    assert main([*arguments, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["decode_tokens_per_second"], row["bandwidth_share"]) == (None, None)
    assert row["prefill_tokens_per_second"] == 8
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "raise --new-tokens" in table
    assert table.splitlines()[2].split()[-2:] == ["-", "-"]


def test_a_model_that_compresses_only_its_cache_is_measured_with_and_without_its_profile(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = has.SparsityConfig(0.0, kv_cache=has.KVCacheConfig(4, residual_length=16))
    apply_config(tiny_llama, config, progress=False)
    tiny_llama.save_pretrained(tmp_path / "kv")
    measure_in_this_process(monkeypatch)
    arguments = ["bench", str(tmp_path / "kv"), "--prompt-tokens", "64", "--new-tokens", "2"]
    assert main([*arguments, "--json"]) == 0
    own, plain = json.loads(capsys.readouterr().out)["rows"]
    assert own["runtime"] == plain["runtime"] == "dense"
    assert (own["adaptive_cache"], plain["adaptive_cache"]) == (True, False)
    assert own["read_bytes_per_token"] < plain["read_bytes_per_token"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "own profile" in table
    assert "DynamicCache" in table


def test_prune_quantises_by_glob_and_says_so_in_its_profile(
    demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prune", str(demo_checkpoint), "--metric", "magnitude", "--no-progress", "--json"]
    bits = ["--weight-bits", "*.mlp.*=8,*.down_proj=4"]
    assert main([*arguments, "--output", str(tmp_path / "a"), *bits]) == 0
    config = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert set(config["weight_bits"].values()) == {8, 4}
    assert all((bits == 4) == ("down" in name) for name, bits in config["weight_bits"].items())
    profile = has.CompressionProfile.load(tmp_path / "a/profile.json")
    assert profile.weight_bits == config["weight_bits"]
    assert "- Weight bits: 4 and 8" in (tmp_path / "a/README.md").read_text().splitlines()
    again = ["--output", str(tmp_path / "b"), "--profile", str(tmp_path / "a/profile.json")]
    assert main([*arguments, *again]) == 0
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    assert main([*arguments, "--output", str(tmp_path / "c"), "--weight-bits", "3"]) == 2
    assert "weight_bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "bits"), [("8", 8), ("*.mlp.*=8", {"*.mlp.*": 8}), ("a=4, b=16", {"a": 4, "b": 16})]
)
def test_weight_bits_are_parsed(text: str, bits: object) -> None:
    assert weight_bits(text) == bits
    for bad in ("x", "a=", "a=b", "8,4"):
        with pytest.raises(argparse.ArgumentTypeError, match="GLOB=BITS joined by commas"):
            weight_bits(bad)


def test_bad_input_is_one_line(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="new_tokens must be a whole number >= 1, got 0"):
        bench(ModelSource(folders[0]), new_tokens=0)
    (folders[1] / "model.safetensors").write_bytes(b"")
    assert main(["bench", str(folders[1]), "--prompt-tokens", "8"]) == 2
    error = capsys.readouterr().err
    assert "cannot be measured in the dense runtime" in error
    assert len(error.strip().splitlines()) == 1


def test_the_prompt_fits_the_context(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(folders[1]), "--new-tokens", "2", "--prompt-tokens"]
    assert main([*arguments, "511"]) == 2
    assert "dense, 512 tokens; got 511 and 2. Give fewer." in capsys.readouterr().err
    assert main(["bench", str(folders[1]), "--new-tokens", "512"]) == 2
    assert "dense, 512 tokens; got 1 and 512. Give fewer." in capsys.readouterr().err
    MambaConfig().save_pretrained(tmp_path / "unlimited")
    model, unlimited = ModelSource(folders[1]), ModelSource(tmp_path / "unlimited")
    assert benching._prompt_tokens([model], 510, 2) == 510
    assert benching._prompt_tokens([unlimited], 9999, 2) == 9999
    assert benching._prompt_tokens([unlimited], None, 32) == 512
    assert benching._prompt_tokens([unlimited, model], None, 32) == 480
