"""Parts of ``lognorm`` put together one by one, for `open_questions.py`; no metrics of the package.

Each is ``f(|W|) · ‖X_j‖^e``. From ``wanda`` (f the identity, e = 1) to ``lognorm``
(``f = log(1 + |W|/‖W_i,:‖ + |W|/‖W_:,j‖)``, e = 1/2) one part changes at a time. Scores compare
within each row, so that dividing by a row's norm alone changes no mask; with the logarithm around
it or a column's share beside it, it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_adaptive_sparse.pruning.metrics import METRICS, ScoringMetric, register_metric

Parts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From |W| (out, in) over the norms of its rows (out, 1) and columns (in,) to f(|W|)."""


def _log(share: torch.Tensor) -> torch.Tensor:
    return torch.log(1 + share)


VARIANTS: dict[str, tuple[Parts, float]] = {
    "wanda, exponent 1/2": (lambda w, row, column: w, 0.5),
    "column norm, exponent 1/2": (lambda w, row, column: w / column, 0.5),
    "column norm, exponent 1": (lambda w, row, column: w / column, 1.0),
    "row + column norm, exponent 1/2": (lambda w, row, column: w / row + w / column, 0.5),
    "log of row norm, exponent 1/2": (lambda w, row, column: _log(w / row), 0.5),
    "log of column norm, exponent 1/2": (lambda w, row, column: _log(w / column), 0.5),
    "lognorm, exponent 1": (lambda w, row, column: _log(w / row + w / column), 1.0),
    "lognorm, exponent 1/4": (lambda w, row, column: _log(w / row + w / column), 0.25),
}
"""Name -> f and the exponent of the input norm."""


def register_variants() -> list[str]:
    """Register the variants as metrics of this process, and return their names."""
    for name, (parts, exponent) in VARIANTS.items():
        if name not in METRICS:
            register_metric(_variant(name, parts, exponent))
    return list(VARIANTS)


def _variant(name: str, parts: Parts, exponent: float) -> type[ScoringMetric]:
    def score(self: Any, weight: torch.Tensor, input_norm: torch.Tensor | None) -> torch.Tensor:
        if input_norm is None:
            raise ValueError(f"Metric {name!r} needs the norms of the inputs.")
        magnitudes = weight.detach().to(torch.float32).abs()
        row, column = (
            torch.linalg.vector_norm(magnitudes, dim=dim, keepdim=keep).clamp_min(1e-30)
            for dim, keep in ((1, True), (0, False))
        )
        return parts(magnitudes, row, column) * input_norm.pow(exponent)

    return type("Variant", (ScoringMetric,), {"name": name, "score": score})
