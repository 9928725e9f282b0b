"""Digests that tell one model, one set of batches, one source of data from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

SAMPLED_PER_TENSOR = 64
"""Elements of each tensor that enter the digest of a model's weights."""

_ENDS_BYTES = 1 << 20
"""Bytes at either end of a data file that tell it from another of its name and size."""


def weights_digest(model: PreTrainedModel) -> str:
    """Return a digest of name, shape, dtype and some elements of every parameter.

    Offloaded ones are read from where they lie; tied ones, which offloading parts, count once.
    """
    digest = hashlib.sha256()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    seen = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            held = parameter
            if parameter.is_meta:
                if tied.get(name, name) in seen:
                    continue
                held = load_offloaded_parameter(model, name)
            seen.add(tied.get(name, name))
            flat = held.detach().reshape(-1)
            step = max(1, flat.numel() // SAMPLED_PER_TENSOR)
            sample = flat[::step].to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def batches_digest(batches: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """Return a digest of every tensor of every batch."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            tensor = batch[key].detach().cpu().contiguous()
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source_digest(data: object) -> str | None:
    """Return a digest that tells data of one name apart; ``None`` for those on the Hub.

    Of a local file its size, its beginning and its end; of rows all that is text or number.
    """
    digest = hashlib.sha256()
    if isinstance(data, str | os.PathLike):
        source = Path(data).expanduser()
        if not source.exists():
            return None
        for path in sorted(p for p in (source, *source.rglob("*")) if p.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_ENDS_BYTES))
                file.seek(max(0, size - _ENDS_BYTES))
                digest.update(file.read())
    elif isinstance(data, list):
        for row in data:
            plain = {k: v for k, v in row.items() if isinstance(v, str | int | float | list)}
            digest.update(repr(plain).encode())
    else:
        return None
    return digest.hexdigest()
