"""How sensitive a classifier is to its input, at data and along paths between them."""

from pushforward.sensitivity.circle import great_circle
from pushforward.sensitivity.dimension import EffectiveDimension, effective_dimension
from pushforward.sensitivity.margins import Margin, margin
from pushforward.sensitivity.norms import jacobian_norm
from pushforward.sensitivity.plane import DecisionMap, decision_map
from pushforward.sensitivity.regions import linear_regions

__all__ = [
    "DecisionMap",
    "EffectiveDimension",
    "Margin",
    "decision_map",
    "effective_dimension",
    "great_circle",
    "jacobian_norm",
    "linear_regions",
    "margin",
]
