"""How far a decision is from another one, in double precision."""

from torch import Tensor

from pushforward.sensitivity.margins import Margin as Margins
from pushforward.sensitivity.margins import margins as margins_of


def margins(logits: Tensor, matrix: Tensor) -> Margins:
    """Margins of logits (B, C) with Jacobians (B, C, n); see `pushforward.sensitivity.margin`."""
    return margins_of(logits.double(), matrix)
