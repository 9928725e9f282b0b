"""The inputs of each expert: the tokens routed to it, and its activations after the gate.

The inputs of ``gate_up_proj`` are rows of what the experts' module is called with. Those of
``down_proj`` never leave the module, so they are computed again, one expert after the other, from
the module's own weights and gate. That this is what the module computes is checked on some tokens
of the first batch, by following them to the output; a module that computes something else is
refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_adaptive_sparse.experts import Experts, ExpertStack

if TYPE_CHECKING:
    from hf_adaptive_sparse.calibration.activations import InputStatistics

CHECKED_TOKENS = 16
"""Tokens of the first batch that are followed to the module's output."""

TOLERANCE = 0.1
"""Relative error of the outputs at most; 16-bit sums stay far below, another formula far above."""

_CHUNK_ELEMENTS = 1 << 24


def expert_name(name: str, expert: int) -> str:
    """Return the name of one expert's matrix in the stack called ``name``."""
    return f"{name}[{expert}]"


def watched_experts(
    stacks: Mapping[str, ExpertStack],
) -> Iterator[tuple[Experts, dict[str, str]]]:
    """Yield each module of experts once, with the stacks of it: parameter's key -> name."""
    modules: dict[int, tuple[Experts, dict[str, str]]] = {}
    for name, stack in stacks.items():
        experts = stack.experts
        modules.setdefault(id(experts.module), (experts, {}))[1][stack.key] = name
    yield from modules.values()


@dataclass(frozen=True)
class _Call:
    """What one forward of the experts was called with.

    Attributes:
        tokens: ``(tokens, in)``; of Llama 4, the blocks of all experts one after the other.
        chosen: ``(tokens, k)``: experts of each token.
        weights: ``(tokens, k)``: what their outputs are multiplied with.
        copies: How often each token of the batch is among the tokens.
    """

    tokens: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    copies: int = 1


class ExpertInputs:
    """Forward hook on a module of experts; see the module's docstring.

    Args:
        experts: The experts.
        names: Key of a parameter -> name of its stack; those that are not in it are not collected.
        statistics: Where the inputs are added.
        only: The experts whose inputs are added; ``None``: all.
    """

    def __init__(
        self,
        experts: Experts,
        names: Mapping[str, str],
        statistics: InputStatistics,
        only: Container[int] | None = None,
    ) -> None:
        self._experts, self._names, self._statistics = experts, names, statistics
        self._only = only
        self._signature = inspect.signature(experts.module.forward)
        self._checked = False

    @torch.no_grad()
    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Add the inputs of all experts of one forward.

        Raises:
            ValueError: If the module is called, or computes, in a way that is not known, or its
                weights are offloaded.
        """
        with _in_memory(module, self._experts.up):
            if getattr(module, self._experts.up).is_meta:
                raise self._refusal("its weights are not in memory")
            self._collect(args, kwargs, output)

    def _collect(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self._call(args, kwargs)
        if not self._checked and call.tokens.shape[0]:
            self._check(call, output)
            self._checked = True
        token_weights = self._statistics.row_weights(call.tokens, call.copies)
        for expert, tokens in self._sent(call):
            if self._only is not None and expert not in self._only:
                continue
            counts = None if token_weights is None else token_weights[tokens]
            if counts is not None:
                tokens, counts = tokens[counts > 0], counts[counts > 0]
            self._add(expert, call.tokens[tokens], counts)

    def _add(self, expert: int, inputs: torch.Tensor, counts: torch.Tensor | None) -> None:
        up, down = self._names.get(self._experts.up), self._names.get("down_proj")
        if up is not None:
            self._statistics.add(expert_name(up, expert), inputs, counts)
        if down is None:
            return
        widest = max(getattr(self._experts.module, self._experts.up).shape[1:])
        step = max(1, _CHUNK_ELEMENTS // widest)
        for start in range(0, inputs.shape[0], step):
            part = slice(start, start + step)
            hidden = self._experts.hidden(expert, inputs[part])
            self._statistics.add(
                expert_name(down, expert), hidden, None if counts is None else counts[part]
            )

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        given = list(self._signature.bind(*args, **kwargs).arguments.values())
        if not all(isinstance(value, torch.Tensor) for value in given):
            raise self._refusal("it is called with something else than tensors")
        tokens = given[0].detach().reshape(-1, given[0].shape[-1])
        if not self._experts.routed:
            return _blocks(tokens, self._experts.count)
        if len(given) != 3:
            raise self._refusal("it is called without the experts that were chosen")
        chosen, weights = given[1], given[2]
        if (
            chosen.is_floating_point()
            or chosen.ndim != 2
            or chosen.shape != weights.shape
            or chosen.shape[0] != tokens.shape[0]
        ):
            raise self._refusal(
                f"it is called with tokens {tuple(tokens.shape)}, experts {tuple(chosen.shape)} "
                f"and weights {tuple(weights.shape)}"
            )
        return _Call(tokens, chosen, weights)

    def _sent(self, call: _Call) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each expert that was chosen, with its tokens, in their order."""
        flat = call.chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        chosen, counts = torch.unique_consecutive(flat[order], return_counts=True)
        places = order.split(counts.tolist())
        for expert, place in zip(chosen.tolist(), places, strict=True):
            if 0 <= expert < self._experts.count:  # others stand for no expert at all
                yield expert, place // call.chosen.shape[1]

    def _check(self, call: _Call, output: Any) -> None:
        """Follow the first tokens to the output."""
        if not isinstance(output, torch.Tensor) or output.numel() != call.tokens.numel():
            raise self._refusal("its output is not one row per token")
        sent = (call.chosen >= 0).any(dim=1).nonzero().view(-1)[:CHECKED_TOKENS]
        few = _Call(call.tokens[sent], call.chosen[sent], call.weights[sent])
        found = output.detach().reshape(call.tokens.shape)[sent].float()
        expected = torch.zeros_like(found)
        for expert, tokens in self._sent(few):
            tokens = tokens.unique()  # one that chose an expert twice has both weights below
            hidden = self._experts.hidden(expert, few.tokens[tokens])
            weights = (few.weights * (few.chosen == expert)).sum(dim=1)[tokens]
            made = self._experts.output(expert, hidden).float()
            expected.index_add_(0, tokens, made * weights.float().unsqueeze(1))
        error = float((found - expected).norm())
        if error > TOLERANCE * float(found.norm()):
            raise self._refusal("its output differs from what its weights and gate compute")

    def _refusal(self, why: str) -> ValueError:
        name = next(iter(self._names.values())).rpartition(".")[0]
        return ValueError(
            f"The inputs of the experts {name!r} ({type(self._experts.module).__name__}) cannot be "
            f"collected: {why}. Use metric='magnitude', which needs no data, or leave them dense: "
            f"modules_to_not_convert=[{name!r}] or a glob such as '*.experts.*'."
        )


@contextmanager
def _in_memory(module: torch.nn.Module, key: str) -> Iterator[None]:
    """Bring weights back that `accelerate` took out of memory when the forward ended."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not getattr(module, key).is_meta:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _blocks(tokens: torch.Tensor, count: int) -> _Call:
    """Return blocks of tokens as tokens that each chose the expert of their block, or none."""
    block = torch.arange(count, device=tokens.device).repeat_interleave(tokens.shape[0] // count)
    chosen = block.masked_fill(~tokens.any(dim=1), -1).unsqueeze(1)
    return _Call(tokens, chosen, torch.ones_like(chosen, dtype=tokens.dtype), count)
