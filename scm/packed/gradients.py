"""The gradients of many trials as rows: which are finite, and each clipped by its own norm."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteProbe:
    """Tells which rows of matrices of one width are finite, in one pass over them.

    A mean with weights below 1/width cannot overflow, and is finite only if every term is.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._weights = torch.full((width,), 0.5 / width, dtype=dtype, device=device)

    def means(self, rows: Tensor) -> Tensor:
        """Return one number a row, finite exactly where the row is."""
        return torch.mv(rows, self._weights)


def clip_rows(gradients: Tensor, limits: Tensor) -> None:
    """Scale each row in place so that its norm is at most its limit, (rows,) float64; inf does not clip.

    As `scm.gradients.clip_by_norm` does it for one trial; never over several.
    """
    norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
    factors = torch.where(torch.isinf(limits), 1.0, (limits / (norms + 1e-12)).clamp(max=1.0))
    gradients.mul_(factors.to(gradients.dtype)[:, None])
