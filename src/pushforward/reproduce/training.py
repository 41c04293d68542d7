"""Small networks, their training, and what is measured on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 1000  # images that are evaluated at a time
USUAL = 4000  # images that the steps of the papers' settings are meant for
MOST = 5  # times as many steps, where there are more
Loss = Callable[[Tensor, Tensor], Tensor]


def mlp(
    sizes: Iterable[int], dropout: float = 0.0, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Flattened pixels through linear layers with activations, and dropout, between them."""
    steps: list[nn.Module] = [nn.Flatten()]
    for place, (wide, narrow) in enumerate(pairwise(sizes)):
        if place:
            steps += [activation(), *([nn.Dropout(dropout)] if dropout else [])]
        steps.append(nn.Linear(wide, narrow))
    return nn.Sequential(*steps)


def batches(size: int, batch: int, steps: int) -> Iterator[Tensor]:
    """Rows for ``steps`` steps, shuffled anew whenever all were seen."""
    order, place = torch.randperm(size), 0
    for _ in range(steps):
        if place >= size:
            order, place = torch.randperm(size), 0
        yield order[place : place + batch]
        place += batch


def minimise(
    loss: Loss,
    parameters: Iterable[nn.Parameter],
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    longest: float = math.inf,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Stochastic gradient descent on ``loss(x, y)`` of batches, its rate falling as a cosine.

    Gradients of a norm over ``longest`` are scaled down to it.
    """
    parameters = list(parameters)
    optimiser = torch.optim.SGD(parameters, rate, momentum=momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    for rows in batches(len(x), batch, steps):
        optimiser.zero_grad()
        loss(x[rows], y[rows]).backward()
        if longest < math.inf:
            nn.utils.clip_grad_norm_(parameters, longest)
        optimiser.step()
        schedule.step()
        advance()


def steps_for(steps: int, size: int) -> int:
    """More steps where there are more than the usual 4000 images, up to five times as many."""
    return round(steps * min(MOST, max(1, size / USUAL)))


# --- measurements -------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """What the model gives for all of ``x``, in evaluation mode, without a graph."""
    model.eval()
    return torch.cat([model(part) for part in x.split(CHUNK)])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percentage of ``x`` that the model puts into the classes ``y``."""
    return 100 * (outputs(model, x).argmax(1) == y).double().mean().item()


def noisy_accuracy(model: nn.Module, x: Tensor, y: Tensor, sigma: float) -> float:
    """Percentage of right classes under Gaussian noise on each pixel."""
    return accuracy(model, x + sigma * torch.randn_like(x), y)


def attacked_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int = 20
) -> float:
    """Percentage of right classes after projected gradient descent; see `attack`."""
    if radius == 0:
        return accuracy(model, x, y)
    return accuracy(model, attack(model, x, y, radius, steps), y)


def attack(model: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int) -> Tensor:
    """Images in [0, 1] within ``radius`` of ``x`` in each pixel that raise the cross entropy.

    Projected gradient descent from a random start, steps of 2.5 radius / steps along the sign of
    the gradient (Madry et al., ICLR 2018).
    """
    model.eval()
    moved = (x + radius * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(moved), y, reduction="sum"), moved)
        moved = moved.detach() + 2.5 * radius / steps * slope.sign()
        moved = torch.minimum(torch.maximum(moved, x - radius), x + radius).clamp(0, 1)
    return moved


def finite_mean(values: Tensor) -> float:
    """The mean as a float; NaN for no values at all."""
    return values.double().mean().item() if values.numel() else math.nan


def ticking(progress: Callable[[float, float], None], total: int) -> Callable[[], None]:
    """A function that counts its calls and tells ``progress`` of them and of ``total``."""
    calls = iter(range(1, total + 1))
    return lambda: progress(next(calls, total), total)


def few_of_each(y: Tensor, count: int) -> Tensor:
    """Rows of ``count`` random examples of each class, fewer where a class has fewer."""
    groups = [(y == each).nonzero().flatten() for each in y.unique()]
    return torch.cat([rows[torch.randperm(len(rows))[:count]] for rows in groups])


@contextmanager
def same_draws() -> Iterator[None]:
    """Leave torch's generator at the end of the block where it stood at its beginning.

    Networks trained in such blocks, one after the other, begin with the same weights.
    """
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
