"""Gathering, scattering and moving: the detected pattern against the Jacobian of autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import tensor

from detected import detect, draw, exact, sound

ROWS = tensor([[2, 0, 2], [1, 1, 0]])
MASK = tensor([[True, False, True, False], [False, True, True, True], [True, False, False, False]])

GATHERING = {
    "gather rows": (lambda x: x.gather(0, ROWS), (3, 4)),
    "gather columns": (lambda x: x.gather(1, ROWS), (3, 4)),
    "gather a number": (lambda x: x.gather(0, tensor(0)), ()),
    "index_select": (lambda x: x.index_select(1, tensor([3, 0, 3])), (3, 4)),
    "index_select of a number": (lambda x: x.index_select(0, tensor([0])), ()),
    "one index": (lambda x: x[tensor([2, 0, 0, 2])], (3, 4)),
    "two indices": (lambda x: x[tensor([2, 0]), tensor([1, 3])], (3, 4)),
    "indices that broadcast": (lambda x: x[tensor([[2], [0]]), tensor([1, 3, 0])], (3, 4)),
    "indices with a slice between": (lambda x: x[tensor([1, 0]), :, tensor([2, 1])], (2, 3, 4)),
    "an index after a slice": (lambda x: x[:, tensor([1, 0, 1])], (2, 3)),
    "negative indices": (lambda x: x[tensor([-1, 0])], (3, 2)),
    "a mask": (lambda x: x[MASK], (3, 4)),
    "a mask of rows": (lambda x: x[tensor([True, False, True])], (3, 4)),
    "a mask that lets nothing through": (lambda x: x[torch.zeros(3, dtype=torch.bool)], (3, 2)),
    "masked_select": (lambda x: x.masked_select(MASK), (3, 4)),
    "masked_select, broadcast": (lambda x: x.masked_select(MASK), (4,)),
    "take": (lambda x: x.take(ROWS), (3, 4)),
    "take_along_dim": (lambda x: x.take_along_dim(ROWS, 1), (2, 3)),
    "take_along_dim, flat": (lambda x: x.take_along_dim(ROWS.reshape(-1)), (2, 3)),
    "embedding": (lambda x: F.embedding(ROWS, x), (3, 4)),
    "embedding with padding": (lambda x: F.embedding(ROWS, x, padding_idx=1), (3, 4)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), (2, 3)),
    "repeat_interleave, unequal": (lambda x: x.repeat_interleave(tensor([0, 3, 1]), 1), (2, 3)),
    "unfold": (lambda x: x.unfold(1, 3, 2), (2, 7)),
    "im2col": (lambda x: F.unfold(x, (2, 3), 2, 1, (1, 2)), (2, 2, 4, 5)),
    "col2im": (lambda x: F.fold(x, (4, 5), (2, 3), stride=(2, 1)), (1, 12, 6)),
    "col2im, padded": (lambda x: F.fold(x, (4, 5), (3, 2), 2, 1, (2, 1)), (2, 12, 5)),
    "col2im without batch": (lambda x: F.fold(x, (3, 4), (2, 2)), (8, 6)),
    "as_strided, overlapping": (lambda x: x.as_strided((3, 2), (1, 2), 1), (7,)),
    "index twice": (lambda x: x[tensor([2, 0, 1])][:, tensor([1, 1])], (3, 2)),
    "indices of indices": (lambda x: x[tensor([3, 1, 2, 0])[tensor([0, 2])]], (4, 2)),
}

MOVING = {
    "diag": (lambda x: x.diag(1), (3, 4)),
    "diag of a vector": (lambda x: x.diag(-1), (3,)),
    "diagonal": (lambda x: x.diagonal(-1, 0, 2), (3, 2, 3)),
    "diag_embed": (lambda x: x.diag_embed(1, 0, 2), (2, 3)),
    "tril": (lambda x: x.tril(-1), (2, 3, 4)),
    "triu": (lambda x: x.triu(1), (3, 4)),
    "block_diag": (lambda x: torch.block_diag(x, 2 * x[:1], x[0, 0]), (2, 3)),
    "roll": (lambda x: x.roll((1, -2), (0, 1)), (2, 5)),
    "roll, flat": (lambda x: x.roll(4), (2, 3)),
    "flip": (lambda x: x.flip(0, 2), (2, 3, 2)),
    "rot90": (lambda x: x.rot90(1, (0, 2)), (2, 3, 2)),
    "cat": (lambda x: torch.cat([x, torch.zeros(1, 3), x.flip(1)]), (2, 3)),
    "stack": (lambda x: torch.stack([x, x.flip(0)], 1), (3, 2)),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1), value=2.0), (2, 3)),
    "pad with an integer": (lambda x: F.pad(x, (1, 0), value=2), (2, 3)),
    "pad by less than nothing": (lambda x: F.pad(x, (-1, 2)), (2, 3)),
    "pad, reflected": (lambda x: F.pad(x, (2, 1), mode="reflect"), (2, 4)),
    "pad, reflected 2d": (lambda x: F.pad(x, (2, 1, 0, 1), mode="reflect"), (1, 3, 4)),
    "pad, reflected 3d": (lambda x: F.pad(x, (1, 1, 0, 1, 1, 0), mode="reflect"), (1, 2, 2, 3)),
    "pad, replicated": (lambda x: F.pad(x, (2, 1), mode="replicate"), (2, 3)),
    "pad, replicated 2d": (lambda x: F.pad(x, (2, 1, 0, 1), mode="replicate"), (1, 2, 3)),
    "pad, replicated 3d": (lambda x: F.pad(x, (1, 0) * 3, mode="replicate"), (1, 2, 1, 2)),
    "pad, circular": (lambda x: F.pad(x, (2, 1), mode="circular"), (2, 4)),
    "pad, circular 2d": (lambda x: F.pad(x, (2, 1, 1, 0), mode="circular"), (1, 1, 2, 3)),
    "pad, circular 3d": (lambda x: F.pad(x, (1, 0) * 3, mode="circular"), (1, 1, 2, 1, 2)),
    "tile": (lambda x: x.tile(2, 2), (3,)),
    "meshgrid": (lambda x: torch.stack(torch.meshgrid(x, 2 * x, indexing="ij")), (3,)),
    "slice_scatter": (lambda x: x.slice_scatter(2 * x[:, :2], 1, 1, 4, 2), (2, 5)),
    "select_scatter": (lambda x: x.select_scatter(x[:, 0] + 1, 1, 2), (2, 3)),
    "diagonal_scatter": (lambda x: x.diagonal_scatter(x[0], 0), (3, 3)),
    "split and join": (lambda x: torch.cat(x.split([1, 2], 1)[::-1], 1), (2, 3)),
    "tril_indices": (lambda x: x[torch.tril_indices(3, 3).unbind()], (3, 3)),
    "nothing": (lambda x: x[:0], (2, 3)),
    "of nothing": (lambda x: x.flip(0), (0, 3)),
    "one": (lambda x: x.roll(1, 0), (1, 1)),
}

PLACES = tensor([2, 0, 2])
GRID = tensor([[0, 2, 0], [1, 1, 2]])
SCATTERING = {
    "scatter": (lambda x: x.scatter(1, GRID[:, :2], 3 * x[:, 2:]), (2, 4)),
    "scatter of numbers": (lambda x: x.scatter(1, GRID, 2.0), (2, 4)),
    "scatter into constants": (lambda x: torch.zeros(2, 4).double().scatter(1, GRID, x), (2, 3)),
    "scatter, part of the source": (lambda x: x.scatter(0, GRID[:, :2], x[:2, :2].exp()), (3, 4)),
    "scatter_": (lambda x: (2 * x).scatter_(1, GRID, x[:, :3].exp()), (2, 4)),
    "scatter_add": (lambda x: x.scatter_add(1, GRID, x[:, :3].exp()), (2, 4)),
    "scatter_add into constants": (
        lambda x: x.new_zeros(3, 3).scatter_add(0, GRID, x.exp()),
        (2, 3),
    ),
    "scatter_reduce sum": (lambda x: x.scatter_reduce(1, GRID, x[:, :3].exp(), "sum"), (2, 4)),
    "scatter_reduce mean": (
        lambda x: x.scatter_reduce(1, GRID, x[:, :3].exp(), "mean", include_self=False),
        (2, 4),
    ),
    "scatter_reduce prod": (lambda x: x.scatter_reduce(1, GRID, x[:, :3].exp(), "prod"), (2, 4)),
    "index_add": (lambda x: x.index_add(0, PLACES, x.exp(), alpha=2), (3, 2)),
    "index_add of nothing": (lambda x: x.index_add(0, PLACES, x.exp(), alpha=0), (3, 2)),
    "index_add of columns": (lambda x: x.index_add(1, PLACES, x.exp()[:, :3]), (2, 4)),
    "index_add of a number": (lambda x: x.index_add(0, tensor([0]), 2 * x), ()),
    "index_copy": (lambda x: x.index_copy(1, PLACES[:2], x[:, 1:3].exp()), (2, 3)),
    "index_fill": (lambda x: x.index_fill(0, PLACES, 1.0), (4, 2)),
    "index_fill by a tensor": (lambda x: x.index_fill(0, PLACES, x[1, 1]), (4, 2)),
    "index_put": (lambda x: x.index_put((PLACES[:2], tensor([1, 0])), x[0].exp()), (3, 2)),
    "index_put that repeats": (lambda x: x.index_put((PLACES,), x[:3].exp()), (4, 2)),
    "index_put that adds": (lambda x: x.index_put((PLACES,), x[:3].exp(), True), (4, 2)),
    "index_put, broadcast": (lambda x: x.index_put((PLACES[:, None], PLACES[:2]), x[0, 0]), (3, 3)),
    "index_put by a mask": (lambda x: x.index_put((MASK,), x[0, 0].exp()), (3, 4)),
    "index_put after a slice": (
        lambda x: torch.ops.aten.index_put(x, [None, PLACES[:2]], x[:, :2].exp()),
        (2, 3),
    ),
    "put": (lambda x: x.put(GRID, x.reshape(-1)[:6].reshape(2, 3).exp()), (2, 4)),
    "put that adds": (lambda x: x.put(GRID, x[:, :3].exp(), accumulate=True), (2, 4)),
    "masked_scatter": (lambda x: x.masked_scatter(MASK, x.exp().flip(0)), (3, 4)),
    "masked_fill": (lambda x: x.masked_fill(MASK, 0.0), (3, 4)),
    "where": (lambda x: torch.where(MASK, x, x.flip(1)), (3, 4)),
    "scatter_add_": (lambda x: (2 * x).scatter_add_(1, GRID, x[:, :3].exp()), (2, 4)),
    "index_add_": (lambda x: (2 * x).index_add_(0, PLACES, x[:3].exp()), (3, 2)),
    "index_copy_": (lambda x: (2 * x).index_copy_(0, PLACES[:2], x[1:].exp()), (3, 2)),
    "into nothing": (lambda x: x.index_add(0, PLACES[:0], x[:0]), (2, 2)),
}


def _assign_rows(x):
    y = 3 * x
    y[PLACES[:2]] = x[1] * 2
    return y


def _assign_by_mask(x):
    y = torch.zeros(3, 4, dtype=torch.float64)
    y[MASK] = x
    return y


def _add_twice(x):
    y = x.clone()
    y[:, PLACES[:2]] += x[:, :2].exp()
    return y


def _put_in_place(x):
    y = 3 * x
    y.put_(PLACES[:2], 2 * x[0, :2])
    y.index_fill_(0, tensor([1]), 0.5)
    y.masked_fill_(MASK[:, :2], 0.0)
    return y


WRITING = {
    "rows": (_assign_rows, (3, 2)),
    "a mask": (_assign_by_mask, (int(MASK.sum()),)),
    "an augmented assignment": (_add_twice, (2, 3)),
    "several in place": (_put_in_place, (3, 2)),
}


@pytest.mark.parametrize("name", GATHERING)
def test_gathering(name):
    f, shape = GATHERING[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("name", MOVING)
def test_moving(name):
    f, shape = MOVING[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("name", SCATTERING)
def test_scattering(name):
    f, shape = SCATTERING[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("name", WRITING)
def test_writing(name):
    f, shape = WRITING[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("reduce", ["amax", "amin"])
def test_extremes_keep_all_that_compete(reduce):
    structure = sound(lambda x: x.scatter_reduce(1, GRID, x[:, :3].exp(), reduce), draw(2, 4))
    rows = structure.pattern.todense().sum(1)
    assert rows.tolist() == [2, 1, 2, 1, 1, 2, 1, 1]


@pytest.mark.filterwarnings("ignore:index_reduce")
def test_index_reduce():
    exact(lambda x: x.index_reduce(0, PLACES, x[:3].exp(), "prod"), draw(4, 2))
    exact(lambda x: x.index_reduce(0, PLACES, x[:3].exp(), "mean", include_self=False), draw(4, 2))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag(mode):
    bags, starts = tensor([2, 0, 1, 1, 2]), tensor([0, 2, 2])
    exact(lambda w: F.embedding_bag(bags, w, starts, mode=mode), draw(3, 2))
    exact(lambda w: F.embedding_bag(GRID, w, mode=mode, padding_idx=2), draw(3, 2))


def test_embedding_bag_of_maxima_keeps_all_that_compete():
    structure = sound(lambda w: F.embedding_bag(GRID, w, mode="max"), draw(4, 2))
    assert structure.pattern.todense().sum(1).tolist() == [2, 2, 2, 2]


def test_embedding_bag_weighs():
    weights = tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    bags, starts = tensor([2, 0, 1, 1]), tensor([0, 3])
    exact(
        lambda w: F.embedding_bag(bags, w, starts, mode="sum", per_sample_weights=weights),
        draw(3, 2),
    )
    exact(
        lambda x: F.embedding_bag(
            bags, draw(3, 2), starts, mode="sum", per_sample_weights=x, include_last_offset=False
        ),
        weights,
    )


def test_as_strided_scatter_is_written_out():
    """Torch's own derivative is wrong: what is met there is not what is looked for."""
    found = detect(lambda x: x.as_strided_scatter(x[:2] + 1, (2,), (3,), 1), draw(6)).pattern
    expected = np.eye(6, dtype=bool)
    expected[[1, 4]] = False
    expected[1, 0] = expected[4, 1] = True
    assert (found.todense() == expected).all()


def test_one_hot_picks_rows():
    hot = F.one_hot(tensor([2, 0, 2]), 3)
    exact(lambda x: hot.double() @ x, draw(3, 2))
    exact(lambda x: F.one_hot(tensor([2, 0, 2]), 3).double() @ x, draw(3, 2))
    exact(lambda x: (F.one_hot(tensor([2, 0, 1]), 4) * x).sum(1), draw(3, 4))


CHOOSING = {
    "argsort": lambda x: x[x.argsort()],
    "gather": lambda x: x.gather(0, x.argsort()),
    "a mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x[(x > 0).nonzero()[:, 0]],
    "argmax": lambda x: 2 * x[x.argmax()],
    "part of an argsort": lambda x: x[x.argsort()[tensor([0, 2])]],
    "take": lambda x: x.take(x.argsort(descending=True)[:2]),
    "scatter": lambda x: torch.zeros_like(x).scatter(0, x.argsort(), x),
    "index_add": lambda x: torch.zeros_like(x).index_add(0, (x > 0).long(), x),
    "index_put": lambda x: x.index_put(((x > 0).nonzero()[:, 0],), x[0]),
    "masked_scatter": lambda x: x.masked_scatter(x > 0, x.exp()),
    "embedding": lambda x: F.embedding((x > 0).long(), x[:, None]),
    "item": lambda x: x[: int((x > -9).sum())],
    "tensor_split": lambda x: torch.cat(x.tensor_split(tensor([int((x > 0).sum())]))[::-1]),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_what_the_input_chooses_holds_at_this_point_only(name):
    exact(CHOOSING[name], draw(5), at_point=True)


def test_indices_among_the_arguments_are_structure():
    structure = exact(lambda x, i: x[i], draw(4), tensor([3, 1]))
    assert structure.pattern.nnz == 2


def test_a_table_that_varies_is_no_structure():
    """A product with a parameter that is zero keeps its entries."""
    weight = torch.nn.Parameter(torch.eye(3, dtype=torch.float64))
    assert detect(lambda x: weight @ x, draw(3)).pattern.nnz == 9
