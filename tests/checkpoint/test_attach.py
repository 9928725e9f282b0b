"""A model pruned in memory: plain, castable, and the same as one pruned while loading."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.checkpoint.quantizer import attach
from tests.families.tiny_models import tiny_model
from tests.processors import make_tokenizer

Batches = list[dict[str, torch.Tensor]]


def zeros(module: torch.nn.Linear) -> float:
    return float((module.weight == 0).float().mean())


def test_a_model_whose_get_decoder_returns_its_head_is_pruned_and_loaded(tmp_path: Path) -> None:
    model = tiny_model("modernbert-decoder").eval()
    batch = {"input_ids": torch.arange(24).view(2, 12) + 3}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    report = has.prune(model, has.SparsityConfig(kv_cache=8), [batch])
    assert report.mean_sparsity == pytest.approx(0.5, abs=1e-3)
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    for runtime in ("dense", "sparse"):
        config = has.SparsityConfig(runtime=runtime)
        again = type(model).from_pretrained(tmp_path, sparsity_config=config).eval()
        assert torch.equal(again.generate(**batch, max_new_tokens=4, do_sample=False), expected)
    assert has.perplexity(again, [batch]) > 1


def test_a_kv_profile_is_refused_where_generate_makes_a_cache_of_another_kind(
    tmp_path: Path,
) -> None:
    refusal = r"MiniMaxForCausalLM makes one of its own.*kv_cache=False"
    model = tiny_model("minimax").eval()
    quantised = has.SparsityConfig(target_sparsity=0.0, kv_cache=has.KVCacheConfig(bits=8))
    with pytest.raises(ValueError, match=refusal):
        has.prune(model, quantised)
    assert not hasattr(model.config, "quantization_config")
    has.prune(model, has.SparsityConfig(metric="magnitude"))
    batch = {"input_ids": torch.arange(24).view(2, 12) + 3}
    expected = has.perplexity(model, [batch])
    model.config.quantization_config.kv_cache = has.KVCacheConfig(bits=8)  # as it was written once
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refusal):
        type(model).from_pretrained(tmp_path)
    without = has.SparsityConfig(kv_cache=False)
    again = type(model).from_pretrained(tmp_path, sparsity_config=without).eval()
    assert has.perplexity(again, [batch]) == pytest.approx(expected, rel=1e-5)
    assert again.generate(batch["input_ids"], max_new_tokens=3, min_new_tokens=3).shape == (2, 15)


def test_the_report_and_the_carried_config_describe_the_model(
    tiny_llama: LlamaForCausalLM, text_batches: Batches
) -> None:
    config = has.SparsityConfig(sparsity={"*.mlp.*": 0.5, "*.q_proj": 0.25}, kv_cache=6)
    report = apply_config(tiny_llama, config, text_batches, progress=False)
    carried = tiny_llama.config.quantization_config
    assert carried.sparsity == report.ratios
    assert len(carried.sparsity) == 28
    assert zeros(tiny_llama.model.layers[2].mlp.down_proj) == 0.5
    assert zeros(tiny_llama.model.layers[2].self_attn.q_proj) == 0.25
    assert zeros(tiny_llama.model.layers[2].self_attn.k_proj) == 0
    assert carried.target_sparsity == pytest.approx(report.mean_sparsity)
    assert carried.kv_cache.key_bits == (6, 6, 6, 6)
    assert carried.provenance["calibration"] == {"batches": 4, "sequential": True}
    assert carried.calibration is None
    assert config.sparsity == {"*.mlp.*": 0.5, "*.q_proj": 0.25}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_config_of_the_kv_cache_alone_leaves_what_is_known_of_the_weights(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, pattern: str
) -> None:
    config = has.SparsityConfig(metric="magnitude", pattern=pattern, weight_bits=8)
    apply_config(tiny_llama, config, progress=False)
    before = tiny_llama.config.quantization_config
    tiny_llama.save_pretrained(tmp_path / "before")
    apply_config(tiny_llama, has.SparsityConfig(target_sparsity=0, kv_cache=6), progress=False)
    carried = tiny_llama.config.quantization_config
    assert carried.kv_cache.key_bits == (6, 6, 6, 6)
    assert before.kv_cache is None
    changed = {k for k, v in carried.to_dict().items() if v != before.to_dict().get(k)}
    assert changed == {"kv_cache"}
    tiny_llama.save_pretrained(tmp_path / "after")
    files = [tmp_path / folder / "model.safetensors" for folder in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_model_stays_plain(tiny_llama: LlamaForCausalLM, text_batches: Batches) -> None:
    apply_config(tiny_llama, has.SparsityConfig(), text_batches, progress=False)
    assert type(tiny_llama.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not getattr(tiny_llama, "is_quantized", False)
    assert not getattr(tiny_llama, "quantization_method", None)
    assert not hasattr(tiny_llama.config, "_is_quantized")
    assert all(p.requires_grad for p in tiny_llama.parameters())


def test_a_compressed_model_is_trained_by_adapters_alone(tiny_llama: LlamaForCausalLM) -> None:
    """transformers' Trainer asks by these."""
    config = has.SparsityConfig(metric="magnitude", runtime="sparse")
    apply_config(tiny_llama, config, progress=False)
    assert tiny_llama.is_quantized
    assert tiny_llama.hf_quantizer.is_trainable
    assert not tiny_llama.hf_quantizer.is_qat_trainable


@pytest.mark.parametrize("origin", ["pruned", "loaded", "loaded_pruning"])
def test_casts_work(tiny_llama: LlamaForCausalLM, tmp_path: Path, origin: str) -> None:
    config = has.SparsityConfig(metric="magnitude")
    model = tiny_llama
    if origin == "loaded_pruning":
        tiny_llama.save_pretrained(tmp_path)
        model = LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=config)
    else:
        apply_config(tiny_llama, config, progress=False)
    if origin == "loaded":
        tiny_llama.save_pretrained(tmp_path)
        model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(model.config, "_is_quantized")  # Jamba and others compute otherwise by it
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert model.to("cpu", dtype=torch.float32).dtype == torch.float32
    assert model.double().dtype == torch.float64
    assert model.train().training


def test_training_a_pruned_model_and_saving_it_loses_nothing(
    tiny_llama: LlamaForCausalLM, text_batches: Batches, tmp_path: Path
) -> None:
    apply_config(tiny_llama, has.SparsityConfig(metric="magnitude"), progress=False)
    optimizer = torch.optim.SGD(tiny_llama.parameters(), lr=0.1)
    tiny_llama.train()(**text_batches[0], labels=text_batches[0]["input_ids"]).loss.backward()
    optimizer.step()
    assert zeros(tiny_llama.model.layers[0].mlp.up_proj) < 0.5
    tiny_llama.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


@pytest.mark.parametrize("metric", ["magnitude", "lognorm", "wanda"])
def test_pruning_in_memory_while_loading_and_from_the_file_are_the_same(
    tiny_llama: LlamaForCausalLM,
    text_batches: Batches,
    tmp_path: Path,
    metric: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hf_adaptive_sparse.checkpoint import applying

    monkeypatch.setattr(applying, "load_processor", lambda name, **hub: "a processor")
    monkeypatch.setattr(
        "hf_adaptive_sparse.calibration.data.load_batches", lambda *a, **k: text_batches
    )
    tiny_llama.save_pretrained(tmp_path / "dense")
    config = has.SparsityConfig(metric=metric, calibration="some data", kv_cache=8)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "dense", sparsity_config=config)
    apply_config(tiny_llama, config, progress=False)
    loaded.save_pretrained(tmp_path / "compressed")
    read = LlamaForCausalLM.from_pretrained(tmp_path / "compressed")
    ids = text_batches[0]
    tokens = [m.generate(**ids, max_new_tokens=66, do_sample=False) for m in (tiny_llama, read)]
    assert torch.equal(*tokens)
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
        assert torch.equal(weight, read.state_dict()[name])
    carried = read.config.quantization_config
    assert carried.sparsity == tiny_llama.config.quantization_config.sparsity
    assert carried.provenance["base_model"] == "dense"
    assert (carried.provenance["calibration"] is None) == (metric == "magnitude")


def test_a_model_without_a_repository_needs_the_processor_for_named_data(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 99)
    settings = has.CalibrationConfig(num_samples=2, sequence_length=20)
    config = has.SparsityConfig(metric="wanda", calibration=settings)
    data = tmp_path / "text.txt"
    with pytest.raises(ValueError, match=r"names no repository .* pass processor="):
        has.prune(tiny_llama, config, data)
    has.prune(tiny_llama, config, data, processor=make_tokenizer(), progress=False)


@pytest.mark.parametrize("form", ["path", "name", "dataset"])
def test_data_that_are_no_batches_are_read_with_the_models_own_processor(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    from hf_adaptive_sparse.checkpoint import applying

    monkeypatch.setattr(applying, "load_processor", lambda name, **hub: make_tokenizer())
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 9)
    data = {
        "path": path,
        "name": str(path),
        "dataset": datasets.Dataset.from_list([{"text": path.read_text()}]),
    }[form]
    settings = has.CalibrationConfig(num_samples=2, sequence_length=20)
    config = has.SparsityConfig(metric="wanda", calibration=settings)
    assert has.prune(tiny_llama, config, data, progress=False).mean_sparsity == 0.5
    told = tiny_llama.config.quantization_config.provenance["calibration"]
    assert told.get("dataset") == (None if form == "dataset" else "text.txt")
    assert told.get("batches") == (2 if form == "dataset" else None)


@pytest.mark.parametrize(("ratio", "recorded"), [(0.5001, 0.5), (0.4, 0.4)])
def test_a_profile_beside_another_target_is_recorded_by_its_mean(
    tiny_llama: LlamaForCausalLM, ratio: float, recorded: float
) -> None:
    config = has.SparsityConfig(0.5, metric="magnitude", sparsity={"*": ratio})
    apply_config(tiny_llama, config, progress=False)
    carried = tiny_llama.config.quantization_config
    assert carried.target_sparsity == pytest.approx(recorded, abs=1e-9)


def test_pruning_again_replaces_the_config(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    first = has.SparsityConfig(0.3, metric="magnitude", kv_cache=8, provenance={"base_model": "x"})
    apply_config(tiny_llama, first, progress=False)
    second = has.SparsityConfig(0.6, metric="magnitude", checkpoint_format="dense")
    apply_config(tiny_llama, second, progress=False)
    carried = tiny_llama.config.quantization_config
    assert (carried.target_sparsity, carried.kv_cache) == (0.6, None)
    assert carried.provenance["base_model"] == "x"
    assert zeros(tiny_llama.model.layers[0].mlp.up_proj) == pytest.approx(0.6, abs=1e-4)
    tiny_llama.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.checkpoint_format == "dense"
    assert zeros(loaded.model.layers[0].mlp.up_proj) == zeros(
        tiny_llama.model.layers[0].mlp.up_proj
    )


def test_copies_and_pickles_of_a_model_save_compressed_too(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    apply_config(tiny_llama, has.SparsityConfig(metric="magnitude"), progress=False)
    for name, twin in {
        "copy": copy.deepcopy(tiny_llama),
        "pickle": pickle.loads(pickle.dumps(tiny_llama)),
    }.items():
        twin.save_pretrained(tmp_path / name)
    tiny_llama.save_pretrained(tmp_path / "model")
    saved = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("copy", "pickle", "model")]
    assert saved[0] == saved[1] == saved[2]


def test_generation_config_is_left_alone(tiny_llava: LlavaForConditionalGeneration) -> None:
    before = tiny_llava.generation_config.to_dict()
    apply_config(tiny_llava, has.SparsityConfig(metric="magnitude", kv_cache=8), progress=False)
    assert tiny_llava.generation_config.to_dict() == before


def test_a_metric_that_needs_data_says_so(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"'lognorm' needs calibration data.*magnitude"):
        apply_config(tiny_llama, has.SparsityConfig(), progress=False)
    assert not hasattr(tiny_llama.config, "quantization_config")


def test_the_place_of_a_local_file_is_not_published(
    tiny_llama: LlamaForCausalLM,
    text_batches: Batches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "hf_adaptive_sparse.calibration.data.load_batches", lambda *a, **k: text_batches
    )
    data = tmp_path / "mine.txt"
    data.write_text("text")
    config = has.SparsityConfig(calibration=data)
    apply_config(tiny_llama, config, processor="a processor", progress=False)
    recorded = tiny_llama.config.quantization_config.provenance["calibration"]
    assert recorded["dataset"] == "mine.txt"
    tiny_llama.save_pretrained(tmp_path / "out")
    LlamaForCausalLM.from_pretrained(tmp_path / "out", sparsity_config=config)


def test_empty_calibration_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="empty"):
        apply_config(tiny_llama, has.SparsityConfig(), [], progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": {"*.nothing": 0.5}}, r"'\*.nothing' matches none"),
        ({"modules_to_not_convert": ["tower"]}, r"'tower' matches none"),
        ({"kv_cache": has.KVCacheConfig(bits=(8, 6))}, r"4 layers, the list has 2"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    tiny_llama: LlamaForCausalLM, fields: dict[str, object], message: str
) -> None:
    before = copy.deepcopy(tiny_llama.state_dict())
    config = has.SparsityConfig(metric="magnitude", **fields)
    with pytest.raises(ValueError, match=message):
        apply_config(tiny_llama, config, progress=False)
    assert all(torch.equal(before[n], t) for n, t in tiny_llama.state_dict().items())


def test_attach_refuses_what_cannot_be_stored(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="it is None"):
        attach(tiny_llama, has.SparsityConfig())
    for name in ("lm_head", "model.norm", "model.layers.9.mlp.up_proj"):
        with pytest.raises(ValueError, match=f"sparsity names '{name}'"):
            attach(tiny_llama, has.SparsityConfig(sparsity={name: 0.5}))
    assert not hasattr(tiny_llama, "hf_quantizer")


def test_a_model_quantized_by_others_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(quant_method="bitsandbytes")
    )
    with pytest.raises(ValueError, match="quantized with 'bitsandbytes'"):
        apply_config(tiny_llama, has.SparsityConfig(metric="magnitude"), progress=False)


def test_a_module_that_disappeared_is_named_when_saving(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    apply_config(tiny_llama, has.SparsityConfig(metric="magnitude"), progress=False)
    tiny_llama.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"names 'model.layers.1.mlp.up_proj.weight'"):
        tiny_llama.save_pretrained(tmp_path)


@pytest.mark.parametrize(("model_type", "idle"), [("mamba", True), ("falcon_h1", False)])
def test_a_kv_profile_without_effect_is_told(model_type: str, idle: bool, caplog) -> None:
    model = tiny_model(model_type)
    has.prune(model, has.SparsityConfig(metric="magnitude", kv_cache=8))
    assert ("The KV profile has no effect on MambaForCausalLM" in caplog.text) is idle
