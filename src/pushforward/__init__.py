"""Everything people want of the Jacobian of a PyTorch network or function."""

from pushforward.errors import PushforwardError
from pushforward.jacobians import Jacobian, hessian, jacobian, plan
from pushforward.operators import LinearOperator, aslinearoperator
from pushforward.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "Jacobian",
    "LinearOperator",
    "Plan",
    "PushforwardError",
    "__version__",
    "aslinearoperator",
    "hessian",
    "jacobian",
    "plan",
]
