"""Products that are too small for their dtype, within one step or over several."""

import math

import pytest
import torch
from torch import nn

from pushforward.path import path_bound
from pushforward.path.bound import _travel
from pushforward.path.rescue import pulled_safely, scaled_by

F = nn.functional


class Loop(nn.Module):
    """A function of many weights and no submodules: one step."""

    def __init__(self, *weights, function=torch.Tensor.contiguous):
        super().__init__()
        self.weights = nn.ParameterList([w.clone() for w in weights])
        self.function = function

    def forward(self, x):
        for weight in self.weights:
            x = self.function(x @ weight)
        return x


def close(found, truth):
    return (found - truth).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budgets", [{}, {"exact_passes": 0, "segment_passes": 0}])
def test_one_step_that_underflows(dtype, budgets):
    length = 40 if dtype == torch.float16 else 200
    model = Loop(*[torch.eye(4) / 2] * length).to(dtype)
    path = path_bound(model, torch.randn(2, 4).to(dtype), seed=0, **budgets)
    truth = math.log(4) / 2 - length * math.log(2)
    assert len(path.layers) == 1
    assert close(path.log_norm, truth)
    for name, bound in path.rungs.items():
        assert not path.certified[name] or (bound >= path.log_norm - 1e-9).all()
        assert close(bound, truth) or name == "mixed" or not path.certified["frobenius"]
    assert close(path.rungs["spectral"], truth)
    probed = path_bound(model, torch.randn(2, 4).to(dtype), probes=4, seed=0, rungs="sampled")
    assert close(probed.rungs["sampled"], truth)
    assert (probed.log_norm - truth).abs().max() < 2


def test_samples_underflow_each_for_itself():
    """One sample keeps its size, one shrinks by 2^-300, one is dead."""

    class Gated(nn.Module):
        def forward(self, x):
            x = x.relu()
            for _ in range(150):
                x = x * torch.tensor([1.0, 0.25, 1.0])[:, None]
            return x[:, :3].cumsum(-1)

    x = torch.ones(3, 4)
    x[2] = -1
    path = path_bound(Gated(), x)
    once = torch.ones(3, 3).tril().norm().log().item()
    expected = [once, once - 300 * math.log(2), -math.inf]
    assert path.log_norm.tolist() == pytest.approx(expected, abs=1e-4)
    for bound in path.rungs.values():
        assert (bound >= path.log_norm).all()
    assert path.rungs["mixed"][2] == -math.inf


def test_a_dip_within_a_step_that_comes_back():
    """2^-160 and then 2^160: what arrives is of size one again."""
    shrinks, grows = torch.eye(3) * 2.0**-40, torch.eye(3) * 2.0**40
    model = Loop(*[grows] * 4, *[shrinks] * 4)
    path = path_bound(model, torch.ones(1, 3) * 1e-38)
    assert close(path.log_norm, math.log(3) / 2)


def test_a_piece_that_underflows_by_itself():
    """A skip around all: no inner place is one tensor wide, so that the cotangent starts larger."""

    class Skipped(nn.Module):
        def forward(self, x):
            h = x
            for _ in range(130):
                h = h * 0.5
            return (h + h * 0 * x.detach()) * (2.0**-30)

    path = path_bound(Skipped(), torch.ones(1, 3))
    assert close(path.log_norm, math.log(3) / 2 - 160 * math.log(2))


def test_a_zero_that_ops_do_not_explain_is_not_certified():
    """Gated by its input at the end, so that no inner place is a cut; 2^-600 in float32."""

    class Deep(nn.Module):
        def forward(self, x):
            h = x
            for _ in range(300):
                h = h.flip(-1) * 0.25
            return h * torch.sigmoid(x)

    path = path_bound(Deep(), torch.randn(2, 8))
    truth = path_bound(Deep(), torch.randn(2, 8).double())
    assert (truth.log_norm > -math.inf).all()
    assert not path.certified["frobenius"] or (path.rungs["frobenius"] > -math.inf).all()
    for name in ("mixed", "spectral", "segments"):
        assert (path.rungs[name] > -math.inf).all()
    deep = nn.Sequential(Deep(), nn.Linear(8, 8), Deep())
    path = path_bound(deep, torch.randn(2, 8), delta=0.1)
    assert all((path.rungs[name] > -math.inf).all() for name in ("mixed", "segments"))


@pytest.mark.parametrize("function", [torch.Tensor.contiguous, torch.tanh])
def test_rows_in_several_blocks(function, monkeypatch):
    """Each block has a factor of its own, and all of them are brought to one."""
    sizes = torch.tensor([0.5, 0.5, 0.45, 0.5])
    model = Loop(*[torch.diag(sizes)] * 150, function=function)
    x = torch.full((2, 4), 1e-3)
    whole = path_bound(model, x)
    monkeypatch.setattr("pushforward.path.pull.BLOCK_BYTES", 1)
    parts = path_bound(model, x)
    truth = math.log(3) / 2 - 150 * math.log(2)
    assert close(whole.log_norm, truth)
    assert close(parts.log_norm, truth)
    for name, bound in parts.rungs.items():
        assert close(bound, whole.rungs[name])


def test_dead_steps_stay_zero():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    nn.init.constant_(model[0].bias, -100.0)
    path = path_bound(model, torch.randn(5, 4))
    assert all((bound == -math.inf).all() for bound in path.rungs.values())
    assert path.certified == dict.fromkeys(path.rungs, True)


def test_zeros_of_ops_without_a_rule():
    class Zero(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 0

    class Model(nn.Module):
        def forward(self, x):
            return Zero.apply(x)

    assert not any(path_bound(Model(), torch.ones(1, 3)).certified.values())
    assert all(path_bound(Model(), torch.ones(1, 3).double()).certified.values())


def test_rows_of_one_sample_share_a_factor():
    """Rows of sizes 1, 2^-100 and 0 keep their proportions, beside a logarithm."""
    model = Loop(*[torch.diag(torch.tensor([0.5, 0.25, 0.0]))] * 150)
    with torch.no_grad():
        journey, _ = _travel(model, torch.randn(2, 3), 0, None, thorough=True)
        seeds = torch.eye(3)[:, None].expand(3, 2, 3).contiguous()
        rows, lost = pulled_safely(journey.passes, journey.steps[0], seeds, 2)
    sizes = rows.double().norm(dim=-1).log() + lost
    assert close(sizes[0], -150 * math.log(2))
    assert (sizes[1] < -250 * math.log(2)).all()
    assert (sizes[2] == -math.inf).all()
    assert torch.equal(scaled_by(rows, torch.zeros(2), 2), rows)
    scaled = scaled_by(rows, torch.tensor([1.0, 0.0]).double(), 2)
    torch.testing.assert_close(scaled[:, 0], math.e * rows[:, 0])
    assert torch.equal(scaled[:, 1], rows[:, 1])
