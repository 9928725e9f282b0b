"""The command ``prune``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from hf_adaptive_sparse.cli.answer import Answer
from hf_adaptive_sparse.cli.inputs import calibration_of, config_of, kv_config, model_of
from hf_adaptive_sparse.cli.options import (
    CALIBRATED,
    OWN_PROFILE,
    add_command,
    add_final_prune,
    add_kv_bits,
    add_offload,
    add_output,
)
from hf_adaptive_sparse.compressor import prune_to_folder
from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.report import format_bytes


def add_prune(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "prune", run_prune, "Prune at uniform ratios, or by a profile, and save"
    )
    for add in (add_output, *CALIBRATED, add_final_prune, add_offload):
        add(parser)
    parser.add_argument(
        "--profile",
        type=os.path.expanduser,
        metavar="FILE",
        help="profile.json of a search, instead of uniform ratios",
    )
    parser.add_argument(
        "--sparsity",
        action="append",
        default=[],
        metavar="GLOB=RATIO",
        help="ratio of the modules that match; may be repeated; other modules stay dense",
    )
    add_kv_bits(parser, "the profile's, else the cache is left alone")


def run_prune(options: argparse.Namespace) -> Answer:
    """Prune at uniform ratios, by globs, or by a profile, and save."""
    sparsity = sparsity_globs(options.sparsity)
    kv_cache, weight_bits, target = None, None, None
    if options.profile is not None:
        if sparsity is not None:
            raise ValueError("Give --profile or --sparsity, not both.")
        profile = CompressionProfile.load(options.profile)
        sparsity = None if profile.sparsity is None else dict(profile.sparsity.ratios)
        kv_cache, weight_bits = profile.kv_cache, profile.weight_bits
        if sparsity is None and options.pattern == "unstructured":
            target = 0.0  # a profile without ratios leaves the weights in
    if options.kv_bits != OWN_PROFILE:
        kv_cache = kv_config(options.kv_bits, kv_cache)
    if sparsity is not None and options.target_sparsity is not None:
        raise ValueError(
            "The ratios of --profile or --sparsity fix their own mean, got --target-sparsity "
            f"{options.target_sparsity}, too. Leave it out."
        )
    config = config_of(
        options,
        sparsity=sparsity,
        kv_cache=kv_cache,
        weight_bits=weight_bits,
        target_sparsity=target,
    )
    result = prune_to_folder(
        model_of(options),
        options.output,
        config,
        calibration=calibration_of(options),
        seed=options.seed,
        offload=options.offload,
        overwrite=options.overwrite,
        progress=not options.no_progress,
    )
    text = (
        f"Removed {result.report.mean_sparsity:.4%} of the decoder's weights "
        f"({len(result.report.modules)} linears, {config.method}).\n"
        f"Weights on disk: {format_bytes(result.weight_bytes)}, dense "
        f"{format_bytes(result.dense_bytes)}.\nSaved to {result.output}"
    )
    return Answer(text, result.to_dict())


def sparsity_globs(pairs: list[str]) -> dict[str, float] | None:
    """Parse ``GLOB=RATIO`` pairs.

    Raises:
        ValueError: If a pair is not of that form.
    """
    ratios = {}
    for pair in pairs:
        glob, separator, ratio = pair.rpartition("=")
        try:
            ratios[glob] = float(ratio)
        except ValueError:
            separator = ""
        if not separator or not glob:
            raise ValueError(f"--sparsity must be GLOB=RATIO, such as '*.mlp.*=0.6', got {pair!r}.")
    return ratios or None
