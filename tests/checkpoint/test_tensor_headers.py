from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_adaptive_sparse.checkpoint.headers import (
    CheckpointError,
    compressed_summary,
    header_length,
    parse_header,
    read_file_header,
    read_headers,
    shard_names,
)
from hf_adaptive_sparse.packing.bitmask import compress


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros((), dtype=torch.float64),
        "c": torch.zeros(0, 4),
        "d": torch.zeros(7, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    headers = read_headers(tmp_path)
    assert headers.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert headers[name].shape == tuple(tensor.shape)
        assert headers[name].numel == tensor.numel()
        assert headers[name].size_bytes == tensor.nbytes
        assert headers[name].file == str(tmp_path / "model.safetensors")
    assert headers["a"].dtype == "BF16"
    assert read_headers(tmp_path / "model.safetensors") == headers


def test_shards_are_joined(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "m-2.safetensors")
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {n: h.shape for n, h in read_headers(tmp_path).items()} == {"a": (2,), "b": (3,)}
    save_file({"a": torch.zeros(3)}, tmp_path / "m-2.safetensors")
    with pytest.raises(CheckpointError, match=r"m-2.safetensors: tensor 'a' is also stored in"):
        read_headers(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names m-2.safetensors, which is not there"):
        read_headers(tmp_path)
    save_file({"c": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert read_headers(tmp_path).keys() == {"c"}  # which transformers loads


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor"):
        read_headers(tmp_path)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/a", "x\\a", 3])
def test_an_index_cannot_point_elsewhere(name: object) -> None:
    with pytest.raises(CheckpointError, match=r"beside the index"):
        shard_names(json.dumps({"weight_map": {"a": name}}).encode(), "index.json")


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": []}}'])
def test_a_broken_index_is_refused(index: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"index.json: not a valid index"):
        shard_names(index, "index.json")


@pytest.mark.parametrize("kept", [0, 5, 20, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*truncated"):
        read_file_header(path)


def test_a_header_longer_than_its_file_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match=f"claims {2**62} bytes of a file of 10"):
        read_file_header(path)
    with pytest.raises(CheckpointError, match="at most 100000000 are read"):
        header_length(struct.pack("<Q", 100_000_001), 2**40, "huge.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        ([], "must be a JSON object"),
        ({"a": 3}, "entry of tensor 'a' is not valid"),
        ({"a": entry("F32", [-1], 0, 4)}, "not valid"),
        ({"a": entry("F32", [True], 0, 4)}, "not valid"),
        ({"a": entry("F32", [1], 4, 0)}, "not valid"),
        ({"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 4]}}, "not valid"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "not valid"),
        ({"a": entry("F32", [2], 0, 4)}, "takes 8 bytes, but 4 are declared"),
        ({"a": entry("F32", [2**40], 0, 4)}, "are declared"),
        ({"a": entry("U8", [3], 1, 4)}, "gap at byte 0"),
        ({"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 2, 4)}, "overlap"),
        ({"a": entry("U8", [3], 0, 3)}, "declares 3 bytes of tensors, the file holds 4"),
    ],
)
def test_a_tampered_header_is_refused(tmp_path: Path, header: object, message: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=rf"bad.safetensors: .*{message}"):
        read_file_header(path)


def test_the_size_of_an_unknown_dtype_is_taken_as_declared() -> None:
    header = json.dumps({"a": entry("F4", [2], 0, 1)}).encode()
    assert parse_header(header, 1, "f")["a"].size_bytes == 1


def test_the_summary_tells_rows_kept_weights_and_bytes(tmp_path: Path) -> None:
    weight = torch.eye(6, 21, dtype=torch.bfloat16)
    values, mask = compress(weight)
    path = tmp_path / "model.safetensors"
    save_file({"x.weight_values": values, "x.weight_bitmask": mask, "n.weight": weight}, path)
    summary = compressed_summary(read_headers(path))
    assert list(summary) == ["x"]
    module = summary["x"]
    assert (module.rows, module.columns_at_most, module.nnz) == (6, 24, 6)
    assert module.size_bytes == 6 * 2 + 6 * 3


def test_a_summary_of_half_a_weight_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    mask = torch.zeros(2, 1, dtype=torch.uint8)
    save_file({"x.weight_bitmask": mask}, path)
    with pytest.raises(CheckpointError, match=r"has no 'x.weight_values'"):
        compressed_summary(read_headers(path))
    save_file({"x.weight_bitmask": mask.int(), "x.weight_values": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"must be U8 \(out, bytes\)"):
        compressed_summary(read_headers(path))
