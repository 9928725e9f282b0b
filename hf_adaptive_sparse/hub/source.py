"""Read a checkpoint's small files and headers from a local folder or a Hub repo."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from hf_adaptive_sparse.checkpoint.headers import (
    INDEX_NAME,
    LENGTH_BYTES,
    WEIGHTS_NAME,
    TensorHeader,
    header_length,
    merge_headers,
    parse_header,
    read_file_header,
    shard_names,
)
from hf_adaptive_sparse.hub.errors import check_repo_id, explained
from hf_adaptive_sparse.naming import expanded, looks_like_path

CONFIG_NAME = "config.json"
ADAPTER_NAME = "adapter_config.json"
MAX_JSON_BYTES = 100_000_000

# A first read this share of a file holds the header of any but the smallest, whose header is short.
_FIRST_READ_SHARE = 256
_FIRST_READ_BYTES = (4_096, 65_536)


class Source(Protocol):
    """A checkpoint that can be looked into without its weights.

    Attributes:
        name: The folder or the repo id, for messages and reports.
        revision: Commit sha of a repo; None for a folder.
        sizes: File name -> bytes.
    """

    name: str
    revision: str | None
    sizes: dict[str, int]

    def read(self, file: str) -> bytes:
        """Return the content of a small file."""
        ...

    def tensors(self, file: str) -> dict[str, TensorHeader]:
        """Return the tensors of a safetensors file, from its header alone."""
        ...


class FolderSource:
    """A checkpoint in a local folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        self.revision: str | None = None
        self.sizes = {p.name: p.stat().st_size for p in self.folder.iterdir() if p.is_file()}

    def read(self, file: str) -> bytes:
        """Return the content of a file."""
        return (self.folder / file).read_bytes()

    def tensors(self, file: str) -> dict[str, TensorHeader]:
        """Return the tensors of a safetensors file."""
        return read_file_header(self.folder / file)


class RepoSource:
    """A checkpoint in a Hub repo, pinned to the commit that its revision names now.

    Headers come by range requests, and a server that answers with more than was asked for is hung
    up on.

    Raises:
        ValueError: If the repo id is invalid.
        HubError: If the repo cannot be read.
    """

    def __init__(
        self, repo_id: str, revision: str | None, token: str | None, endpoint: str | None
    ) -> None:
        check_repo_id(repo_id)
        self.name = repo_id
        self._token = token
        self._api = HfApi(endpoint=endpoint, token=token)
        with explained("inspect", repo_id, revision):
            info = self._api.model_info(repo_id, revision=revision, files_metadata=True)
        self.revision: str | None = info.sha
        self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def read(self, file: str) -> bytes:
        """Return the content of a file."""
        with explained("inspect", self.name, self.revision):
            path = self._api.hf_hub_download(self.name, file, revision=self.revision)
        return Path(path).read_bytes()

    def tensors(self, file: str) -> dict[str, TensorHeader]:
        """Return the tensors of a safetensors file."""
        size = self.sizes[file]
        least, most = _FIRST_READ_BYTES
        # An empty file has no first bytes to ask for.
        first = min(size, most, max(least, size // _FIRST_READ_SHARE))
        start = self._first_bytes(file, first) if first else b""
        length = header_length(start, size, file)
        end = LENGTH_BYTES + length
        if len(start) < end:
            start = self._first_bytes(file, end)
        return parse_header(start[LENGTH_BYTES:end], size - end, file)

    def _first_bytes(self, file: str, count: int) -> bytes:
        url = hf_hub_url(self.name, file, revision=self.revision, endpoint=self._api.endpoint)
        headers = {
            **build_hf_headers(token=self._token),
            "Range": f"bytes=0-{count - 1}",
            "Accept-Encoding": "identity",
        }
        received = bytearray()
        with (
            explained("inspect", self.name, self.revision),
            get_session().stream(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response,
        ):
            hf_raise_for_status(response)
            for chunk in response.iter_bytes(_FIRST_READ_BYTES[1]):
                received += chunk
                if len(received) >= count:
                    break
        return bytes(received[:count])


def open_source(
    repo_or_folder: str | os.PathLike[str],
    revision: str | None,
    token: str | None,
    endpoint: str | None,
) -> Source:
    """Return the folder where there is one of that name, otherwise the repo.

    Raises:
        ValueError: If it is neither a folder nor a valid repo id, or a revision of a folder was
            asked for.
        HubError: If the repo cannot be read.
    """
    text = os.fspath(repo_or_folder)
    folder = local_folder(text)
    if folder is None:
        return RepoSource(text, revision, token, endpoint)
    check_no_revision(text, revision)
    return FolderSource(folder)


def check_no_revision(folder: str | os.PathLike[str], revision: str | None) -> None:
    """Refuse the revision of a local folder, which would have no effect.

    Raises:
        ValueError: If there is one.
    """
    if revision is not None:
        raise ValueError(
            f"{os.fspath(folder)!r} is a local folder: only a Hub repo has revision {revision!r}."
        )


def local_folder(repo_or_folder: str | os.PathLike[str]) -> Path | None:
    """Return the folder where there is one of that name; ``None``: it can only be a repo.

    ``~`` stands for the home folder, as where data are read.

    Raises:
        ValueError: If it is a path, or a file, and there is no folder.
    """
    text = os.fspath(repo_or_folder)
    path = expanded(text)
    if path.is_dir():
        return path
    if looks_like_path(text) or path.is_file():
        raise ValueError(f"There is no folder {text!r}. Name a folder or a repo 'owner/name'.")
    return None


def read_small(source: Source, file: str) -> bytes:
    """Return the content of a JSON file of the checkpoint.

    Raises:
        ValueError: If the file is missing or far too large.
    """
    if file not in source.sizes:
        if ADAPTER_NAME in source.sizes:
            raise ValueError(
                f"{source.name} has no {file}: it is a PEFT adapter alone. Merge it into its base "
                "model (merge_and_unload()), save that with its processor, and name its folder."
            )
        raise ValueError(f"{source.name} has no {file}: it is not a complete transformers model.")
    if source.sizes[file] > MAX_JSON_BYTES:
        raise ValueError(
            f"{file} of {source.name} has {source.sizes[file]} bytes; at most {MAX_JSON_BYTES} "
            "are read."
        )
    return source.read(file)


def read_config(source: Source) -> dict[str, Any]:
    """Return the model's config.

    Raises:
        ValueError: If it is missing or not a JSON object, or its model type, its quantization
            config or the method of that is of another kind than transformers takes.
    """
    config = read_object(source, CONFIG_NAME)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    for name, value, kind, words in (
        ("model_type", config.get("model_type", ""), str, "text"),
        ("quantization_config", quantization, dict | None, "an object"),
        ("quantization_config.quant_method", method, str | None, "text"),
    ):
        if not isinstance(value, kind):
            raise ValueError(
                f"{name} in {CONFIG_NAME} of {source.name} must be {words}, got {value!r}. "
                "Download or save it again."
            )
    return config


def read_object(source: Source, file: str) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        ValueError: If it is missing or not a JSON object.
    """
    content = read_small(source, file)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} of {source.name} is not valid JSON.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} of {source.name} is not a JSON object.")
    return found


def read_tensors(source: Source) -> dict[str, TensorHeader]:
    """Return the headers of all tensors of the checkpoint.

    As in transformers, a single file has precedence over shards.

    Raises:
        ValueError: If there are no safetensors weights, a shard is missing or damaged, or index and
            shards disagree.
    """
    if WEIGHTS_NAME in source.sizes:
        return source.tensors(WEIGHTS_NAME)
    if INDEX_NAME not in source.sizes:
        raise ValueError(f"{source.name} has neither {WEIGHTS_NAME} nor {INDEX_NAME}.")
    index = read_small(source, INDEX_NAME)
    shards = shard_names(index, INDEX_NAME)
    for shard in shards:
        if shard not in source.sizes:
            raise ValueError(f"{source.name} lacks {shard}, a shard that {INDEX_NAME} names.")
    tensors = merge_headers(source.tensors(shard) for shard in shards)
    weight_map = json.loads(index)["weight_map"]
    for name in sorted({*weight_map, *tensors}):
        stored = tensors[name].file if name in tensors else "nowhere"
        if Path(stored).name != weight_map.get(name):
            raise ValueError(
                f"{source.name}: {INDEX_NAME} places the tensor {name!r} in "
                f"{weight_map.get(name, 'no file')}, but it is stored in {Path(stored).name}."
            )
    return tensors
