"""The samplers of a search, by name.

To add one, write a function with `@register_sampler` here, or pass an Optuna sampler to
``search(sampler=...)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Maker = Callable[[int], "BaseSampler"]
"""Takes a seed, returns a sampler. One is made for every trial: what it has to remember, it reads
from the study."""

DEFAULT_SAMPLER = "tpe"

_MAKERS: dict[str, Maker] = {}


def register_sampler(name: str) -> Callable[[Maker], Maker]:
    """Register a sampler under a name.

    Raises:
        ValueError: If the name is taken.
    """

    def register(make: Maker) -> Maker:
        if name in _MAKERS:
            raise ValueError(f"The sampler {name!r} is registered already.")
        _MAKERS[name] = make
        return make

    return register


def sampler_names() -> tuple[str, ...]:
    """Return the names of all samplers."""
    return tuple(_MAKERS)


def sampler_maker(name: str) -> Maker:
    """Return the function that makes the sampler of a name.

    Raises:
        ValueError: If there is none, or a package that it needs is not installed.
    """
    if name not in _MAKERS:
        raise ValueError(f"sampler must be one of {', '.join(_MAKERS)}, got {name!r}.")
    make = _MAKERS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(0)
    except ImportError as error:
        raise ValueError(
            f"The sampler {name!r} needs a package that is not installed ({error}): pip install "
            f"'hf-adaptive-sparse[samplers]', or choose another of {', '.join(_MAKERS)}."
        ) from error
    return make


def check_sampler(sampler: object) -> None:
    """Check that a sampler is the name of one or an Optuna sampler.

    Raises:
        ValueError: If it is not, or a package that it needs is not installed.
    """
    from optuna.samplers import BaseSampler

    if isinstance(sampler, str):
        sampler_maker(sampler)
    elif not isinstance(sampler, BaseSampler):
        raise ValueError(
            f"sampler must be one of {', '.join(_MAKERS)}, or an Optuna sampler, got {sampler!r}. "
            f"Leave it out for {DEFAULT_SAMPLER!r}."
        )


def as_sampler(sampler: BaseSampler | str, seed: int) -> BaseSampler:
    """Return an Optuna sampler: the one given, or the named one, seeded trial by trial."""
    if not isinstance(sampler, str):
        return sampler
    from hf_adaptive_sparse.search.per_trial_sampler import PerTrialSampler

    return PerTrialSampler(sampler_maker(sampler), seed)


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f"No module named {package!r}", name=package)


@register_sampler("tpe")
def _tpe(seed: int) -> BaseSampler:
    """Optuna's tree-structured Parzen estimator, with a joint density of all parameters.

    Optuna 5 takes that by default; the paper's releases took one density per parameter.
    """
    from optuna.samplers import TPESampler

    return TPESampler(seed=seed, multivariate=True, constant_liar=True)


@register_sampler("tpe-univariate")
def _tpe_univariate(seed: int) -> BaseSampler:
    """The same with one density per parameter, as in the paper."""
    from optuna.samplers import TPESampler

    return TPESampler(seed=seed, multivariate=False, constant_liar=True)


@register_sampler("evolution")
def _evolution(seed: int) -> BaseSampler:
    """Exchanges of levels between units, see `evolution`."""
    from hf_adaptive_sparse.search.evolution import EvolutionSampler

    return EvolutionSampler(seed)


@register_sampler("gp")
def _gp(seed: int) -> BaseSampler:
    """Optuna's Gaussian process; needs scipy."""
    from optuna.samplers import GPSampler

    _require("scipy")
    return GPSampler(seed=seed)


@register_sampler("cmaes")
def _cmaes(seed: int) -> BaseSampler:
    """Optuna's CMA-ES; needs cmaes."""
    from optuna.samplers import CmaEsSampler

    _require("cmaes")
    return CmaEsSampler(seed=seed, warn_independent_sampling=False)


@register_sampler("random")
def _random(seed: int) -> BaseSampler:
    """Independent draws: the baseline of all others."""
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)
