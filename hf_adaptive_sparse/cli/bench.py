"""The command ``bench``."""

from __future__ import annotations

import argparse

from hf_adaptive_sparse.cli.commands import Answer
from hf_adaptive_sparse.compressor import ModelSource, bench
from hf_adaptive_sparse.report import format_bytes, text_table

RUNTIMES = {"both": ("sparse", "dense"), "sparse": ("sparse",), "dense": ("dense",)}


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
        f"memory reaches {format_bytes(round(result.bytes_per_second))} per second here.\n"
        "Sparse: with the model's own KV profile. Dense: with DynamicCache."
    )
    return Answer(text, result.to_dict())
