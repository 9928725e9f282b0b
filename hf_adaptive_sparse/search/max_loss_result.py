"""The result of a search for the smallest budget within a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_adaptive_sparse.search.increase import CONFIDENCE, Increase
from hf_adaptive_sparse.search.loss_budgets import budget_text
from hf_adaptive_sparse.search.result import SearchResult


@dataclass(frozen=True)
class WithinLoss:
    """What was found.

    Attributes:
        search: The search at the smallest budget that holds.
        budget: That budget.
        unit: ``"mean KV bits"`` or ``"bytes on disk"``.
        max_loss: The bound that was asked for.
        held_out: The increase of the perplexity on the held-out data. Its ``high`` holds with
            `CONFIDENCE`, however many budgets were looked at.
        windows: Held-out windows it was measured on.
        tried: Budget -> increase on the evaluation data, in the order tried.
        indistinct: Per pair of KV widths that no difference could be measured between: the wider,
            which was left out, and the narrower.
    """

    search: SearchResult = field(repr=False)
    budget: float
    unit: str
    max_loss: float
    held_out: Increase
    windows: int
    tried: Mapping[float, float]
    indistinct: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        lines = [
            f"No difference could be measured between {wide} and {narrow} KV bits: {narrow} taken."
            for wide, narrow in self.indistinct
        ]
        lines.append(
            f"Smallest found within {self.max_loss:.4%}: {budget_text(self.budget, self.unit)}. "
            f"Perplexity on {self.windows} held-out windows {self.held_out.mean:+.3%}, below "
            f"{self.held_out.high:+.3%} at {CONFIDENCE:.0%} confidence."
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "max_loss": self.max_loss,
            "budget": self.budget,
            "unit": self.unit,
            "study_name": self.search.study.study_name,
            "held_out": {
                "increase": self.held_out.mean,
                "at_most": self.held_out.high,
                "confidence": CONFIDENCE,
                "windows": self.windows,
            },
            # A budget whose every trial failed has no figure.
            "tried": [
                {"budget": budget, "increase": value if math.isfinite(value) else None}
                for budget, value in self.tried.items()
            ],
            "indistinct_kv_bits": [list(pair) for pair in self.indistinct],
        }
