"""What a cache knows of how its model attends, which may change while the cache is in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from transformers import PretrainedConfig

FLEX = "flex_attention"
"""The attention implementation that transformers compiles; what is compiled cannot decode views."""

_ATTRIBUTE = "_attn_implementation_internal"


class Attending:
    """How a model attends now. Copies follow the same model, a pickle keeps what it was then.

    Args:
        attributes: Those of the config that says how the model attends. (The config itself takes
            microseconds to answer, for each token.)
    """

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        self._attributes = attributes

    @classmethod
    def of(cls, config: PretrainedConfig) -> Self:
        """Return how a model with this config attends."""
        decoder: PretrainedConfig = config.get_text_config(decoder=True)
        # Of encoder-decoders with one config for both it is a copy, which would not follow the
        # model.
        is_its_own = decoder is config.get_text_config(decoder=True)
        return cls(vars(decoder if is_its_own else config))

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_attributes": {_ATTRIBUTE: self._attributes.get(_ATTRIBUTE)}}

    @property
    def takes_views(self) -> bool:
        """Whether the model can be handed views."""
        return self._attributes.get(_ATTRIBUTE) != FLEX
