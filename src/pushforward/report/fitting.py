"""Bringing a model and data together: mode, dtype, device, shape."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from pushforward.errors import LoadError
from pushforward.report.data import DataSet
from pushforward.report.randomness import seeded


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for the block; each of its modules gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    # Exported programs know one mode only, and say so when they are asked for another.
    with suppress(NotImplementedError):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def fitted(model: nn.Module, data: DataSet) -> DataSet:
    """``data`` in the model's dtype, on its device, and as vectors where only these go in.

    Raises:
        LoadError: where the model does not take the samples.
    """
    like = _floating_tensor(model)
    data = replace(data, x=data.x.to(device=like.device, dtype=like.dtype))
    complaint = _complaint(model, data.x)
    if complaint is None:
        return data
    if data.x.dim() > 2 and _complaint(model, data.flattened().x) is None:
        return data.flattened()
    vectors = f", nor as vectors of {data.x[0].numel()}" if data.x.dim() > 2 else ""
    raise LoadError(
        f"the model does not take the samples of {data.name}, shape {tuple(data.x.shape[1:])} "
        f"each{vectors}: {complaint}"
    )


def _floating_tensor(model: nn.Module) -> Tensor:
    """A parameter or buffer to take dtype and device from; a model may have none."""
    tensors = [*model.parameters(), *model.buffers()]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return floating[0] if floating else torch.empty(0)


def _complaint(model: nn.Module, x: Tensor) -> str | None:
    """What the model says against two of the samples, None if it takes them."""
    try:
        with evaluating(model), seeded(0), torch.no_grad():
            model(x[:2].clone())
    except Exception as error:  # the user's forward may raise anything
        return f"{type(error).__name__}: {error}"
    return None
