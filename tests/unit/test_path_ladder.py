"""What the rungs and estimates of `path_bound` are made of: budgets, probes, probable bounds."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nets import NETS, resnet20
from oracles import loop_jacobian
from pushforward.errors import CouplingError, DifferentiationError, InputError, ShapeError
from pushforward.path import dense, lanczos, local, path_bound, rungs
from pushforward.path.bound import _travel
from pushforward.path.dense import Norms
from pushforward.path.groups import exact_groups, log_best_chain
from pushforward.path.samples import orthonormal
from pushforward.path.sampling import chi_squared_quantile
from pushforward.path.spectra import spectrum


@pytest.fixture(autouse=True)
def _failures_of_rules_are_seen(monkeypatch):
    monkeypatch.setattr(local, "TOLERATED", (RuntimeError, AttributeError, TypeError))


def chain(*logs):
    """Norms of a chain from pairs (log_fro, log_spectral)."""
    return [Norms(*torch.tensor(pair, dtype=torch.float64)[:, None]) for pair in logs]


def brute_force(singles, groups):
    """The least over all divisions and all places of the Frobenius norm, one by one."""
    table = {(i, i + 1): norms for i, norms in enumerate(singles)} | groups

    def divisions(first):
        if first == len(singles):
            yield []
        for (start, stop), norms in table.items():
            if start == first:
                yield from ([norms, *rest] for rest in divisions(stop))

    return min(
        sum(n.log_fro.item() if at == place else n.log_spectral.item() for at, n in enumerate(ns))
        for ns in divisions(0)
        for place in range(len(ns))
    )


@pytest.mark.parametrize("seed", range(8))
def test_dynamic_programming_finds_the_best_division(seed):
    torch.manual_seed(seed)
    numbers = torch.randn(5, 2, dtype=torch.float64).sort(dim=1, descending=True)[0]
    singles = chain(*numbers.tolist())
    spans = [(0, 2), (1, 3), (2, 5), (0, 4), (3, 5)]
    groups = dict(zip(spans, chain(*torch.randn(5, 2).double().tolist()), strict=True))
    expected = brute_force(singles, groups)
    assert log_best_chain(singles, groups).item() == pytest.approx(expected)
    alone = log_best_chain(singles, {}).item()
    assert alone == pytest.approx(rungs.log_mixed(singles).item())
    assert expected <= alone


def test_groups_are_a_prefix_of_one_order():
    model, x = NETS["vision transformer"].built()
    with torch.no_grad():
        journey, _ = _travel(model, x, 0, None, thorough=True)
        steps, samples = journey.steps, journey.samples
        all_groups = list(exact_groups(journey.passes, steps, samples, 10**6))
        costs = [dense.width(steps[j - 1].stop, samples) * (j - i) for i, j in all_groups]
        assert len(all_groups) == len(steps) * (len(steps) - 1) // 2
        assert costs == sorted(costs)
        for budget in (0, costs[0] - 1, costs[0], sum(costs[:2]), sum(costs) - 1):
            found = list(exact_groups(journey.passes, steps, samples, budget))
            spent = sum(costs[: len(found)])
            assert found == all_groups[: len(found)]
            assert spent <= budget < spent + costs[len(found)]


def test_budgets_may_be_without_end():
    model, x = NETS["perceptron"].built()
    path = path_bound(model, x, exact_passes=math.inf, segment_passes=math.inf)
    torch.testing.assert_close(path.rungs["segments"], path.log_norm)


def test_norms_of_groups_are_those_of_their_products():
    model, x = NETS["perceptron"].built()
    with torch.no_grad():
        journey, _ = _travel(model, x, 0, None, thorough=True)
        norms = dense.exact_norms(journey.passes, journey.steps[1:], journey.samples)
    hidden = model[0](x).detach()
    found = [loop_jacobian(lambda h: model[2](model[1](h)), h) for h in hidden]
    singular = torch.linalg.svdvals(torch.stack(found))
    torch.testing.assert_close(norms.log_fro, singular.norm(dim=1).log())
    torch.testing.assert_close(norms.log_spectral, singular[:, 0].log())


def test_columns_of_ops_without_a_second_derivative_are_rows():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.repeat_interleave(20, dim=-1)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient.unflatten(-1, (-1, 20)).sum(-1)

    class Wide(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    row = path_bound(Wide(), torch.randn(3, 2)).layers[0]
    torch.testing.assert_close(row.log_spectral.exp(), torch.full((3,), 20.0).double().sqrt())


def test_the_narrowest_width_counts():
    """Three orthogonal layers with a waist of two: J has rank two and norm one."""
    model = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in ((6, 2), (2, 5), (5, 5))])
    for layer in model.double():
        nn.init.orthogonal_(layer.weight)
    path = path_bound(model, torch.zeros(1, 6).double())
    assert path.rungs["spectral"].item() == pytest.approx(math.log(2) / 2)
    assert path.log_norm.item() == pytest.approx(math.log(2) / 2)
    assert path.rungs["frobenius"].item() == pytest.approx((math.log(2) * 2 + math.log(5)) / 2)


# Frobenius norms that are estimates, spectral norms that are probable


def wide_residual():
    torch.manual_seed(0)
    return resnet20(width=2, outputs=3).double().eval(), torch.randn(2, 3, 8, 8).double()


def test_an_estimated_norm_is_replaced_by_a_bound():
    model, x = wide_residual()
    exact = path_bound(model, x)
    path = path_bound(model, x, exact_passes=8, seed=0)
    assert path.certified == {name: name != "frobenius" for name in path.rungs}
    assert any(not row.exact for row in path.layers)
    for row, truth in zip(path.layers, exact.layers, strict=True):
        assert (row.log_spectral >= truth.log_spectral - 1e-9).all()
        assert row.spectral_label == "certified"


def test_what_has_no_bound_at_all_is_an_estimate(monkeypatch):
    monkeypatch.setattr("pushforward.path.local.MOST_ROWS", 0)

    class Inverse(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x.unflatten(-1, (4, 4)) + 5 * torch.eye(4).double()).flatten(1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), Inverse(), nn.Linear(16, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    path = path_bound(model, x, exact_passes=4, seed=1)
    assert path.certified == dict.fromkeys(path.rungs, False)
    assert [row.spectral_label for row in path.layers] == ["certified", "estimate", "certified"]
    assert "‖·‖_2 estimate" in path.table()
    assert path.seed == 1
    sure = path_bound(model, x, exact_passes=4, delta=0.01, seed=1)
    assert sure.labels["spectral"] == "holds with probability 0.99"
    assert sure.layers[1].spectral_label == "probable"
    assert not sure.certified["spectral"]


@pytest.mark.parametrize("delta", [0.5, 0.01, 1e-6])
def test_probable_bounds(delta, monkeypatch):
    """The bound is above the norm about as often as it says, and tighter than what is certain."""
    monkeypatch.setattr(lanczos, "ITERATIONS", 12)
    monkeypatch.setattr(dense, "MOST_WORK", 0)
    model, x = wide_residual()
    certain = path_bound(model, x, rungs="spectral", exact_passes=0, seed=0)
    truth = path_bound(model, x, rungs=()).log_norm
    path = path_bound(model, x, rungs="spectral", exact_passes=0, delta=delta, seed=0)
    assert path.labels["spectral"] in (f"holds with probability {1 - delta:g}", "certified")
    assert (path.rungs["spectral"] >= truth).all()
    assert (path.rungs["spectral"] <= certain.rungs["spectral"]).all()
    if delta == 0.5:
        assert (path.rungs["spectral"] < certain.rungs["spectral"] - 1).all()
        assert "bound that holds with probability 0.5" in path.table()


def test_probable_bounds_fail_no_more_often_than_they_say(monkeypatch):
    """With few products the probability is used up: failures are there, and rare enough."""
    monkeypatch.setattr(lanczos, "ITERATIONS", 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 60)).double()
    truth = torch.linalg.matrix_norm(model[0].weight.detach(), ord=2).log()
    with torch.no_grad():
        journey, _ = _travel(model, torch.zeros(1, 60).double(), 0, None, thorough=True)
        step, generator = journey.steps[0], torch.Generator().manual_seed(0)
        for delta in (0.9, 0.5):
            draws = [
                lanczos.log_probable(journey.passes, step, 1, delta, generator) for _ in range(200)
            ]
            found = torch.stack([draw for draw in draws if draw is not None])
            assert (found < truth).double().mean() <= delta


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_lanczos_on_low_ranks_is_exact(rank):
    torch.manual_seed(0)
    weight = torch.randn(9, rank).double() @ torch.randn(rank, 7).double()
    model = nn.Linear(7, 9).double()
    with torch.no_grad():
        model.weight.copy_(weight)
        journey, _ = _travel(model, torch.zeros(2, 7).double(), 0, None, thorough=True)
        draw = torch.Generator().manual_seed(0)
        found = lanczos.log_probable(journey.passes, journey.steps[0], 2, 0.1, draw)
    expected = torch.linalg.matrix_norm(weight, ord=2).log() if rank else torch.tensor(-math.inf)
    torch.testing.assert_close(found, expected.double().expand(2))


def test_without_a_second_derivative_there_is_no_probable_bound():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.flip(-1) * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient.flip(-1) * 2

    class Turn(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    x = torch.randn(2, 5, dtype=torch.float64)
    path = path_bound(Turn(), x, delta=0.1, exact_passes=0, seed=0)
    assert path.layers[0].spectral_label == "estimate"
    assert path.layers[0].log_spectral.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
def test_spectra_of_long_rows_in_float32(scale):
    """Products of float32 rows that are too long to be copied, of any size."""
    torch.manual_seed(0)
    rows = torch.randn(3, 2, 40_000, dtype=torch.float64)
    rows[1] = rows[0] + 0.1 * rows[1]
    singular = torch.linalg.svdvals(rows.transpose(0, 1))
    norms = singular.norm(dim=1)
    found = spectrum((rows * scale).float(), norms * scale, 2)
    torch.testing.assert_close(found.log_share, (singular[:, 0] / norms).log(), atol=1e-5, rtol=0)
    share = singular / singular.sum(dim=1, keepdim=True)
    rank = torch.special.entr(share).sum(dim=1).exp()
    torch.testing.assert_close(found.effective_rank, rank, atol=1e-3, rtol=0)


# Estimated gains


def test_estimated_squares_are_unbiased():
    model, x = NETS["vision transformer"].built()
    exact = path_bound(model, x, rungs=())
    runs = [path_bound(model, x, rungs=(), probes=2, seed=s).log_norm for s in range(80)]
    squares = torch.stack([(2 * run).exp() for run in runs])
    spread = squares.std(0) / math.sqrt(len(runs))
    assert ((squares.mean(0) - (2 * exact.log_norm).exp()).abs() < 4 * spread).all()


@pytest.mark.parametrize("probes", [1, 24])
@pytest.mark.parametrize("name", ["vision transformer", "rank one"])
def test_intervals_cover(name, probes):
    if name == "rank one":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 5), nn.Linear(5, 3)).double()
        x = torch.randn(2, 4).double()
    else:
        model, x = NETS[name].built(samples=2)
    exact = path_bound(model, x, rungs=())
    hits, gain_hits, total = 0, 0, 0
    for seed in range(60):
        path = path_bound(model, x, rungs=(), probes=probes, seed=seed)
        low, high = path.interval
        hits += ((low <= exact.log_norm) & (exact.log_norm <= high)).sum().item()
        for row, truth in zip(path.layers, exact.layers, strict=True):
            low, high = row.gain_interval
            inside = (low - 1e-12 <= truth.log_gain) & (truth.log_gain <= high + 1e-12)
            gain_hits, total = gain_hits + inside.sum().item(), total + inside.numel()
    assert hits >= 0.95 * 120 - 2.5 * math.sqrt(0.95 * 0.05 * 120)
    assert gain_hits >= 0.92 * total


def test_estimated_gains_add_up_and_repeat():
    model, x = NETS["perceptron"].built()
    path = path_bound(model, x, probes=3, seed=5)
    again = path_bound(model, x, probes=3, seed=5)
    assert torch.equal(path.log_norm, again.log_norm)
    total = torch.stack([row.log_gain for row in path.layers]).sum(0)
    torch.testing.assert_close(total, path.log_norm)
    assert path.log_spectral_norm is None
    assert all(row.effective_rank is None for row in path.layers)
    assert path.certified == dict.fromkeys(path.rungs, True)
    fresh = path_bound(model, x, rungs=(), probes=1)
    replay = path_bound(model, x, rungs=(), probes=1, seed=fresh.seed)
    assert torch.equal(fresh.log_norm, replay.log_norm)
    one = path_bound(model, x[:1], rungs=(), probes=2, batch_dim=None, seed=0)
    assert one.interval[0].shape == one.layers[0].gain_interval[1].shape == ()


def test_estimates_do_not_underflow():
    layers = [nn.Linear(3, 3, bias=False) for _ in range(60)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
        layer.weight.data *= 1e-3
    path = path_bound(nn.Sequential(*layers), torch.zeros(2, 3), rungs=(), probes=20, seed=0)
    low, high = path.interval
    truth = 60 * math.log(1e-3) + math.log(3) / 2
    assert ((low < truth) & (truth < high)).all()


def test_estimated_gains_of_a_zero_jacobian():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[1].weight)
    for probes in (1, 20):
        path = path_bound(model, torch.randn(2, 3).double(), rungs=(), probes=probes, seed=0)
        assert (path.log_norm == -math.inf).all()
        assert not torch.stack([row.gain_interval[0] for row in path.layers]).isnan().any()


@pytest.mark.parametrize("freedom", [1, 7, 64])
@pytest.mark.parametrize("probability", [0.025, 0.9875])
def test_quantiles_of_chi_squared(freedom, probability):
    scipy = pytest.importorskip("scipy.stats")
    expected = scipy.chi2.ppf(probability, freedom)
    assert chi_squared_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9)


# Gains alone


@pytest.mark.parametrize("name", NETS)
def test_gains_alone_are_the_same_in_fewer_passes(name):
    model, x = NETS[name].built()
    quick, full = path_bound(model, x, rungs=()), path_bound(model, x)
    assert [row.name for row in quick.layers] == [row.name for row in full.layers]
    for one, other in zip(quick.layers, full.layers, strict=True):
        torch.testing.assert_close(one.log_gain, other.log_gain, atol=1e-10, rtol=0)
    torch.testing.assert_close(quick.log_spectral_norm, full.log_spectral_norm)
    outputs = sum(leaf[0].numel() for leaf in torch.utils._pytree.tree_leaves(model(x)))
    assert quick.passes == outputs + 1  # one more, to see that samples stay apart


@pytest.mark.parametrize("size", [1, 2, 9])
def test_directions_of_the_output_are_orthonormal(size):
    model = nn.Linear(2, size).double()
    with torch.no_grad():
        journey, _ = _travel(model, torch.zeros(3, 2).double(), 0, None, thorough=False)
    known, place = journey.known, journey.steps[-1].stop
    parts = [orthonormal(place, 3, known.direction, first, first + 1) for first in range(size)]
    rows = torch.cat(parts)[:, 0]
    torch.testing.assert_close(rows @ rows.T, torch.eye(size).double())
    torch.testing.assert_close(rows[0].abs(), known.direction.abs())


def test_samples_that_meet_on_the_way_are_merged_when_only_gains_are_asked_for():
    class Meet(nn.Module):
        def forward(self, x):
            return x + x.roll(1, 0)

    class Part(nn.Module):
        def forward(self, y):
            power = torch.arange(len(y))[:, None]
            signs = torch.where((power - power.T) % len(y) % 2 == 0, 1.0, -1.0).to(y) / 2
            return signs @ y

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Meet(), Part(), nn.Linear(4, 2)).double()
    x = torch.randn(3, 3, dtype=torch.float64)
    path = path_bound(model, x, rungs=())
    assert [row.name for row in path.layers] == ["0", "1 … 2", "3"]
    with pytest.raises(CouplingError, match="they influence each other"):
        path_bound(model[:2], x, rungs=())


def test_gains_alone_of_many_outputs_have_no_spectral_norm():
    model = nn.Linear(300, 300).double()
    x = torch.zeros(2, 300, dtype=torch.float64)
    assert path_bound(model, x, rungs=()).log_spectral_norm is None
    path = path_bound(model, x, rungs="frobenius")
    truth = torch.linalg.matrix_norm(model.weight.detach(), ord=2).log()
    torch.testing.assert_close(path.log_spectral_norm, truth.expand(2))
    assert path.layers[0].effective_rank is None


# Arguments


@pytest.mark.parametrize("probes", [0, -3, 2.5, True, "many"])
def test_probes_out_of_range(probes):
    with pytest.raises(InputError, match="probes expects a positive number of random cotangents"):
        path_bound(nn.Linear(2, 2), torch.zeros(1, 2), probes=probes)


@pytest.mark.parametrize("name", ["exact_passes", "segment_passes"])
def test_budgets_out_of_range(name):
    with pytest.raises(InputError, match=f"{name} expects a number of passes, 0 or more, got -1"):
        path_bound(nn.Linear(2, 2), torch.zeros(1, 2), **{name: -1})


@pytest.mark.parametrize("delta", [-0.1, 1.0, math.nan, None, "small", True])
def test_probabilities_out_of_range(delta):
    with pytest.raises(InputError, match="delta expects a probability from 0 to below 1"):
        path_bound(nn.Linear(2, 2), torch.zeros(1, 2), delta=delta)


@pytest.mark.parametrize("name", ["exact_passes", "segment_passes"])
@pytest.mark.parametrize("budget", ["many", None, math.nan, True])
def test_budgets_that_are_no_numbers(name, budget):
    message = f"{name} expects a number of passes, 0 or more, got {budget!r}"
    with pytest.raises(InputError, match=message):
        path_bound(nn.Linear(2, 2), torch.zeros(1, 2), **{name: budget})


@pytest.mark.parametrize("wanted", [None, 3, ["frobenius", None]])
def test_rungs_that_are_no_names(wanted):
    with pytest.raises(InputError, match=r"rungs expects names among frobenius.*\(\) computes"):
        path_bound(nn.Linear(2, 2), torch.zeros(1, 2), rungs=wanted)


@pytest.mark.parametrize("seed", ["x", 1.5, True, 2**64, -(2**63) - 1])
def test_seeds_that_are_no_whole_numbers(seed):
    with pytest.raises(InputError, match="seed expects a whole number of 64 bits, got"):
        path_bound(nn.Linear(2, 2), torch.zeros(1, 2), seed=seed)


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1])
def test_seeds_of_64_bits(seed):
    assert path_bound(nn.Linear(2, 2), torch.zeros(1, 2), probes=1, seed=seed).seed == seed


def test_models_without_outputs():
    class Nothing(nn.Module):
        def forward(self, x):
            return x[:, :0]

    with pytest.raises(ShapeError, match=r"expects a model with outputs, got \(2, 0\)"):
        path_bound(Nothing(), torch.zeros(2, 3))


def test_reentrant_checkpoints_say_what_to_do():
    class Saving(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.layer, self.reentrant = nn.Linear(3, 3), reentrant

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=self.reentrant)

    for samples, wanted in ((1, ()), (2, ()), (1, "mixed"), (2, "mixed")):
        with pytest.raises(DifferentiationError, match="with use_reentrant=False"):
            path_bound(Saving(True), torch.randn(samples, 3), rungs=wanted)
    assert path_bound(Saving(False), torch.randn(2, 3)).log_norm.isfinite().all()
