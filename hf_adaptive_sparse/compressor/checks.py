"""Whether what a job is asked for can be had together; checked before any work is done."""

from __future__ import annotations

from dataclasses import replace

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor.sources import ModelSource
from hf_adaptive_sparse.hub import push_token
from hf_adaptive_sparse.search.loss_budgets import kv_alone
from hf_adaptive_sparse.search.space import SearchSpace


def on_cpu(model: ModelSource) -> ModelSource:
    """Return the model as a job reads it that leaves the weights in their files.

    Raises:
        ValueError: If it is to be on another device.
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
    """Check what can be checked of a push without asking the Hub.

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
    """Check that what is searched, what is pruned in the end, and how, belong together.

    Raises:
        ValueError: If they do not; the message says what to change.
    """
    if space.prunes and not space.is_free and space.target != config.target_sparsity:
        raise ValueError(
            f"The config and the space must have one target_sparsity, got "
            f"{config.target_sparsity} and {space.target}."
        )
    if space.weight_bits is not None and config.weight_group_size is not None:
        raise ValueError(
            "Searched weight bits have groups of their own (a row at 8 bits, 64 columns at 4), got "
            f"weight_group_size={config.weight_group_size}. Leave it out, or give weight_bits in "
            "the config instead of searching them."
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
