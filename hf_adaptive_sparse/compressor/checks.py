"""Checks that a job's options are compatible, made before any work is done."""

from __future__ import annotations

from dataclasses import replace

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.hub import push_token
from hf_adaptive_sparse.packing.weight_codes import default_group_size
from hf_adaptive_sparse.search.loss_budgets import kv_alone
from hf_adaptive_sparse.search.space import SearchSpace


def on_cpu(model: ModelSource) -> ModelSource:
    """Return the model on the CPU, where an offloaded job leaves the weights in their files.

    Raises:
        ValueError: If a ``device_map`` places it elsewhere.
    """
    if model.device_map is not None:
        raise ValueError(
            "Offloading leaves the weights on disk and computes on the CPU, got device_map="
            f"{model.device_map!r}. Give one of them (--offload or --device-map)."
        )
    return replace(model, device_map="cpu")


def check_offloadable(max_loss: float | None) -> None:
    """Check that a job can leave the weights in their files.

    Raises:
        ValueError: If it needs them in memory.
    """
    if max_loss is not None:
        raise ValueError(
            f"max_loss={max_loss} prunes for each size that it tries, which needs the model in "
            "memory: leave out offload, or give a budget (target_sparsity, size_bytes) instead."
        )


def check_pushed(push_to_hub: str | None, private: bool) -> None:
    """Check the options of a push as far as that is possible without the Hub.

    Raises:
        ValueError: If the repo id is invalid, or nothing is pushed that could be private.
        HubError: If there is no token, or offline mode is on.
    """
    if push_to_hub is not None:
        push_token(push_to_hub)
    elif private:
        raise ValueError(
            "private is about the repo that is pushed to, got no push_to_hub. Give the repo "
            "(--push-to-hub REPO), or leave it out."
        )


def check_goal(
    config: SparsityConfig, space: SearchSpace, max_loss: float | None, workers: int
) -> None:
    """Check that config, space and workers fit each other.

    Raises:
        ValueError: If they do not.
    """
    if space.prunes and not space.is_free and space.target != config.target_sparsity:
        raise ValueError(
            f"The config and the space must have one target_sparsity, got "
            f"{config.target_sparsity} and {space.target}."
        )
    stored_otherwise = config.quantises_weights or config.weight_group_size is not None
    if space.weight_bits is not None and stored_otherwise:
        raise ValueError(
            "Searched weight bits replace those of the config and have groups of their own (a row "
            f"at 8 bits, {default_group_size(4)} columns at 4), got weight_bits="
            f"{config.weight_bits!r} and weight_group_size={config.weight_group_size} beside "
            f"widths to search, {space.weight_bits}. Give the one or the other (--weight-bits or "
            "--search-weight-bits)."
        )
    if space.size_bytes is not None or (max_loss is not None and not kv_alone(space)):
        if config.checkpoint_format == "dense":
            raise ValueError(
                "A budget in bytes on disk needs checkpoint_format='bitmask', got 'dense', which "
                "stores the removed weights, too. Change one of them."
            )
        if config.quantises_weights:
            raise ValueError(
                f"A budget in bytes on disk counts the weight bits of the space, got weight_bits="
                f"{config.weight_bits!r} in the config. Search them instead "
                "(SearchSpace(weight_bits=...), --search-weight-bits), one width being enough; "
                "leave out 12, whose bytes are not known beforehand."
            )
    if workers != 1 and not space.searches and max_loss is None:
        raise ValueError(
            f"There is nothing to search, so workers must be 1, got {workers}. Leave it out."
        )
