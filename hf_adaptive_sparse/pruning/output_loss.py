"""How much a linear's outputs change with its weight, over all calibration tokens.

``Σ ‖(W − W')x‖² = tr((W − W') H (W − W')ᵀ)`` with the Hessian ``H = Σ x xᵀ``: every update of the
kept weights lowers this loss, and linears that read the same tensor share one. Memory: ``H`` takes
``in_features²`` float32, and each of the two factorisations, made when first asked for, as much
again.
"""

from __future__ import annotations

import torch

from hf_adaptive_sparse.pruning.sparsegpt import DAMPING, fill_dead_, inverse_factor

_EIGEN_FLOOR = 1e-8


class OutputLoss:
    """The loss of the linears that share one Hessian.

    Attributes:
        dead: ``(in,)``, bool: features that were zero in all calibration data.
    """

    def __init__(self, hessian: torch.Tensor, damping: float = DAMPING) -> None:
        """Take over a Hessian.

        Args:
            hessian: ``(in, in)``, float32, symmetric, positive semi-definite. Overwritten.
            damping: Multiple of its mean diagonal that is added to the diagonal.
        """
        self.dead = hessian.diagonal() == 0
        self._hessian: torch.Tensor | None = hessian
        self._damping = damping
        self._damped = False
        self._factor: torch.Tensor | None = None
        self._spectrum: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def hessian(self) -> torch.Tensor:
        """Return the damped Hessian ``(in, in)``, float32; of dead features see `fill_dead_`.

        Raises:
            ValueError: If it was given up for its factor.
        """
        if self._hessian is None:
            raise ValueError("The Hessian was overwritten by its factor; ask for it before that.")
        if not self._damped:
            self._damped = True
            fill_dead_(self._hessian)
            diagonal = self._hessian.diagonal()
            diagonal.add_(self._damping * float(diagonal.mean(dtype=torch.float64)))
        return self._hessian

    def inverse_factor(self, keep_hessian: bool) -> torch.Tensor:
        """Return ``U`` ``(in, in)``, float32, upper triangular with ``UᵀU = H⁻¹`` (damped).

        Args:
            keep_hessian: False gives the Hessian's memory up for the factor.

        Raises:
            ValueError: If the Hessian cannot be factorised.
        """
        if self._factor is None:
            if self._hessian is None:
                raise ValueError("The Hessian was given up before it was factorised.")
            # The factorisation damps by itself, more where that does not suffice.
            damping = 0.0 if self._damped else self._damping
            work = self._hessian.clone() if keep_hessian else self._hessian
            self._factor, _ = inverse_factor(work, damping)
            if not keep_hessian:
                self._hessian = None
        return self._factor

    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the eigenvalues and eigenvectors of the Hessian scaled to a diagonal of ones.

        Returns:
            ``scale`` ``(in,)``, the inverse roots of the damped diagonal; eigenvalues ``(in,)``,
            positive, ascending; eigenvectors ``(in, in)`` in columns; all float32.
        """
        if self._spectrum is None:
            hessian = self.hessian()
            scale = hessian.diagonal().rsqrt()
            scaled = hessian * scale.unsqueeze(1) * scale
            values, vectors = torch.linalg.eigh(scaled)
            floor = _EIGEN_FLOOR * float(values[-1])
            self._spectrum = scale, values.clamp_min(floor), vectors
        return self._spectrum

    def of(self, change: torch.Tensor) -> float:
        """Return the loss of a change ``(out, in)`` of the weight, damping included."""
        change = change.to(torch.float32)
        return float(((change @ self.hessian()) * change).sum(dtype=torch.float64))
