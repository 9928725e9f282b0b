"""Compressed checkpoints through ``load_state_dict``: what a Trainer does when it goes on."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model
from transformers import LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from tests.families.tiny_models import tiny_model

Changes = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
DENSE = has.SparsityConfig(runtime="dense")
IDS = torch.arange(5, 37)
EXAMPLES = [{"input_ids": IDS, "labels": IDS}] * 2


def pruned(model: PreTrainedModel, **fields: object) -> PreTrainedModel:
    apply_config(model, has.SparsityConfig(metric="magnitude", **fields), progress=False)
    return model


def emptied(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def differing(model: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    expected = other.state_dict()
    return [name for name, w in model.state_dict().items() if not torch.equal(w, expected[name])]


def trainer(model: PreTrainedModel, folder: Path, **options: object) -> Trainer:
    settings: dict[str, object] = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **(settings | options))
    steps = iter(range(9))
    return Trainer(
        model,
        arguments,
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES,
        compute_metrics=lambda _: {"steps": float(next(steps))},
    )


@pytest.mark.parametrize("start", ["loaded", "pruned"])
def test_a_trainer_resumes_with_the_weights_it_saved(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, start: str
) -> None:
    again = copy.deepcopy(tiny_llama)
    model = pruned(tiny_llama)
    if start == "loaded":
        model.save_pretrained(tmp_path / "half")
        model, again = (
            LlamaForCausalLM.from_pretrained(tmp_path / "half", sparsity_config=DENSE)
            for _ in range(2)
        )
    else:
        pruned(again)
    trainer(model, tmp_path, max_steps=1).train()
    assert differing(model, again)
    resumed = trainer(again, tmp_path, max_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not differing(model, again)


def test_a_trainer_brings_its_best_model_back(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = pruned(tiny_llama)
    trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_steps",
        greater_is_better=False,
    ).train()
    first, last = (LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{n}") for n in (1, 2))
    assert not differing(model, first)
    assert differing(model, last)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize(("bits", "group_size"), [(16, None), (12, None), (8, 32), (4, 96)])
def test_a_strict_load_takes_every_format(
    tmp_path: Path, model_type: str, bits: int, group_size: int | None
) -> None:
    dense = tiny_model(model_type).to(torch.bfloat16)
    model = pruned(dense, weight_bits=bits, weight_group_size=group_size)
    model.save_pretrained(tmp_path, save_original_format=False)
    twin = emptied(copy.deepcopy(model))
    load_model(twin, tmp_path / "model.safetensors", strict=True)
    assert not differing(twin, model)


def test_the_sparse_runtime_takes_them_as_they_are(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    pruned(tiny_llama, weight_bits=8).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path, sparsity_config=has.SparsityConfig(runtime="sparse")
    )
    before = copy.deepcopy(loaded)
    load_model(loaded, tmp_path / "model.safetensors", strict=True)
    assert not differing(loaded, before)


def test_copies_pickles_and_wrappers_of_a_model_take_them_too(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = pruned(pruned(tiny_llama))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        emptied(twin).load_state_dict(stored, strict=False)
        assert not differing(twin, model)
    twin = emptied(copy.deepcopy(model))
    wrapped = {f"module.{name}": weight for name, weight in stored.items()}
    wrapped["module.lm_head.weight"] = stored["model.embed_tokens.weight"]
    torch.nn.ModuleDict({"module": twin}).load_state_dict(wrapped)
    assert not differing(twin, model)
    assert len(model._load_state_dict_pre_hooks) == 1


def test_a_weight_may_lie_in_two_files(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = pruned(tiny_llama)
    model.save_pretrained(tmp_path, max_shard_size="21KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(
        files[name] != files[name.replace("bitmask", "values")]
        for name in files
        if name.endswith("bitmask")
    )
    twin = emptied(copy.deepcopy(model))
    load_sharded_checkpoint(twin, str(tmp_path), strict=False)
    assert not differing(twin, model)


UP = "model.layers.1.mlp.up_proj.weight"


def stored(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_what_waits_is_never_mixed_with_another_load(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = pruned(tiny_llama)
    earlier = {f"{UP}_values": stored(model, tmp_path)[f"{UP}_values"] * 2}
    files, plain = load_file(tmp_path / "model.safetensors"), {UP: model.state_dict()[UP] + 1}
    bitmask = {f"{UP}_bitmask": files[f"{UP}_bitmask"]}
    twin = copy.deepcopy(model)
    twin.load_state_dict(dict(earlier), strict=False)
    assert copy.deepcopy(twin)._parts_that_wait == {}
    assert pickle.loads(pickle.dumps(twin))._parts_that_wait == {}
    for part in (f"{UP}_values", f"{UP}_bitmask"):
        twin.load_state_dict({part: files[part]}, strict=False)
    assert not differing(twin, model)
    twin.load_state_dict(dict(earlier), strict=False)
    twin.load_state_dict(dict(plain), strict=False)
    twin.load_state_dict(dict(bitmask), strict=False)
    assert torch.equal(twin.state_dict()[UP], plain[UP])


def test_a_plain_weight_goes_before_compressed_parts_of_it(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = pruned(tiny_llama)
    files = stored(model, tmp_path) | {UP: torch.ones_like(model.get_parameter(UP))}
    result = model.load_state_dict(files, strict=False)
    assert set(result.unexpected_keys) == {f"{UP}_values", f"{UP}_bitmask"}
    assert (model.get_parameter(UP) == 1).all()


@pytest.mark.parametrize("carried", ["none", "dict"])
def test_a_model_without_our_config_object_can_be_loaded(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, carried: str
) -> None:
    model = pruned(tiny_llama, weight_bits=8)
    files, before = stored(model, tmp_path), copy.deepcopy(model)
    if carried == "none":
        model.dequantize()
        model.load_state_dict(before.state_dict())
        assert f"{UP}_values" in model.load_state_dict(files, strict=False).unexpected_keys
    else:
        model.config = type(model.config).from_dict(model.config.to_dict())
        emptied(model).load_state_dict(files, strict=False)
    assert not differing(model, before)


def test_codes_are_restored_in_the_dtype_of_the_model(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = pruned(tiny_llama, weight_bits=8)
    files = stored(model, tmp_path / "float32")
    model.to(torch.bfloat16).load_state_dict(files, strict=False)
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "float32", sparsity_config=DENSE, dtype=torch.bfloat16
    )
    assert not differing(model, loaded)
    assert f"{UP}_scales" in stored(model, tmp_path / "bfloat16")
    assert not caplog.records


def test_codes_need_as_many_scales_as_the_config_says(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    files = stored(pruned(copy.deepcopy(tiny_llama), weight_bits=4), tmp_path)
    other = pruned(tiny_llama, weight_bits=4, weight_group_size=32)
    with pytest.raises(CheckpointError, match=r"weight: the scales of a weight .* must be"):
        other.load_state_dict(files, strict=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda parts: {"values": parts["values"][:-1]}, "the bitmask keeps|values"),
        (lambda parts: {"bitmask": torch.tensor(1, dtype=torch.uint8)}, "the bitmask of a weight"),
        (lambda parts: {"scales": torch.ones(3, 1)}, "is stored as values, bitmask; got bitmask, "),
    ],
    ids=["values", "scalar", "surplus"],
)
def test_what_is_damaged_is_named(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, changes: Changes, message: str
) -> None:
    model = pruned(tiny_llama)
    files = stored(model, tmp_path)
    parts = {kind: files[f"{UP}_{kind}"] for kind in ("values", "bitmask")}
    files |= {f"{UP}_{kind}": part for kind, part in changes(parts).items()}
    with pytest.raises(CheckpointError, match=f"{UP}: .*({message})"):
        model.load_state_dict(files, strict=False)
