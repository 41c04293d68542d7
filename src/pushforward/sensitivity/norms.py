"""How strongly a classifier answers to a small change of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pushforward import linalg
from pushforward.boundary import Structure
from pushforward.derivatives import jacobian
from pushforward.errors import (
    DifferentiationError,
    InputError,
    MemoryBudgetError,
    ShapeError,
)
from pushforward.jacobians import Jacobian
from pushforward.sensitivity.batches import budget, checked_batch, over_samples

QUANTITIES = ("probabilities", "logits")
# Of a Jacobian in double precision, alive at once: the logits', its product, the result.
COPIES = 4
# A logit of minus infinity, which rules a class out, as a number.
LEAST = -1e300


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
        \|J(x)\|_F = \sqrt{\sum_{i,j} (\partial p_i / \partial x_j)^2},
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
        derivative is zero. A softmax that is saturated loses no digits: 1 - p keeps its own.

    Raises:
        InputError: ``of`` is unknown, ``x`` is not real floating point.
        ShapeError: no batch of samples, or no dimension of at least two classes.
        CouplingError: samples influence each other.
        DifferentiationError: an op without a derivative, or a Jacobian that is not finite.
        MemoryBudgetError: not even one sample fits in ``memory``.

    Cost: one Jacobian of the logits by the structure engine, at most C backward passes.

    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> x = torch.tensor([[1.0, 0.5]])
    >>> jacobian_norm(lambda x: x @ weight, x, of="logits")
    tensor([2.2361])
    >>> jacobian_norm(lambda x: x @ weight, x)  # p = (1/2, 1/2)
    tensor([0.7906])
    """
    checked_batch(x, "jacobian_norm")
    check_request(model, of)
    room = budget(memory)

    def norms(rows: slice) -> Tensor:
        J = jacobian(model, x[rows], batch_dim=0, memory=room)
        return norm_of(J, of, room).to(x.dtype)

    found = over_samples(norms, len(x), "Jacobian norms", progress)
    return torch.cat(found) if found else x.new_zeros(0)


def check_request(model: Any, of: str) -> None:
    """Refuse what is no function, and quantities that there are not."""
    if of not in QUANTITIES:
        raise InputError(f'of expects "probabilities" or "logits", got {of!r}')
    if not callable(model):
        raise InputError(f"expected a model or function, got {type(model).__name__}")


def norm_of(J: Jacobian, of: str, room: int | None) -> Tensor:
    """||J||_F of the logits or of their softmax, (B,)."""
    if of == "logits":
        return finite(J.fro_norm())
    logits = checked_logits(J.value)
    if logits.dim() == 2 and room is not None and _takes(J) > room:
        _require_room(logits, room)
        return finite(_norm_by_strips(J, logits, room))
    return finite(linalg.fro_norm(_of_probabilities(J, logits).flatten(1, -2)))


def matrix_of(J: Jacobian, of: str) -> Tensor:
    """The Jacobian of the logits or of their softmax, (B, m, n)."""
    if of == "logits":
        return J.matrix()
    return _of_probabilities(J, checked_logits(J.value)).flatten(1, -2)


def _takes(J: Jacobian) -> int:
    """The bytes of all that stands beside the Jacobian, that of softmax among it."""
    m, n = J.shape
    return COPIES * 8 * (J.batch or 1) * m * max(m, n)


def _require_room(logits: Tensor, room: int) -> None:
    """For the Jacobians of softmax, which are squares."""
    needed = COPIES * 8 * logits.numel() * logits.shape[1]
    if needed > room:
        raise MemoryBudgetError(
            f"memory={room} bytes expects room for the Jacobian of softmax over {logits.shape[1]} "
            f'classes, got {needed} bytes; raise it, or ask for of="logits"'
        )


def _of_probabilities(J: Jacobian, logits: Tensor) -> Tensor:
    """(B, R, C, n) in double precision, for logits (B, C) or (B, C, *R)."""
    scales, directions = softmax_jacobian(logits.unsqueeze(-1).flatten(2))
    rows = J.matrix().unflatten(1, (logits.shape[1], -1)).movedim(1, 2)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return scales.unsqueeze(-1) * (directions.to(dtype) @ rows.to(dtype)).double()


def _norm_by_strips(J: Jacobian, logits: Tensor, room: int) -> Tensor:
    """The same without all entries at once: the rows of some probabilities at a time."""
    scales, directions = (part.squeeze(1) for part in softmax_jacobian(logits.unsqueeze(-1)))
    some = max(1, room * J.shape[0] // _takes(J))

    def norm(columns: Tensor, scale: Tensor) -> Tensor:
        return linalg.fro_norm(J.pull(columns.mT.to(J.dtype)).double() * scale.unsqueeze(1))

    strips = zip(directions.split(some, 1), scales.split(some, 1), strict=True)
    return linalg.fro_norm(torch.stack([norm(*strip) for strip in strips], -1).unsqueeze(1))


def finite(norms: Tensor) -> Tensor:
    """Refuse what is NaN or infinite."""
    bad = ~torch.isfinite(norms)
    if bad.any():
        raise DifferentiationError(
            f"expected finite Jacobians, got NaN or infinity at {int(bad.sum())} of {len(norms)} "
            "samples; look for an overflow or a division by zero in the model"
        )
    return norms


def checked_logits(logits: Any) -> Tensor:
    """Refuse an output that is not logits of at least two classes, (B, C, ...)."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
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
    if isinstance(output, Tensor):
        return str(output.dtype)
    leaves = [leaf for leaf in Structure.of(output)[0] if isinstance(leaf, Tensor)]
    return f"{type(output).__name__} of {len(leaves)} tensors"


def softmax_jacobian(logits: Tensor) -> tuple[Tensor, Tensor]:
    r"""The Jacobian of softmax, row by row as a scale and a direction of size one.

    Its rows are :math:`p_i (e_i - p)`. Where p_t is nearly 1, p_t (e_t - p) is all rounding, and
    squares of the others vanish. With :math:`d_j = z_j - z_t \le 0` and the sum s of
    :math:`e^{d_j}` over j other than t nothing cancels:

    .. math::
        p_t = \frac{1}{1 + s}, \quad p_j = e^{d_j} p_t, \quad
        p_t (e_t - p) = s p_t^2 (e_t - q), \quad q_j = e^{d_j} / s

    Returns:
        Of logits (B, C, R) scales (B, R, C) and directions (B, R, C, C), in double precision.
    """
    z = logits.double().movedim(1, -1)
    top = _first_largest(z.detach())
    largest = z.masked_fill(~top, 0.0).sum(-1, keepdim=True)
    behind = (z - largest).clamp_min(LEAST).masked_fill(top, 0.0)
    others = behind.exp().masked_fill(top, 0.0).sum(-1, keepdim=True)
    shares = (behind - others.log1p()).exp()
    rivals = behind.masked_fill(top, -torch.inf).softmax(-1)
    means = torch.where(top.unsqueeze(-1), rivals.unsqueeze(-2), shares.unsqueeze(-2))
    units = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return torch.where(top, others * shares.square(), shares), units - means


def _first_largest(logits: Tensor) -> Tensor:
    """A mask of the largest entry along the last dimension, the first of several."""
    equal = logits == logits.amax(-1, keepdim=True)
    return equal & (equal.cumsum(-1) == 1)
