"""The ladder of bounds on every network: no rung below the truth, and no rung out of order."""

import itertools
import json
import math

import pytest
import torch
from torch import Tensor, nn

from nets import NETS, VitBlock, resnet20
from oracles import loop_jacobian
from pushforward.path import path_bound

UPPER = ("frobenius", "mixed", "spectral", "segments")
RUNGS = (*UPPER, "sampled")
SLACK = 1e-9


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """(B, m, n), sample by sample, from rows of plain gradients."""

    def flat(sample: Tensor) -> Tensor:
        leaves = torch.utils._pytree.tree_leaves(model(sample[None]))
        return torch.cat([leaf.reshape(-1) for leaf in leaves])

    found = [loop_jacobian(flat, sample) for sample in x]
    return torch.stack([jacobian.reshape(-1, x[0].numel()) for jacobian in found])


def holds_at(name: str, seed: int) -> None:
    """Compare all rungs with the dense Jacobian at one point."""
    model, x = NETS[name].built(seed=seed)
    truth = jacobians(model, x).flatten(1).norm(dim=1).log()
    path = path_bound(model, x, rungs=RUNGS, seed=0)
    torch.testing.assert_close(path.log_norm, truth, atol=1e-10, rtol=0)
    assert path.certified == {rung: rung != "sampled" for rung in RUNGS}
    for rung in UPPER:
        assert (path.rungs[rung] >= truth - SLACK).all(), rung
    assert (path.rungs["sampled"] <= truth + SLACK).all()


@pytest.mark.parametrize("name", NETS)
def test_no_rung_is_below_the_truth(name):
    holds_at(name, seed=0)


@pytest.mark.parametrize("name", NETS)
def test_rungs_keep_their_order(name):
    model, x = NETS[name].built()
    rungs = path_bound(model, x, segment_passes=30).rungs
    assert (rungs["segments"] <= rungs["mixed"]).all()
    assert (rungs["mixed"] <= rungs["frobenius"] + SLACK).all()
    assert (rungs["mixed"] <= rungs["spectral"] + SLACK).all()


@pytest.mark.parametrize("name", NETS)
def test_no_rung_is_below_the_truth_where_jacobians_are_not_formed(name, monkeypatch):
    """Bounds op by op alone, and Frobenius norms that are estimates."""
    monkeypatch.setattr("pushforward.path.dense.MOST_WORK", 0)
    model, x = NETS[name].built()
    path = path_bound(model, x, rungs=("mixed", "spectral", "segments"), exact_passes=1, seed=0)
    assert path.certified == dict.fromkeys(path.rungs, True)
    for rung, bound in path.rungs.items():
        assert (bound >= path.log_norm - SLACK).all(), rung
        assert (bound < path.log_norm + 20).all(), rung


@pytest.mark.parametrize("name", NETS)
def test_a_larger_budget_never_loosens_segments(name):
    model, x = NETS[name].built()
    budgets = [0, 20, 100, 10**6]
    paths = [path_bound(model, x, rungs="segments", segment_passes=b) for b in budgets]
    bounds = [path.rungs["segments"] for path in paths]
    for less, more in itertools.pairwise(bounds):
        assert (more <= less + 1e-12).all()
    torch.testing.assert_close(bounds[0], path_bound(model, x, rungs="mixed").rungs["mixed"])
    torch.testing.assert_close(bounds[-1], paths[0].log_norm)
    assert paths[0].passes <= paths[-1].passes


@pytest.mark.parametrize("name", NETS)
def test_singular_values_of_the_whole(name):
    model, x = NETS[name].built()
    singular = torch.linalg.svdvals(jacobians(model, x))
    path = path_bound(model, x)
    torch.testing.assert_close(path.log_spectral_norm, singular[:, 0].log())
    share = singular / singular.sum(dim=1, keepdim=True)
    rank = torch.special.entr(share).sum(dim=1).exp()
    torch.testing.assert_close(path.layers[0].effective_rank, rank, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_samples_are_bounded_one_by_one(name):
    """Bounds of a batch are those of its samples, where samples can be told apart."""
    model, x = NETS[name].built()
    whole = path_bound(model, x)
    for number, sample in enumerate(x):
        alone = path_bound(model, sample[None], batch_dim=None)
        for rung in UPPER:
            torch.testing.assert_close(alone.rungs[rung], whole.rungs[rung][number])


@pytest.mark.parametrize("name", NETS)
def test_float32_is_bounded_too(name):
    model, x = NETS[name].built()
    truth = path_bound(model, x, rungs=()).log_norm
    rungs = path_bound(model.float(), x.float()).rungs
    for rung, bound in rungs.items():
        assert (bound >= truth - 1e-4).all(), rung


def test_alignment_is_the_gain_beyond_that_of_independent_directions():
    model, x = NETS["perceptron"].built()
    path = path_bound(model, x)
    widths = [7, 7, 3]
    for row, width in zip(path.layers[:-1], widths, strict=False):
        independent = row.log_fro - math.log(width) / 2
        torch.testing.assert_close(row.alignment, row.log_gain - independent)
        torch.testing.assert_close(row.slack, row.log_fro - row.log_gain)
    assert (path.layers[-1].alignment.abs() < 1e-12).all()


def test_independent_directions_have_no_alignment():
    """The mean over random rotations between two layers."""
    first, last = torch.randn(2, 6, 6, dtype=torch.float64)
    squares = []
    for _ in range(200):
        turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double()
        with torch.no_grad():
            model[0].weight.copy_(turn @ first), model[1].weight.copy_(last)
        row = path_bound(model, torch.zeros(1, 6).double(), rungs="frobenius").layers[0]
        squares.append((2 * row.alignment).exp())
    values = torch.stack(squares)
    assert abs(values.mean() - 1) < 4 * values.std() / math.sqrt(len(squares))


# Large networks


def fifty_layers() -> nn.Module:
    hidden = [layer for _ in range(48) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), *hidden, nn.Linear(32, 5))


def test_fifty_layers():
    torch.manual_seed(0)
    model, x = fifty_layers().double(), torch.randn(2, 20, dtype=torch.float64)
    truth = jacobians(model, x).flatten(1).norm(dim=1).log()
    path = path_bound(model, x)
    gaps = {rung: ((bound - truth) / math.log(10)).mean() for rung, bound in path.rungs.items()}
    assert all((bound >= truth - SLACK).all() for bound in path.rungs.values())
    assert gaps["frobenius"] > 50 > 25 > gaps["mixed"] > gaps["segments"] >= 0


def test_a_residual_network_with_small_images():
    torch.manual_seed(0)
    model = resnet20(width=2, outputs=4).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    truth = jacobians(model, x).flatten(1).norm(dim=1).log()
    path = path_bound(model, x, exact_passes=64, segment_passes=40, seed=0)
    for rung in ("mixed", "spectral", "segments"):
        assert path.certified[rung]
        assert (path.rungs[rung] >= truth - SLACK).all()


@pytest.mark.slow
def test_a_residual_network_of_full_size():
    torch.manual_seed(0)
    model, x = resnet20().eval(), torch.randn(2, 3, 32, 32)
    path = path_bound(model, x, rungs=RUNGS, segment_passes=200, seed=0)
    truth = jacobians(model.double(), x.double()).flatten(1).norm(dim=1).log()
    torch.testing.assert_close(path.log_norm, truth, atol=1e-4, rtol=0)
    assert path.labels["frobenius"] == "estimate"
    for rung in ("mixed", "spectral", "segments"):
        assert path.certified[rung]
        assert (path.rungs[rung] >= truth).all()
    assert (path.rungs["mixed"] < path.rungs["frobenius"] - 40).all()


@pytest.mark.slow
def test_vision_transformer_of_some_size():
    torch.manual_seed(0)
    model = nn.Sequential(VitBlock(32, 4, 64), VitBlock(32, 4, 64), nn.Flatten(), nn.Linear(512, 4))
    model, x = model.double(), torch.randn(2, 16, 32, dtype=torch.float64)
    truth = jacobians(model, x).flatten(1).norm(dim=1).log()
    path = path_bound(model, x)
    assert all((bound >= truth - SLACK).all() for bound in path.rungs.values())
    assert (path.rungs["mixed"] - truth < 2).all()


@pytest.mark.slow
def test_a_trained_network():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16), torch.tensor(labels)
    torch.manual_seed(0)
    sizes = [64, 48, 48, 48, 48]
    pairs = itertools.pairwise(sizes)
    hidden = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(48, 10)).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    assert (model(x).argmax(1) == y).double().mean() > 0.95
    truth = jacobians(model, x[:20]).flatten(1).norm(dim=1).log()
    path = path_bound(model, x[:20], segment_passes=500)
    assert all((bound >= truth - SLACK).all() for bound in path.rungs.values())
    assert (path.rungs["segments"] < path.rungs["frobenius"] - 2).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_rung_underflows_at_any_depth(scale):
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(100)])
    for layer in model:
        nn.init.orthogonal_(layer.weight)
        with torch.no_grad():
            layer.weight *= scale
    rungs = path_bound(model, torch.zeros(1, 3), rungs=RUNGS, seed=0).rungs
    expected = 100 * math.log(scale) + math.log(3) / 2
    for rung in ("mixed", "spectral", "segments", "sampled"):
        assert rungs[rung].item() == pytest.approx(expected, abs=2e-3), rung
    assert rungs["frobenius"].item() == pytest.approx(expected + 99 * math.log(3) / 2, abs=2e-3)


@pytest.mark.parametrize("dead", [0, 2, 4])
def test_a_dead_layer_takes_every_rung_to_minus_infinity(dead):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(model[dead].weight)
    path = path_bound(model.double(), torch.randn(2, 3).double(), rungs=RUNGS, seed=0)
    assert (path.log_norm == -torch.inf).all()
    assert all((bound == -torch.inf).all() for bound in path.rungs.values())
    assert (path.log_spectral_norm == -torch.inf).all()
    assert path.layers[0].effective_rank.tolist() == [0, 0]
    assert "nan" not in json.dumps(path.to_dict())
    assert path.verdict() is None
    path.table(), path.plot()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("name", NETS)
def test_no_rung_is_below_the_truth_at_other_points(name, seed):
    holds_at(name, seed)


@pytest.mark.slow
def test_a_thousand_layers_in_float32():
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(1000)])
    for layer in model:
        nn.init.orthogonal_(layer.weight)
        with torch.no_grad():
            layer.weight *= 1e-3
    path = path_bound(model, torch.zeros(2, 4), rungs=RUNGS, seed=0)
    expected = 1000 * math.log(1e-3) + math.log(2)
    for rung in ("mixed", "spectral", "segments", "sampled"):
        assert path.rungs[rung].tolist() == pytest.approx([expected] * 2, abs=1e-2)
    assert path.log_norm.tolist() == pytest.approx([expected] * 2, abs=1e-2)
