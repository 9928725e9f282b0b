"""The command ``report``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.options import add_command
from hf_adaptive_sparse.report import read_study, write_study_report
from hf_adaptive_sparse.report.study_analysis import failure_signs
from hf_adaptive_sparse.report.study_mark import check_report_folder


def add_report(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "report", run_report, "Write a search's report: one HTML page, and its plots"
    )
    parser.add_argument(
        "source",
        type=os.path.expanduser,
        metavar="STUDY",
        help="folder that search or compress wrote, journal or SQLite file, or storage URL",
    )
    parser.add_argument(
        "--study", metavar="NAME", help="study in the storage (default: the only one there)"
    )
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="DIR",
        default="report",
        help="folder to write; a former report of the same study there is replaced (default: "
        "report)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into DIR whatever it holds, and replace files of the same names",
    )


def run_report(options: argparse.Namespace) -> Answer:
    """Write a study's report."""
    facts = read_study(options.source, options.study)
    if not options.overwrite:
        check_report_folder(facts, options.output)
    page = write_study_report(facts, options.output)
    best = None if facts.best is None else facts.best["value"]
    signs = failure_signs(facts)
    data = {
        "page": str(page),
        "study_name": facts.name,
        "trials": len(facts.rows),
        "objective": list(facts.labels),
        "best_value": best,
        "uniform_value": None if facts.uniform is None else facts.uniform["value"],
        "held_out": None if facts.held_out is None else dict(facts.held_out),
        "warnings": signs,
    }
    return Answer("\n".join([f"Report: {page}", *signs]), data)
