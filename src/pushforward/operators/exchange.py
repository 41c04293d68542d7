"""What scipy is given of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import InputError, MissingDependencyError


def scipy_operator(operator: Any) -> Any:
    """A ``scipy.sparse.linalg.LinearOperator`` with the same products, on numpy arrays."""
    sparse = scipy_sparse()
    if operator.batch is not None:
        raise InputError(
            f"to_scipy expects one operator, got a batch of {operator.batch}; scipy has no batches"
        )

    def product(multiply: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
        def apply(block: Any) -> Any:
            tensor = torch.as_tensor(block, dtype=operator.dtype, device=operator.device)
            columns = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor
            product = multiply(columns).detach().cpu()
            return product.reshape(len(product), *tensor.shape[1:]).numpy()

        return apply

    push, pull = product(operator.push), product(operator.pull)
    return sparse.linalg.LinearOperator(
        operator.shape,
        matvec=push,
        rmatvec=pull,
        matmat=push,
        rmatmat=pull,
        dtype=torch.empty(0, dtype=operator.dtype).numpy().dtype,
    )


def scipy_sparse() -> Any:
    """Import ``scipy.sparse`` with ``linalg``, or say how to get it."""
    try:
        import scipy.sparse
        import scipy.sparse.linalg
    except ImportError as error:
        raise MissingDependencyError(
            "expected scipy for this conversion, but it is not installed; pip install scipy"
        ) from error
    return scipy.sparse
