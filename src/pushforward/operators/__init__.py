"""Linear operators: matrices known by their products.

base.py           LinearOperator; sums, products, Gram operators, shifts
exchange.py       what scipy is given of an operator
conversions.py    operators out of matrices, scipy's operators and functions
"""

from pushforward.operators.base import LinearOperator
from pushforward.operators.conversions import aslinearoperator
from pushforward.operators.exchange import scipy_sparse

__all__ = ["LinearOperator", "aslinearoperator", "scipy_sparse"]
