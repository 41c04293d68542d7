"""Random straight-line programs: ops on registers that all hold matrices of one shape.

A program is data, so that a failing one can be read and made smaller: a list of (op, i, j), where i
and j say which registers the op reads, counted from the last one. Register 0 is the input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Op = Callable[[Tensor, Tensor], Tensor]


def _draw(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mask(a: Tensor) -> Tensor:
    """A constant mask of the shape of a tensor."""
    return _draw(*a.shape, seed=3) > 0.2


def _write_rows(a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    y[1:] = b[: len(b) - 1].sin()
    return y


def _write_column(a: Tensor, b: Tensor) -> Tensor:
    y = a * 1.0
    y[:, 0] += b[:, -1]
    y[:, -1].mul_(0.5)
    return y


def _write_where_constant(a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    y[_mask(a)] = b[_mask(a)] * 2
    return y


def _write_where_negative(a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    y[b < 0] = 0.5
    return y


def _write_through_a_view(a: Tensor, b: Tensor) -> Tensor:
    y = (a + 0.1).contiguous()
    y.view(-1)[::2].copy_(b.reshape(-1)[::2])
    return y


def _write_over_itself(a: Tensor, _: Tensor) -> Tensor:
    y = a.clone()
    y[:-1] += y[1:].clone()
    return y


def _write_twice(a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    y[0] = 0
    y[0].add_(b[0])
    return y.mul_(b)


def _index_add(a: Tensor, b: Tensor) -> Tensor:
    return a.index_add(0, torch.arange(len(a)).flip(0), b)


def _scatter(a: Tensor, b: Tensor) -> Tensor:
    index = torch.arange(a.shape[1]).flip(0).expand(a.shape)
    return torch.zeros_like(a).scatter(1, index, a) + b


def _gather(a: Tensor, b: Tensor) -> Tensor:
    index = (torch.arange(a.numel()) * 3 % len(a)).reshape(a.shape)
    return a.gather(0, index) * b


def _by_order(a: Tensor, b: Tensor) -> Tensor:
    return a.gather(1, b.argsort(1))


def _times_constant(a: Tensor, _: Tensor) -> Tensor:
    return a @ _draw(a.shape[1], a.shape[1])


def _times_band(a: Tensor, _: Tensor) -> Tensor:
    return torch.eye(len(a), dtype=a.dtype).roll(1, 0).triu() @ a


def _times_masked(a: Tensor, b: Tensor) -> Tensor:
    weight = _draw(a.shape[1], a.shape[1]) * torch.eye(a.shape[1], dtype=a.dtype)
    return torch.nn.functional.linear(a, weight) + b


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT).tanh() @ a


def _without_gradient(a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        scale = b.sigmoid()
    return a * scale


def _branch(a: Tensor, b: Tensor) -> Tensor:
    return a.sin() if float(b.detach().sum()) > 0 else a.flip(0) * 0.7


def _loop(a: Tensor, b: Tensor) -> Tensor:
    for k in range(2):
        a = torch.cat([a[:, 1:] * b[:, :-1], a[:, k : k + 1] if a.shape[1] > k else a[:, :1]], 1)
    return a


def _windows(a: Tensor, b: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(a, (1, 1))
    return padded.unfold(1, 3, 1).amax(-1) + b


def _strided(a: Tensor, _: Tensor) -> Tensor:
    flat = torch.cat([a.reshape(-1), a.reshape(-1)])
    return flat.as_strided(a.shape, (1, 1)) * 0.9


def _convolved(a: Tensor, b: Tensor) -> Tensor:
    kernel = torch.tensor([[[1.0, 0.0, -0.5]]], dtype=a.dtype)
    return torch.nn.functional.conv1d(a[:, None], kernel, padding=1)[:, 0] * b


OPS: dict[str, Op] = {
    "add": torch.add,
    "sub": lambda a, b: a - 0.3 * b,
    "mul": torch.mul,
    "div": lambda a, b: a / (1 + b * b),
    "maximum": torch.maximum,
    "where_constant": lambda a, b: torch.where(_mask(a), a, b),
    "where_positive": lambda a, b: torch.where(a > 0, a, b),
    "sin": lambda a, _: a.sin(),
    "tanh": lambda a, _: a.tanh(),
    "relu": lambda a, _: a.relu(),
    "square": lambda a, _: a * a / (1 + a * a),
    "zero": lambda a, b: a * torch.zeros_like(b) + b,
    "half": lambda a, _: a.masked_fill(~_mask(a), 0.0),
    "sum": lambda a, b: a.mean(1, keepdim=True).tanh() + b,
    "centre": lambda a, _: a - a.mean(0),
    "cumsum": lambda a, _: a.cumsum(1),
    "flip": lambda a, _: a.flip(0),
    "roll": lambda a, b: a.roll(1, 1) + b,
    "turned": lambda a, _: a.mT.reshape(a.shape),
    "swap": lambda a, _: torch.cat(a.split([1, len(a) - 1])[::-1]),
    "softmax": lambda a, _: a.softmax(0),
    # Of one or two columns alone it would be constant, and all derivatives rounding.
    "norm": lambda a, b: torch.nn.functional.layer_norm(a, a.shape[1:]) + 0.1 * b,
    "sort": lambda a, _: a.sort(1).values,
    "tril": lambda a, b: a.tril() + b.triu(1),
    "detach": lambda a, b: a * b.detach().cos(),
    "number": lambda a, b: a * float(b.detach()[0, 0].sigmoid()),
    "write_rows": _write_rows,
    "write_column": _write_column,
    "write_where_constant": _write_where_constant,
    "write_where_negative": _write_where_negative,
    "write_through_a_view": _write_through_a_view,
    "write_over_itself": _write_over_itself,
    "write_twice": _write_twice,
    "index_add": _index_add,
    "scatter": _scatter,
    "gather": _gather,
    "by_order": _by_order,
    "times_constant": _times_constant,
    "times_band": _times_band,
    "times_masked": _times_masked,
    "product": _product,
    "without_gradient": _without_gradient,
    "branch": _branch,
    "loop": _loop,
    "windows": _windows,
    "strided": _strided,
    "convolved": _convolved,
}


@dataclass(frozen=True)
class Program:
    """A function from a matrix to a matrix; ``ending`` says what of the registers comes out."""

    steps: Sequence[tuple[str, int, int]]
    ending: str = "last"

    def __call__(self, x: Tensor) -> Tensor:
        registers = [x]
        for name, i, j in self.steps:
            a, b = (registers[-1 - k % len(registers)] for k in (i, j))
            registers.append(OPS[name](a, b))
        return ENDINGS[self.ending](registers)


ENDINGS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "last": lambda registers: registers[-1],
    "two": lambda registers: torch.stack(registers[-2:]),
    "row": lambda registers: registers[-1][0],
    "total": lambda registers: registers[-1].square().sum()[None],
}
