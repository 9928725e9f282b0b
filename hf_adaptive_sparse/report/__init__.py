"""What people read: tables, plots and the model card."""

from hf_adaptive_sparse.report.card import CardFacts, write_model_card
from hf_adaptive_sparse.report.plots import plot_profile, plot_search_history
from hf_adaptive_sparse.report.tables import (
    escape_markdown,
    format_bytes,
    markdown_table,
    text_table,
)

__all__ = [
    "CardFacts",
    "escape_markdown",
    "format_bytes",
    "markdown_table",
    "plot_profile",
    "plot_search_history",
    "text_table",
    "write_model_card",
]
