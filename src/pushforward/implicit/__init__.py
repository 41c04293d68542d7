"""Fixed points z = f(z): found, differentiated implicitly, and how stable they are."""

from pushforward.implicit.attach import Backward
from pushforward.implicit.fixed import ConvergenceWarning, FixedPoint, fixed_point
from pushforward.implicit.radius import spectral_radius

__all__ = ["Backward", "ConvergenceWarning", "FixedPoint", "fixed_point", "spectral_radius"]
