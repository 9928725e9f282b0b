"""Profiles: validation, means, and their JSON forms."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse.profiles import (
    FORMAT_VERSION,
    KV_BITS,
    LOSSLESS_BITS_VERSION,
    CalibrationConfig,
    CompressionProfile,
    KVCacheConfig,
    SparsityProfile,
    check_format_version,
)

bit_widths = st.sampled_from(KV_BITS)


class TestSparsityProfile:
    def test_mean_is_weighted_by_parameters(self) -> None:
        profile = SparsityProfile({"a": 0.25, "b": 0.75})
        assert profile.mean({"a": 300, "b": 100}) == pytest.approx(0.375)

    def test_modules_it_does_not_name_count_as_dense(self) -> None:
        assert SparsityProfile({"a": 0.5}).mean({"a": 10, "b": 10}) == pytest.approx(0.25)

    @pytest.mark.parametrize("numel", [{}, {"a": 0}])
    def test_no_weights_have_no_mean(self, numel: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="numel must count at least one weight"):
            SparsityProfile({}).mean(numel)

    @pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan"), "0.5", True, None])
    def test_refuses_what_is_not_a_ratio(self, ratio: object) -> None:
        with pytest.raises(ValueError, match=r"sparsity of 'a' must be a number in \[0, 1\)"):
            SparsityProfile({"a": ratio})  # type: ignore[dict-item]

    def test_json_round_trip(self) -> None:
        profile = SparsityProfile({"a": 0.475, "b": 0.5})
        assert SparsityProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


class TestKVCacheConfig:
    def test_one_width_serves_every_layer(self) -> None:
        assert KVCacheConfig(bits=6).layer_bits(3) == ((6, 6), (6, 6), (6, 6))

    def test_keys_and_values_override_apart(self) -> None:
        config = KVCacheConfig(bits=8, value_bits=[2, 4])
        assert config.layer_bits(2) == ((8, 2), (8, 4))

    def test_wrong_length_names_both_lengths(self) -> None:
        with pytest.raises(ValueError, match=r"key_bits .* 4 layers, the list has 2 entries"):
            KVCacheConfig(key_bits=(8, 6)).layer_bits(4)

    def test_mean_is_weighted_by_width(self) -> None:
        config = KVCacheConfig(key_bits=(8, 6), value_bits=(8, 6))
        assert config.mean_bits([(64, 64), (64, 64)]) == 7.0
        assert config.mean_bits([(192, 192), (64, 64)]) == 7.5

    @pytest.mark.parametrize("bits", [0, 5, 7, 32, 8.0, "8", True, [], [8, 5]])
    def test_refuses_other_widths(self, bits: object) -> None:
        with pytest.raises(ValueError, match=r"2, 3, 4, 6, 8, 16|at least one layer"):
            KVCacheConfig(bits=bits)  # type: ignore[arg-type]

    @pytest.mark.parametrize("field", ["group_size", "residual_length"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "64"])
    def test_refuses_sizes_below_one(self, field: str, value: object) -> None:
        with pytest.raises(ValueError, match=f"{field} must be a whole number >= 1"):
            KVCacheConfig(**{field: value})  # type: ignore[arg-type]

    @given(st.lists(st.tuples(bit_widths, bit_widths), min_size=1, max_size=6))
    def test_json_round_trip_keeps_every_layers_bits(self, bits: list[tuple[int, int]]) -> None:
        keys, values = zip(*bits, strict=True)
        config = KVCacheConfig(key_bits=keys, value_bits=values, group_size=32)
        again = KVCacheConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again.layer_bits(len(bits)) == config.layer_bits(len(bits)) == tuple(bits)
        assert again.to_dict() == config.to_dict()

    @pytest.mark.parametrize("value", [-1, 0.5, True, "4"])
    def test_refuses_other_sink_lengths(self, value: object) -> None:
        with pytest.raises(ValueError, match="sink_length must be a whole number >= 0"):
            KVCacheConfig(sink_length=value)  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", ["row", "", None, 0])
    def test_refuses_other_key_modes(self, value: object) -> None:
        with pytest.raises(ValueError, match="key_mode must be one of channel, token, got"):
            KVCacheConfig(key_mode=value)  # type: ignore[arg-type]

    def test_a_form_of_the_first_version_keeps_its_keys_per_token(self) -> None:
        first = {"key_bits": [8, 6], "value_bits": 6, "group_size": 64, "residual_length": 64}
        assert KVCacheConfig.from_dict(first).key_mode == "token"
        assert KVCacheConfig.from_dict(first).residual_length == 64
        assert KVCacheConfig.from_dict({"bits": 8}) == KVCacheConfig(bits=8)
        assert KVCacheConfig().key_mode == "channel"
        again = KVCacheConfig.from_dict(KVCacheConfig.from_dict(first).to_dict())
        assert again.key_mode == "token"

    def test_fields_of_a_user_have_no_form_of_a_version(self) -> None:
        fields = {"key_bits": 8, "value_bits": 6, "group_size": 64, "residual_length": 64}
        assert KVCacheConfig.from_fields(fields) == KVCacheConfig(**fields)

    def test_unknown_key_lists_the_known(self) -> None:
        with pytest.raises(ValueError, match=r"knows the keys bits, .*got nbits"):
            KVCacheConfig.from_dict({"nbits": 4})


class TestCalibrationConfig:
    @pytest.mark.parametrize("field", ["num_samples", "batch_size", "sequence_length"])
    def test_refuses_counts_below_one(self, field: str) -> None:
        with pytest.raises(ValueError, match=f"{field} must be a whole number >= 1, got 0"):
            CalibrationConfig(**{field: 0})  # type: ignore[arg-type]

    def test_refuses_a_negative_image_weight(self) -> None:
        with pytest.raises(ValueError, match="image_weight must be a number >= 0"):
            CalibrationConfig(image_weight=-1.0)

    def test_json_round_trip(self) -> None:
        config = CalibrationConfig(dataset="a:b", sequence_length=64)
        assert CalibrationConfig(**json.loads(json.dumps(config.to_dict()))) == config


class TestCompressionProfile:
    def test_save_and_load(self, tmp_path) -> None:
        profile = CompressionProfile(
            SparsityProfile({"a": 0.5}), KVCacheConfig(key_bits=(8, 6), value_bits=(8, 8))
        )
        profile.save(tmp_path / "profile.json")
        assert CompressionProfile.load(tmp_path / "profile.json") == CompressionProfile(
            profile.sparsity, KVCacheConfig.from_dict(profile.kv_cache.to_dict())
        )
        assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]

    def test_a_save_that_fails_leaves_nothing_behind(self, tmp_path) -> None:
        (tmp_path / "profile.json").mkdir()
        with pytest.raises(OSError, match=r"profile\.json"):
            CompressionProfile().save(tmp_path / "profile.json")
        assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]

    @pytest.mark.parametrize(
        "text", ["{", "{}", "[]", pytest.param("[" * 100_000, id="too deep to be read")]
    )
    def test_a_file_that_is_none_is_named(self, tmp_path, text: str) -> None:
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(ValueError, match=r"mine\.json is no compression profile: "):
            CompressionProfile.load(tmp_path / "mine.json")

    def test_empty_profile(self) -> None:
        assert CompressionProfile.from_dict(CompressionProfile().to_dict()) == CompressionProfile()

    @pytest.mark.parametrize("version", [None, 0, "1", True, 1.0])
    def test_refuses_a_version_that_is_none(self, version: object) -> None:
        with pytest.raises(ValueError, match="must be a whole number >= 1"):
            check_format_version(version, "x")

    def test_refuses_a_version_from_the_future(self) -> None:
        message = f"the compression profile has format_version {LOSSLESS_BITS_VERSION + 1}"
        with pytest.raises(ValueError, match=re.escape(message)):
            CompressionProfile.from_dict({"format_version": LOSSLESS_BITS_VERSION + 1})
        with pytest.raises(ValueError, match=f"reads up to {FORMAT_VERSION}"):
            check_format_version(FORMAT_VERSION + 1, "x")

    def test_weight_bits_are_version_two_and_nothing_else_is(self, tmp_path) -> None:
        plain = CompressionProfile(SparsityProfile({"a": 0.5}))
        assert plain.to_dict().keys() == {"format_version", "sparsity", "kv_cache"}
        assert plain.to_dict()["format_version"] == 1
        quantised = CompressionProfile(plain.sparsity, weight_bits={"a": 8, "b": 4})
        assert quantised.to_dict()["format_version"] == 2
        lossless = CompressionProfile(plain.sparsity, weight_bits={"a": 12, "b": 4})
        assert lossless.to_dict()["format_version"] == 3
        assert CompressionProfile.from_dict(lossless.to_dict()) == lossless
        none = CompressionProfile(plain.sparsity, weight_bits={"a": 16})
        assert none.to_dict()["format_version"] == 2
        quantised.save(tmp_path / "profile.json")
        assert CompressionProfile.load(tmp_path / "profile.json") == quantised

    @pytest.mark.parametrize("bits", [2, 32, "8", True, None])
    def test_refuses_other_weight_bits(self, bits: object) -> None:
        with pytest.raises(ValueError, match=r"weight_bits of 'a' must be one of 4, 8, 12, 16"):
            CompressionProfile(weight_bits={"a": bits})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "read",
    [SparsityProfile.from_dict, KVCacheConfig.from_dict, CompressionProfile.from_dict],
)
@pytest.mark.parametrize("form", [[], 3, "x", None])
def test_a_form_that_is_no_object_is_refused(read, form) -> None:
    with pytest.raises(ValueError, match="must be a JSON object, got"):
        read(form)


@pytest.mark.parametrize(
    ("read", "known"),
    [
        (CompressionProfile.from_dict, "kv_cache, weight_bits"),
        (SparsityProfile.from_dict, "ratios"),
    ],
)
def test_a_key_that_means_nothing_is_refused(read, known: str) -> None:
    with pytest.raises(
        ValueError, match=rf"knows the keys format_version, .*{known}; got kv_cach\."
    ):
        read({"format_version": 1, "kv_cach": {"bits": 4}})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"sparsity": 3}, "must be a mapping from module names, got 3"),
        ({"sparsity": {"a": 10**400}}, r"sparsity of 'a' must be a number in \[0, 1\)"),
        ({"weight_bits": [8]}, r"must be a mapping from module names, got \[8\]"),
        ({"kv_cache": {"bits": 8, "key_mode": ["token"]}}, "key_mode must be one of"),
        ({"kv_cache": {"bits": None, "key_bits": 8}}, "bits must be one of"),
    ],
)
def test_a_damaged_profile_says_which_value(form, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionProfile.from_dict({"format_version": 1, **form})


def test_kv_profiles_are_equal_if_they_mean_the_same() -> None:
    said_once, said_apart = KVCacheConfig(bits=6), KVCacheConfig(key_bits=6, value_bits=6)
    assert said_once == said_apart == KVCacheConfig.from_dict(said_once.to_dict())
    assert len({said_once, said_apart}) == 1
    assert said_once != KVCacheConfig(key_bits=6)
    assert said_once != KVCacheConfig(bits=6, sink_length=4)
    assert said_once != 6
