"""Order and running sums: the detected pattern against the Jacobian of autograd."""

import pytest
import torch
from torch import tensor

from detected import detect, draw, exact, overs, sound

# Each holds at its point only.
ORDER = {
    "sort": (lambda x: x.sort().values, (3, 4)),
    "sort along rows": (lambda x: x.sort(0, descending=True).values, (3, 4)),
    "sort, stable": (lambda x: torch.sort(x, stable=True, dim=0)[0], (3, 4)),
    "sort of one": (lambda x: x.sort(1).values, (2, 1)),
    "argsort and gather": (lambda x: (2 * x).gather(1, x.argsort(1)), (3, 4)),
    "topk": (lambda x: x.topk(2).values, (3, 4)),
    "topk along rows": (lambda x: x.topk(2, 0, largest=False).values, (3, 4)),
    "kthvalue": (lambda x: x.kthvalue(2).values, (3, 4)),
    "kthvalue, kept": (lambda x: x.kthvalue(2, 0, keepdim=True).values, (3, 4)),
    "median": (lambda x: x.median(), (3, 3)),
    "median along an axis": (lambda x: x.median(0).values, (3, 4)),
    "median, kept": (lambda x: x.median(1, keepdim=True).values, (3, 4)),
    "nanmedian": (lambda x: x.nanmedian(1).values, (3, 4)),
    "nanmedian of all": (lambda x: x.nanmedian(), (5,)),
    "mode": (lambda x: x.mode(1).values, (3, 4)),
    "mode along rows": (lambda x: x.mode(0, keepdim=True).values, (3, 4)),
    "msort": (lambda x: x.msort(), (3, 4)),
    "sort twice": (lambda x: x.sort(0).values.sort(1).values, (3, 4)),
    "rank and scatter": (lambda x: torch.zeros_like(x).scatter(0, x.argsort(0), x.exp()), (3, 2)),
}

SCANS = {
    "cumsum": (lambda x: x.cumsum(1), (2, 4)),
    "cumsum along rows": (lambda x: x.cumsum(0), (3, 2)),
    "cumsum from the end": (lambda x: x.flip(-1).cumsum(-1).flip(-1), (2, 4)),
    "cumprod": (lambda x: x.cumprod(-1), (2, 4)),
    "cumulative_trapezoid": (lambda x: torch.cumulative_trapezoid(x, dim=1), (2, 4)),
    "trapezoid": (lambda x: torch.trapezoid(x, dim=0), (3, 2)),
    "trapezoid over points": (lambda x: torch.trapezoid(draw(3), x), (3,)),
    "diff": (lambda x: x.diff(dim=1), (2, 4)),
    "diff twice, with ends": (lambda x: x.diff(2, 1, x[:, :1], torch.ones(2, 1).double()), (2, 4)),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), (2, 4)),
    "of a number": (lambda x: x.cumsum(0), ()),
    "of one": (lambda x: x.cumsum(1), (2, 1)),
    "of nothing": (lambda x: x.cumsum(1), (2, 0)),
    "renewed": (lambda x: x.cumsum(0) * tensor([[1.0], [0.0], [2.0]]).double(), (3, 2)),
}

FLAT = {
    "searchsorted": lambda x: x * torch.searchsorted(tensor([0.0, 1.0]).double(), x),
    "searchsorted in the input": lambda x: x * torch.searchsorted(x.sort().values.detach(), 0.1),
    "bucketize": lambda x: x * torch.bucketize(x, tensor([-1.0, 0.5]).double()),
    "unique": lambda x: x * x.detach().round().unique(return_inverse=True)[1],
    "bincount": lambda x: x + (x > 0).long().bincount(minlength=2)[0],
    "histc": lambda x: x + x.detach().histc(2),
}


@pytest.mark.parametrize("name", ORDER)
def test_order_holds_at_this_point_only(name):
    f, shape = ORDER[name]
    exact(f, draw(*shape), at_point=True)


@pytest.mark.parametrize("name", SCANS)
def test_scans(name):
    f, shape = SCANS[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("op", [torch.cummax, torch.cummin])
def test_running_extremes_keep_all_that_compete(op):
    structure = sound(lambda x: op(x, 1).values, draw(2, 4))
    assert structure.pattern.todense().sum(1).tolist() == [1, 2, 3, 4] * 2


@pytest.mark.parametrize("name", FLAT)
def test_whole_numbers_have_no_derivative(name):
    structure = detect(FLAT[name], draw(2))
    assert structure.pattern.nnz == 2
    assert structure.dense_ops == ()


def test_order_of_constants_is_structure():
    exact(lambda x: x[tensor([3, 1, 2]).sort().values - 1], draw(3))
    keys = draw(3)
    exact(lambda x: x[keys.argsort()], draw(3))


def test_ties_share_the_median():
    x = tensor([1.0, 2.0, 2.0, 2.0, 5.0], dtype=torch.float64)
    structure = exact(lambda x: x.median(), x, at_point=True)
    assert structure.pattern.nnz == 3


def test_sorted_rows_that_are_constant_stay_structure():
    first = draw(1, 3)

    def ordered(x):
        table = torch.cat([first, x[None]])
        return table.sort(1).values[0] * x

    assert overs(ordered, draw(3), at_point=True) == 0
