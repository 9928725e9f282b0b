"""The commands ``inspect`` and ``push``."""

from __future__ import annotations

import argparse
from typing import Any

from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.options import add_command
from hf_adaptive_sparse.hub import inspect, push_folder


def add_inspect(commands: Any) -> None:
    """Add ``inspect``."""
    parser = add_command(
        commands,
        "inspect",
        run_inspect,
        "Show how a checkpoint is compressed, without downloading its weights",
    )
    parser.add_argument("model", metavar="REPO", help="Hub repo or local folder")
    parser.add_argument("--revision", help="branch, tag or commit")


def run_inspect(options: argparse.Namespace) -> Answer:
    """Describe a checkpoint from its config and headers."""
    found = inspect(options.model, revision=options.revision)
    return Answer(str(found), found.to_dict())


def add_push(commands: Any) -> None:
    """Add ``push``."""
    parser = add_command(commands, "push", run_push, "Push a compressed model's folder to the Hub")
    parser.add_argument("folder", metavar="DIR", help="folder that compress or prune wrote")
    parser.add_argument("repo", metavar="REPO", help="Hub repo, such as me/my-model")
    parser.add_argument("--private", action="store_true", help="make the repo private")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--message", help="commit message")


def run_push(options: argparse.Namespace) -> Answer:
    """Push a folder."""
    url = push_folder(
        options.folder,
        options.repo,
        private=options.private,
        revision=options.revision,
        commit_message=options.message,
    )
    text = f"Pushed: {url}"
    if not url.is_new:
        text = f"Nothing to push: {options.repo} already holds this folder."
    return Answer(text, {"commit_url": url, "pushed": url.is_new})
