"""``sparsity_config=`` and ``quantization_config=``, from every class; registration."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig
from transformers.quantizers.auto import AutoHfQuantizer

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from tests.conftest import llama_config
from tests.servers import free_port

MAGNITUDE = has.SparsityConfig(metric="magnitude", kv_cache=8)


def ratio(model: PreTrainedModel) -> float:
    linear = model.get_submodule(next(iter(model.config.quantization_config.sparsity)))
    return float((linear.weight == 0).float().mean())


@pytest.fixture
def dense_llama(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    tiny_llama.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def dense_llava(tiny_llava: LlavaForConditionalGeneration, tmp_path: Path) -> Path:
    tiny_llava.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def compressed_llama(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    apply_config(tiny_llama, MAGNITUDE, progress=False)
    tiny_llama.save_pretrained(tmp_path / "compressed")
    return tmp_path / "compressed"


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM, AutoModel])
@pytest.mark.parametrize("argument", ["sparsity_config", "quantization_config"])
def test_a_dense_llama_is_pruned_by_every_class(
    dense_llama: Path, loader: type, argument: str
) -> None:
    model = loader.from_pretrained(dense_llama, **{argument: MAGNITUDE})
    assert ratio(model) == 0.5
    assert model.config.quantization_config.kv_cache.key_bits == (8,) * 4
    assert MAGNITUDE.sparsity is None


@pytest.mark.parametrize(
    "loader",
    [AutoModelForImageTextToText, has.AutoModelForVision2Seq, LlavaForConditionalGeneration],
)
def test_a_dense_llava_is_pruned_by_every_class(
    dense_llava: Path, tmp_path: Path, loader: type
) -> None:
    model = loader.from_pretrained(dense_llava, sparsity_config=MAGNITUDE, dtype=torch.bfloat16)
    assert ratio(model) == 0.5
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "out")
    again = loader.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(*map(state, (model, again)), strict=True))


@pytest.mark.parametrize("runtime", ["dense", "sparse"])
def test_a_head_of_another_size_is_made_anew_where_that_is_asked_for(
    tmp_path: Path, runtime: str
) -> None:
    model = LlamaForSequenceClassification(llama_config(num_labels=2))
    apply_config(model, MAGNITUDE, progress=False)
    model.save_pretrained(tmp_path)
    load = partial(
        LlamaForSequenceClassification.from_pretrained,
        tmp_path,
        sparsity_config=has.SparsityConfig(runtime=runtime),
    )
    with pytest.raises(CheckpointError, match=r"'score.weight' .*ignore_mismatched_sizes=True"):
        load(num_labels=5)
    loaded = load(num_labels=5, ignore_mismatched_sizes=True)
    assert loaded.score.weight.shape == (5, 64)
    norms = [m.state_dict()["model.layers.1.input_layernorm.weight"] for m in (model, loaded)]
    assert torch.equal(*norms)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight_bitmask' must be"):
        load(intermediate_size=320, ignore_mismatched_sizes=True)
    with pytest.raises(CheckpointError, match=r"'score.weight'"):  # it holds for one call
        load(num_labels=5)


def state(model: PreTrainedModel) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def test_a_dict_is_taken_for_a_config(dense_llama: Path) -> None:
    for argument in ("sparsity_config", "quantization_config"):
        given = {"quant_method": "adaptive_sparse", "metric": "magnitude", "target_sparsity": 0.25}
        model = LlamaForCausalLM.from_pretrained(dense_llama, **{argument: given})
        assert ratio(model) == 0.25
    with pytest.raises(TypeError, match="SparsityConfig or its dict, got float"):
        LlamaForCausalLM.from_pretrained(dense_llama, sparsity_config=0.5)


def test_none_is_as_good_as_nothing(dense_llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(dense_llama, sparsity_config=None)
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
def test_both_arguments_are_refused(dense_llama: Path, loader: type) -> None:
    with pytest.raises(ValueError, match="either sparsity_config or quantization_config, not both"):
        loader.from_pretrained(
            dense_llama, sparsity_config=MAGNITUDE, quantization_config=MAGNITUDE
        )


def test_a_pattern_is_applied(dense_llama: Path) -> None:
    config = has.SparsityConfig(metric="magnitude", pattern="1:4")
    model = LlamaForCausalLM.from_pretrained(dense_llama, sparsity_config=config)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.view(-1, 4) != 0).sum(1).unique().tolist() == [1]
    assert model.config.quantization_config.target_sparsity == 0.75


def test_what_cannot_work_is_told_before_weights_are_read(dense_llama: Path) -> None:
    (dense_llama / "model.safetensors").write_bytes(b"")
    for fields, message in (
        ({"metric": "wanda"}, "'wanda' needs calibration data.* no weight update.$"),
        ({"runtime": "sparse"}, "weight update. runtime alone would do for a compressed checkp"),
        ({"metric": "magnitude", "sparsity": {"x": 0.5}}, "'x' matches none"),
        ({"metric": "magnitude", "kv_cache": {"bits": [8]}}, "4 layers, the list has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LlamaForCausalLM.from_pretrained(
                dense_llama, sparsity_config=has.SparsityConfig(**fields)
            )


def test_calibration_data_are_read_with_the_repos_own_processor(
    dense_llama: Path, text_batches: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_adaptive_sparse.checkpoint import applying

    seen: dict[str, object] = {}

    def load_processor(name: str, **hub: object) -> str:
        seen.update(hub, name=name)
        return "processor"

    def load_batches(source: object, processor: object, **kwargs: object) -> object:
        seen.update(kwargs, source=source, processor=processor)
        return text_batches

    monkeypatch.setattr(applying, "load_processor", load_processor)
    monkeypatch.setattr("hf_adaptive_sparse.calibration.data.load_batches", load_batches)
    calibration = has.CalibrationConfig(
        dataset="some/data", num_samples=7, sequence_length=32, batch_size=2, seed=5
    )
    config = has.SparsityConfig(metric="wanda", calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(
        dense_llama,
        sparsity_config=config,
        token="secret",
        revision="main",
        cache_dir="elsewhere",
        local_files_only=True,
    )
    assert ratio(model) == 0.5
    assert seen["name"] == str(dense_llama)
    assert seen["token"] == "secret"
    assert (seen["cache_dir"], seen["local_files_only"]) == ("elsewhere", True)
    assert (seen["source"], seen["processor"]) == ("some/data", "processor")
    assert (seen["num_samples"], seen["sequence_length"], seen["batch_size"]) == (7, 32, 2)
    provenance = model.config.quantization_config.provenance
    assert provenance["calibration"]["dataset"] == "some/data"
    assert provenance["seed"] == 5
    assert "secret" not in model.config.to_json_string()


# On a compressed checkpoint


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("argument", ["sparsity_config", "quantization_config"])
def test_runtime_and_kv_cache_may_be_overridden(
    compressed_llama: Path, loader: type, argument: str
) -> None:
    def load(**fields: object) -> PreTrainedModel:
        config = has.SparsityConfig(**fields)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return loader.from_pretrained(compressed_llama, **{argument: config})

    assert load().config.quantization_config.kv_cache.key_bits == (8,) * 4
    assert load(kv_cache=None).config.quantization_config.kv_cache.key_bits == (8,) * 4
    assert load(kv_cache=False).config.quantization_config.kv_cache is None
    assert load(kv_cache=6).config.quantization_config.kv_cache.key_bits == (6,) * 4
    assert load(runtime="dense").config.quantization_config.runtime == "dense"
    with pytest.raises(ValueError, match="4 layers, the list has 3"):
        load(kv_cache={"bits": [8, 8, 6]})


def test_what_disagrees_with_the_checkpoint_is_refused(compressed_llama: Path) -> None:
    for fields, message in (
        ({"target_sparsity": 0.3}, r"target_sparsity .*says 0.5, .*says 0.3"),
        ({"metric": "lognorm"}, r"metric .*'magnitude'.*'lognorm'"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(
                compressed_llama, sparsity_config=has.SparsityConfig(**fields)
            )


def test_the_config_that_made_a_checkpoint_also_reads_it(compressed_llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(compressed_llama, sparsity_config=MAGNITUDE)
    assert ratio(model) == 0.5


def test_another_quantization_of_a_compressed_checkpoint_is_refused(
    compressed_llama: Path,
) -> None:
    with pytest.raises(ValueError, match="SparsityConfig but you are passing a BitsAndBytesConfig"):
        LlamaForCausalLM.from_pretrained(
            compressed_llama, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_configs_that_are_objects_already_are_merged_too() -> None:
    merged = AutoHfQuantizer.merge_quantization_configs(
        has.SparsityConfig(0.5, sparsity={}), has.SparsityConfig(kv_cache=4)
    )
    assert merged.kv_cache == has.KVCacheConfig(bits=4)


def test_the_config_of_a_model_in_memory_can_be_passed_on(
    tiny_llama: LlamaForCausalLM, compressed_llama: Path
) -> None:
    before = tiny_llama.config.quantization_config.to_dict()
    for loader in (LlamaForCausalLM, AutoModelForCausalLM):
        model = loader.from_pretrained(
            compressed_llama, config=tiny_llama.config, sparsity_config={"kv_cache": 4}
        )
        assert model.config.quantization_config.kv_cache.key_bits == (4,) * 4
    bare = AutoModel.from_pretrained(compressed_llama, config=tiny_llama.config)
    assert "layers.0.mlp.up_proj" in bare.config.quantization_config.sparsity
    assert tiny_llama.config.quantization_config.to_dict() == before


# Registration


def test_registering_again_changes_nothing() -> None:
    before = PreTrainedModel.__dict__["from_pretrained"].__func__
    has.register()
    assert PreTrainedModel.__dict__["from_pretrained"].__func__ is before


def test_vision2seq_is_back() -> None:
    assert transformers.AutoModelForVision2Seq is has.AutoModelForVision2Seq
    mapping = AutoModelForImageTextToText._model_mapping
    assert has.AutoModelForVision2Seq._model_mapping is mapping


def test_other_models_load_as_before(dense_llama: Path) -> None:
    model, info = LlamaForCausalLM.from_pretrained(dense_llama, output_loading_info=True)
    assert not info["missing_keys"]
    assert not hasattr(model.config, "quantization_config")


def test_a_weight_update_is_applied_recorded_and_read_back(
    tiny_llama: LlamaForCausalLM, text_batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    config = has.SparsityConfig(metric="lognorm", weight_update="least_squares")
    has.prune(tiny_llama, config, text_batches, progress=False)
    own = tiny_llama.config.quantization_config
    assert own.weight_update == "least_squares"
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tiny_llama.get_parameter(name)
    assert not torch.equal(weight[weight != 0], before[name][weight != 0])
    tiny_llama.save_pretrained(tmp_path / "updated")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "updated")
    assert again.config.quantization_config == own
    assert all(torch.equal(a, b) for a, b in zip(*map(state, (tiny_llama, again)), strict=True))
    assert has.inspect(tmp_path / "updated").metric == "lognorm + least_squares"


def test_a_weight_update_without_calibration_is_refused_before_loading(dense_llama: Path) -> None:
    config = has.SparsityConfig(metric="magnitude", weight_update="obs")
    with pytest.raises(ValueError, match="weight_update='obs' needs calibration data"):
        AutoModelForCausalLM.from_pretrained(dense_llama, sparsity_config=config)


@pytest.fixture
def one_process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun tells the only process that it starts."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_only_dense_weights_are_sharded_over_processes(tmp_path: Path) -> None:
    model = LlamaForCausalLM(llama_config())
    model.save_pretrained(tmp_path / "plain")
    apply_config(model, MAGNITUDE, progress=False)
    model.save_pretrained(tmp_path / "compressed")
    model.hf_quantizer.quantization_config.checkpoint_format = "dense"
    model.save_pretrained(tmp_path / "dense")

    def load(folder: str, config: has.SparsityConfig | None = None) -> Any:
        return LlamaForCausalLM.from_pretrained(
            tmp_path / folder,
            sparsity_config=config,
            distributed_config=DistributedConfig(tp_plan="auto", tp_size=1),
        )

    for folder, config in (("compressed", None), ("plain", MAGNITUDE)):
        with pytest.raises(ValueError, match=r"distributed_config= .*checkpoint_format='dense'"):
            load(folder, config)
    only_cache = has.SparsityConfig(target_sparsity=0.0, kv_cache=8)
    load("plain", only_cache).save_pretrained(tmp_path / "only_cache")
    assert load("only_cache").config.quantization_config.kv_cache is not None
    ids = torch.arange(1, 20)[None]
    sharded = load("dense")
    assert sharded.hf_quantizer.runtime_choice.runtime == "dense"
    torch.testing.assert_close(sharded(ids).logits, model(ids).logits)
