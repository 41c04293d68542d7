"""Everything people want of the Jacobian of a PyTorch network or function.

Exact where it can be, cheap because it chooses its passes, honest where it estimates.
"""

from pushforward import autograd, callbacks, errors, implicit, linalg, regularizers, sensitivity
from pushforward.density import AutoTransform, Pushforward, logdetcheck, value_and_logabsdet
from pushforward.derivatives import hessian, jacobian, plan
from pushforward.differential import divergence, laplacian
from pushforward.errors import PushforwardError
from pushforward.estimate import Estimate
from pushforward.jacobians import Jacobian
from pushforward.loading import load_plan
from pushforward.noise import noise_response
from pushforward.operators import LinearOperator, aslinearoperator
from pushforward.path import PathBound, path_bound
from pushforward.pattern import Pattern
from pushforward.plans import Plan

__version__ = "0.1.0"

__all__ = [
    "AutoTransform",
    "Estimate",
    "Jacobian",
    "LinearOperator",
    "PathBound",
    "Pattern",
    "Plan",
    "Pushforward",
    "PushforwardError",
    "__version__",
    "aslinearoperator",
    "autograd",
    "callbacks",
    "divergence",
    "errors",
    "hessian",
    "implicit",
    "jacobian",
    "laplacian",
    "linalg",
    "load_plan",
    "logdetcheck",
    "noise_response",
    "path_bound",
    "plan",
    "regularizers",
    "sensitivity",
    "value_and_logabsdet",
]
