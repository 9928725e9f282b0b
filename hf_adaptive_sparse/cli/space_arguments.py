"""The options of a search's space and budget, and the space made of them."""

from __future__ import annotations

import argparse
import math
from typing import Any

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.search.byte_sizes import parse_bytes
from hf_adaptive_sparse.search.loss_budgets import check_bound, kv_alone
from hf_adaptive_sparse.search.objectives import Goal
from hf_adaptive_sparse.search.space import FREE, SearchSpace
from hf_adaptive_sparse.search.space_rules import GRANULARITIES, KV_SPLITS


def widths(text: str) -> tuple[int, ...] | None:
    """Parse widths joined by commas.

    Raises:
        argparse.ArgumentTypeError: If it is neither ``none`` nor numbers joined by commas.
    """
    if text.strip().lower() == "none":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be widths joined by commas, such as 6,8, or none; got {text!r}"
        ) from None


def size(text: str) -> int:
    """Parse a size in bytes.

    Raises:
        argparse.ArgumentTypeError: If it is not a size.
    """
    try:
        return parse_bytes(text, "it")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def loss(text: str) -> float:
    """Parse a relative loss: ``0.5%`` or ``0.005``.

    Raises:
        argparse.ArgumentTypeError: If it is neither.
    """
    number = text.strip()
    percent = number.endswith("%")
    try:
        value = float(number.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(
            f"must be a percentage such as 0.5%, or a fraction below 1 such as 0.005; got {text!r}"
        )
    return value


def add_space(parser: argparse.ArgumentParser) -> None:
    """Add the options of a search's space and budget."""
    ratios = parser.add_argument_group("what shares a ratio, and in which range")
    ratios.add_argument(
        "--granularity",
        choices=GRANULARITIES,
        default="block",
        help="block of layers, layer, or the linears of one role (q, k, v, o, gate, up, down) in "
        "either (default: block)",
    )
    ratios.add_argument("--blocks", type=int, metavar="N", help="blocks of layers (default: 8)")
    ratios.add_argument(
        "--sparsity-range",
        type=float,
        metavar="RATIO",
        help="largest distance of a ratio from the target (default: 0.05)",
    )
    ratios.add_argument(
        "--sparsity-low", type=float, metavar="RATIO", help="lowest ratio, instead of a range"
    )
    ratios.add_argument("--sparsity-high", type=float, metavar="RATIO", help="highest ratio")
    bits = parser.add_argument_group("bits")
    bits.add_argument(
        "--kv-bits",
        type=widths,
        default=SearchSpace.kv_bits,
        metavar="BITS",
        help="widths of keys and values to search, such as 6,8; one width fixes them; "
        f"none leaves the cache alone (default: {','.join(map(str, SearchSpace.kv_bits or ()))})",
    )
    bits.add_argument(
        "--kv-mean-bits",
        type=float,
        metavar="BITS",
        help="mean of a free split of the KV bits, held exactly (default: an equal split)",
    )
    bits.add_argument(
        "--kv-split",
        choices=KV_SPLITS,
        help="every KV width to as many layers, or any to any (default: free with --kv-mean-bits "
        "or --fit, else equal)",
    )
    bits.add_argument(
        "--kv-apart", action="store_true", help="keys and values of a layer may differ in width"
    )
    bits.add_argument(
        "--search-weight-bits",
        type=widths,
        metavar="BITS",
        help="widths of the kept weights to search, such as 16,8,4, one per block, which takes a "
        "--search-weight-mean or a budget; one width fixes them (default: the model's dtype)",
    )
    bits.add_argument(
        "--search-weight-mean",
        type=float,
        metavar="BITS",
        help="mean of the searched weight bits, held exactly",
    )
    budget = parser.add_argument_group(
        "budget in bytes", "sizes such as 6GiB (powers of 1024), 4.5GB (powers of 1000), or bytes"
    )
    budget.add_argument(
        "--fit",
        type=size,
        metavar="SIZE",
        help="most memory for weights, in the sparse runtime, and KV cache together; the mean "
        "ratio is then free unless --target-sparsity is given",
    )
    budget.add_argument(
        "--context", type=int, metavar="N", help="tokens per sequence that --fit makes room for"
    )
    budget.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="sequences that --fit makes room for (default: 1)",
    )
    budget.add_argument(
        "--size", type=size, metavar="SIZE", help="most bytes of the weights' files on disk"
    )
    budget.add_argument(
        "--max-loss",
        type=loss,
        metavar="LOSS",
        help="the other way round: the smallest checkpoint whose perplexity on "
        "held-out data rises by this at most, such as 0.5%% (with --target-sparsity 0, and no "
        "weight bits to search: the fewest KV bits)",
    )


def space_of(options: argparse.Namespace, config: SparsityConfig, base: SearchSpace) -> SearchSpace:
    """Return the space that the options ask for.

    Args:
        options: Those of `add_space`, and ``target_sparsity``, ``None`` where it was not given.
        config: The config of the final prune; a pattern n:m leaves the ratios fixed.
        base: The defaults, from a preset.

    Raises:
        ValueError: If options contradict each other.
    """
    check_left_to_search(options, config)
    check_weight_widths(options)
    check_needed(options)
    budgets = (options.fit, options.size, options.max_loss)
    target: float | str | None = config.target_sparsity
    if config.pattern != "unstructured":
        target = None
    elif options.target_sparsity is None and any(budget is not None for budget in budgets):
        target = FREE
    check_ratios(options, config.pattern, target)
    limits: dict[str, Any] = {}
    if options.fit is not None:
        limits = {"context_length": options.context, "batch_size": options.batch}
    reach = options.sparsity_range
    space = SearchSpace(
        target_sparsity=target,
        sparsity_range=base.sparsity_range if reach is None else reach,
        step=base.step,
        blocks=base.blocks if options.blocks is None else options.blocks,
        granularity=options.granularity,
        sparsity_low=options.sparsity_low,
        sparsity_high=options.sparsity_high,
        kv_bits=options.kv_bits,
        kv_split=options.kv_split,
        kv_apart=options.kv_apart,
        kv_mean_bits=options.kv_mean_bits,
        weight_bits=options.search_weight_bits,
        weight_mean_bits=options.search_weight_mean,
        fit_bytes=options.fit,
        size_bytes=options.size,
        **limits,
    )
    if options.max_loss is not None:
        check_max_loss(options, space)
    return space


def check_needed(options: argparse.Namespace) -> None:
    """Refuse options that say nothing without another one.

    Raises:
        ValueError: If the other one is missing.
    """
    if options.fit is not None and options.context is None:
        raise ValueError(
            "--fit needs --context: the tokens per sequence whose KV cache has to fit beside the "
            "weights."
        )
    cached = {"--context": options.context is not None, "--batch": options.batch != 1}
    given = [option for option, is_given in cached.items() if is_given]
    if given and options.fit is None:
        raise ValueError(
            "--context and --batch size the KV cache that --fit counts, got "
            f"{' and '.join(given)} without --fit: give --fit, too."
        )


def check_left_to_search(options: argparse.Namespace, config: SparsityConfig) -> None:
    """Check that a pattern n:m, which fixes the ratios, leaves bits to search.

    Raises:
        ValueError: If nothing is left to search.
    """
    fixed = config.pattern != "unstructured"
    if fixed and options.kv_bits is None and options.search_weight_bits is None:
        raise ValueError(
            f"--pattern {config.pattern} fixes every ratio, which with --kv-bits none leaves "
            "nothing to search. Prune without a search (the command prune), or give KV bits, such "
            "as --kv-bits 6,8."
        )


def check_ratios(options: argparse.Namespace, pattern: str, target: float | str | None) -> None:
    """Refuse options of the ratios that others leave without effect.

    Raises:
        ValueError: If there are any.
    """
    if options.blocks is not None and not options.granularity.startswith("block"):
        raise ValueError(
            f"--blocks is for a granularity of blocks, got --blocks {options.blocks} and "
            f"--granularity {options.granularity}. Leave one of them out."
        )
    shaping = {
        "--sparsity-range": options.sparsity_range,
        "--sparsity-low": options.sparsity_low,
        "--sparsity-high": options.sparsity_high,
    }
    if options.search_weight_bits is None:
        shaping["--blocks"] = options.blocks
    given = [option for option, value in shaping.items() if value is not None]
    if given and target in (None, 0.0):
        fixed = "--target-sparsity 0" if target == 0.0 else f"--pattern {pattern}"
        raise ValueError(
            f"With {fixed} there are no ratios to search, got {' and '.join(given)}. Leave one of "
            "them out."
        )
    has_bounds = options.sparsity_low is not None and options.sparsity_high is not None
    if options.sparsity_range is not None and (has_bounds or target == FREE):
        raise ValueError(
            "--sparsity-range is the distance from --target-sparsity to those bounds that are not "
            f"given, got {options.sparsity_range:g} with "
            f"{'both bounds' if has_bounds else 'no target'}. Give --target-sparsity, or "
            "--sparsity-low and --sparsity-high alone."
        )


def check_weight_widths(options: argparse.Namespace) -> None:
    """Refuse weight bits to search without their mean, and the mean without the bits.

    Raises:
        ValueError: If one is given without the other.
    """
    palette, mean = options.search_weight_bits, options.search_weight_mean
    if palette is None and mean is not None:
        raise ValueError(
            f"--search-weight-mean {mean:g} needs the widths to search: give --search-weight-bits, "
            "too, such as 16,8,4."
        )
    budgets = (mean, options.fit, options.size, options.max_loss)
    if palette is not None and len(palette) > 1 and all(budget is None for budget in budgets):
        raise ValueError(
            f"--search-weight-bits {','.join(map(str, palette))} leaves the mean open. Give "
            "--search-weight-mean BITS, or a budget: --size, or --fit with --context."
        )


def check_max_loss(options: argparse.Namespace, space: SearchSpace) -> None:
    """Refuse what decides the size, or counts something else, beside ``--max-loss``.

    Raises:
        ValueError: If such an option is given.
    """
    check_bound(options.max_loss, space, Goal.parse(options.objective).to_json(), options.timeout)
    # The space cannot tell a split that was asked for from its default.
    if kv_alone(space) and options.kv_split == "equal":
        raise ValueError(
            "--max-loss finds the mean KV bits, --kv-split equal fixes it: leave one of them out."
        )
