"""Decoder layers that stay on disk: each is read for its turn, and written as a shard when pruned.

The folder that is written holds what a run needs to go on after it was interrupted: the shards of
the layers that are done, and a state file that names them. A layer counts as done when the state
file says so, which is written once its shard is on the disk. A state of another run, or one whose
shards are not what it says, is not used, and its shards are removed. Whoever completes the folder
removes the state, last of all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import decoder_layers
from hf_adaptive_sparse.checkpoint.empty_weights import empty_, fill_
from hf_adaptive_sparse.checkpoint.headers import read_file_header
from hf_adaptive_sparse.checkpoint.shards import write_index, write_json, write_shard
from hf_adaptive_sparse.checkpoint.weight_files import WeightFiles
from hf_adaptive_sparse.packing.stored_names import tensor_name
from hf_adaptive_sparse.packing.stored_weight import (
    ValueFormat,
    restored_weight,
    stored_kinds,
    stored_tensors,
)
from hf_adaptive_sparse.pruning.residence import LayerResidence

logger = logging.getLogger(__name__)

STATE_NAME = "offload_state.json"
STATE_VERSION = 1


class OffloadedLayers(LayerResidence):
    """The decoder layers of a model whose weights lie in ``source``, pruned into ``folder``.

    Besides the embeddings, encoders and whatever else lies outside the layers, at most one layer is
    in memory.

    Attributes:
        removed: Name of a weight -> weights that went, of all layers that are done.
        without_data: Name of a stack of experts -> those that were pruned without data, of a linear
            that was -> none; likewise.
        most_resident_bytes: The most bytes of layers that were in memory at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: WeightFiles,
        folder: Path,
        formats: Mapping[str, ValueFormat],
        fingerprint: Mapping[str, Any],
        *,
        sequential: bool = True,
    ) -> None:
        """Load and write what lies outside the layers, as the first shard, and see what is done.

        Args:
            model: The model, on the meta device; it is filled.
            source: The dense checkpoint.
            folder: Folder to write to; a state of an earlier run in it is continued.
            formats: Parameter name -> how its values are stored, of the parameters that are stored
                compressed.
            fingerprint: What a run depends on, plain JSON types. An earlier state with another one
                is not used.
            sequential: Layers that are done run as they are pruned; False: as they were.
        """
        self._model, self._source, self._folder = model, source, folder
        self._formats = dict(formats)
        self._fingerprint = dict(fingerprint)
        self._sequential = sequential
        self._prefix, layers = decoder_layers(model)
        self._count = len(layers)
        self._shards: dict[str, dict[str, int]] = {}
        self._done: set[int] = set()
        self._resident: int | None = None
        self.removed: dict[str, int] = {}
        self.without_data: dict[str, list[int]] = {}
        self.most_resident_bytes = 0
        self._resume()
        inside = self._prefix + "."
        self._outside = [n for n in source.names if not n.startswith(inside)]
        if self._file(0) not in self._shards:
            self._write(0, source.tensors(self._outside))
        self._fill(self._outside)
        model.tie_weights(set(source.twins), recompute_mapping=False)

    @property
    def done(self) -> frozenset[int]:
        """Layers that are pruned and written."""
        return frozenset(self._done)

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """See `LayerResidence.resident`."""
        if self._resident == index:
            yield
            return
        tied = [name for name in self._source.twins if name.startswith(self._layer(index))]
        names = self._names(index) + tied
        if index in self._done and self._sequential:
            self._fill_pruned(index, names)
        else:
            self._fill(names)
        state = self._model.get_submodule(f"{self._prefix}.{index}").state_dict()
        size = sum(tensor.nbytes for tensor in state.values())
        self.most_resident_bytes = max(self.most_resident_bytes, size)
        self._resident = index
        try:
            yield
        finally:
            empty_(self._model, names)
            self._resident = None

    def keep(
        self, index: int, removed: Mapping[str, int], without_data: Mapping[str, Sequence[int]]
    ) -> None:
        """See `LayerResidence.keep`: write the layer's shard, then the state."""
        tensors: dict[str, torch.Tensor] = {}
        state = self._model.get_submodule(f"{self._prefix}.{index}").state_dict()
        self.removed |= removed
        for name in self._names(index):
            key, tensor = self._key(name), state[name[len(self._layer(index)) :]]
            if name in self._formats:
                tensors |= stored_tensors(key, tensor, self._formats[name])
            elif self._untouched(name):
                tensors |= self._source.tensors([name])
            else:
                self._source.check_own_name(name)
                tensors[key] = tensor
        self.without_data |= {name: list(experts) for name, experts in without_data.items()}
        self._done.add(index)
        self._write(index + 1, tensors)

    def finish(self) -> None:
        """Write the layers in which nothing was pruned, and the index; the state stays."""
        for index in range(self._count):
            if index not in self._done:
                with self.resident(index):
                    self.keep(index, {}, {})
        write_index(self._folder, self._shards)

    def _layer(self, index: int) -> str:
        return f"{self._prefix}.{index}."

    def _key(self, name: str) -> str:
        """Return the name that a parameter is written under: that in the files it was read from.

        What was assembled, and what is compressed of experts, goes by its own name.
        """
        stacked = name in self._formats and not name.endswith(".weight")
        if stacked or name not in self._source.stored:
            return name
        return self._source.stored[name].name

    def _untouched(self, name: str) -> bool:
        """Whether a parameter that is assembled is written as the tensors that it was read from."""
        if name in self._formats or not self._source.assembled(name):
            return False
        return not self.removed.get(name)

    def _names(self, index: int) -> list[str]:
        return [name for name in self._source.names if name.startswith(self._layer(index))]

    def _file(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._count + 1:05d}.safetensors"

    def _fill(self, names: list[str]) -> None:
        fill_(self._model, self._source.parameters(names))

    def _fill_pruned(self, index: int, names: list[str]) -> None:
        tensors = self._source.parameters(
            name for name in names if name in self._source.twins or self._untouched(name)
        )
        with safe_open(self._folder / self._file(index + 1), framework="pt") as file:
            for name in names:
                if name in tensors:
                    continue
                key = self._key(name)
                if name in self._formats:
                    shape = self._model.get_parameter(name).shape
                    form = self._formats[name]
                    kinds = stored_kinds(form.bits)
                    stored = {kind: file.get_tensor(tensor_name(key, kind)) for kind in kinds}
                    tensors[name] = restored_weight(stored, shape, form)
                else:
                    tensors[name] = file.get_tensor(key).clone()
        fill_(self._model, tensors)

    def _write(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self._shards[self._file(number)] = write_shard(self._folder / self._file(number), tensors)
        write_json(
            self._folder / STATE_NAME,
            {
                "format_version": STATE_VERSION,
                "fingerprint": self._fingerprint,
                "done": sorted(self._done),
                "removed": self.removed,
                "starved": self.without_data,
                "shards": self._shards,
            },
        )

    def _resume(self) -> None:
        state = self._usable_state()
        if state is None:
            for left in self._folder.glob("*.safetensors*"):
                left.unlink()
            return
        self._shards, self.removed = state["shards"], state["removed"]
        self.without_data = state.get("starved", {})
        self._done = set(state["done"])
        logger.info("Going on with layer %d of %d.", len(self._done), self._count)

    def _usable_state(self) -> dict[str, Any] | None:
        """Return the state of an earlier run of the same whose shards are whole."""
        path = self._folder / STATE_NAME
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            same = state["format_version"] == STATE_VERSION
            same = same and state["fingerprint"] == json.loads(json.dumps(self._fingerprint))
            same = same and all(self._whole(file, sizes) for file, sizes in state["shards"].items())
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            same = False
        if same:
            return state
        logger.warning(
            "The unfinished run in %s was another one, or its files are damaged; it starts anew.",
            path.parent,
        )
        return None

    def _whole(self, file: str, sizes: Mapping[str, int]) -> bool:
        headers = read_file_header(self._folder / file)
        return {name: header.size_bytes for name, header in headers.items()} == sizes
