"""Every error that the library raises on purpose.

    PushforwardError
    ├── InputError (ValueError)            an argument that cannot be worked with
    │   ├── ShapeError                     a tensor of the wrong shape
    │   └── DimensionError                 a map between spaces of the wrong dimensions
    ├── CouplingError                      samples of a batch influence each other
    ├── DifferentiationError               a map that cannot be differentiated rightly
    ├── GraphError                         tensors that no autograd graph connects
    ├── PlanError                          a plan that does not hold for these arguments
    ├── MemoryBudgetError                  a result that does not fit in ``memory=``
    ├── ConvergenceError                   an iteration that did not reach its tolerance
    ├── LogDetError                        a log-determinant that is not the true one
    ├── NotAvailableError                  something that this version does not do
    ├── MissingDependencyError (ImportError)   an optional package that is not installed
    └── LoadError                          a model, a data set or a plan that cannot be loaded

Each message says what was expected, what came, and what to do.
"""


class PushforwardError(Exception):
    """Base of every error that the library raises on purpose."""


class InputError(PushforwardError, ValueError):
    """An argument that cannot be worked with."""


class ShapeError(InputError):
    """A tensor of the wrong shape."""


class DimensionError(InputError):
    """A map between spaces of the wrong dimensions."""


class CouplingError(PushforwardError):
    """Samples of a batch influence each other, so that no Jacobian per sample exists."""


class DifferentiationError(PushforwardError):
    """A map that cannot be differentiated rightly."""


class GraphError(PushforwardError):
    """Tensors that no autograd graph connects."""


class PlanError(PushforwardError):
    """A plan that does not hold for these arguments."""


class MemoryBudgetError(PushforwardError):
    """A result that does not fit in the budget given as ``memory=``."""


class ConvergenceError(PushforwardError):
    """An iteration that did not reach its tolerance."""


class LogDetError(PushforwardError):
    """A hand-written log-determinant that is not the true one."""


class NotAvailableError(PushforwardError):
    """Something that this version does not do."""


class MissingDependencyError(PushforwardError, ImportError):
    """An optional package that is not installed."""


class LoadError(PushforwardError):
    """A model, a data set or a plan that cannot be loaded."""
