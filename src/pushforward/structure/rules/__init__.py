"""One table of rules, filled family by family."""

from pushforward.structure.rules import (
    algebra,
    contraction,
    correlation,
    fourier,
    losses,
    movement,
    normalisation,
    pointwise,
    pooling,
    reductions,
    resampling,
    returning,
    scattering,
    sorting,
    windows,
)
from pushforward.structure.rules.registry import RULES, Call, rule

FAMILIES = (
    algebra,
    contraction,
    correlation,
    fourier,
    losses,
    movement,
    normalisation,
    pointwise,
    pooling,
    reductions,
    resampling,
    returning,
    scattering,
    sorting,
    windows,
)

__all__ = ["FAMILIES", "RULES", "Call", "rule"]
