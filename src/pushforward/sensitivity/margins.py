"""How far a decision is from another one: in logits and, to first order, in the input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.derivatives import jacobian
from pushforward.errors import InputError, ShapeError
from pushforward.sensitivity.batches import budget, checked_batch, joined, over_samples
from pushforward.sensitivity.norms import checked_logits, finite

# For the norm of a perturbation that of the gradients which it is set against.
DUAL = {1: math.inf, 2: 2.0, math.inf: 1.0}
# Of the Jacobian of a part, alive at once: itself, its differences.
COPIES = 2


@dataclass(frozen=True, eq=False)
class Margin:
    """What `margin` returns, per sample; every tensor is ``(B,)``.

    Attributes:
        prediction: the class of the largest logit.
        rival: the class j at which ``radius`` is attained.
        margin: z_c - max over j != c of z_j, where c is the label, or else the prediction.
        radius: the first-order distance in the input at which class j ties with class c.
    """

    prediction: Tensor
    rival: Tensor
    margin: Tensor
    radius: Tensor


def margin(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor | None = None,
    *,
    ord: float = 2,
    memory: int | None = None,
    progress: bool | None = None,
) -> Margin:
    r"""The logit margin of each sample, and how far away its decision changes to first order.

    .. math::
        \min_{j \ne c} z_c - z_j, \qquad
        \min_{j \ne c} \frac{z_c - z_j}{\|\nabla_x (z_c - z_j)\|_q}

    The second is the distance, in the norm dual to q, at which the linearised logits tie: one step
    of DeepFool (Moosavi-Dezfooli, Fawzi and Frossard, "DeepFool: a simple and accurate method to
    fool deep neural networks", CVPR 2016).

    Args:
        model: a module or function that gives logits ``(B, C)``, in the mode that it is in.
        x: a batch ``(B, *in)`` of independent samples.
        y: their classes c, ``(B,)``, integer; the predictions if None. A sample that is
            classified wrongly has a negative margin and radius.
        ord: the norm in which the radius is measured: 1, 2 or ``math.inf``.
        memory, progress: as in `jacobian_norm`.

    Returns:
        `Margin`. ``margin`` and ``radius`` are differentiable with respect to ``x`` and all
        parameters. A rival that comes no nearer to first order is infinitely far; a tie is at
        distance 0.

    Raises:
        InputError: ``x``, ``y`` or ``ord`` is none of the above.
        ShapeError: no logits ``(B, C)`` of at least two classes, or another number of labels.
        PushforwardError: for the reasons that `jacobian_norm` has.

    Cost: one Jacobian of the logits, held whole for some samples at a time.

    >>> found = margin(lambda x: x, torch.tensor([[3.0, 1.0]]))
    >>> found.margin, found.radius
    (tensor([2.]), tensor([1.4142]))
    """
    checked_batch(x, "margin")
    _check_labels(y, x)
    if ord not in DUAL:
        raise InputError(f"ord expects 1, 2 or math.inf, got {ord!r}")
    room = budget(memory)

    def measured(rows: slice) -> Margin:
        J = jacobian(model, x[rows], batch_dim=0, memory=room and room // COPIES)
        logits = _flat_logits(J.value)
        return margins(logits, J.matrix(), None if y is None else y[rows], DUAL[ord])

    found = over_samples(measured, len(x), "Margins", progress)
    return joined(found) if found else margins(x.new_zeros(0, 2), x.new_zeros(0, 2, 1))


def margins(
    logits: Tensor, matrix: Tensor, labels: Tensor | None = None, dual: float = 2.0
) -> Margin:
    """Margins of logits (B, C) with Jacobians (B, C, n)."""
    prediction = logits.argmax(1)
    own = (prediction if labels is None else labels.to(logits.device).long()).unsqueeze(1)
    _check_classes(own, logits)
    lead = logits.gather(1, own) - logits
    rivals = lead.scatter(1, own, math.inf)
    differences = matrix - matrix.gather(1, own.unsqueeze(2).expand(-1, -1, matrix.shape[2]))
    # In double: squares of small derivatives would vanish.
    slopes = finite(torch.linalg.vector_norm(differences, ord=dual, dim=2, dtype=torch.float64))
    nearest = _distances(rivals.double(), slopes).min(1)
    return Margin(prediction, nearest.indices, rivals.amin(1), nearest.values.to(logits.dtype))


def _distances(lead: Tensor, slopes: Tensor) -> Tensor:
    """Leads over slopes: a tie is at distance 0, and a slope of 0 never closes a lead."""
    flat = slopes == 0
    far = torch.where(lead == 0, 0.0, lead.detach().sign() * math.inf)
    return torch.where(flat | (lead == 0) | lead.isinf(), far, lead / slopes.masked_fill(flat, 1.0))


def _flat_logits(output: Any) -> Tensor:
    logits = checked_logits(output)
    if logits.dim() != 2:
        raise ShapeError(
            f"margin expects one decision per sample, logits (B, C), got {tuple(logits.shape)}; "
            "choose one position, or move the positions into the batch"
        )
    return logits


def _check_labels(labels: Tensor | None, x: Tensor) -> None:
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        came = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"y expects an integer tensor of classes (B,), got {came}")
    if tuple(labels.shape) != (len(x),):
        raise ShapeError(
            f"y expects one class for each sample, ({len(x)},), got {tuple(labels.shape)}"
        )


def _check_classes(own: Tensor, logits: Tensor) -> None:
    classes = logits.shape[1]
    if bool(((own < 0) | (own >= classes)).any()):
        raise InputError(
            f"y expects classes from 0 to {classes - 1}, got {int(own.min())} to {int(own.max())}"
        )
