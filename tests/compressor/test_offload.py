"""Pruning from disk to disk: the same result as in memory, one layer at a time, and resumable."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlavaProcessor
from transformers.core_model_loading import Chunk, WeightConverter

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint import offloaded, shards, weight_files
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.checkpoint.offloaded import STATE_NAME, OffloadedLayers
from hf_adaptive_sparse.compressor import (
    DataSource,
    ModelSource,
    compress,
    compression,
    prune_to_folder,
)
from hf_adaptive_sparse.compressor.saving import save_model, save_processor
from hf_adaptive_sparse.pruning import layerwise
from hf_adaptive_sparse.staging import OutputError
from tests.families.catalogue import FAMILIES
from tests.families.matrix import make_batch
from tests.families.tiny_models import tiny_model
from tests.processors import make_llava_processor, make_tokenizer

CONFIG = has.SparsityConfig(
    sparsity={"*.mlp.*": 0.6, "*.layers.0.self_attn.*": 0.3},
    kv_cache=has.KVCacheConfig(bits=6),
    calibration=has.CalibrationConfig(),
)

CONFIG_OF_TEXT = has.SparsityConfig(target_sparsity=0.5)


@pytest.fixture
def questions(question_file: Path) -> DataSource:
    return DataSource(question_file, num_samples=4, batch_size=2)


@pytest.fixture
def source(llava_folder: Path) -> ModelSource:
    return ModelSource(llava_folder)


def offload(source, output, data, config=CONFIG, **options):
    return prune_to_folder(
        source, output, config, calibration=data, offload=True, progress=False, **options
    )


def state(folder: Path) -> dict[str, torch.Tensor]:
    return has.AutoModelForVision2Seq.from_pretrained(folder).state_dict()


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def assert_same_model(expected: Path, found: Path) -> None:
    first, second = state(expected), state(found)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"calibration": has.CalibrationConfig(sequential=False)},
        {"metric": "sparsegpt"},
        {"metric": "magnitude", "checkpoint_format": "dense"},
        {"pattern": "2:4", "sparsity": None, "modules_to_not_convert": ["*.layers.2.*"]},
        {"target_sparsity": 0.0, "sparsity": None},
        {"weight_bits": {"*.mlp.*": 8, "*.q_proj": 4}},
        {"target_sparsity": 0.0, "sparsity": None, "weight_bits": 4},
    ],
    ids=[
        "sequential",
        "one-shot",
        "sparsegpt",
        "dense format",
        "2:4",
        "nothing removed",
        "codes",
        "codes alone",
    ],
)
def test_the_result_is_that_of_memory_bit_for_bit(source, questions, tmp_path, changes):
    settings = {"kv_cache": CONFIG.kv_cache, "sparsity": CONFIG.sparsity} | changes
    config = has.SparsityConfig(**{"calibration": CONFIG.calibration} | settings)
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    expected = prune_to_folder(source, memory, config, calibration=questions, progress=False)
    found = offload(source, disk, questions, config)
    assert_same_model(memory, disk)
    assert replace(found.report, seconds=0) == replace(expected.report, seconds=0)
    assert found.dense_bytes == expected.dense_bytes
    for name in ("config.json", "generation_config.json", "profile.json"):
        assert json.loads((disk / name).read_text()) == json.loads((memory / name).read_text())
    stored = load_file(memory / "model.safetensors")
    shards = {key for path in disk.glob("*.safetensors") for key in load_file(path)}
    assert shards == stored.keys()
    extra = {p.name for p in disk.iterdir()} ^ {p.name for p in memory.iterdir()}
    assert {name for name in extra if not name.startswith("model")} == set()


@contextmanager
def edited_tensors(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_tensors_that_the_model_does_not_take_are_left_out_as_in_memory(
    source, questions, tmp_path
) -> None:
    folder = Path(shutil.copytree(source.name, tmp_path / "source"))
    inv_freq = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    with edited_tensors(folder) as tensors:
        tensors |= {inv_freq: torch.ones(4), "mtp.layers.0.weight": torch.ones(2, 2)}
    prune_to_folder(
        ModelSource(folder), tmp_path / "memory", CONFIG, calibration=questions, progress=False
    )
    offload(ModelSource(folder), tmp_path / "disk", questions)
    assert_same_model(tmp_path / "memory", tmp_path / "disk")
    assert stored_tensors(tmp_path / "memory").keys() == stored_tensors(tmp_path / "disk").keys()


EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """The folder of a model whose head is its embedding."""
    folder = tmp_path / "source"
    tiny_model("llama", {"tie_word_embeddings": True}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_tied_weight_may_lie_under_either_name(tied, tokens, tmp_path) -> None:
    with edited_tensors(tied) as tensors:
        embedding = tensors.pop(EMBEDDING)
        tensors["lm_head.weight"] = embedding
    offload(ModelSource(tied), tmp_path / "disk", tokens, has.SparsityConfig())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, embedding)


def test_a_block_that_layers_share_is_read_for_each(tokens, tmp_path) -> None:
    layers = ["linear_attention", "hybrid"] * 3
    model = tiny_model(
        "zamba2",
        {
            "num_hidden_layers": len(layers),
            "layer_types": layers,
            "hybrid_layer_ids": [1, 3, 5],
            "num_mem_blocks": 1,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_d_state": 8,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
    )
    assert any(name.startswith("model.layers.5.") for name in model.all_tied_weights_keys)
    model.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    source, config = ModelSource(tmp_path / "source"), has.SparsityConfig()
    prune_to_folder(source, tmp_path / "memory", config, calibration=tokens, progress=False)
    offload(source, tmp_path / "disk", tokens, config)
    expected, found = stored_tensors(tmp_path / "memory"), stored_tensors(tmp_path / "disk")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_tied_weight_that_is_under_no_name_is_missed(tied, tokens, tmp_path) -> None:
    with edited_tensors(tied) as tensors:
        del tensors[EMBEDDING]
    with pytest.raises(CheckpointError, match=r"lacks 2 .*such as 'lm_head.weight'"):
        offload(ModelSource(tied), tmp_path / "disk", tokens, has.SparsityConfig())


def test_a_tensor_of_another_shape_is_refused(tied, tokens, tmp_path) -> None:
    with edited_tensors(tied) as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(40, 32)
    with pytest.raises(CheckpointError, match=r"up_proj.weight', \[48, 32\]; it has \[40, 32\]"):
        offload(ModelSource(tied), tmp_path / "disk", tokens, has.SparsityConfig())


@pytest.fixture
def tokens() -> DataSource:
    ids = torch.randint(100, 160, (1, 40), generator=torch.Generator().manual_seed(0))
    return DataSource([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


def test_a_model_without_prunable_weights_takes_the_cache(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(
        tmp_path / "gpt2"
    )
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    config = has.SparsityConfig(target_sparsity=0.0, kv_cache=has.KVCacheConfig(bits=8))
    offload(ModelSource(tmp_path / "gpt2"), tmp_path / "disk", None, config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    assert model.config.quantization_config.kv_cache.layer_bits(2) == ((8, 8),) * 2


@pytest.mark.parametrize("original", [True, False], ids=["tensor per expert", "stacked"])
@pytest.mark.parametrize("changes", [{}, {"checkpoint_format": "dense"}, {"weight_bits": 8}])
def test_experts_are_pruned_as_in_memory(tokens, tmp_path, original, changes):
    model, folder = tiny_model("mixtral"), tmp_path / "source"
    config = has.SparsityConfig(
        sparsity={"*.layers.1.*": 0.5},
        calibration=has.CalibrationConfig(min_expert_tokens=21),
        **changes,
    )
    model.save_pretrained(folder, save_original_format=original)
    make_llava_processor().tokenizer.save_pretrained(folder)
    source, memory, disk = ModelSource(folder), tmp_path / "memory", tmp_path / "disk"
    expected = prune_to_folder(source, memory, config, calibration=tokens, progress=False)
    found = offload(source, disk, tokens, config)
    loaded = [type(model).from_pretrained(folder).state_dict() for folder in (memory, disk)]
    assert all(torch.equal(tensor, loaded[1][name]) for name, tensor in loaded[0].items())
    assert found.report.experts_without_data == expected.report.experts_without_data != {}


def interrupted_and_resumed(folder, output, tokens, config, monkeypatch):
    """Prune from disk to disk, interrupted at the second layer; return the report in the end."""
    keep = OffloadedLayers.keep

    def dies(self, index, *args):
        if index == 1:
            raise KeyboardInterrupt
        keep(self, index, *args)

    monkeypatch.setattr(OffloadedLayers, "keep", dies)
    with pytest.raises(KeyboardInterrupt):
        offload(ModelSource(folder), output, tokens, config)
    monkeypatch.setattr(OffloadedLayers, "keep", keep)
    return offload(ModelSource(folder), output, tokens, config).report


def test_interrupted_runs_name_all_linears_without_data(tokens, tmp_path, monkeypatch):
    folder, config = tmp_path / "source", has.SparsityConfig()
    tiny_model("mamba").save_pretrained(folder)
    make_llava_processor().tokenizer.save_pretrained(folder)
    memory = prune_to_folder(
        ModelSource(folder), tmp_path / "memory", config, calibration=tokens, progress=False
    )
    report = interrupted_and_resumed(folder, tmp_path / "out", tokens, config, monkeypatch)
    names = [f"backbone.layers.{index}.mixer.dt_proj" for index in range(2)]
    assert report.linears_without_data == memory.report.linears_without_data == names
    assert report.experts_without_data == {}


def test_interrupted_runs_name_all_experts_without_data(tokens, tmp_path, monkeypatch):
    folder, config = tmp_path / "source", has.SparsityConfig()
    tiny_model("mixtral").save_pretrained(folder)
    make_llava_processor().tokenizer.save_pretrained(folder)
    report = interrupted_and_resumed(folder, tmp_path / "out", tokens, config, monkeypatch)
    assert report.experts_without_data == {
        f"model.layers.{index}.mlp.experts": [0, 1, 2, 3] for index in range(2)
    }


def test_one_layer_is_in_memory_at_a_time(source, questions, tmp_path, monkeypatch):
    seen: list[OffloadedLayers] = []
    most = 0
    resident = OffloadedLayers.resident

    def counted(self, index):
        nonlocal most
        seen.append(self)
        layers = self._model.get_submodule(self._prefix)
        held = [
            i for i, layer in enumerate(layers) if any(not p.is_meta for p in layer.parameters())
        ]
        assert set(held) <= {index}
        most = max(most, len(held))
        return resident(self, index)

    monkeypatch.setattr(OffloadedLayers, "resident", counted)
    offload(source, tmp_path / "out", questions)
    layers = seen[0]
    one = sum(p.numel() * 4 for p in layers._model.model.language_model.layers[0].parameters())
    assert layers.most_resident_bytes == one
    assert all(p.is_meta for p in layers._model.model.language_model.layers.parameters())
    assert len(seen) > 4


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("died_at", [0, 2, 4])
def test_an_interrupted_run_goes_on_where_it_was(
    source, questions, tmp_path, monkeypatch, died_at, sequential
):
    settings = {
        "sparsity": CONFIG.sparsity,
        "calibration": has.CalibrationConfig(sequential=sequential),
        "weight_bits": {"*.mlp.up_proj": 8},
    }
    config = has.SparsityConfig(**settings)
    whole, output = tmp_path / "whole", tmp_path / "out"
    expected = offload(source, whole, questions, config)
    write = offloaded.write_shard

    def dying(path, tensors):
        if f"-{died_at + 1:05d}-of" in path.name:
            path.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        return write(path, tensors)

    monkeypatch.setattr(offloaded, "write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        offload(source, output, questions, config)
    assert not output.exists()
    monkeypatch.setattr(offloaded, "write_shard", write)

    calibrated = []
    collect = layerwise.collect_inputs
    monkeypatch.setattr(
        layerwise,
        "collect_inputs",
        lambda linears, **k: calibrated.append(linears) or collect(linears, **k),
    )
    found = offload(source, output, questions, config)
    done = max(0, died_at - 1)  # the first shard is not a layer
    assert len(calibrated) == 4 - done
    assert replace(found.report, seconds=0) == replace(expected.report, seconds=0)
    assert_same_model(whole, output)
    assert not (output / STATE_NAME).exists()


def count_written(monkeypatch) -> list[str]:
    """Return the list to which the name of each shard that is written from now on is added."""
    written, write = [], offloaded.write_shard
    monkeypatch.setattr(
        offloaded,
        "write_shard",
        lambda path, tensors: written.append(path.name) or write(path, tensors),
    )
    return written


def test_a_run_that_fails_after_its_last_layer_prunes_none_again(
    source, questions, tmp_path, monkeypatch
):
    whole, output = tmp_path / "whole", tmp_path / "out"
    expected = offload(source, whole, questions)

    def full(self, folder, **options):
        (Path(folder) / "left.json").write_text("half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(LlavaProcessor, "save_pretrained", full)
        offload(source, output, questions)
    assert not output.exists()
    written = count_written(monkeypatch)
    found = offload(source, output, questions)
    assert written == []
    assert replace(found.report, seconds=0) == replace(expected.report, seconds=0)
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.glob("*.safetensors*"):
        assert path.read_bytes() == (output / path.name).read_bytes()


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_full_disk_is_named_where_the_processor_is_written(
    source, tmp_path, monkeypatch, offloaded
):
    def full(self, folder, **options):
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    monkeypatch.setattr(LlavaProcessor, "save_pretrained", full)
    config = has.SparsityConfig(metric="magnitude")
    message = r"processor cannot be written to .*No space left on device.*Free space there, or"
    with pytest.raises(OutputError, match=message):
        prune_to_folder(source, tmp_path / "out", config, offload=offloaded, progress=False)


def test_a_bug_in_a_processor_is_no_full_disk(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise RuntimeError("no such attribute")

    with pytest.raises(RuntimeError, match="no such attribute"):
        save_processor(Broken(), tmp_path)


def test_a_full_disk_is_named_where_a_shard_is_written(source, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    message = r"weights cannot be written to .*No space left on device.*Free space there, or"
    with pytest.raises(OutputError, match=message):
        offload(source, tmp_path / "out", None, has.SparsityConfig(metric="magnitude"))


def test_a_job_that_is_interrupted_while_it_measures_prunes_none_again(
    source, text_file, tmp_path, monkeypatch
):
    data = DataSource(text_file, num_samples=6, sequence_length=32, batch_size=2)
    settings = {"calibration": data, "evaluation": data, "n_trials": 3, "progress": False}
    whole, output = tmp_path / "whole", tmp_path / "out"
    compress(source, whole, offload=True, **settings)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compression, "_load_stored", interrupted)
        compress(source, output, offload=True, **settings)
    written = count_written(monkeypatch)
    compress(source, output, offload=True, **settings)
    assert written == []
    assert_same_model(whole, output)
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}


def interrupt(source, output, data, config=CONFIG) -> None:
    """Leave a run of which every layer is done."""

    def full(self):
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(OffloadedLayers, "finish", full)
        offload(source, output, data, config)


def test_the_state_of_another_run_is_not_used(source, questions, tmp_path, caplog):
    output = tmp_path / "out"
    interrupt(source, output, questions)
    other = has.SparsityConfig(target_sparsity=0.25, calibration=has.CalibrationConfig())
    with caplog.at_level(logging.WARNING):
        found = offload(source, output, questions, other)
    assert "starts anew" in caplog.text
    assert found.report.mean_sparsity == pytest.approx(0.25, abs=1e-4)


def test_a_run_in_another_dtype_starts_anew(source, tmp_path, caplog):
    config, output = has.SparsityConfig(metric="magnitude"), tmp_path / "out"
    interrupt(replace(source, dtype="bfloat16"), output, None, config)
    with caplog.at_level(logging.WARNING):
        offload(source, output, None, config)
    assert "starts anew" in caplog.text
    assert {t.dtype for t in stored_tensors(output).values()} == {torch.float32, torch.uint8}


def test_shards_of_another_model_do_not_stay(source, tmp_path):
    config, output = has.SparsityConfig(metric="magnitude"), tmp_path / "out"
    tiny_model("llama").save_pretrained(tmp_path / "other")
    make_llava_processor().tokenizer.save_pretrained(tmp_path / "other")
    interrupt(source, output, None, config)
    offload(ModelSource(tmp_path / "other"), output, None, config)
    named = set(
        json.loads((output / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    assert {path.name for path in output.glob("*.safetensors*")} == {
        "model.safetensors.index.json",
        *named,
    }


def test_a_run_whose_shards_are_damaged_starts_anew(source, tmp_path, caplog):
    config, output = has.SparsityConfig(metric="magnitude"), tmp_path / "out"
    interrupt(source, output, None, config)
    [shard] = (tmp_path / "out.adaptive-sparse.partial").glob("model-00003-of-*")
    os.truncate(shard, shard.stat().st_size - 16)
    with caplog.at_level(logging.WARNING):
        offload(source, output, None, config)
    assert "damaged" in caplog.text
    assert "model.language_model.layers.1.mlp.up_proj.weight" in state(output)


def test_a_shard_is_on_the_disk_before_the_state_names_it(source, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file) or fsync(file))
    written = []

    def order(path, data):
        assert len(synced) == 2 * len(written) + 1  # of each before: shard and state
        written.append(path)
        shards.write_json(path, data)

    monkeypatch.setattr(offloaded, "write_json", order)
    offload(source, tmp_path / "out", None, has.SparsityConfig(metric="magnitude"))
    assert len(written) == 5


def test_an_output_that_is_not_empty_is_left_alone(source, questions, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("here")
    with pytest.raises(OutputError, match="must be empty"):
        offload(source, output, questions)
    offload(source, output, questions, overwrite=True)
    assert not (output / "mine").exists()


def test_the_whole_job_gives_what_it_gives_in_memory_and_goes_on_where_it_was(
    source, text_file, tmp_path, monkeypatch
):
    data = DataSource(text_file, num_samples=6, sequence_length=32, batch_size=2)
    settings = {"calibration": data, "evaluation": data, "n_trials": 3, "progress": False}
    expected = compress(source, tmp_path / "memory", **settings)

    output, write = tmp_path / "disk", offloaded.write_shard

    def dying(path, tensors):
        if "-00003-of" in path.name:
            raise KeyboardInterrupt
        return write(path, tensors)

    monkeypatch.setattr(offloaded, "write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        compress(source, output, offload=True, **settings)
    assert not output.exists()
    written = []
    monkeypatch.setattr(
        offloaded, "write_shard", lambda path, tensors: written.append(path) or write(path, tensors)
    )
    found = compress(source, output, offload=True, **settings)
    assert [path.name[:11] for path in written] == ["model-00003", "model-00004", "model-00005"]
    assert_same_model(tmp_path / "memory", output)
    assert found.search.best_value == expected.search.best_value
    assert [row.sparsity for row in found.measurements] == [
        row.sparsity for row in expected.measurements
    ]
    for mine, other in zip(found.measurements, expected.measurements, strict=True):
        assert mine.perplexity == pytest.approx(other.perplexity, rel=1e-5)
    assert not list(tmp_path.glob("*.partial"))
    named = {path.name for path in output.iterdir() if not path.name.startswith("model")}
    assert named == {
        path.name for path in (tmp_path / "memory").iterdir() if not path.name.startswith("model")
    }


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [({}, {"max_loss": 0.01}, "max_loss"), ({"device_map": "cuda:0"}, {}, "device_map")],
)
def test_the_whole_job_refuses_what_needs_the_model_in_memory(
    source, questions, tmp_path, change, options, message
):
    with pytest.raises(ValueError, match=message):
        compress(replace(source, **change), tmp_path / "out", offload=True, **options)


def test_saving_may_consume_the_model(tiny_llama, text_batches, tmp_path):
    has.prune(tiny_llama, CONFIG_OF_TEXT, text_batches, progress=False)
    save_model(tiny_llama, None, tmp_path / "kept")
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    assert not weight.is_meta
    save_model(tiny_llama, None, tmp_path / "gone", consume=True)
    assert tiny_llama.model.layers[0].mlp.up_proj.weight.is_meta
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("kept", "gone"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_compressed_model_and_one_without_safetensors_are_refused(source, questions, tmp_path):
    output = tmp_path / "out"
    offload(source, output, questions)
    with pytest.raises(ValueError, match="compressed or quantised already"):
        offload(ModelSource(output), tmp_path / "again", questions)
    (Path(source.name) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither .* pytorch_model.bin, become"):
        offload(source, tmp_path / "again", questions)


def test_weights_made_by_a_conversion_are_refused(source, questions, tmp_path, monkeypatch):
    split = WeightConverter("self_attn.q_proj.weight", ["a.weight", "b.weight"], [Chunk(dim=0)])
    monkeypatch.setattr(weight_files, "get_model_conversion_mapping", lambda model: [split])
    with pytest.raises(CheckpointError, match=r"by a conversion.*save_original_format=False"):
        offload(source, tmp_path / "out", questions)


SAMPLE = ["llama", "gemma3", "qwen2_vl", "mllama", "opt", "granite_speech (audio)"]


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.title in SAMPLE], ids=lambda f: f.title
)
def test_stand_ins_show_what_the_layers_are_called_with(family):
    model = tiny_model(family.model_type, family.changes)
    batch = make_batch(family, model)
    real = layerwise.DecoderReplay(model, [batch])
    shown = layerwise.DecoderReplay(model, [batch], stand_ins=True)
    assert torch.equal(real.hidden_states[0], shown.hidden_states[0])
    last = len(real._layers)
    for index in range(last):
        real.run_layer(index, advance=True)
        shown.run_layer(index, advance=True)
        assert torch.equal(real.hidden_states[0], shown.hidden_states[0])
    assert not any("forward" in layer.__dict__ for layer in real._layers)


def test_what_is_not_consumed_is_copied_from_its_file(tiny_llama, text_batches, tmp_path):
    """A norm that stayed mapped would keep the pages of weights that were let go."""
    has.prune(tiny_llama, has.SparsityConfig(metric="wanda"), text_batches, progress=False)
    before = {name: (p.data_ptr(), p.clone()) for name, p in tiny_llama.named_parameters()}
    save_model(tiny_llama, None, tmp_path / "gone", consume=True)
    stayed = [name for name, p in tiny_llama.named_parameters() if not p.is_meta]
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= set(stayed)
    for name in stayed:
        now, (address, values) = tiny_llama.get_parameter(name), before[name]
        assert now.data_ptr() != address
        assert torch.equal(now, values)
    assert tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "gone")
    assert torch.equal(loaded.lm_head.weight, before["model.embed_tokens.weight"][1])


@pytest.mark.parametrize(
    ("family", "stored", "dtype"),
    [
        ("llava", torch.bfloat16, "float32"),
        ("llava", torch.float32, "bfloat16"),
        ("blip-2", torch.bfloat16, "float16"),  # keeps its Q-Former in float32
        ("glm4_moe", torch.bfloat16, "float16"),  # a router's buffer in float32, experts untouched
    ],
)
def test_all_is_written_in_the_dtype_that_memory_has(tmp_path, family, stored, dtype):
    changes = next(f.changes for f in FAMILIES if f.title == family)
    tiny_model(family, changes).to(stored).save_pretrained(tmp_path / "source")
    make_llava_processor().tokenizer.save_pretrained(tmp_path / "source")
    source, memory, disk = (
        ModelSource(tmp_path / "source", dtype=dtype),
        tmp_path / "m",
        tmp_path / "d",
    )
    config = has.SparsityConfig(sparsity={"*.layers.1.*": 0.5}, metric="magnitude")
    expected = prune_to_folder(source, memory, config, progress=False)
    assert offload(source, disk, None, config).dense_bytes == expected.dense_bytes
    first, second = stored_tensors(memory), stored_tensors(disk)
    common = first.keys() & second.keys()  # what is compressed of experts has names of its own
    assert all("experts.sparse" in name for name in first.keys() ^ second.keys())
    assert [n for n in common if first[n].dtype != second[n].dtype] == []
    assert all(torch.equal(first[n], second[n]) for n in common)
    assert (disk / "config.json").read_text() == (memory / "config.json").read_text()
