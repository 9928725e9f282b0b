"""Where decoder layers are while a model is pruned: all in memory, or each for its turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext


class LayerResidence(ABC):
    """Brings layers into memory, and takes them when they are pruned."""

    @abstractmethod
    def resident(self, index: int) -> AbstractContextManager[None]:
        """Hold the weights of a layer in memory while the context is open."""

    @abstractmethod
    def keep(
        self, index: int, removed: Mapping[str, int], without_data: Mapping[str, Sequence[int]]
    ) -> None:
        """Store a resident layer, which is pruned now.

        Args:
            index: The layer.
            removed: Name of a weight -> weights that went.
            without_data: Name of a stack of experts -> those that were pruned without data; of a
                linear that was -> none.
        """


class _Everywhere(LayerResidence):
    def resident(self, index: int) -> AbstractContextManager[None]:
        return nullcontext()

    def keep(
        self, index: int, removed: Mapping[str, int], without_data: Mapping[str, Sequence[int]]
    ) -> None:
        """Nothing to do: the model holds it."""


EVERYWHERE = _Everywhere()
"""All layers are in memory all the time."""
