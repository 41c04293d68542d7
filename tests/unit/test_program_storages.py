"""Programs and storages: what lies where it did, and what belongs to whoever asks for it."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import pushforward as pf
from pushforward.program import Program, Recorder, program

F64 = {"dtype": torch.float64}


def recorded(work: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Program:
    own = x.clone()
    with torch.no_grad():
        return program(lambda: work(own), Recorder([own], []))


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "a copy of a slice": lambda x: (x * 2)[5:].clone().as_strided((2,), (2,), 1) + 0.5,
    "a slice and zeros": lambda x: ((x * 2)[5:] + torch.zeros(5)).as_strided((2,), (2,), 1) + 0.5,
    "a slice times ones": lambda x: ((x * 2)[5:] * torch.ones(5)).as_strided((2,), (2,), 1) + 0.5,
    "a view of a copy": lambda x: (x * 2)[5:].clone().view(5, 1).as_strided((2,), (2,), 1) + 0.5,
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides_count_from_where_a_tensor_lay(name: str):
    work, x = STRIDED[name], torch.arange(10.0)
    made = recorded(lambda x: [work(x)], x)
    for point in (x, x + 1):
        torch.testing.assert_close(made(point)[0], work(point))


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x,
        lambda x: x.view(2, 5).T,
        lambda x: torch.ones(3),
        lambda x: x[2:4],
        lambda x: x.clone().mul_(2)[1:],
    ],
)
def test_results_are_nobody_elses(work: Callable[[Tensor], Tensor]):
    x = torch.arange(10.0)
    made = recorded(lambda x: [work(x)], x)
    made(x)[0].fill_(-1.0)
    assert torch.equal(x, torch.arange(10.0))
    torch.testing.assert_close(made(x)[0], work(x))


def test_repeated_rows_that_are_viewed_again():
    """Rows of a matrix repeated without a copy cannot be viewed as one axis."""
    w, x = torch.randn(5, 4, requires_grad=True, **F64), torch.randn(3, 4, **F64)
    J = pf.jacobian(lambda x: torch.nn.functional.linear(x, w), x)
    expected = torch.block_diag(*[w.detach()] * 3)
    torch.testing.assert_close(J.matrix().detach(), expected)


def test_samples_of_a_batch_do_not_shift_the_numbers_of_ops():
    """A cut is found again by the number of its op, whatever else follows the run."""
    torch.manual_seed(0)
    widths = [512, 256, 8, 256, 512]
    layers: list[torch.nn.Module] = [torch.nn.Flatten(0)]
    for into, out in pairwise(widths):
        layers += [torch.nn.Linear(into, out), torch.nn.Tanh()]
    net, x = torch.nn.Sequential(*layers[:-1]).double(), torch.randn(2, 256, **F64)
    J = pf.jacobian(net, x)
    assert J.plan.strategy == "split"
    assert J.plan.passes == 16
    torch.testing.assert_close(J.matrix(), pf.jacobian(net, x, plan="reverse").matrix())
