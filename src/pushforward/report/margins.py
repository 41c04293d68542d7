"""How far a decision is from another one: in logits and, to first order, in the input."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Margins:
    """Per sample, (B,): the class that wins, the class that is nearest, margin and radius.

    ``margin`` is the top logit minus the second. ``radius`` is the Euclidean distance at which the
    linearised logits tie first, min_j (z_c - z_j) / ||grad(z_c - z_j)||, and ``rival`` the j of
    that minimum; it is infinite where no other class can win to first order.
    """

    prediction: Tensor
    rival: Tensor
    margin: Tensor
    radius: Tensor


def margins(logits: Tensor, matrix: Tensor) -> Margins:
    """Margins of logits (B, C) with Jacobians (B, C, n)."""
    logits = logits.double()
    top = logits.topk(2, dim=1)
    radius, rival = distances(logits, matrix).min(dim=1)
    return Margins(top.indices[:, 0], rival, top.values[:, 0] - top.values[:, 1], radius)


def distances(logits: Tensor, matrix: Tensor) -> Tensor:
    """First-order distance to each class, (B, C), infinite for the class that wins."""
    winner = logits.argmax(dim=1, keepdim=True)
    lead = logits.gather(1, winner) - logits
    slopes = torch.stack(
        [
            # In double: squares of small derivatives would vanish.
            torch.linalg.vector_norm(rows - rows[best], dim=1, dtype=torch.float64)
            for rows, best in zip(matrix, winner.squeeze(1).tolist(), strict=True)
        ]
    )
    # A tie is at distance 0 whatever the slope; a slope of 0 never closes a lead.
    far = torch.where(lead > 0, lead / slopes, torch.zeros_like(lead))
    return far.scatter(1, winner, torch.inf)
