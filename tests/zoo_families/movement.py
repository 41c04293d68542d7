"""Maps that move entries, sum them up in order, or transform them in an order: triangular ones."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo_families.case import Problem, block_diagonal, case, module, positions, randn

MOVEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "reshape": lambda x: x.reshape(len(x), 2, 2),
    "transpose": lambda x: x.mT,
    "permute": lambda x: x.reshape(3, 2, 2).permute(2, 0, 1),
    "slice": lambda x: x[:, 1:3],
    "index": lambda x: x[:, [2, 0, 0]],
    "gather": lambda x: x.gather(1, torch.tensor([[3, 0]]).expand(len(x), 2)),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "expand": lambda x: x[:, None].expand(3, 2, 4),
    "stack": lambda x: torch.stack([x, x.flip(-1)], dim=1),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "sort": lambda x: x.sort(-1).values,
}
_MEETING = {"transpose", "permute"}


def _movement(name: str) -> Callable[[], Problem]:
    f, x = MOVEMENTS[name], randn(3, 4)
    move = f if name != "sort" else lambda index: index.gather(1, x.argsort(-1))
    return lambda: Problem(
        f,
        (x.clone(),),
        jacobian=lambda: positions(move, (3, 4)),
        pattern=lambda: positions(move, (3, 4)).numpy().astype(bool),
    )


for _name in MOVEMENTS:
    case(_name, *([] if _name in _MEETING else ["batched"]))(_movement(_name))


@case("pad", "batched")
def pad() -> Problem:
    eye = torch.eye(4, dtype=torch.float64)
    return Problem(
        lambda x: functional.pad(x, (1, 2)),
        (randn(3, 4),),
        jacobian=lambda: block_diagonal(functional.pad(eye, (0, 0, 1, 2)).expand(3, 7, 4)),
    )


@case("scatter_add")
def scatter_add() -> Problem:
    index = torch.tensor([0, 2, 2, 1, 0])
    return Problem(
        lambda x: x.new_zeros(3).scatter_add(0, index, x),
        (randn(5),),
        jacobian=lambda: functional.one_hot(index).T.double(),
        pattern=lambda: functional.one_hot(index).T.numpy().astype(bool),
    )


@case("cumsum", "batched", "square")
def cumsum() -> Problem:
    lower = torch.ones(4, 4, dtype=torch.float64).tril()
    return Problem(
        lambda x: x.cumsum(-1),
        (randn(3, 4),),
        jacobian=lambda: block_diagonal(lower.expand(3, 4, 4)),
        pattern=lambda: np.kron(np.eye(3), lower.numpy()) != 0,
    )


@case("cumprod", "batched", "square")
def cumprod() -> Problem:
    lower = np.tril(np.ones((4, 4)))
    return Problem(
        lambda x: x.cumprod(-1), (randn(3, 4),), pattern=lambda: np.kron(np.eye(3), lower) != 0
    )


class Coupling(nn.Module):
    """A layer that keeps the first half and moves the second by an affine map of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        kept, moved = x.chunk(2, dim=-1)
        scale, shift = self.net(kept).chunk(2, dim=-1)
        return torch.cat([kept, moved * torch.exp(torch.tanh(scale)) + shift], dim=-1)

    def log_scale(self, x: Tensor) -> Tensor:
        """log |det J|, (B,)."""
        return torch.tanh(self.net(x[..., :2])[..., :2]).sum(-1)


@case("coupling_flow", "batched", "square", "network")
def coupling_flow() -> Problem:
    net = module(Coupling)
    block = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]])
    return Problem(
        net,
        (randn(3, 4),),
        pattern=lambda: np.kron(np.eye(3), block) != 0,
        parameters=tuple(net.parameters()),
    )


class Triangular(nn.Module):
    """An autoregressive layer: entry i is scaled and shifted by the entries before it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4, 4).tril(-1))

    def forward(self, x: Tensor) -> Tensor:
        scale = functional.linear(x, self.scale.weight * self.mask, self.scale.bias)
        shift = functional.linear(x, self.shift.weight * self.mask, self.shift.bias)
        return x * torch.exp(torch.tanh(scale)) + shift


@case("triangular_flow", "batched", "square", "network")
def triangular_flow() -> Problem:
    net = module(Triangular)
    return Problem(
        net,
        (randn(3, 4),),
        pattern=lambda: np.kron(np.eye(3), np.tril(np.ones((4, 4)))) != 0,
        parameters=tuple(net.parameters()),
    )


class Planar(nn.Module):
    """x + u tanh(w x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.w = nn.Parameter(torch.randn(4) / 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.u * torch.tanh(self.w(x))


@case("planar_flow", "batched", "square", "network")
def planar_flow() -> Problem:
    net, x = module(Planar), randn(3, 4)

    def jacobian() -> Tensor:
        with torch.no_grad():
            slope = 1 - torch.tanh(net.w(x)) ** 2
            update = net.u[:, None] * net.w.weight
            return block_diagonal(torch.eye(4, dtype=torch.float64) + slope[..., None] * update)

    return Problem(net, (x,), jacobian=jacobian, parameters=tuple(net.parameters()))
