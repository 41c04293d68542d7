"""Modules that are not later what they were when they were called: no closed form holds."""

import pytest
import torch
from torch import nn

from pushforward.path import path_bound


class Around(nn.Module):
    """Calls a layer, and does something before and after."""

    def __init__(self, layer, before, after):
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, x):
        kept = self.before(self.layer)
        y = self.layer(x)
        self.after(self.layer, kept)
        return y


def set_parameter(layer):
    kept = layer.weight
    layer.weight = nn.Parameter(3 * kept.detach())
    return kept


def set_data(layer):
    kept = layer.weight.data
    layer.weight.data = 3 * kept
    return kept


def set_data_twice(layer):
    layer.weight.data = 3 * layer.weight.data
    return layer.weight.data / 3


def add_hook(layer):
    return layer.register_forward_hook(lambda module, args, output: 3 * output)


def replace_forward(layer):
    layer.forward = lambda x: torch.sin(3 * x)


def restore(layer, kept):
    layer.weight = kept


def restore_data(layer, kept):
    layer.weight.data = kept


def remove(layer, handle):
    handle.remove()


CHANGES = {
    "another parameter": (set_parameter, restore),
    "other data": (set_data, restore_data),
    "other data, and again": (set_data_twice, restore_data),
    "a hook": (add_hook, remove),
    "another forward": (replace_forward, lambda layer, kept: delattr(layer, "forward")),
}


def assert_right(model, x):
    """All rungs bound the truth where few rows are allowed, and the norm of the step is it."""
    for budgets in ({}, {"exact_passes": 0}):
        path = path_bound(model, x, seed=0, segment_passes=0, **budgets)
        bounds = [path.rungs[name] for name, holds in path.certified.items() if holds]
        assert all((bound >= path.log_norm - 1e-9).all() for bound in bounds)
        if len(path.layers) == 1 and path.layers[0].exact:
            torch.testing.assert_close(path.layers[0].log_fro, path.log_norm)


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def layer():
    torch.manual_seed(1)
    return nn.Linear(4, 5).double()


@pytest.mark.parametrize("name", CHANGES)
def test_changes_around_a_call(name, layer, x):
    assert_right(Around(layer, *CHANGES[name]), x)


def test_settings_that_change_around_a_call():
    """Batch norm that is in training for one call only; the second is a convolution's padding."""
    norm = nn.BatchNorm1d(3).double().eval()
    model = Around(norm, lambda layer: layer.train(), lambda layer, _: layer.eval())
    model.eval()
    path = path_bound(model, torch.randn(5, 3).double(), batch_dim=None)
    torch.testing.assert_close(path.layers[0].log_fro, path.log_norm)
    conv = nn.Conv1d(2, 2, 3, padding=2).double()

    def pad(layer, padding):
        layer.padding = padding

    assert_right(
        Around(conv, lambda layer: pad(layer, (2,)), lambda layer, _: pad(layer, (0,))),
        torch.randn(2, 2, 4).double(),
    )


def test_functional_calls_with_other_weights(layer, x):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.big = layer, nn.Parameter(5 * layer.weight.detach())

        def forward(self, x):
            return torch.func.functional_call(self.layer, {"weight": self.big}, (x,))

    assert_right(Other(), x)
    assert_right(nn.Sequential(Other(), nn.Tanh()), x)


@pytest.mark.parametrize("pre", [False, True])
def test_hooks_of_all_modules(pre, layer, x):
    if pre:
        handle = nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: 3 * args[0]
        )
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: 3 * y)
    try:
        assert_right(nn.Sequential(layer), x)
    finally:
        handle.remove()


def test_weights_that_are_buffers_or_of_other_kinds(layer, x):
    class Wrapped(torch.Tensor):
        pass

    other = nn.Linear(4, 5).double()
    del other.weight
    other.register_buffer("weight", layer.weight.detach())
    assert_right(nn.Sequential(other), x)
    wrapped = nn.Linear(4, 5).double()
    del wrapped.weight
    wrapped.weight = layer.weight.detach().as_subclass(Wrapped)
    assert_right(nn.Sequential(wrapped), x)


def test_autocast_rounds_weights():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)

    torch.manual_seed(0)
    path = path_bound(Cast(), torch.randn(1, 6))
    assert (path.layers[0].log_fro - path.log_norm).abs().max() < 1e-6


def test_unchanged_modules_keep_their_closed_forms(layer, x, monkeypatch):
    monkeypatch.setattr("pushforward.path.norms._log_norm_of_any", None)
    model = nn.Sequential(layer, nn.BatchNorm1d(5).double().eval(), nn.ReLU())
    path = path_bound(model, x, rungs="frobenius")
    assert all(row.exact for row in path.layers)
    with torch.inference_mode():
        bias = nn.Parameter(torch.zeros(5).double(), requires_grad=False)
    layer.bias = bias
    assert path_bound(nn.Sequential(layer), x, rungs="frobenius").layers[0].exact
