"""Closed forms for single modules against the general route, which takes every row."""

import pytest
import torch
from torch import nn

from pushforward.path import leaves, norms, path_bound

# Modules and the shape of one sample.
MODULES = {
    "linear": (nn.Linear(3, 4), (3,)),
    "linear over positions": (nn.Linear(3, 4, bias=False), (5, 2, 3)),
    "conv1d": (nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), (2, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), groups=2), (4, 5, 6)),
    "conv2d same": (nn.Conv2d(2, 2, 3, padding="same"), (2, 4, 3)),
    "conv3d": (nn.Conv3d(1, 2, 2, padding=1), (1, 3, 2, 3)),
    "conv transposed 1d": (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), (2, 4)),
    "conv transposed 2d": (
        nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        (2, 3, 4),
    ),
    "conv transposed 3d": (nn.ConvTranspose3d(1, 2, 2), (1, 2, 3, 2)),
    "relu": (nn.ReLU(), (3, 4)),
    "relu in place": (nn.ReLU(inplace=True), (3, 4)),
    "gelu": (nn.GELU(), (7,)),
    "sigmoid": (nn.Sigmoid(), (7,)),
    "prelu": (nn.PReLU(3), (3, 4)),
    "hardswish": (nn.Hardswish(), (7,)),
    "glu": (nn.GLU(), (2, 6)),
    "dropout": (nn.Dropout(0.4), (30,)),
    "identity": (nn.Identity(), (3,)),
    "flatten": (nn.Flatten(), (2, 3)),
    "unflatten": (nn.Unflatten(1, (2, 3)), (6,)),
    "pixel shuffle": (nn.PixelShuffle(2), (4, 2, 3)),
    "zero pad": (nn.ZeroPad2d((1, 2, -1, 0)), (2, 3, 4)),
    "constant pad": (nn.ConstantPad1d(2, 3.0), (2, 4)),
    "batch norm": (nn.BatchNorm2d(3).eval(), (3, 2, 2)),
    "max pool": (nn.MaxPool2d(3, stride=1, padding=1), (2, 4, 5)),
    "adaptive max pool": (nn.AdaptiveMaxPool1d(3), (2, 5)),
    "reflection pad": (nn.ReflectionPad1d(2), (2, 4)),
    "replication pad": (nn.ReplicationPad2d(1), (2, 3, 2)),
    "circular pad": (nn.CircularPad1d(2), (2, 4)),
    "upsample nearest": (nn.Upsample(scale_factor=2), (2, 3, 2)),
    "upsample nearest 2d": (nn.UpsamplingNearest2d(scale_factor=3), (2, 2, 2)),
    "average pool tiles": (nn.AvgPool2d(2, ceil_mode=True), (2, 5, 4)),
    "average pool overlaps": (nn.AvgPool2d(3, stride=2, padding=1), (2, 5, 6)),
    "average pool inside": (
        nn.AvgPool1d(3, stride=1, padding=1, count_include_pad=False),
        (2, 5),
    ),
    "average pool 3d": (nn.AvgPool3d(2, stride=1), (2, 3, 2, 3)),
    "adaptive average tiles": (nn.AdaptiveAvgPool2d(1), (3, 4, 4)),
    "adaptive average overlaps": (nn.AdaptiveAvgPool1d(3), (2, 5)),
    "layer norm": (nn.LayerNorm(4), (3, 4)),
    "layer norm over two": (nn.LayerNorm((2, 3)), (4, 2, 3)),
    "rms norm": (nn.RMSNorm(4), (3, 4)),
    "instance norm": (nn.InstanceNorm2d(3, affine=True), (3, 2, 3)),
    "group norm": (nn.GroupNorm(2, 4), (4, 3)),
    "softmax": (nn.Softmax(dim=1), (4, 3)),
    "log softmax": (nn.LogSoftmax(dim=-1), (2, 4)),
}


def prepared(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module.double()


def log_norms(module, x, batch_dim=0):
    path = path_bound(nn.Sequential(module), x, batch_dim=batch_dim, rungs="frobenius")
    (row,) = path.layers
    return row.log_fro, path.log_norm


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("batch_dim", [0, None])
def test_rules_agree_with_every_row(name, batch_dim, monkeypatch):
    module, shape = MODULES[name]
    module = prepared(module)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(norms, "_log_norm_of_any", None)  # a rule must do it alone
    found, truth = log_norms(module, x, batch_dim)
    torch.testing.assert_close(found, truth)
    monkeypatch.setattr(leaves, "MOST_BLOCK_PASSES", 10**6)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5)),
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 4, 4)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 2)),
        (nn.LocalResponseNorm(2), (4, 3)),
        (nn.Softmax(), (4,)),
        (nn.utils.spectral_norm(nn.Linear(3, 4)).eval(), (3,)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), (3,)),
        (type("Sub", (nn.ReLU,), {"forward": lambda self, x: 3 * x})(), (4,)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_what_no_rule_fits_takes_every_row(module, shape):
    module = module.double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    found, truth = log_norms(module, x)
    torch.testing.assert_close(found, truth)


def test_a_module_with_a_hook_takes_every_row():
    module = nn.Linear(3, 3).double()
    handle = module.register_forward_hook(lambda module, args, output: output**2)
    x = torch.randn(2, 3, dtype=torch.float64)
    found, truth = log_norms(module, x)
    torch.testing.assert_close(found, truth)
    handle.remove()
    assert not torch.allclose(log_norms(module, x)[0], found)


def test_a_replaced_forward_takes_every_row():
    module = nn.Linear(3, 3).double()
    module.forward = lambda x: torch.sin(x)
    found, truth = log_norms(module, torch.randn(2, 3, dtype=torch.float64))
    torch.testing.assert_close(found, truth)


def test_batch_norm_in_training_is_no_diagonal():
    module = nn.BatchNorm1d(3).double()
    found, truth = log_norms(module, torch.randn(5, 3, dtype=torch.float64), batch_dim=None)
    torch.testing.assert_close(found, truth)


def test_wide_blocks_take_every_row(monkeypatch):
    monkeypatch.setattr(leaves, "MOST_BLOCK_PASSES", 2)
    module, shape = MODULES["layer norm"]
    found, truth = log_norms(prepared(module), torch.randn(2, *shape, dtype=torch.float64))
    torch.testing.assert_close(found, truth)


def test_columns_where_they_are_fewer():
    torch.manual_seed(0)

    class Wide(nn.Module):
        def forward(self, x):
            return torch.sin(x.repeat_interleave(20, dim=-1)).cumsum(-1)

    x = torch.randn(3, 2, dtype=torch.float64)
    path = path_bound(Wide(), x, rungs="frobenius")
    torch.testing.assert_close(path.layers[0].log_fro, path.log_norm)
    assert path.passes < 40 + 2 + 40  # gains, check of the samples, and fewer than all rows


def test_rows_where_there_is_no_second_derivative():
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

    path = path_bound(Wide(), torch.randn(3, 2, dtype=torch.float64), rungs="frobenius")
    torch.testing.assert_close(path.layers[0].log_fro, path.log_norm)
    torch.testing.assert_close(path.log_norm.exp(), torch.full((3,), 40.0).double().sqrt())


def test_zero_weights_have_norm_minus_infinity():
    module = nn.Linear(3, 4)
    nn.init.zeros_(module.weight)
    found, truth = log_norms(module, torch.randn(2, 3))
    assert (found == -torch.inf).all()
    assert (truth == -torch.inf).all()
