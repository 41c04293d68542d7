"""Pooling and its gradients: which windows an element lies in."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detected import detect, draw, exact
from oracles import loop_hessian
from pushforward.structure.rules.pooling import adaptive, sliding, turned

EXACT = {
    "avg 1d": (lambda x: F.avg_pool1d(x, 3, 2), (1, 2, 7)),
    "avg 2d": (lambda x: F.avg_pool2d(x, (2, 3), (1, 2), (0, 1)), (2, 2, 4, 5)),
    "avg 2d, rounded up": (lambda x: F.avg_pool2d(x, 2, ceil_mode=True), (1, 1, 3, 5)),
    "avg 2d, no batch": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (2, 4, 3)),
    "avg 3d": (lambda x: F.avg_pool3d(x, 2, 1), (1, 1, 2, 3, 4)),
    "adaptive 1d": (lambda x: F.adaptive_avg_pool1d(x, 3), (1, 2, 7)),
    "adaptive 2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (1, 2, 5, 4)),
    "adaptive to one": (lambda x: F.adaptive_avg_pool2d(x, 1), (1, 2, 3, 4)),
    "adaptive 3d": (lambda x: F.adaptive_avg_pool3d(x, (1, 2, 3)), (1, 1, 2, 3, 4)),
    "upwards": (lambda x: F.adaptive_avg_pool1d(x, 5), (1, 1, 3)),
    "lp": (lambda x: F.lp_pool1d(x.exp(), 3.0, 2), (1, 1, 6)),
}
CHOOSING = {
    "max 1d": (lambda x: F.max_pool1d(x, 3, 2, 1), lambda x: F.avg_pool1d(x, 3, 2, 1), (1, 2, 7)),
    "max 2d": (
        lambda x: F.max_pool2d(x, (2, 3), (1, 2)),
        lambda x: F.avg_pool2d(x, (2, 3), (1, 2)),
        (2, 2, 4, 5),
    ),
    "max 2d, rounded up": (
        lambda x: F.max_pool2d(x, 2, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
        (1, 1, 3, 5),
    ),
    "max 1d, dilated": (
        lambda x: F.max_pool1d(x, 2, 1, dilation=3),
        lambda x: x[..., :-3] + x[..., 3:],
        (1, 1, 7),
    ),
    "max 3d": (lambda x: F.max_pool3d(x, 2, 1), lambda x: F.avg_pool3d(x, 2, 1), (1, 1, 2, 3, 4)),
    "adaptive max": (
        lambda x: F.adaptive_max_pool2d(x, (2, 3)),
        lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
        (1, 2, 5, 4),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str):
    pool, shape = EXACT[name]
    exact(pool, draw(*shape))


@pytest.mark.parametrize("name", CHOOSING)
def test_maxima_keep_the_whole_window(name: str):
    choosing, summing, shape = CHOOSING[name]
    found = detect(choosing, draw(*shape))
    assert found.pattern.same_as(detect(summing, draw(*shape)).pattern)
    assert not found.guards.at_point


def hessian_of(pool, shape: tuple[int, ...]):
    """The Hessian of the sum of third powers of what was pooled, detected and met."""

    def energy(x: Tensor) -> Tensor:
        return pool(x).pow(3).sum()

    structure = detect(energy, draw(*shape), hessian=True)
    size, met = int(np.prod(shape)), 0
    for seed in range(4):
        hessian = loop_hessian(energy, draw(*shape, seed=seed))
        met = met | (hessian.reshape(size, size) != 0).numpy()
    return structure, met


@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives(name: str):
    structure, met = hessian_of(*EXACT[name])
    assert structure.dense_ops == ()
    assert (structure.pattern.todense() == met).all()


@pytest.mark.parametrize("name", CHOOSING)
def test_second_derivatives_of_maxima(name: str):
    choosing, summing, shape = CHOOSING[name]
    structure, met = hessian_of(choosing, shape)
    assert structure.dense_ops == ()
    assert not (met & ~structure.pattern.todense()).any()
    assert structure.pattern.same_as(hessian_of(summing, shape)[0].pattern)


def test_where_maxima_were_is_undone():
    where = F.max_pool2d(draw(1, 2, 4, 4), 2, return_indices=True)[1]
    exact(lambda x: F.max_unpool2d(x, where, 2), draw(1, 2, 2, 2))


def test_where_maxima_are_holds_at_this_point():
    def there_and_back(x: Tensor) -> Tensor:
        return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)

    assert detect(there_and_back, draw(1, 1, 4, 4)).guards.at_point


def test_tables_name_the_inputs_of_each_output():
    assert sliding(4, 2, 3, 2, 1, 1).tolist() == [[-1, 0, 1], [1, 2, 3]]
    assert adaptive(5, 2).tolist() == [[0, 1, 2], [2, 3, 4]]
    assert adaptive(3, 2).tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("table", [sliding(7, 3, 3, 2, 1, 2), adaptive(7, 3), adaptive(2, 5)])
def test_a_table_turned_around_names_the_outputs_of_each_input(table: np.ndarray):
    size = int(table.max()) + 2
    back = turned(table, size)
    assert {(o, i) for o, row in enumerate(table) for i in row if i >= 0} == {
        (o, i) for i, row in enumerate(back) for o in row if o >= 0
    }
    assert len(back) == size


def test_a_window_on_padding_alone_is_constant():
    pattern = detect(lambda x: F.avg_pool1d(x, 2, 2, 1), torch.zeros(1, 1, 1).double()).pattern
    assert pattern.nnz == 1
