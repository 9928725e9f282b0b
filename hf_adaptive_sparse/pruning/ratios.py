"""From a target, names and globs to one ratio per prunable weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from hf_adaptive_sparse.architecture import (
    check_no_adapters,
    prunable_weights,
    spread_by_name,
)
from hf_adaptive_sparse.profiles import check_ratio
from hf_adaptive_sparse.pruning.patterns import Pattern, parse_pattern


def resolve_ratios(
    model: nn.Module,
    target_sparsity: float,
    sparsity: Mapping[str, float] | None = None,
    modules_to_not_convert: Iterable[str] | None = None,
    pattern: str | Pattern = "unstructured",
) -> dict[str, float]:
    """Return the ratio of every prunable linear and stack of experts.

    Without ``sparsity`` every linear takes ``target_sparsity``. With it, ``sparsity`` alone
    decides, by the precedence of `spread_by_name`, and a linear that nothing names stays dense
    (ratio 0). The mean that results is whatever the entries give; it is not stretched to
    ``target_sparsity``.

    Args:
        model: The model.
        target_sparsity: Uniform ratio, used where ``sparsity`` is ``None``.
        sparsity: Module name, name of a containing module, or glob -> ratio.
        modules_to_not_convert: Names or globs left out altogether: neither pruned nor counted.
        pattern: ``"unstructured"``, or ``"n:m"``, which admits only the ratio ``1 - n/m`` and 0.

    Returns:
        Runtime module name -> ratio, in layer order, for every prunable linear not left out.

    Raises:
        ValueError: If a ratio is invalid or against the pattern, a name or glob matches nothing, or
            the model has adapters.
    """
    check_no_adapters(model)
    parsed = parse_pattern(pattern)
    weights = prunable_weights(model, modules_to_not_convert)
    if sparsity is None:
        ratio = parsed.check(target_sparsity, "target_sparsity")
        return dict.fromkeys(weights, ratio)
    check_ratio(target_sparsity, "target_sparsity")
    ratios = {key: parsed.check(ratio, f"sparsity of {key!r}") for key, ratio in sparsity.items()}
    return spread_by_name(ratios, weights, 0.0, "sparsity")
