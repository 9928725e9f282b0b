"""Statistics of what flows into the linears: norms per input feature, and Hessians.

One context manager places the hooks and takes them away. Which tokens count, and how much, is given
to the statistics for each batch (`InputStatistics.token_weights`), never looked up elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig

from hf_adaptive_sparse.architecture import media_token_ids

T = TypeVar("T")

_CHUNK_ELEMENTS = 1 << 20
_HESSIAN_ROWS = 1024


def token_weights(
    batch: Mapping[str, torch.Tensor], config: PretrainedConfig, image_weight: float = 1.0
) -> torch.Tensor:
    """Return how much each token of a batch counts.

    Args:
        batch: Inputs of the model's forward, with ``input_ids`` ``(batch, seq)`` or
            ``inputs_embeds`` ``(batch, seq, hidden)``, and perhaps ``attention_mask``
            ``(batch, seq)``.
        config: Config of the model, which names the tokens of images, videos and sounds.
        image_weight: Weight of such a token.

    Returns:
        ``(batch, seq)``, float32: 0 for padding, ``image_weight`` for tokens of images,
        videos and sounds, 1 for text.

    Raises:
        ValueError: If the batch has neither ids nor embeddings, or a mask of another shape.
    """
    ids, embeds = batch.get("input_ids"), batch.get("inputs_embeds")
    if ids is not None:
        shape, device = ids.shape, ids.device
    elif embeds is not None:
        shape, device = embeds.shape[:2], embeds.device
    else:
        raise ValueError(
            "A calibration batch must hold input_ids (batch, seq) or inputs_embeds; it has "
            f"{', '.join(sorted(batch)) or 'nothing'}."
        )
    weights = torch.ones(shape, dtype=torch.float32, device=device)
    if ids is not None:
        media = torch.tensor(media_token_ids(config), dtype=ids.dtype, device=ids.device)
        weights.masked_fill_(torch.isin(ids, media), image_weight)
    mask = batch.get("attention_mask")
    if mask is not None:
        if mask.shape != shape:
            raise ValueError(
                f"attention_mask must have the shape of the tokens, {tuple(shape)}, so that "
                f"padding can be left out; got {tuple(mask.shape)}."
            )
        weights.masked_fill_(mask.to(device) == 0, 0.0)
    return weights


class InputStatistic:
    """Sums over the inputs of one linear, or of several that read the same tensor.

    Attributes:
        owner: The linear that was called first.
        squares: ``(in,)``, float64: weighted sum of squares.
        hessian: ``(in, in)``, float32: weighted ``Σ x xᵀ``; ``None`` unless asked for.
        tokens: Sum of the weights of all inputs.
    """

    def __init__(self, owner: str, width: int, hessian: bool, device: torch.device) -> None:
        self.owner = owner
        # Sums in float64 (MPS has none): then the norm is the exact one, rounded once.
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.squares = torch.zeros(width, dtype=wide, device=device)
        self.hessian = torch.zeros(width, width, device=device) if hessian else None
        self.tokens = 0.0
        self._made: object | None = None

    def add_(self, inputs: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add inputs.

        Args:
            inputs: ``(rows, in)``, any floating dtype. Not modified.
            weights: ``(rows,)``, float32; rows of weight 0 are not looked at. ``None``: all 1.

        Raises:
            ValueError: If a counted input is NaN or infinite.
        """
        limit = _CHUNK_ELEMENTS // max(1, inputs.shape[1])
        step = max(1, limit if self.hessian is None else min(limit, _HESSIAN_ROWS))
        for start in range(0, inputs.shape[0], step):
            rows = inputs[start : start + step]
            part = None if weights is None else weights[start : start + step]
            if part is not None:
                counted = part > 0
                if not bool(counted.all()):
                    rows, part = rows[counted], part[counted]
            values = rows.to(torch.float32)
            if part is not None:
                self.tokens += float(part.sum(dtype=torch.float64))
                if not bool((part == 1).all()):
                    values = values * part.sqrt().unsqueeze(1)
            else:
                self.tokens += values.shape[0]
            self.squares += values.square().sum(dim=0, dtype=self.squares.dtype)
            if self.hessian is not None:
                self.hessian.addmm_(values.t(), values)
        if not bool(self.squares.isfinite().all()):
            raise ValueError(
                f"The inputs of {self.owner!r} must be finite; the calibration data make some of "
                "them NaN or infinite. Check the model's weights and dtype (float16 overflows "
                "where bfloat16 does not) and the data."
            )

    def turned_into(self, kind: type[T]) -> T:
        """Return ``kind(hessian)``, made once, to which the Hessian is given up.

        Raises:
            ValueError: If no Hessian was asked for, or it was turned into something else.
        """
        if not isinstance(self._made, kind):
            if self.hessian is None:
                raise ValueError(f"No Hessian was collected for {self.owner!r}, or it is gone.")
            self._made = kind(self.hessian)  # type: ignore[call-arg]
            self.hessian = None
        return self._made


class InputStatistics:
    """Collects the statistics of a set of linears while the model runs; see `collect_inputs`.

    Linears that are handed the very same tensor one after the other (query, key and value; gate and
    up) share one statistic.

    Attributes:
        token_weights: ``(batch, seq)``, float32: how much each token of the batch now running
            counts. ``None``: every row counts 1. Inputs with another number of rows than tokens
            (experts, encoder states) count 1 each.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], hessian: bool = False) -> None:
        self.token_weights: torch.Tensor | None = None
        self._names: dict[nn.Module, str] = {module: name for name, module in linears.items()}
        self._hessian = hessian
        self._statistics: dict[str, InputStatistic] = {}
        self._last: tuple[torch.Tensor, InputStatistic] | None = None

    def hook(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook that adds the input of one of the linears."""
        name, inputs = self._names[module], args[0].detach()
        known = self._statistics.get(name)
        if self._last is not None and self._last[0] is args[0]:
            shared = self._last[1]
            if known is None:
                known = self._statistics[name] = shared
            if known is shared:
                return
        elif known is not None and known.owner != name:
            raise RuntimeError(
                f"{name!r} and {known.owner!r} read the same tensor in one batch and different "
                "ones in another; their statistics cannot be told apart."
            )
        if known is None:
            known = InputStatistic(name, inputs.shape[-1], self._hessian, inputs.device)
            self._statistics[name] = known
        rows = inputs.reshape(-1, inputs.shape[-1])
        weights = self.token_weights
        if weights is not None and weights.numel() == rows.shape[0]:
            weights = weights.reshape(-1).to(rows.device)
        else:
            weights = None
        known.add_(rows, weights)
        self._last = args[0], known

    def forget_inputs(self) -> None:
        """Let go of the last input, which is held to recognise it."""
        self._last = None

    def release(self) -> None:
        """Let go of all sums: the Hessians of one layer must not outlive its pruning."""
        self._statistics.clear()
        self._last = None

    def statistic(self, name: str) -> InputStatistic:
        """Return the sums for a linear.

        Raises:
            ValueError: If no calibration token reached it.
        """
        found = self._statistics.get(name)
        if found is None or found.tokens <= 0:
            raise ValueError(
                f"No calibration token reached {name!r}; at least one must. Use more calibration "
                "data (with images, if the module reads them), or leave it out with "
                "modules_to_not_convert."
            )
        return found

    def input_norm(self, name: str) -> torch.Tensor:
        """Return ``‖X_j‖₂`` over all counted tokens: ``(in,)``, float32.

        Raises:
            ValueError: If no calibration token reached the linear.
        """
        return self.statistic(name).squares.sqrt().to(torch.float32)


@contextmanager
def collect_inputs(
    linears: Mapping[str, nn.Linear], hessian: bool = False
) -> Iterator[InputStatistics]:
    """Collect statistics of the inputs of ``linears`` while the context is open.

    Args:
        linears: Name -> module.
        hessian: Also sum ``x xᵀ``: ``in * in`` float32 per distinct input.

    Yields:
        The statistics; set their ``token_weights`` before each batch. They stay readable after.
    """
    statistics = InputStatistics(linears, hessian)
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        handles.extend(m.register_forward_pre_hook(statistics.hook) for m in linears.values())
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
        statistics.forget_inputs()
