"""One table of rules, filled family by family."""

from pushforward.structure.rules import (
    contraction,
    losses,
    movement,
    normalisation,
    pointwise,
    reductions,
    scattering,
    sorting,
    windows,
)
from pushforward.structure.rules.registry import RULES, Call, rule

FAMILIES = (
    contraction,
    losses,
    movement,
    normalisation,
    pointwise,
    reductions,
    scattering,
    sorting,
    windows,
)

__all__ = ["FAMILIES", "RULES", "Call", "rule"]
