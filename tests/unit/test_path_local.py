"""Norms of single ops against the singular values of their Jacobians, and how samples lie."""

import math

import pytest
import torch
from torch import Tensor, nn

from pushforward.path import local, path_bound
from pushforward.path.bound import _travel
from pushforward.path.dense import exact_norms
from pushforward.path.follow import log_spectral_by_ops

F = nn.functional


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.fixture(autouse=True)
def _failures_of_rules_are_seen(monkeypatch):
    monkeypatch.setattr(local, "TOLERATED", (RuntimeError, AttributeError, TypeError))


def compared(function, *shape, samples=3, dtype=torch.float64, seed=0):
    """The bound op by op less the norm itself, per sample, and whether it is called exact."""
    torch.manual_seed(seed)
    x = torch.randn(samples, *shape, dtype=dtype)
    module = function if isinstance(function, nn.Module) else Function(function)
    with torch.no_grad():
        journey, _ = _travel(module.to(dtype), x, 0, None, thorough=True)
        (step,) = journey.steps
        found = log_spectral_by_ops(journey.passes, step, samples)
        if found is None:
            return None, False
        truth = exact_norms(journey.passes, [step], samples).log_spectral
    return torch.where(found.log == truth, 0.0, found.log - truth), found.exact


W = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6).sin()
B = torch.linspace(-2, 3, 6, dtype=torch.float64)

# Functions whose norm is found exactly.
EXACT = {
    "nothing": lambda x: x,
    "a product with a matrix": lambda x: x @ W.T,
    "a matrix on the left": lambda x: W[:4, :4] @ x,
    "transposed, flattened, and a product": lambda x: (x.transpose(1, 2) @ W[:4, :4]).flatten(1),
    "a slice": lambda x: 3 * x[:, 1:, ::2],
    "parts put together again": lambda x: torch.cat([x * 2, x.new_ones(len(x), 1, 6)], dim=1),
    "padded": lambda x: F.pad(x * 1.5, (1, 2)),
    "cumulated": lambda x: x.cumsum(-1),
    "a sum": lambda x: x.sum(-1),
    "a mean": lambda x: x.mean((1, 2)),
    "a norm": lambda x: x.norm(dim=-1),
    "a deviation": lambda x: x.std(dim=1, keepdim=True),
    "logsumexp": lambda x: x.logsumexp(-1),
    "a product of all": lambda x: x.prod(-1),
    "repeated": lambda x: x.repeat(1, 2, 3),
    "expanded": lambda x: x[:, :, None].expand(-1, -1, 5, -1),
    "picked with repetition": lambda x: x[:, [0, 0, 2, 3, 3, 3]],
    "gathered": lambda x: x.gather(1, torch.zeros(len(x), 2, 6, dtype=torch.long)),
    "sorted": lambda x: x.sort(-1)[0] * 2,
    "the largest": lambda x: x.max(-1)[0],
    "the largest, by another op": lambda x: x.amax(-1),
    "windows": lambda x: x.unfold(-1, 3, 1),
    "a chain of elementwise functions": lambda x: torch.exp(-(x**2)) * torch.sin(x) + x / 3,
    "gated by itself": lambda x: x * torch.sigmoid(1.7 * x),
    "chosen": lambda x: torch.where(x > 0, x**2, -x),
    "clamped and masked": lambda x: x.clamp(-1, 0.5).masked_fill(x > 0.3, 0.0) * 4,
    "times a vector": lambda x: x * B,
    "divided": lambda x: x / (1 + B**2),
    "glu": lambda x: F.glu(x, -1),
    "log softmax": lambda x: F.log_softmax(x, dim=1),
    "dropout": lambda x: F.dropout(x, 0.5),
    "max pool": lambda x: F.max_pool2d(x[:, None], 2, stride=1),
    "reflected": lambda x: F.pad(x, (2, 1), mode="reflect"),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2),
}

# Functions with a bound, and the largest factor by which it may miss.
BOUNDED = {
    "softmax": (lambda x: x.softmax(-1), 1.7),
    "layer norm": (lambda x: F.layer_norm(x, (6,), B), 1.4),
    "group norm": (lambda x: F.group_norm(x, 2, B[:4]), 1.1),
    "instance norm": (lambda x: F.instance_norm(x), 1.1),
    "average pool": (lambda x: F.avg_pool1d(x, 3, 2, 1), 1.5),
    "adaptive average": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), 1.5),
    "bilinear": (lambda x: F.interpolate(x[:, None], (5, 7), mode="bilinear"), 1.5),
    "a convolution": (nn.Conv1d(4, 3, 3, padding=1), 1.3),
    "a convolution without padding": (nn.Conv1d(4, 3, 3, padding="valid"), 1.3),
    "a plane without padding": (
        lambda x: F.conv2d(x[:, None], W[None, None, :2, :3], padding="valid"),
        1.3,
    ),
    "a space without padding": (
        lambda x: F.conv3d(x[:, None, None], W[None, None, None, :2, :3], padding="valid"),
        1.3,
    ),
    "a transposed convolution": (nn.ConvTranspose1d(4, 3, 3, stride=2), 1.3),
    "a skip": (lambda x: x + torch.tanh(x @ W.T @ W), 1.5),
    "branches side by side": (lambda x: torch.cat([x @ W.T, x.sin()], dim=-1), 1.2),
    "stacked": (lambda x: torch.stack([x, x.flip(1)], dim=1), 1.0001),
    "a choice between branches": (lambda x: torch.where(x > 0, x.flip(-1), x.roll(1, 1)), 1.5),
    "products of branches": (lambda x: (x @ W[:, :6].T[:, :4]) * x.mean(-1, keepdim=True), 2.0),
    "a quotient of branches": (lambda x: x.sin() / (2 + x.mean(-1, keepdim=True).cos()), 2.0),
    "attention scores": (lambda x: x @ x.transpose(1, 2), 1.5),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), 6.0),
    "attention, flattened": (lambda x: (x @ x.mT / 2).softmax(-1) @ x, 6.0),
    "rms": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), 1.2),
    "rms with a weight": (lambda x: x * torch.rsqrt(B[0] ** 2 + (x**2).mean(-1, True)), 1.2),
    "rms without a constant": (lambda x: torch.rsqrt((x**2).mean(-1, keepdim=True)) * x, 1.2),
    "normalised": (lambda x: F.normalize(x, dim=-1), 3.0),
    "broadcast sum": (lambda x: x + x.mean(-1, keepdim=True), 1.5),
    "largest of two": (lambda x: torch.maximum(x, x.roll(1, -1)), 1.5),
    "smaller of a row and all": (lambda x: torch.minimum(x[:, :1], x.roll(1, 2)), 2.0),
    "ties": (lambda x: torch.maximum(x @ W.T, (x @ W.T).clamp(min=-99)), 1.0001),
    "ties everywhere": (lambda x: torch.maximum(x.tanh() * 0, x.sin() * 0 + x.cos() * 0), 1.6),
    "ties with a skip": (lambda x: torch.minimum(x * 2, (x @ W.T @ W).relu() + x * 2), 4.0),
    "shares": (lambda x: torch.cat([a * 2 for a in x.split(2, dim=1)], dim=1), 1.5),
    "an unbound axis": (lambda x: torch.stack([a.sin() for a in x.unbind(1)]).mean(0), 3.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_norms(name, monkeypatch):
    monkeypatch.setattr(local, "MOST_ROWS", -1)  # a rule must do it
    gap, exact = compared(EXACT[name], 4, 6)
    assert exact
    assert (gap.abs() < 1e-9).all()


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bounds(name, seed, monkeypatch):
    monkeypatch.setattr(local, "MOST_ROWS", -1)
    function, factor = BOUNDED[name]
    gap, exact = compared(function, 4, 6, seed=seed)
    assert (gap >= -1e-9).all()
    assert (gap <= math.log(factor)).all()
    assert not exact


@pytest.mark.parametrize("name", [*EXACT, *BOUNDED])
def test_bounds_of_one_sample_and_in_float32(name):
    function = EXACT.get(name) or BOUNDED[name][0]
    gap, _ = compared(function, 4, 6, samples=1)
    assert (gap >= -1e-9).all()
    if name not in ("dropout", "divided", "times a vector", "layer norm", "group norm"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(__name__ + ".W", W.float())
            gap, _ = compared(function, 4, 6, dtype=torch.float32)
    assert (gap >= -1e-4).all()


def test_ops_without_a_rule_are_taken_row_by_row():
    def tent(x):
        y = x.clone()
        y[:, 1:3] *= 2
        return torch.linalg.solve(torch.eye(6, dtype=x.dtype) * 2 + W.T @ W, y.mT)

    gap, _ = compared(tent, 4, 6)
    assert (gap >= -1e-9).all()
    assert (gap < 1).all()


def test_what_has_no_rule_and_many_rows_has_no_bound(monkeypatch):
    monkeypatch.setattr(local, "MOST_ROWS", 3)
    assert compared(lambda x: torch.linalg.pinv(x).sin(), 4, 6) == (None, False)


def test_complex_numbers_and_custom_functions_have_no_bound():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    assert compared(lambda x: torch.fft.fft(x).abs(), 4, 6) == (None, False)
    assert compared(Double.apply, 4, 6) == (None, False)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.transpose(0, 1).sin().transpose(0, 1) * 2,
        lambda x: x.transpose(0, 1).reshape(-1, 6).sin().reshape(4, -1, 6).transpose(0, 1),
        lambda x: x.flatten(0, 1)[None].sin().view(x.shape),
        lambda x: x.permute(2, 1, 0).sin().permute(2, 1, 0),
    ],
    ids=["time first", "time first, flattened", "behind a 1", "samples last"],
)
def test_samples_are_told_apart_wherever_they_lie(function):
    gap, _ = compared(function, 4, 6, samples=5)
    assert (gap.abs() < 1e-9).all()


def test_samples_that_cannot_be_told_apart_share_a_bound():
    """Each sample is moved to places of its own: no axis holds the samples."""

    def scattered(x):
        order = torch.tensor([0, 3, 1, 4, 2, 5])
        return x.reshape(-1)[order].sin()[order.argsort()].view(x.shape)

    gap, exact = compared(scattered, 2, samples=3)
    assert not exact
    assert (gap >= -1e-12).all()
    assert gap.min() < 1e-9  # the largest of all is the norm for one of the samples


def test_dead_steps_are_minus_infinity():
    gap, _ = compared(lambda x: x * 0, 4, 6)
    assert (gap == 0).all()


def test_wide_matrices_get_an_inequality(monkeypatch):
    monkeypatch.setattr("pushforward.path.spectrum.LARGEST_SIDE", 3)
    gap, exact = compared(lambda x: x @ W.T, 4, 6)
    assert not exact
    assert (gap > 1e-3).all()


def test_a_rule_that_fails_gives_no_bound(monkeypatch):
    def broken(op, number):
        raise ValueError("a rule that is wrong")

    monkeypatch.setitem(local.RULES, "Cumsum", broken)
    with pytest.raises(ValueError, match="a rule that is wrong"):
        compared(lambda x: x.cumsum(-1), 4, 6)
    monkeypatch.setattr(local, "TOLERATED", Exception)
    assert compared(lambda x: x.cumsum(-1), 4, 6) == (None, False)


def test_ties_share_what_they_choose():
    """Where both are equal each gets half: twice half of the same is the whole."""

    def tied(x):
        h = x @ W.T
        return torch.maximum(h, F.relu(h) - F.relu(-h))

    gap, _ = compared(tied, 4, 6)
    assert (gap >= -1e-9).all()
    path = path_bound(
        Function(lambda x: (lambda h: torch.maximum(h, F.relu(h)))(F.avg_pool1d(x, 2))),
        torch.rand(1, 1, 8192, generator=torch.Generator().manual_seed(0)).double(),
        probes=4,
        seed=0,
        segment_passes=0,
    )
    assert path.layers[0].spectral_label == "certified"
    assert path.layers[0].log_spectral.item() >= math.log(0.5) / 2 - 1e-12


MANY = torch.zeros(4000, dtype=torch.long)
COUNTED = {
    "index": lambda x: x[:, MANY],
    "index by two": lambda x: x[:, None].expand(-1, 2, -1)[:, MANY, MANY],
    "index_select": lambda x: x.index_select(1, MANY),
    "gather": lambda x: x.gather(1, MANY.expand(len(x), -1)),
    "take": lambda x: x.take(MANY),
    "expand": lambda x: x[:, :1].expand(-1, 4000),
    "repeat": lambda x: x.repeat(1, 1000),
    "nearest": lambda x: F.interpolate(x[:, None], size=8000),
    "linear": lambda x: F.interpolate(x[:, None], size=8000, mode="linear"),
    "maximum": lambda x: torch.maximum(x[:, :1], (x[:, 1:2] - 9).expand(-1, 4000)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", COUNTED)
def test_counts_go_beyond_what_short_dtypes_can_count(name, dtype):
    """Against the same function in float64, which has the same Jacobian."""
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        found, truth = (self_bound(COUNTED[name], each) for each in (x, x.double()))
    assert found is not None
    assert (found >= truth - 1e-3).all()
    assert (found <= truth + 0.5).all()


def self_bound(function, x):
    """The bound op by op; in float64 the norm itself."""
    journey, _ = _travel(Function(function), x, None, None, thorough=True)
    if x.dtype == torch.float64:
        return exact_norms(journey.passes, journey.steps, 1).log_spectral
    found = log_spectral_by_ops(journey.passes, journey.steps[0], 1)
    return None if found is None else found.log


def test_short_dtypes_in_ops_that_add_in_them_alone():
    """Replication adds in bfloat16 and stops at 256; pooling stays far below."""
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        assert self_bound(lambda x: F.pad(x[:, None], (500, 500), mode="replicate"), x) is None

        def few(x):
            return F.avg_pool2d(F.pad(x[:, None], (5, 5), mode="replicate"), (1, 3), 1)

        assert self_bound(few, x) >= self_bound(few, x.double())
        dead = torch.zeros(1, 1, dtype=torch.bfloat16)
        assert self_bound(lambda x: x.expand(1, 3) * 0, dead) == -torch.inf


def test_long_functions_are_not_followed(monkeypatch):
    monkeypatch.setattr("pushforward.path.follow.MOST_NODES", 5)
    assert compared(lambda x: x.sin().cos().sin().cos().exp(), 4, 6) == (None, False)
    assert compared(lambda x: x.sin(), 4, 6)[1]


def test_a_root_mean_square_along_another_axis_is_no_normalisation():
    """Where the mean is broadcast along the wrong axis, only the product rule holds."""

    def wrong(x):
        return x * torch.rsqrt(x.pow(2).mean(-1)[:, None, :] + 1e-6)

    gap, _ = compared(wrong, 4, 4)
    assert (gap >= -1e-9).all()
    for spelling in (
        lambda x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True)),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) * 0.2),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - 0.1),
        lambda x: x * torch.rsqrt(x.sin().pow(2).mean(-1, keepdim=True)),
    ):
        gap, _ = compared(spelling, 4, 4, seed=3)
        assert (gap >= -1e-9).all()


INVERSE_RMS = {
    "a gate of the same input": lambda x: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (100 * (x[..., :1] - 0.1)) ** 2)
    ),
    "a constant of more rows": lambda x: (
        x[:, :1]
        * torch.rsqrt(x[:, :1].pow(2).mean(-1, keepdim=True) + torch.full((8, 1), 1e-3).double())
    ),
    "a shifted input": lambda x: x * torch.rsqrt((x + 5).pow(2).mean(-1, keepdim=True)),
    "a mean taken twice": lambda x: (lambda m: x * torch.rsqrt(m + m))(
        x.pow(2).mean(-1, keepdim=True)
    ),
    "taken away": lambda x: (
        x * torch.rsqrt(torch.add(40 * torch.ones(()), x.pow(2).mean(-1, keepdim=True), alpha=-9))
    ),
}


@pytest.mark.parametrize("name", INVERSE_RMS)
@pytest.mark.parametrize("point", [0.1045, 0.3, 2.0])
def test_what_is_like_a_root_mean_square_and_is_none(name, point):
    """The addend depends on x, or makes more of the factor than one number per mean."""
    torch.manual_seed(0)
    x = torch.rand(3, 4, 6, dtype=torch.float64) * 0.1 + point
    x[..., 0] = point
    with torch.no_grad():
        journey, _ = _travel(Function(INVERSE_RMS[name]), x, 0, None, thorough=True)
        found = log_spectral_by_ops(journey.passes, journey.steps[0], 3)
        truth = exact_norms(journey.passes, journey.steps, 3).log_spectral
    assert (found.log >= truth - 1e-9).all()


# Rules that need a gate of their own


class Mixing(nn.Module):
    """Batch norm in training couples the samples, so that all of them are one map."""

    def __init__(self, affine):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=affine)

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training(affine):
    torch.manual_seed(0)
    module = Mixing(affine).double()
    with torch.no_grad():
        if affine:
            module.norm.weight.uniform_(0.5, 2)
        x = torch.randn(6, 4, dtype=torch.float64)
        journey, _ = _travel(module, x, None, None, thorough=True)
        found = log_spectral_by_ops(journey.passes, journey.steps[0], 1)
        truth = exact_norms(journey.passes, journey.steps, 1).log_spectral
    assert found is not None
    assert -1e-9 <= (found.log - truth).item() < 0.7


UNUSUAL = {
    "a scalar quotient": lambda x: x.sin() / 3,
    "a constant over branches": lambda x: x.sin() * 2 + x.flip(-1) * 0.5,
    "weighted sums": lambda x: torch.baddbmm(x @ W.T[:, :4], x[:, :, :4], x[:, :, :4].mT[:, :4]),
    "weighted bias": lambda x: torch.addmm(x.flatten(1)[:, :5], x.flatten(1)[:, 5:11], W.T),
    "a product with itself": lambda x: (x.flatten(1)[:, :3].T @ x.flatten(1)[:, :3]).sum() * x[:1],
    "an amplified convolution": lambda x: F.conv1d(
        x, x.mean((0, 2))[None, :, None].expand(2, 4, 1)
    ),
    "log softmax of one": lambda x: F.log_softmax(x[:, :, :1], dim=-1) + x[:, :, :1],
    "all of one number": lambda x: x.sum() + x.amax() + x.norm() + x.cumsum(0).sum(),
    "one number": lambda x: x[0, 0, 0].cumsum(0).softmax(0) + x[0, 0, 0],
    "differences of broadcast parts": lambda x: x.mean(-1, keepdim=True) - 3 * x,
    "a middle of three": lambda x: torch.median(x, dim=-1)[0],
    "the k-th": lambda x: torch.topk(x, 2, dim=-1)[0] * 2,
    "a divided average": lambda x: F.avg_pool2d(x[:, None], 2, divisor_override=1),
    "scaled attention": lambda x: F.layer_norm(x, (6,)).mT @ x / x.norm(),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_ops_of_one_map(name):
    """All samples together, so that they may meet."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        journey, _ = _travel(Function(UNUSUAL[name]), x, None, None, thorough=True)
        found = log_spectral_by_ops(journey.passes, journey.steps[0], 1)
        truth = exact_norms(journey.passes, journey.steps, 1).log_spectral
    assert found is not None
    assert (found.log >= truth - 1e-9).all()
