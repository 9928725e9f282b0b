"""Whose report a folder holds: each page names its study, so that no other one's is replaced."""

from __future__ import annotations

import hashlib
import json
import os
import re

from hf_adaptive_sparse.naming import expanded
from hf_adaptive_sparse.report.study_facts import StudyFacts
from hf_adaptive_sparse.staging import OutputError

PAGE = "report.html"

_MARK = re.compile(r'<meta name="study" content="([0-9a-f]+) ([^"]*)">')


def study_mark(facts: StudyFacts) -> str:
    """Return the tag that tells a study's page from those of others.

    It holds what stays the same as trials come in, and the uniform profile's value, if there is one
    yet: that depends on the weights and the data, too.
    """
    about = [facts.name, facts.space, facts.metric, facts.labels, facts.spans]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    uniform = "" if facts.uniform is None else repr(facts.uniform["value"])
    return f'<meta name="study" content="{digest} {uniform}">'


def check_report_folder(facts: StudyFacts, directory: str | os.PathLike[str]) -> None:
    """Check that a folder holds nothing, or a report of the same study.

    Raises:
        OutputError: If it holds something else.
    """
    folder = expanded(directory)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    page = folder / PAGE
    if page.is_file():
        text = page.read_text(encoding="utf-8", errors="replace")
        if _is_of(facts, text):
            return
        held = "the report of another study" if _MARK.search(text) else "a page that names no study"
    else:
        held = "something else"
    raise OutputError(
        f"The folder of a report must be empty or hold one of the same study, {folder} holds "
        f"{held}. Choose another folder with --output, or pass --overwrite to replace files of the "
        "same names there."
    )


def _is_of(facts: StudyFacts, page: str) -> bool:
    """Return whether a page is of the study, or may be: of a study's first trials less is known."""
    found, own = _MARK.search(page), _MARK.search(study_mark(facts))
    if found is None or own is None or found[1] != own[1]:
        return False
    return not found[2] or not own[2] or found[2] == own[2]
