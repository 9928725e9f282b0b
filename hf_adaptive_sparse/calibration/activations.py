"""Statistics of the inputs of prunable weights: norms per input feature, and Hessians.

One context manager places the hooks and takes them away. Which tokens count, and how much, is given
to the statistics for each batch (`InputStatistics.token_weights` and ``encoder_weights``), never
looked up elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from hf_adaptive_sparse.architecture import Prunable
from hf_adaptive_sparse.calibration.expert_inputs import ExpertInputs, watched_experts
from hf_adaptive_sparse.experts import ExpertStack

T = TypeVar("T")

_CHUNK_ELEMENTS = 1 << 20
_HESSIAN_ROWS = 1024


class InputStatistic:
    """Sums over the inputs of one linear, or of several that read the same tensor.

    Attributes:
        owner: The linear that was called first.
        squares: ``(in,)``, float64: weighted sum of squares.
        hessian: ``(in, in)``, float32: weighted ``Σ x xᵀ``; ``None`` unless asked for.
        tokens: Sum of the weights of all inputs.
        rows: Inputs that were counted, whatever their weight.
    """

    def __init__(self, owner: str, width: int, hessian: bool, device: torch.device) -> None:
        self.owner = owner
        # Sums in float64 (MPS has none): then the norm is the exact one, rounded once.
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.squares = torch.zeros(width, dtype=wide, device=device)
        self.hessian = torch.zeros(width, width, device=device) if hessian else None
        self.tokens = 0.0
        self.rows = 0
        self._made: object | None = None

    @classmethod
    def without_data(
        cls, owner: str, width: int, hessian: bool, device: torch.device
    ) -> InputStatistic:
        """Return what stands for inputs that nothing is known of: all features alike, unrelated."""
        known = cls(owner, width, False, device)
        known.squares.fill_(1.0)
        known.tokens = 1.0
        if hessian:
            known.hessian = torch.eye(width, device=device)
        return known

    def parted(self, owner: str) -> InputStatistic:
        """Return a copy of the sums, for a linear that goes on without the others."""
        other = copy.copy(self)
        other.owner, other.squares = owner, self.squares.clone()
        other.hessian = None if self.hessian is None else self.hessian.clone()
        return other

    @property
    def norm(self) -> torch.Tensor:
        """``‖X_j‖₂`` over all counted tokens: ``(in,)``, float32."""
        return self.squares.sqrt().to(torch.float32)

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
            self.rows += rows.shape[0]
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
    up) share one statistic, until one is handed another (merged self- and cross-attention). Each
    expert of a stack has one of its own, of the tokens that were sent to it.

    Attributes:
        token_weights: ``(batch, seq)``, float32: how much each token of the batch now running
            counts. ``None``: every row counts 1.
        encoder_weights: Of an encoder-decoder the same of the tokens that its encoder reads, for
            inputs with as many rows: what cross-attention makes keys and values of. Inputs with
            the rows of neither count 1 each.
    """

    def __init__(self, weights: Mapping[str, Prunable], hessian: bool = False) -> None:
        self.token_weights: torch.Tensor | None = None
        self.encoder_weights: torch.Tensor | None = None
        linears = {n: m for n, m in weights.items() if isinstance(m, nn.Linear)}
        self._names: dict[nn.Module, str] = {module: name for name, module in linears.items()}
        self._hessian = hessian
        self._statistics: dict[str, InputStatistic] = {}
        self._read: dict[str, int] = {}
        # The tensor that was read last, and the statistic of its reader before and after that.
        self._last: tuple[torch.Tensor, InputStatistic | None, InputStatistic] | None = None

    def hook(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook that adds the input of one of the linears.

        Raises:
            ValueError: If the input is not finite, or a statistic that was shared cannot be parted.
        """
        name, inputs = self._names[module], args[0].detach()
        before = known = self._statistics.get(name)
        last = self._last
        if last is not None and last[0] is args[0] and (before is last[1] or before is last[2]):
            known = last[2]
        else:
            if known is None:
                known = self._new(name, inputs)
            elif known.owner != name:
                known = self._parted(name, known)
            rows = inputs.reshape(-1, inputs.shape[-1])
            known.add_(rows, self.row_weights(rows))
            self._last = args[0], before, known
        self._statistics[name] = known
        self._read[name] = known.rows

    def _parted(self, name: str, shared: InputStatistic) -> InputStatistic:
        """Return a statistic for a linear that no longer reads what it shared one for."""
        if shared.rows != self._read[name]:
            raise ValueError(
                f"{name!r} must read the tensors that {shared.owner!r} reads, in every batch or in "
                "none; it was given others after a batch in which it was not called. Leave it "
                "dense with modules_to_not_convert, or use metric='magnitude', which needs no data."
            )
        return shared.parted(name)

    def row_weights(self, rows: torch.Tensor, copies: int = 1) -> torch.Tensor | None:
        """Return the weights ``(rows,)`` of the batch's tokens, if these are so many copies."""
        for weights in (self.token_weights, self.encoder_weights):
            if weights is not None and weights.numel() * copies == rows.shape[0]:
                return weights.reshape(-1).to(rows.device).repeat(copies)
        return None

    def add(self, name: str, rows: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add inputs of one expert's matrix; arguments as for `InputStatistic.add_`."""
        if name not in self._statistics:
            self._statistics[name] = self._new(name, rows)
        self._statistics[name].add_(rows, weights)

    def rows(self, name: str) -> int:
        """Return how many inputs were counted."""
        return self._statistics[name].rows if name in self._statistics else 0

    def _new(self, name: str, inputs: torch.Tensor) -> InputStatistic:
        return InputStatistic(name, inputs.shape[-1], self._hessian, inputs.device)

    def forget_inputs(self) -> None:
        """Let go of the last input, which is held to recognise it."""
        self._last = None

    def forget(self, name: str) -> None:
        """Let go of the sums of one expert's matrix: nothing else shares them."""
        self._statistics.pop(name, None)

    def release(self) -> None:
        """Let go of all sums: the Hessians of one layer must not outlive its pruning."""
        self._statistics.clear()
        self._read.clear()
        self._last = None

    def reached(self, name: str) -> bool:
        """Return whether a calibration token that counts reached a linear."""
        found = self._statistics.get(name)
        return found is not None and found.tokens > 0

    def statistic(self, name: str) -> InputStatistic:
        """Return the sums for a linear.

        Raises:
            ValueError: If no calibration token reached it.
        """
        if not self.reached(name):
            raise ValueError(
                f"No calibration token reached {name!r}; at least one must. Use more calibration "
                "data (with images, if the module reads them), or leave it out with "
                "modules_to_not_convert."
            )
        return self._statistics[name]

    def input_norm(self, name: str) -> torch.Tensor:
        """Return ``‖X_j‖₂`` over all counted tokens: ``(in,)``, float32.

        Raises:
            ValueError: If no calibration token reached the linear.
        """
        return self.statistic(name).norm


@contextmanager
def collect_inputs(
    weights: Mapping[str, Prunable],
    hessian: bool = False,
    experts: Container[int] | None = None,
) -> Iterator[InputStatistics]:
    """Collect statistics of the inputs of ``weights`` while the context is open.

    Args:
        weights: Name -> linear or stack of experts.
        hessian: Also sum ``x xᵀ``: ``in * in`` float32 per distinct input, and per expert.
        experts: Experts whose inputs are collected; ``None``: all.

    Yields:
        The statistics; set their ``token_weights`` and ``encoder_weights`` before each batch. They
        stay readable after. Those of expert ``e`` of a stack go by `expert_name`.
    """
    statistics = InputStatistics(weights, hessian)
    handles: list[torch.utils.hooks.RemovableHandle] = []
    linears = [module for module in weights.values() if isinstance(module, nn.Linear)]
    stacks = {n: module for n, module in weights.items() if isinstance(module, ExpertStack)}
    try:
        handles.extend(module.register_forward_pre_hook(statistics.hook) for module in linears)
        for owner, names in watched_experts(stacks):
            hook = ExpertInputs(owner, names, statistics, experts)
            handles.append(owner.module.register_forward_hook(hook, with_kwargs=True))
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
        statistics.forget_inputs()
