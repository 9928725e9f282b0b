"""Tables, plots, study reports and model cards."""

from hf_adaptive_sparse.report.card import CardFacts, write_model_card
from hf_adaptive_sparse.report.plots import plot_profile
from hf_adaptive_sparse.report.study_facts import facts_of, read_study
from hf_adaptive_sparse.report.study_page import write_study_report
from hf_adaptive_sparse.report.study_plots import plot_history
from hf_adaptive_sparse.report.tables import (
    escape_markdown,
    format_bytes,
    markdown_table,
    text_table,
)

__all__ = [
    "CardFacts",
    "escape_markdown",
    "facts_of",
    "format_bytes",
    "markdown_table",
    "plot_history",
    "plot_profile",
    "read_study",
    "text_table",
    "write_model_card",
    "write_study_report",
]
