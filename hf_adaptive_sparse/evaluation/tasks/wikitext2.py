"""WikiText-2 perplexity: consecutive windows of the test split, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import media_token_ids
from hf_adaptive_sparse.calibration.records import TEXT, Records, Table, text_rows
from hf_adaptive_sparse.calibration.text_windows import read_windows, window_length
from hf_adaptive_sparse.errors import NonFiniteError
from hf_adaptive_sparse.evaluation.perplexity import negative_log_likelihood
from hf_adaptive_sparse.evaluation.scoring import perplexity_of
from hf_adaptive_sparse.evaluation.tasks.task import (
    Figures,
    Item,
    Outcome,
    Setting,
    Task,
    mean_figures,
    register_task,
)


@register_task
class WikiText2(Task):
    """Perplexity of a text, by the convention of `text_windows`; see `perplexity`."""

    name = "wikitext2"
    metric = "perplexity"
    default_data = "Salesforce/wikitext:wikitext-2-raw-v1:test"
    columns: ClassVar[tuple[str, ...]] = (TEXT,)

    def items(
        self, table: Table, processor: Any, model: PreTrainedModel, setting: Setting
    ) -> Iterator[Item]:
        """Yield the windows, each (tokens,) int64."""
        records = Records(table.name, "text", lambda: text_rows(table))
        windows = read_windows(
            records,
            processor,
            length=window_length(setting.sequence_length, model.config),
            count=None,
            left_out=media_token_ids(model.config),
        )
        for index, window in enumerate(windows):
            yield Item(str(index), window)

    def evaluate(
        self, model: PreTrainedModel, processor: Any, items: Sequence[Item], setting: Setting
    ) -> list[Outcome]:
        """Score each window; ``nll`` in nats, summed over ``tokens``.

        Raises:
            NonFiniteError: If a loss is NaN or infinite.
        """
        outcomes = []
        for item in items:
            # One at a time: a window fills the device, and each is to have a loss of its own.
            ids = item.content.unsqueeze(0)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            nll, tokens = negative_log_likelihood(model, batch, setting.kv_cache)
            if not math.isfinite(nll):
                raise NonFiniteError(
                    f"The loss must be finite; window {item.key} gives {nll}: the model computes "
                    "NaN or infinite logits."
                )
            outcomes.append({"nll": nll, "tokens": tokens})
        return outcomes

    def figures(self, outcomes: Sequence[Outcome]) -> Figures:
        """Return ``exp(sum of nll / sum of tokens)``; its error by the delta method."""
        tokens = sum(outcome["tokens"] for outcome in outcomes)
        value = perplexity_of(sum(outcome["nll"] for outcome in outcomes) / tokens)
        error = mean_figures([o["nll"] / o["tokens"] for o in outcomes]).standard_error
        return Figures(value, None if error is None else error * value, {"tokens": tokens})
