"""The command ``bench``."""

from __future__ import annotations

import argparse
from typing import Any

from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.options import add_command
from hf_adaptive_sparse.compressor import ModelSource, bench
from hf_adaptive_sparse.compressor.benching import PROMPT_TOKENS
from hf_adaptive_sparse.report import format_bytes, text_table

RUNTIMES = {"both": ("sparse", "dense"), "sparse": ("sparse",), "dense": ("dense",)}


def add_bench(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "bench",
        run_bench,
        "Measure a model on this machine: bytes, load time, tokens per second, memory bandwidth",
    )
    parser.add_argument("model", metavar="MODEL", help="Hub repo or local folder")
    parser.add_argument("--dense", metavar="MODEL", help="the dense model, to measure beside it")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--dtype", default="auto", help="dtype to load in (default: as stored)")
    parser.add_argument("--device-map", help="as in transformers, for example auto")
    parser.add_argument(
        "--runtime",
        choices=("sparse", "dense", "both"),
        default="both",
        help="runtime of a compressed model (default: both, one after the other)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help=f"tokens of the prompt (default: {PROMPT_TOKENS}, or fewer where the context has no "
        "room for them)",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=32, metavar="N", help="tokens to decode (default: 32)"
    )


def run_bench(options: argparse.Namespace) -> Answer:
    """Measure a model, dense against compressed, each in a process of its own."""
    result = bench(
        ModelSource(options.model, options.revision, options.dtype, options.device_map),
        None
        if options.dense is None
        else ModelSource(options.dense, None, options.dtype, options.device_map),
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        runtimes=RUNTIMES[options.runtime],
    )
    text = (
        f"{text_table(result.table_rows())}\n\n"
        f"Prompt of {result.prompt_tokens} tokens, {result.new_tokens} decoded. A plain read of "
        f"memory reaches {format_bytes(round(result.bytes_per_second))} per second here."
    )
    if any(row.decode_tokens_per_second is None for row in result.rows):
        text += (
            f"\nNo decode speed where {result.new_tokens} tokens took less time than the "
            "measurement varies by: raise --new-tokens."
        )
    return Answer(text, result.to_dict())
