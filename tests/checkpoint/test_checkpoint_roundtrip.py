"""Save -> load -> save through transformers' own functions, in both formats."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    LlamaModel,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.headers import compressed_summary, read_headers
from hf_adaptive_sparse.checkpoint.plugin import apply_config

QUIET = {"progress": False}


@pytest.fixture(params=["llama", "llava"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made: PreTrainedModel = request.getfixturevalue(f"tiny_{request.param}")
    return made


def compress_(model: PreTrainedModel, **fields: object) -> PreTrainedModel:
    config = has.SparsityConfig(metric="magnitude", **fields)
    apply_config(model, config, **QUIET)
    return model


def patterns(model: nn.Module) -> dict[str, torch.Tensor]:
    """The bytes of all parameters and buffers."""
    return {
        name: tensor.detach().cpu().contiguous().view(torch.uint8)
        for name, tensor in model.state_dict().items()
    }


def assert_same_bytes(a: nn.Module, b: nn.Module) -> None:
    left, right = patterns(a), patterns(b)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


def file_hashes(folder: Path) -> dict[str, str]:
    """Hashes of the weight files, and of our part of the config.

    The rest of it transformers completes on the first load (dtypes of a LLaVA's parts).
    """
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*safetensors*")
    }
    ours = json.loads((folder / "config.json").read_text())["quantization_config"]
    return hashes | {"config.json": json.dumps(ours)}


def tensor_hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                data = handle.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                hashes[name] = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    return hashes


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 128, (2, 12), generator=generator)
    if model.config.model_type != "llava":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ids[:, 1:5] = 4
    pixels = torch.randn(2, 3, 16, 16, generator=generator).to(model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def generate(model: PreTrainedModel) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(**inputs(model), max_new_tokens=70, do_sample=False)
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpoint_format", ["bitmask", "dense"])
def test_save_load_save_is_bit_exact(
    model: PreTrainedModel, tmp_path: Path, dtype: torch.dtype, checkpoint_format: str
) -> None:
    # Loaded, not cast: a cast also rounds the rotary frequencies, which no checkpoint stores.
    model.to(dtype).save_pretrained(tmp_path / "dense")
    model = type(model).from_pretrained(tmp_path / "dense")
    compress_(model, checkpoint_format=checkpoint_format, kv_cache=8)
    before = generate(model)
    model.save_pretrained(tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert loaded.dtype == dtype
    assert not loaded.training
    assert_same_bytes(model, loaded)
    assert torch.equal(generate(loaded), before)
    loaded.save_pretrained(tmp_path / "b")
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")


def test_every_bit_pattern_survives_the_file(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    compress_(tiny_llama)
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, :4] = torch.tensor([-0.0, float("nan"), float("-inf"), 1e-45])
        weight[1] = 0
        weight[2] = 1
        weight.view(torch.int32)[3, 3] = 0x7FC0BEEF
        tiny_llama.model.layers[1].mlp.up_proj.weight.zero_()
    tiny_llama.save_pretrained(tmp_path)
    assert_same_bytes(tiny_llama, LlamaForCausalLM.from_pretrained(tmp_path))


def test_columns_need_not_be_a_multiple_of_eight(tmp_path: Path) -> None:
    from tests.conftest import llama_config

    torch.manual_seed(0)
    odd = LlamaForCausalLM(llama_config(hidden_size=44, intermediate_size=13))
    compress_(odd)
    odd.save_pretrained(tmp_path)
    assert_same_bytes(odd, LlamaForCausalLM.from_pretrained(tmp_path))
    assert read_headers(tmp_path / "model.safetensors")[
        "model.layers.0.mlp.down_proj.weight_bitmask"
    ].shape == (44, 2)


@pytest.mark.parametrize("checkpoint_format", ["bitmask", "dense"])
def test_shards(model: PreTrainedModel, tmp_path: Path, checkpoint_format: str) -> None:
    compress_(model, checkpoint_format=checkpoint_format)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 5
    assert index["weight_map"].keys() == read_headers(tmp_path / "a").keys()
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert_same_bytes(model, loaded)
    loaded.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert tensor_hashes(tmp_path / "a") == tensor_hashes(tmp_path / "b")
    # transformers orders tensors another way once a model has been loaded; from then on the
    # shards are the same files.
    again = type(model).from_pretrained(tmp_path / "b")
    again.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    assert file_hashes(tmp_path / "b") == file_hashes(tmp_path / "c")


def test_only_what_the_profile_names_is_compressed(
    tiny_llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    compress_(tiny_llava, sparsity={"*.up_proj": 0.5, "*layers.2.*": 0.25})
    tiny_llava.save_pretrained(tmp_path)
    headers = read_headers(tmp_path / "model.safetensors")
    masks = {name for name in headers if name.endswith("bitmask")}
    assert len(masks) == 3 + 7
    assert all("language_model" in name for name in masks)
    summary = compressed_summary(headers)
    numel = tiny_llava.model.language_model.layers[2].mlp.up_proj.weight.numel()
    assert [m.nnz for n, m in summary.items() if "layers.2.mlp.up_proj" in n] == [numel * 3 // 4]
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    # The config speaks of runtime names, the file of the names LLaVA has always had on disk.
    assert all(name.startswith("model.language_model.layers.") for name in config["sparsity"])
    assert any(name.startswith("language_model.model.layers.") for name in masks)


def test_the_config_file_holds_the_designs_keys_and_nothing_else(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    compress_(tiny_llama, kv_cache=has.KVCacheConfig(bits=(8, 6, 8, 6)))
    tiny_llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(config) == {
        "quant_method",
        "format_version",
        "target_sparsity",
        "metric",
        "pattern",
        "checkpoint_format",
        "sparsity",
        "modules_to_not_convert",
        "kv_cache",
        "provenance",
    }
    assert config["kv_cache"]["key_bits"] == [8, 6, 8, 6]
    assert len(config["sparsity"]) == 28
    assert set(config["provenance"]) == {
        "base_model",
        "revision",
        "calibration",
        "seed",
        "versions",
    }


def test_pruned_weights_take_at_most_0575_of_bf16_on_disk(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    compress_(tiny_llama.to(torch.bfloat16))
    tiny_llama.save_pretrained(tmp_path)
    stored = sum(m.size_bytes for m in compressed_summary(read_headers(tmp_path)).values())
    names = tiny_llama.config.quantization_config.sparsity
    dense = sum(tiny_llama.get_submodule(name).weight.nbytes for name in names)
    assert stored <= 0.575 * dense
    file_size = (tmp_path / "model.safetensors").stat().st_size
    rest = sum(
        h.size_bytes
        for n, h in read_headers(tmp_path).items()
        if not n.endswith(("bitmask", "values"))
    )
    assert file_size - rest < 0.575 * dense + 16_384


@pytest.mark.parametrize("checkpoint_format", ["bitmask", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_may_be_asked_for(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, dtype: torch.dtype, checkpoint_format: str
) -> None:
    compress_(tiny_llama.to(torch.bfloat16), checkpoint_format=checkpoint_format)
    tiny_llama.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert all(p.dtype == dtype for p in loaded.parameters())
    assert_same_bytes(tiny_llama.to(dtype), loaded)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(tiny_llama: LlamaForCausalLM, tmp_path: Path, device_map: object) -> None:
    compress_(tiny_llama)
    tiny_llama.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, low_cpu_mem_usage=True
    )
    assert_same_bytes(tiny_llama, loaded)


def test_layers_offloaded_to_disk_are_saved_compressed_again(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    compress_(tiny_llama)
    before = generate(tiny_llama)
    tiny_llama.save_pretrained(tmp_path / "a")
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    device_map = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    device_map |= {"model.layers.2": "disk", "model.layers.3": "disk"}
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "a", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(generate(loaded), before)
    with pytest.warns(UserWarning, match="offloaded"):
        loaded.save_pretrained(tmp_path / "b")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "b")
    assert_same_bytes(tiny_llama, again)


@pytest.mark.parametrize(
    "loader", [AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel], ids=lambda c: c.__name__
)
def test_every_class_reads_a_llama(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, loader: type
) -> None:
    compress_(tiny_llama)
    tiny_llama.save_pretrained(tmp_path)
    loader = type(tiny_llama) if loader is PreTrainedModel else loader
    assert_same_bytes(tiny_llama, loader.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "loader",
    [AutoModelForImageTextToText, has.AutoModelForVision2Seq, LlavaForConditionalGeneration],
    ids=lambda c: c.__name__,
)
def test_every_class_reads_a_llava(
    tiny_llava: LlavaForConditionalGeneration, tmp_path: Path, loader: type
) -> None:
    compress_(tiny_llava, kv_cache=6)
    tiny_llava.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert_same_bytes(tiny_llava, loaded)
    assert torch.equal(generate(loaded), generate(tiny_llava))


def test_a_bare_decoder_is_read_from_and_written_for_the_whole_model(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    compress_(tiny_llama)
    tiny_llama.save_pretrained(tmp_path / "whole")
    bare = AutoModel.from_pretrained(tmp_path / "whole")
    assert isinstance(bare, LlamaModel)
    assert_same_bytes(tiny_llama.model, bare)
    assert next(iter(bare.config.quantization_config.sparsity)).startswith("layers.0.")
    bare.save_pretrained(tmp_path / "bare")
    assert compressed_summary(read_headers(tmp_path / "bare")).keys() == {
        name.removeprefix("model.") for name in tiny_llama.config.quantization_config.sparsity
    }
    assert_same_bytes(tiny_llama, LlamaForCausalLM.from_pretrained(tmp_path / "bare"))


def test_a_bare_llava_is_read(tiny_llava: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    compress_(tiny_llava)
    tiny_llava.save_pretrained(tmp_path)
    assert_same_bytes(tiny_llava.model, AutoModel.from_pretrained(tmp_path))


EXCLUDED = {
    "model.language_model.layers.0.self_attn.q_proj": ["language_model.layers.0.self_attn.q_proj"],
    "model.language_model.layers.0.mlp": [
        f"language_model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    ],
    "model.*.layers.3.self_attn.[kv]_proj": [
        f"language_model.layers.3.self_attn.{name}_proj" for name in ("k", "v")
    ],
    "*.layers.1.self_attn.*": ["*.layers.1.self_attn.*"],
}


@pytest.mark.parametrize("runtime", ["dense", "sparse"])
def test_what_stays_dense_is_renamed_for_another_class(
    tiny_llava: LlavaForConditionalGeneration, tmp_path: Path, runtime: str
) -> None:
    compress_(tiny_llava, modules_to_not_convert=list(EXCLUDED))
    tiny_llava.save_pretrained(tmp_path / "whole")
    config = has.SparsityConfig(runtime=runtime)
    bare = AutoModel.from_pretrained(tmp_path / "whole", sparsity_config=config)
    found = bare.config.quantization_config.modules_to_not_convert
    assert found == [name for names in EXCLUDED.values() for name in names]
    expected = has.sparsity_report(tiny_llava)
    assert has.sparsity_report(bare).mean_sparsity == expected.mean_sparsity
    bare.save_pretrained(tmp_path / "bare")
    whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "bare")
    assert has.sparsity_report(whole).mean_sparsity == expected.mean_sparsity


def test_what_stays_dense_and_is_in_no_other_class_is_forgotten(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    compress_(tiny_llama, modules_to_not_convert=["*.layers.3.*", "model.layers.2.mlp"])
    tiny_llama.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules_to_not_convert"].append("model.layers.9.mlp")
    path.write_text(json.dumps(config))
    bare = AutoModel.from_pretrained(tmp_path)
    assert set(bare.config.quantization_config.modules_to_not_convert) == {
        name
        for name, module in bare.named_modules()
        if name.startswith(("layers.3.", "layers.2.mlp.")) and isinstance(module, nn.Linear)
    }
    assert has.sparsity_report(bare).total == has.sparsity_report(tiny_llama).total


def test_the_dense_format_is_read_without_the_plugin(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    compress_(tiny_llama, checkpoint_format="dense", kv_cache=8)
    tiny_llama.save_pretrained(tmp_path)
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "assert not any(n.startswith('hf_adaptive_sparse') for n in sys.modules)\n"
        "import hashlib\n"
        "h = hashlib.sha256()\n"
        "for n, t in sorted(m.state_dict().items()):\n"
        "    h.update(t.numpy().tobytes())\n"
        "print(h.hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        # As where the plugin is not installed: installed, it registers itself.
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256()
    for _, tensor in sorted(tiny_llama.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    assert done.stdout.strip() == digest.hexdigest()


def test_a_model_with_nothing_pruned_carries_its_kv_profile(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    before = patterns(tiny_llama)
    config = has.SparsityConfig(target_sparsity=0, kv_cache=has.KVCacheConfig(key_bits=8))
    report = apply_config(tiny_llama, config, **QUIET)
    assert report.modules == ()
    assert report.mean_sparsity == 0
    assert all(torch.equal(before[n], t) for n, t in patterns(tiny_llama).items())
    tiny_llama.save_pretrained(tmp_path)
    assert compressed_summary(read_headers(tmp_path)) == {}
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.kv_cache.layer_bits(4) == ((8, 8),) * 4
    assert_same_bytes(tiny_llama, loaded)
