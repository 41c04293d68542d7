"""How strongly a classifier answers to a small change of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pushforward.boundary import Structure
from pushforward.derivatives import jacobian
from pushforward.errors import DifferentiationError, InputError, ShapeError
from pushforward.sensitivity.batches import budget, checked_batch, over_samples

QUANTITIES = ("probabilities", "logits")


def jacobian_norm(
    model: Callable[[Tensor], Any],
    x: Tensor,
    of: str = "probabilities",
    *,
    memory: int | None = None,
    progress: bool | None = None,
) -> Tensor:
    r"""The Frobenius norm of the input-output Jacobian at each sample, exact.

    .. math::
        \|J(x)\|_F = \Big(\sum_{i,j} \big(\partial p_i / \partial x_j\big)^2\Big)^{1/2},
        \quad p = \mathrm{softmax}(z)

    or the same of the logits z. Of the probabilities it goes with the generalisation gap of a
    classifier (Novak, Bahri, Abolafia, Pennington and Sohl-Dickstein, "Sensitivity and
    generalization in neural networks: an empirical study", ICLR 2018).

    Args:
        model: a module or function that gives logits, ``(B, C, ...)`` with the classes in dimension
            1. It is taken in the mode that it is in: call ``.eval()`` first, where that matters.
        x: a batch ``(B, *in)`` of independent samples.
        of: "probabilities": of the softmax of the output. "logits": of the output as it is, also
            where that is a pytree, or probabilities already.
        memory: a budget in bytes; samples and passes are taken in parts that fit.
        progress: whether to show a bar on standard error; None shows one on a terminal, where the
            work is long.

    Returns:
        ``(B,)``, in the dtype of ``x``. Differentiable with respect to ``x`` and all
        parameters; measure under ``torch.no_grad()``, which keeps no graph. Where J is zero the
        derivative is zero. A softmax that is saturated is taken in double precision and loses no
        digits: 1 - p keeps its own.

    Raises:
        InputError: ``of`` is unknown, ``x`` is not real floating point.
        ShapeError: no batch of samples, or no dimension of at least two classes.
        CouplingError: samples influence each other.
        DifferentiationError: an op without a derivative, or a Jacobian that is not finite.
        MemoryBudgetError: not even one sample fits in ``memory``.

    Cost: one Jacobian by the structure engine, at most C backward passes.

    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> x = torch.tensor([[1.0, 0.5]])
    >>> jacobian_norm(lambda x: x @ weight, x, of="logits")
    tensor([2.2361])
    >>> jacobian_norm(lambda x: x @ weight, x)  # p = (1/2, 1/2)
    tensor([0.7906])
    """
    checked_batch(x, "jacobian_norm")
    function = quantity(model, of)

    def norms(rows: slice) -> Tensor:
        J = jacobian(function, x[rows], batch_dim=0, memory=budget(memory))
        return finite(J.fro_norm()).to(x.dtype)

    found = over_samples(norms, len(x), "Jacobian norms", progress)
    return torch.cat(found) if found else x.new_zeros(0)


def finite(norms: Tensor) -> Tensor:
    """Refuse what is NaN or infinite."""
    bad = ~torch.isfinite(norms)
    if bad.any():
        raise DifferentiationError(
            f"expected finite Jacobians, got NaN or infinity at {int(bad.sum())} of {len(norms)} "
            "samples; look for an overflow or a division by zero in the model"
        )
    return norms


def quantity(model: Callable[[Tensor], Any], of: str) -> Callable[[Tensor], Any]:
    """The map whose Jacobian is asked for."""
    if of not in QUANTITIES:
        raise InputError(f'of expects "probabilities" or "logits", got {of!r}')
    if not callable(model):
        raise InputError(f"expected a model or function, got {type(model).__name__}")
    return model if of == "logits" else lambda x: probabilities(checked_logits(model(x)))


def checked_logits(logits: Any) -> Tensor:
    """Refuse an output that is not logits of at least two classes, (B, C, ...)."""
    if not isinstance(logits, Tensor):
        raise InputError(
            f"expected one tensor of logits (B, C, ...), got {_kind(logits)}; wrap the model in a "
            'function that returns them, or ask for of="logits", which takes any output'
        )
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ShapeError(
            f"expected logits (B, C, ...) of at least two classes, got {tuple(logits.shape)}; give "
            "a single logit z the rival 0, as torch.stack((0 * z, z), 1) does"
        )
    return logits


def _kind(output: Any) -> str:
    leaves = [leaf for leaf in Structure.of(output)[0] if isinstance(leaf, Tensor)]
    return f"{type(output).__name__} of {len(leaves)} tensors"


def probabilities(logits: Tensor) -> Tensor:
    r"""The softmax over dimension 1 in double precision, with derivatives exact where it saturates.

    The backward pass of softmax forms p_t (1 - p_t), which is all rounding once p_t is nearly 1.
    With d_j = z_j - z_t for the largest logit z_t and d_t = 0 a constant, nothing cancels:

    .. math::
        \log p_t = -\log(1 + \sum_{j \ne t} e^{d_j}), \quad p_j = e^{d_j} p_t
    """
    logits = logits.double()
    top = _first_largest(logits.detach())
    largest = logits.masked_fill(~top, 0.0).sum(1, keepdim=True)
    behind = (logits - largest).masked_fill(top, 0.0)
    others = behind.exp().masked_fill(top, 0.0).sum(1, keepdim=True)
    return (behind - others.log1p()).exp()


def _first_largest(logits: Tensor) -> Tensor:
    """A mask of one largest entry along dimension 1; of several that are equal, the first."""
    equal = logits == logits.amax(1, keepdim=True)
    return equal & (equal.cumsum(1) == 1)
