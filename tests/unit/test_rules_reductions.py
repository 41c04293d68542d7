"""Reductions, softmax and losses: what is summed, along which axes, and what the labels choose."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import tensor

from detected import detect, draw, exact, overs
from oracles import loop_hessian

EXACT = {
    "sum": lambda x: x.sum(),
    "sum along": lambda x: x.sum(1),
    "sum along the last": lambda x: x.sum(-1, keepdim=True),
    "sum along two": lambda x: x.sum((0, -1)),
    "sum along none": lambda x: x.sum(()),
    "mean": lambda x: x.mean(-2, keepdim=True),
    "prod": lambda x: x.prod(1),
    "logsumexp": lambda x: x.logsumexp((0, 2)),
    "var": lambda x: x.var(1),
    "var of all": lambda x: x.var(),
    "var, biased": lambda x: x.var((0, 1), correction=0, keepdim=True),
    "std": lambda x: x.std(-1),
    "var_mean": lambda x: torch.var_mean(x, 1)[0],
    "norm": lambda x: x.norm(),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, 3, (0, 1)),
    "norm that counts": lambda x: torch.linalg.vector_norm(x, 0, 1) + x.sum(1),
    "nansum": lambda x: x.nansum(2),
    "dist": lambda x: torch.dist(x[0], x[1], 3),
    "renorm": lambda x: x.renorm(2, 0, 1e-3),
    "trace": lambda x: x[0].trace(),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax, masked": lambda x: x.masked_fill(torch.eye(3, 4) > 0, -torch.inf).softmax(-1),
    "argmax": lambda x: x * (1 + x.argmax(-1, keepdim=True)),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str):
    exact(EXACT[name], draw(2, 3, 4, seed=1))


# Maxima choose one element here and another there: all of the axis stays.
CHOOSING = {
    "amax": lambda x: x.amax(1),
    "amin of two": lambda x: x.amin((0, 2), keepdim=True),
    "max": lambda x: x.max(),
    "max along": lambda x: x.max(-1).values,
    "min along": lambda x: x.min(1, keepdim=True).values,
    "aminmax": lambda x: torch.aminmax(x, dim=1).max,
    "infinity norm": lambda x: torch.linalg.vector_norm(x, torch.inf, 2),
}
SUMS = {
    "amax": lambda x: x.sum(1),
    "amin of two": lambda x: x.sum((0, 2), keepdim=True),
    "max": lambda x: x.sum(),
    "max along": lambda x: x.sum(-1),
    "min along": lambda x: x.sum(1, keepdim=True),
    "aminmax": lambda x: x.sum(1),
    "infinity norm": lambda x: x.sum(2),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_maxima_keep_the_whole_axis(name: str):
    found, summed = (detect(f[name], draw(2, 3, 4)) for f in (CHOOSING, SUMS))
    assert found.pattern.same_as(summed.pattern)
    assert not found.guards.at_point


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, torch.amax, torch.prod, torch.norm])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_sizes(reduce, shape: tuple[int, ...]):
    exact(reduce, draw(*shape) + 3)


@pytest.mark.parametrize("reduce", [torch.sum, torch.prod, torch.logsumexp])
def test_over_nothing(reduce):
    found = detect(lambda x: reduce(x, 1), draw(3, 0))
    assert found.pattern.shape == (3, 0)


def test_axes_without_tensors_axes():
    exact(lambda x: x.sum(0) + x.amax(-1) + x.logsumexp(0), draw())


LABELS = tensor([2, 0, -100, 1])
KINDS = tensor([[1, -1, 1], [1, 1, -1], [-1, 1, 1], [1, -1, -1]]).double()
TARGETS = torch.rand(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LOSSES = {
    "mse": lambda x, how: F.mse_loss(x, TARGETS, reduction=how),
    "smooth_l1": lambda x, how: F.smooth_l1_loss(x, 3 * TARGETS, reduction=how, beta=9.0),
    "huber": lambda x, how: F.huber_loss(x, 3 * TARGETS, reduction=how, delta=9.0),
    "soft_margin": lambda x, how: F.soft_margin_loss(x, KINDS, reduction=how),
    "bce": lambda x, how: F.binary_cross_entropy(x.sigmoid(), TARGETS, reduction=how),
    "bce of logits": lambda x, how: F.binary_cross_entropy_with_logits(x, TARGETS, reduction=how),
    "cross_entropy": lambda x, how: F.cross_entropy(x, LABELS, reduction=how),
    "cross_entropy, soft": lambda x, how: F.cross_entropy(
        x, LABELS, reduction=how, label_smoothing=0.1
    ),
    "nll": lambda x, how: F.nll_loss(x, LABELS, reduction=how, weight=TARGETS[0]),
    "kl_div": lambda x, how: F.kl_div(x, TARGETS, reduction=how.replace("mean", "batchmean")),
    "poisson": lambda x, how: F.poisson_nll_loss(x, TARGETS, reduction=how),
    "l1": lambda x, how: F.l1_loss(x, 9 * TARGETS, reduction=how),
}


@pytest.mark.parametrize("how", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, how: str):
    exact(lambda x: LOSSES[name](x, how), draw(4, 3, seed=2))


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_of_losses(name: str):
    def energy(x):
        return LOSSES[name](x, "mean")

    structure = detect(energy, draw(4, 3), hessian=True)
    met = np.zeros((12, 12), bool)
    for seed in range(6):
        hessian = loop_hessian(energy, draw(4, 3, seed=seed)).reshape(12, 12).abs().numpy()
        met |= hessian > 1e-13 * hessian.max()
    assert structure.dense_ops == ()
    assert (structure.pattern.todense() == met).all()


def test_labels_of_images():
    labels = tensor([[[1, 0, 2], [0, -100, 1]]])
    exact(lambda x: F.nll_loss(x, labels, reduction="none"), draw(1, 3, 2, 3))
    exact(lambda x: F.cross_entropy(x, labels, reduction="sum"), draw(1, 3, 2, 3))


def test_labels_of_one_sample_without_a_batch():
    exact(lambda x: F.nll_loss(x, tensor(2)), draw(4))


def test_labels_that_depend_on_the_inputs_hold_at_this_point():
    exact(
        lambda x: F.nll_loss(x, x.detach().argmax(1), reduction="none"), draw(3, 4), at_point=True
    )


def test_labels_among_the_arguments_are_looked_at():
    structure = detect(
        lambda x, y: F.nll_loss(x, y, reduction="none"), draw(3, 4), tensor([1, 3, 0])
    )
    assert structure.pattern.indices.tolist() == [1, 4 + 3, 8]


def test_margins_meet_all_scores_of_a_sample():
    structure = detect(
        lambda x: F.multi_margin_loss(x, tensor([1, 0]), reduction="none"), draw(2, 3)
    )
    assert (structure.pattern.todense() == np.kron(np.eye(2, dtype=bool), np.ones(3, bool))).all()


def test_connectionist_losses_stay_within_a_sample():
    scores, labels, lengths = draw(5, 2, 4), tensor([[1, 2], [3, 1]]), tensor([5, 5])

    def loss(x):
        return F.ctc_loss(x.log_softmax(-1), labels, lengths, tensor([2, 2]), reduction="none")

    assert overs(loss, scores) == 0
