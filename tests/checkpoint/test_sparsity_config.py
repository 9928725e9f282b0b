from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from hf_adaptive_sparse.checkpoint.config import CHECKPOINT_FIELDS, SparsityConfig
from hf_adaptive_sparse.checkpoint.merging import merge_configs
from hf_adaptive_sparse.profiles import CalibrationConfig, KVCacheConfig
from hf_adaptive_sparse.search.space import SearchSpace

PROFILE = {"model.layers.0.mlp": 0.4, "model.layers.1.mlp": 0.6}


def checkpoint(**changes: object) -> SparsityConfig:
    values: dict[str, object] = {
        "target_sparsity": 0.5,
        "metric": "wanda",
        "pattern": "unstructured",
        "checkpoint_format": "bitmask",
        "sparsity": PROFILE,
        "modules_to_not_convert": ["a", "b"],
        "kv_cache": KVCacheConfig(bits=(8, 6)),
        "provenance": {"seed": 3},
    }
    return SparsityConfig(**(values | changes))  # type: ignore[arg-type]


def copies(config: SparsityConfig) -> dict[str, SparsityConfig]:
    return {
        "copy": copy.copy(config),
        "deepcopy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
        "to_dict": SparsityConfig.from_dict(config.to_dict()),
        "json": SparsityConfig.from_dict(json.loads(config.to_json_string())),
        "dict": SparsityConfig.from_dict(dict(config)),
    }


def test_defaults_are_those_of_the_design() -> None:
    config = SparsityConfig()
    assert config.target_sparsity == 0.5
    assert config.metric == "lognorm"
    assert config.sparsity is None
    assert config.pattern == "unstructured"
    assert config.calibration is None
    assert config.kv_cache is None
    assert config.modules_to_not_convert == []
    assert config.checkpoint_format == "bitmask"
    assert config.runtime == "auto"
    assert config.passed == frozenset()
    assert config.quant_method == "adaptive_sparse"


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "to_dict", "json", "dict"])
@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(),
        SparsityConfig(0.3, "ria"),
        SparsityConfig(target_sparsity=0.5),
        SparsityConfig(kv_cache=None, calibration=None),
        SparsityConfig(kv_cache=False, runtime="dense"),
        SparsityConfig(
            sparsity={"*.up_proj": 0.25},
            calibration=CalibrationConfig(num_samples=3, image_weight=0.5),
            modules_to_not_convert=("x",),
            provenance={"note": [1, None]},
        ),
        checkpoint(),
        SparsityConfig(weight_bits=16),
        SparsityConfig(weight_update=None),
        SparsityConfig(weight_update="obs"),
        checkpoint(weight_update="least_squares"),
        checkpoint(weight_bits={"model.layers.0.mlp": 8}, weight_group_size=64),
    ],
)
def test_what_was_passed_survives_every_copy(config: SparsityConfig, how: str) -> None:
    twin = copies(config)[how]
    assert twin == config
    assert twin.passed == config.passed
    assert twin.to_dict() == config.to_dict()


def test_positional_and_keyword_arguments_count_as_passed() -> None:
    config = SparsityConfig(0.5, metric="lognorm")
    assert config.passed == {"target_sparsity", "metric"}
    assert SparsityConfig(kv_cache=None).passed == {"kv_cache"}


def test_the_config_of_a_compressed_model_is_plain_json_with_the_designs_keys() -> None:
    data = checkpoint().to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data.keys() == {
        "quant_method",
        "format_version",
        "provenance",
        *CHECKPOINT_FIELDS,
    }
    assert data["format_version"] == 1
    assert data["kv_cache"] == {
        "key_bits": [8, 6],
        "value_bits": [8, 6],
        "group_size": 64,
        "residual_length": 128,
        "key_mode": "channel",
        "sink_length": 0,
    }


def test_a_weight_update_is_stored_only_where_there_is_one() -> None:
    assert "weight_update" not in checkpoint().to_dict()
    config = checkpoint(weight_update="obs")
    assert config.to_dict()["weight_update"] == "obs"
    assert config.to_dict()["format_version"] == 1
    assert config.method == "wanda + obs"
    assert checkpoint().method == "wanda"
    with pytest.raises(ValueError, match=r"weight_update .*'obs', sparsity_config says None"):
        merge_configs(config, SparsityConfig(weight_update=None))
    assert merge_configs(config, SparsityConfig()).weight_update == "obs"


def test_only_data_free_metrics_without_an_update_need_no_calibration() -> None:
    assert not SparsityConfig(metric="magnitude").needs_calibration
    assert SparsityConfig(metric="magnitude", weight_update="obs").needs_calibration
    assert SparsityConfig().needs_calibration


def test_12_bits_are_version_three_and_have_no_scales() -> None:
    config = checkpoint(weight_bits={"model.layers.0.mlp": 12}, weight_group_size=64)
    assert config.to_dict()["format_version"] == config.format_version == 3
    assert config.value_formats["model.layers.0.mlp"] == (12, None)
    assert SparsityConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="below 16 need format_version 3, got 2"):
        SparsityConfig.from_dict(config.to_dict() | {"format_version": 2})
    with pytest.raises(ValueError, match="weight_bits must be None or widths from 4, 8, 16"):
        SearchSpace(weight_bits=(12, 8))


def test_weight_bits_are_version_two_and_nothing_else_is() -> None:
    bits = {"model.layers.0.mlp": 8, "model.layers.1.mlp": 4}
    quantised = checkpoint(weight_bits=bits)
    data = quantised.to_dict()
    assert data["format_version"] == 2
    assert data["weight_bits"] == bits
    assert quantised.value_format("model.layers.0.mlp").group_size is None
    assert quantised.value_format("model.layers.1.mlp").group_size == 64
    assert quantised.value_format("elsewhere").group_size is None
    assert checkpoint(weight_bits=4, weight_group_size=32).value_format("any").group_size == 32
    whole = checkpoint(weight_bits={"model.layers.0.mlp": 16})
    assert whole.to_dict()["format_version"] == 1
    assert not whole.quantises_weights
    # What an earlier release would not know stays out of what it can read.
    assert checkpoint().to_dict().keys().isdisjoint({"weight_bits", "weight_group_size"})
    assert "weight_bits" not in SparsityConfig().to_dict()["defaulted"]


def test_a_quantised_module_is_stored_compressed_even_where_nothing_was_removed() -> None:
    config = checkpoint(sparsity={"a": 0.5, "b": 0.0, "c": 0.0}, weight_bits={"b": 8})
    assert config.compressed_modules == ["a", "b"]


def test_a_change_to_the_dict_does_not_reach_the_config() -> None:
    config = checkpoint()
    data = config.to_dict()
    data["sparsity"]["x"] = 0.1
    data["provenance"]["seed"] = 4
    assert config == checkpoint()
    assert config != SparsityConfig()
    assert config != "config"


def test_it_lives_in_a_model_config(tmp_path: Path) -> None:
    config = LlamaConfig(quantization_config=checkpoint())
    config.save_pretrained(tmp_path)
    loaded = LlamaConfig.from_pretrained(tmp_path).quantization_config
    assert SparsityConfig.from_dict(loaded) == checkpoint()
    assert "adaptive_sparse" in repr(config)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (False, False),
        (6, KVCacheConfig(bits=6)),
        ({"bits": [8, 6]}, KVCacheConfig(bits=(8, 6))),
        (KVCacheConfig(bits=4), KVCacheConfig(bits=4)),
    ],
)
def test_kv_cache_is_normalised(given: object, expected: object) -> None:
    assert SparsityConfig(kv_cache=given).kv_cache == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("wikitext", CalibrationConfig(dataset="wikitext")),
        (Path("a.txt"), CalibrationConfig(dataset="a.txt")),
        ({"dataset": "x", "seed": 2}, CalibrationConfig(dataset="x", seed=2)),
        (CalibrationConfig(), CalibrationConfig()),
    ],
)
def test_calibration_is_normalised(given: object, expected: object) -> None:
    assert SparsityConfig(calibration=given).calibration == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", 0.5), ("1:4", 0.75), ("6:8", 0.25)])
def test_a_pattern_fixes_the_target(pattern: str, ratio: float) -> None:
    assert SparsityConfig(pattern=pattern).target_sparsity == ratio
    assert SparsityConfig(ratio, pattern=pattern).target_sparsity == ratio
    assert SparsityConfig(0.0, pattern=pattern).target_sparsity == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_sparsity": 1.0}, r"target_sparsity must be a number in \[0, 1\).*got 1.0"),
        ({"target_sparsity": -0.1}, r"got -0.1"),
        ({"target_sparsity": "half"}, r"got 'half'"),
        ({"target_sparsity": float("nan")}, r"got nan"),
        ({"metric": "random"}, r"lognorm.*"),
        ({"pattern": "4:2"}, r"4:2"),
        ({"pattern": "blocks"}, r"blocks"),
        ({"target_sparsity": 0.3, "pattern": "2:4"}, r"2:4"),
        ({"checkpoint_format": "zip"}, r"one of 'bitmask', 'dense', got 'zip'"),
        ({"runtime": "fast"}, r"one of 'auto', 'dense', 'sparse', got 'fast'"),
        ({"runtime": "sparse", "checkpoint_format": "dense"}, r"needs checkpoint_format='bitmask'"),
        ({"sparsity": 0.5}, r"A single ratio is target_sparsity"),
        ({"sparsity": {3: 0.5}}, r"module name or glob to ratio"),
        ({"sparsity": {"a": 1.5}}, r"sparsity of 'a' must be .* got 1.5"),
        ({"kv_cache": True}, r"kv_cache must be None, False, .* got True"),
        ({"kv_cache": "8"}, r"kv_cache must be .* got '8'"),
        ({"kv_cache": 5}, r"2, 3, 4, 6, 8, 16.* got 5"),
        ({"kv_cache": {"bit": 8}}, r"got bit"),
        ({"modules_to_not_convert": "lm_head"}, r"must be a list .* got 'lm_head'"),
        ({"modules_to_not_convert": [1]}, r"must be a list"),
        (
            {"calibration": [{"input_ids": None}]},
            r"Batches and datasets in memory go to hf_adaptive_sparse\.prune\(model, config,",
        ),
        ({"calibration": {"samples": 3}}, r"got samples"),
        ({"provenance": {"x": {1, 2}}}, r"plain JSON types"),
        ({"provenance": 3}, r"must be a mapping, got int"),
        ({"quant_method": "gptq"}, r"'adaptive_sparse', got 'gptq'"),
        ({"format_version": 4}, r"format_version 4.*Upgrade"),
        ({"format_version": 1, "weight_bits": 8}, r"below 16 need format_version 2, got 1"),
        ({"weight_bits": 2}, r"weight_bits .*must be one of 4, 8, 12, 16 .*got 2"),
        ({"weight_bits": "8"}, r"got '8'"),
        (
            {"weight_bits": {"a": True}},
            r"weight_bits of 'a' must be one of 4, 8, 12, 16 .*got True",
        ),
        ({"weight_bits": {1: 8}}, r"map module names or globs to bits"),
        ({"weight_bits": {"a": 8}, "checkpoint_format": "dense"}, r"checkpoint_format='bitmask'"),
        ({"weight_update": "admm"}, r"None or one of least_squares, obs; got 'admm'"),
        ({"weight_update": ["obs"]}, r"None or one of least_squares, obs; got \['obs'\]"),
        ({"weight_group_size": 2**64 + 32}, r"at most 2147483616, got 18446744073709551648"),
        (
            {"weight_update": "obs", "metric": "alps"},
            r"'alps' updates the weights by itself, so weight_update must be None; got 'obs'",
        ),
        ({"weight_group_size": 48}, r"multiple of 32 above 0, .*got 48"),
        ({"weight_group_size": True}, r"multiple of 32 above 0, .*got True"),
        ({"format_version": "1"}, r"must be a whole number"),
        ({"defaulted": ["colour"]}, r"got \['colour'\]"),
    ],
)
def test_invalid_values_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**arguments)  # type: ignore[arg-type]


def test_only_a_saved_kv_profile_can_be_of_the_first_form() -> None:
    fields = {"key_bits": 8, "value_bits": 6, "group_size": 64, "residual_length": 64}
    asked = KVCacheConfig(**fields)
    assert SparsityConfig(kv_cache=fields).kv_cache == asked
    assert SparsityConfig.from_dict({"kv_cache": fields}).kv_cache == asked
    saved = SparsityConfig(kv_cache=asked).to_dict() | {"kv_cache": fields}
    assert SparsityConfig.from_dict(saved).kv_cache == replace(asked, key_mode="token")
    assert SparsityConfig.from_dict(saved, kv_cache=fields).kv_cache == asked


def test_a_future_version_is_told_before_its_unknown_keys() -> None:
    data = checkpoint().to_dict() | {"format_version": 9, "colour": 4}
    with pytest.raises(ValueError, match="format_version 9"):
        SparsityConfig.from_dict(data)
    with pytest.raises(ValueError, match=r"knows the keys .*target_sparsity.*; got colour"):
        SparsityConfig.from_dict(data | {"format_version": 1})


def test_from_dict_keeps_transformers_contract() -> None:
    config, rest = SparsityConfig.from_dict(
        checkpoint().to_dict(), return_unused_kwargs=True, runtime="dense", other=1
    )
    assert config.runtime == "dense"
    assert rest == {"other": 1}


# Merging a passed config into a checkpoint's


@pytest.mark.parametrize(
    "passed",
    [
        SparsityConfig(),
        SparsityConfig(runtime="dense"),
        SparsityConfig(kv_cache=None),
        SparsityConfig(target_sparsity=0.5, metric="wanda", modules_to_not_convert=["b", "a"]),
        SparsityConfig(sparsity={"model.layers.*": 0.6, "model.layers.0.mlp": 0.4}),
        SparsityConfig(sparsity=None),
        SparsityConfig(calibration="anything"),
        checkpoint(),
    ],
)
def test_what_agrees_or_was_not_passed_is_accepted(passed: SparsityConfig) -> None:
    merged = merge_configs(checkpoint(), passed)
    assert merged.to_dict() == checkpoint().to_dict()
    assert merged.runtime == passed.runtime


def test_the_kv_profile_may_be_replaced_or_switched_off() -> None:
    assert merge_configs(checkpoint(), SparsityConfig(kv_cache=4)).kv_cache == KVCacheConfig(4)
    assert merge_configs(checkpoint(), SparsityConfig(kv_cache=False)).kv_cache is None
    assert checkpoint().kv_cache == KVCacheConfig(bits=(8, 6))


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"target_sparsity": 0.4}, r"target_sparsity .*says 0.5, .*says 0.4"),
        ({"metric": "lognorm"}, r"metric .*says 'wanda', .*says 'lognorm'"),
        ({"pattern": "2:4"}, r"pattern .*'unstructured'.*'2:4'"),
        ({"checkpoint_format": "dense"}, r"checkpoint_format .*'bitmask'.*'dense'"),
        ({"modules_to_not_convert": ["a"]}, r"modules_to_not_convert"),
        ({"modules_to_not_convert": None}, r"modules_to_not_convert"),
        ({"sparsity": {"model.layers.0.mlp": 0.5}}, r"sparsity .*0.4.*0.5"),
        ({"sparsity": {"*": 0.4}}, r"sparsity .*layers.1.mlp': 0.6.*'\*': 0.4"),
        ({"sparsity": {"lm_head": 0.4}}, r"no module 'lm_head'"),
    ],
)
def test_what_disagrees_is_named_with_both_values(passed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_configs(checkpoint(), SparsityConfig(**passed))  # type: ignore[arg-type]


QUANTISED = {"weight_bits": {"model.layers.0.mlp": 8, "model.layers.1.mlp": 4}}


def test_weight_bits_are_compared_as_they_come_to_stand() -> None:
    made = checkpoint(**QUANTISED)
    for fields in (
        {"weight_bits": {"*": 4, "model.layers.0.mlp": 8}},
        {"weight_group_size": None},
        QUANTISED,
        {},
    ):
        assert merge_configs(made, SparsityConfig(**fields)).to_dict() == made.to_dict()  # type: ignore[arg-type]
    for fields, message in (
        ({"weight_bits": 8}, r"weight_bits .*'model.layers.1.mlp': 4.*says 8"),
        ({"weight_bits": 16}, r"weight_bits .*says 16"),
        ({"weight_bits": {"lm_head": 8}}, r"weight_bits"),
        ({"weight_group_size": 64}, r"weight_group_size .*says None, .*says 64"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_configs(made, SparsityConfig(**fields))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight_bits .*says 16, .*says 4"):
        merge_configs(checkpoint(), SparsityConfig(weight_bits=4))
    assert merge_configs(checkpoint(), SparsityConfig(weight_bits=16)) == checkpoint()


def test_recorded_calibration_is_compared() -> None:
    recorded = CalibrationConfig(dataset="x").to_dict()
    made = checkpoint(provenance={"calibration": recorded})
    merge_configs(made, SparsityConfig(calibration="x"))
    merge_configs(made, SparsityConfig(calibration="some/folder/x"))
    by_hand = checkpoint(provenance={"calibration": {"batches": 4, "sequential": True}})
    merge_configs(by_hand, SparsityConfig(calibration="y"))
    with pytest.raises(ValueError, match=r"calibration .*'x'.*'y'"):
        merge_configs(made, SparsityConfig(calibration="y"))
