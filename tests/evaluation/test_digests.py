"""Digests: the same for the same thing, whatever holds it, and another for another."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from transformers import LlamaForCausalLM, PreTrainedModel

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.evaluation.digests import source_digest, weights_digest
from hf_adaptive_sparse.runtime.conversion import sparse_weights
from tests.families.tiny_models import tiny_model


def loaded(folder: Path, model: PreTrainedModel, runtime: str, **options: Any) -> PreTrainedModel:
    config = has.SparsityConfig(runtime=runtime)
    found: PreTrainedModel = type(model).from_pretrained(folder, sparsity_config=config, **options)
    return found


@pytest.mark.parametrize("bits", [16, 12, 8, 4])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_checkpoint_has_one_digest_in_both_runtimes(
    family: str, bits: int, tmp_path: Path
) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    apply_config(model, has.SparsityConfig(metric="magnitude", weight_bits=bits), progress=False)
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        dense, sparse = (loaded(tmp_path, model, r, dtype=dtype) for r in ("dense", "sparse"))
        assert sparse_weights(sparse)
        digest = weights_digest(dense)
        assert weights_digest(sparse) == digest
        cpu_offload(sparse, execution_device=torch.device("cpu"))
        assert weights_digest(sparse) == digest


def test_sparse_weights_that_lie_on_disk_count_as_those_in_memory(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    apply_config(tiny_llama, has.SparsityConfig(metric="magnitude", weight_bits=4), progress=False)
    tiny_llama.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"lm_head": "cpu", "model.layers.0": "cpu"}
    device_map |= {f"model.layers.{index}": "disk" for index in (1, 2, 3)}
    options = {"device_map": device_map, "offload_folder": str(tmp_path / "offloaded")}
    sparse = loaded(tmp_path / "model", tiny_llama, "sparse", **options)
    assert sparse.model.layers[1].mlp.up_proj.weight_values.is_meta
    assert weights_digest(sparse) == weights_digest(loaded(tmp_path / "model", tiny_llama, "dense"))


def test_every_column_of_a_weight_counts(tiny_llama: LlamaForCausalLM) -> None:
    digests = {weights_digest(tiny_llama)}
    for name in ("self_attn.q_proj", "mlp.down_proj"):  # of 64 and 160 columns
        weight = tiny_llama.model.layers[0].get_submodule(name).weight
        for column in range(weight.shape[1]):
            before = weight.data.clone()
            weight.data[:, column] += 1
            digests.add(weights_digest(tiny_llama))
            weight.data.copy_(before)
    assert len(digests) == 1 + 64 + 160


def test_names_and_shapes_and_dtypes_count(tiny_llama: LlamaForCausalLM) -> None:
    half, reshaped, renamed = (copy.deepcopy(tiny_llama) for _ in range(3))
    half.half()
    norm = reshaped.model.norm
    norm.weight.data = norm.weight.data.view(8, 8)
    renamed.model.last = renamed.model.__dict__["_modules"].pop("norm")
    models = (tiny_llama, half, reshaped, renamed)
    assert len({weights_digest(model) for model in models}) == len(models)


def parquet(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [text]}), path)


def test_of_a_folder_only_the_files_that_are_read_count(tmp_path: Path) -> None:
    data = tmp_path / "data"
    parquet(data / "de" / "validation-0.parquet", "eins")
    parquet(data / "en" / "validation-0.parquet", "one")
    digest = source_digest(data, "validation")
    parquet(data / "train.parquet", "another split")
    (data / "README.md").write_text("words")
    (data / "results").mkdir()
    (data / "results" / "wikitext2.jsonl").write_text("outcomes")
    assert source_digest(data, "validation") == digest
    assert source_digest(data, "train") != digest
    shutil.copytree(data, tmp_path / "moved")
    assert source_digest(tmp_path / "moved", "validation") == digest
    (tmp_path / "moved" / "de").rename(tmp_path / "moved" / "fr")
    assert source_digest(tmp_path / "moved", "validation") != digest
    parquet(data / "en" / "validation-0.parquet", "two")
    assert source_digest(data, "validation") != digest


def test_of_a_file_its_content_counts(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    digests = set()
    for text in ("one", "two"):
        file.write_text(json.dumps({"text": text}))
        digests.add(source_digest(file, "validation"))
    assert len(digests) == 2
    assert source_digest(str(file), "test") in digests
    assert source_digest("Salesforce/wikitext", "test") is None
    assert source_digest("~no-such-user/data.jsonl", "test") is None


def rows(shade: int = 0, **cells: Any) -> list[dict[str, Any]]:
    picture = Image.new("RGB", (2, 2), (shade, 0, 0))
    return [{"image": picture, "frames": [picture, picture], "question": "q", **cells}]


def test_rows_count_by_content_and_not_by_where_they_lie() -> None:
    digest = source_digest(rows(), "validation")
    kept = [rows() for _ in range(3)]  # at other addresses
    assert {source_digest(again, "validation") for again in kept} == {digest}
    palette = Image.new("P", (2, 2))
    repainted = palette.copy()
    repainted.putpalette([9] * 768)
    others = [
        rows(1),
        [{**rows()[0], "image": rows(1)[0]["image"]}],
        [{**rows()[0], "frames": rows()[0]["frames"][:1]}],
        rows(image=palette),
        rows(image=repainted),
        rows(image=b"png"),
        rows(image={"bytes": b"png", "path": None}),
        rows(image=Path("a.png")),
        rows(audio={"array": np.zeros(2, np.float32), "sampling_rate": 16000}),
        rows(audio={"array": np.ones(2, np.float32), "sampling_rate": 16000}),
        rows(audio={"array": torch.ones(3), "sampling_rate": 16000}),
        rows(answers=[{"answer": "yes"}]),
        rows(answers=[{"answer": "no"}]),
        rows(answers=["a", "b"]),
        rows(answers=["a, b"]),
        rows() + rows(),
    ]
    found = {source_digest(other, "validation") for other in others}
    assert len(found | {digest}) == len(others) + 1
