"""Everything people want of the Jacobian of a PyTorch network or function."""

from pushforward.errors import PushforwardError

__version__ = "0.1.0"

__all__ = ["PushforwardError", "__version__"]
