"""Everything people want of the Jacobian of a PyTorch network or function.

Exact where it can be, cheap because it chooses its passes, honest where it estimates.
"""

from pushforward import autograd, linalg
from pushforward.differential import divergence, laplacian
from pushforward.errors import PushforwardError
from pushforward.jacobians import Jacobian, hessian, jacobian, plan
from pushforward.operators import LinearOperator, aslinearoperator
from pushforward.planning import Plan

__version__ = "0.1.0"

__all__ = [
    "Jacobian",
    "LinearOperator",
    "Plan",
    "PushforwardError",
    "__version__",
    "aslinearoperator",
    "autograd",
    "divergence",
    "hessian",
    "jacobian",
    "laplacian",
    "linalg",
    "plan",
]
