"""Consecutive windows of tokens from lines of text.

The convention that makes perplexities comparable: lines joined by newlines, tokenised as one text
without special tokens, cut into consecutive windows, the rest dropped. So that a few windows of a
large corpus cost little, only a prefix of it is tokenised, as one text, and its last tokens are
not used: those before them are the tokens that the whole text gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_adaptive_sparse.architecture import context_length
from hf_adaptive_sparse.calibration.conversation_texts import line_of_conversation
from hf_adaptive_sparse.calibration.records import TEXT, DataError, Records, Row

DEFAULT_LENGTH = 2048
"""Tokens per window, where the model's context is not shorter."""

CHARACTERS_PER_TOKEN = 6
"""First guess of how much text gives enough tokens; more is read where it was too low."""

SEAM_TOKENS = 64
"""Tokens at the end of a prefix that the text after it might change."""


def window_length(sequence_length: int | None, config: PretrainedConfig) -> int:
    """Return the tokens per window.

    Args:
        sequence_length: Tokens asked for; ``None``: ``min(2048, the model's context)``.
        config: The model's config.

    Raises:
        ValueError: If it is below 2 or above the model's context.
    """
    context = context_length(config)
    length = min(DEFAULT_LENGTH, context) if sequence_length is None else sequence_length
    if isinstance(length, bool) or not 2 <= length <= context:
        raise ValueError(
            f"sequence_length must be between 2 and the model's context of {context} tokens, got "
            f"{length!r}."
        )
    return length


def read_windows(
    records: Records,
    processor: Any,
    *,
    length: int,
    count: int | None,
    left_out: Sequence[int] = (),
) -> list[torch.Tensor]:
    """Return the first windows of a text.

    Args:
        records: Records of kind ``"text"``. A row is a line; one newline at its end is its own.
            A conversation is one in its chat template.
        processor: Processor or tokenizer.
        length: Tokens per window.
        count: Windows at most; ``None`` for all.
        left_out: Ids that stand for features of images, videos or sounds. Text that spells one
            out ("<image>") would ask the model for an image, so these tokens are left out.

    Returns:
        Windows of shape (length,), int64.

    Raises:
        DataError: If the text does not fill one window.
    """
    lines = (_line_of(processor, row).removesuffix("\n").removesuffix("\r") for row in records)
    text: list[str] = []
    wanted = None if count is None else count * length
    target = None if wanted is None else CHARACTERS_PER_TOKEN * wanted
    while True:
        ended = _take(lines, text, target)
        ids = encode(processor, "\n".join(text), left_out)
        if ended or wanted is None or target is None:
            break
        ids = ids[: max(0, len(ids) - SEAM_TOKENS)]
        if len(ids) >= wanted:
            break
        target *= 2
    full = len(ids) // length
    if full == 0:
        raise DataError(
            f"At least one window of {length} tokens is needed; {records.name} gives {len(ids)} "
            "tokens. Use more text or a shorter sequence_length."
        )
    return list(ids[: (full if count is None else min(count, full)) * length].split(length))


def _line_of(processor: Any, row: Row) -> str:
    """Return the text of a row, which may be a conversation."""
    return str(row[TEXT]) if TEXT in row else line_of_conversation(processor, row)


def _take(lines: Iterator[str], text: list[str], target: int | None) -> bool:
    """Add lines to ``text`` until it has ``target`` characters; return whether they ran out."""
    size = sum(len(line) + 1 for line in text)
    while target is None or size < target:
        line = next(lines, None)
        if line is None:
            return True
        text.append(line)
        size += len(line) + 1
    return False


def encode(processor: Any, text: str, left_out: Sequence[int] = ()) -> torch.Tensor:
    """Tokenise a text without special tokens, and leave out the given ids.

    Returns:
        Ids of shape (tokens,), int64.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    # verbose=False: a corpus is longer than the context, and is cut afterwards.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)
    return tokens[~torch.isin(tokens, torch.tensor(left_out, dtype=torch.int64))]
