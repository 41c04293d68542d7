"""Singular values of a product of two factors, without the product.

J = A B with A of shape (m, w) and B of shape (w, n), w less than both m and n. With A = Q_A R_A and
B^T = Q_B R_B the w x w core R_A R_B^T has the singular values of J; the others of J are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pushforward.linalg import upcast

# QR differentiates through the inverse of R: beyond this condition too many digits are lost.
_REGULAR = 1e-4


def core(tall: Tensor, wide: Tensor) -> Tensor | None:
    """The core of a product: (..., m, w) and (..., w, n) to (..., w, w), in double precision.

    None where entries are not finite, or derivatives are wanted that QR cannot give, since the
    columns of a factor are nearly dependent: the product itself has them.

    Cost: two QR, O((m + n) w^2).
    """
    left, right = upcast(tall), upcast(wide).mT
    if not bool(left.isfinite().all() and right.isfinite().all()):
        return None
    tracked = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    one, other = (torch.linalg.qr(part, "reduced" if tracked else "r").R for part in (left, right))
    if tracked and not (_is_regular(one) and _is_regular(other)):
        return None
    return one @ other.mT


def _is_regular(triangle: Tensor) -> bool:
    """Whether no singular value is small beside the largest."""
    values = torch.linalg.svdvals(triangle.detach())
    return bool((values[..., -1] > _REGULAR * values[..., 0]).all())
