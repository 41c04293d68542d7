"""Training of small networks, attacks, noise, planes and curves."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pushforward.report.optional import require
from pushforward.reproduce.cells import paint_cells, three_digits
from pushforward.reproduce.curves import Curve, paint_curves
from pushforward.reproduce.training import (
    accuracy,
    attack,
    attacked_accuracy,
    batches,
    few_of_each,
    minimise,
    mlp,
    noisy_accuracy,
    outputs,
    same_draws,
    steps_for,
    ticking,
)
from pushforward.sensitivity import decision_map


def test_mlp_has_activations_and_dropout_between_its_layers():
    kinds = [type(module) for module in mlp((4, 5, 3), dropout=0.5, activation=nn.ELU)]
    assert kinds == [nn.Flatten, nn.Linear, nn.ELU, nn.Dropout, nn.Linear]
    assert [type(module) for module in mlp((4, 3))] == [nn.Flatten, nn.Linear]


def test_batches_go_through_everything_before_they_repeat():
    found = list(batches(10, 4, 7))
    assert [len(rows) for rows in found] == [4, 4, 2, 4, 4, 2, 4]
    assert torch.cat(found[:3]).sort().values.tolist() == list(range(10))
    assert torch.cat(found[3:6]).sort().values.tolist() == list(range(10))


def test_minimise_finds_least_squares():
    torch.manual_seed(0)
    x = torch.randn(50, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    weight = nn.Parameter(torch.zeros(3))
    ticks = []
    minimise(
        lambda x, y: (x @ weight - y).square().mean(),
        [weight],
        x,
        y,
        steps=200,
        batch=10,
        rate=0.05,
        advance=lambda: ticks.append(1),
    )
    assert torch.allclose(weight, torch.tensor([1.0, -2.0, 0.5]), atol=1e-3)
    assert len(ticks) == 200


def test_weight_decay_shrinks():
    weight = nn.Parameter(torch.ones(1))
    x = torch.zeros(4, 1)
    minimise(lambda x, y: (x * weight).sum(), [weight], x, x, steps=5, batch=2, rate=0.1)
    assert weight.item() == 1
    minimise(
        lambda x, y: (x * weight).sum(),
        [weight],
        x,
        x,
        steps=5,
        batch=2,
        rate=0.1,
        weight_decay=0.5,
    )
    assert 0 < weight.item() < 1


def test_long_gradients_are_scaled_down():
    weight = nn.Parameter(torch.zeros(2))
    x, slope = torch.zeros(1, 2), torch.tensor([30.0, 40.0])
    minimise(
        lambda x, y: weight @ slope,
        [weight],
        x,
        x,
        steps=1,
        batch=1,
        rate=1.0,
        longest=1.0,
    )
    assert torch.allclose(weight, torch.tensor([-0.6, -0.8]), atol=1e-4)


def linear() -> nn.Linear:
    """Class 1 where the first of two pixels is over a half."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0]]))
        model.bias.copy_(torch.tensor([0.0, -5.0]))
    return model


POINTS = torch.tensor([[0.45, 0.5], [0.1, 0.5], [0.55, 0.5], [0.9, 0.5]])
CLASSES = torch.tensor([0, 0, 1, 1])


def test_accuracy_is_a_percentage_in_evaluation_mode():
    model = nn.Sequential(linear(), nn.Dropout(0.9)).train()
    assert accuracy(model, POINTS, CLASSES) == 100
    assert accuracy(model, POINTS, 1 - CLASSES) == 0
    assert not outputs(model, POINTS).requires_grad


def test_outputs_in_parts_are_all_outputs():
    x = torch.rand(1003, 2)
    assert torch.allclose(outputs(linear(), x), linear()(x))


def test_attack_stays_in_its_box_and_in_the_range_of_pixels():
    moved = attack(linear(), POINTS, CLASSES, 0.2, 5)
    assert (moved - POINTS).abs().max() <= 0.2 + 1e-6
    assert 0 <= moved.min() <= moved.max() <= 1
    assert torch.allclose(moved[:, 0], POINTS[:, 0] + 0.2 * torch.tensor([1.0, 1, -1, -1]))


def test_attack_raises_the_loss():
    torch.manual_seed(0)
    model, x, y = mlp((4, 8, 3)), torch.rand(20, 4), torch.randint(3, (20,))
    moved = attack(model, x, y, 0.3, 10)
    before, after = (F.cross_entropy(model(each), y, reduction="none") for each in (x, moved))
    assert bool((after > before).all())


def test_attacked_accuracy_falls_where_the_border_is_near():
    assert attacked_accuracy(linear(), POINTS, CLASSES, 0.0) == 100
    assert attacked_accuracy(linear(), POINTS, CLASSES, 0.1) == 50
    assert attacked_accuracy(linear(), POINTS, CLASSES, 0.5) == 0


def test_noisy_accuracy_is_that_of_the_normal_law():
    x = torch.tensor([[0.6, 0.0]]).expand(20_000, 2)
    torch.manual_seed(0)
    found = noisy_accuracy(linear(), x, torch.ones(20_000, dtype=torch.long), 0.1)
    assert found == pytest.approx(100 * 0.8413, abs=1)


def test_ticks_are_heard_with_their_total():
    heard = []
    tick = ticking(lambda done, total: heard.append((done, total)), 2)
    for _ in range(3):
        tick()
    assert heard == [(1, 2), (2, 2), (2, 2)]


def test_few_of_each_class():
    y = torch.tensor([2, 0, 2, 2, 0, 1])
    torch.manual_seed(0)
    rows = few_of_each(y, 2)
    assert y[rows].tolist() == [0, 0, 1, 2, 2]
    assert len(rows.unique()) == 5
    assert len({tuple(few_of_each(y, 2).tolist()) for _ in range(20)}) > 1


def test_same_draws_repeat():
    with same_draws():
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), first)


# --- drawings -----------------------------------------------------------------------------------


def figure():
    return require("matplotlib.figure").Figure()


def test_curves_are_means_with_bands_of_one_deviation():
    axes = figure().subplots()
    values = np.array([[1.0, 2.0], [3.0, 6.0]])
    paint_curves(
        axes, {"a": Curve((0, 1), values, "red"), "b": Curve((0, 1), values[:1], "blue", True)}
    )
    assert axes.lines[0].get_ydata().tolist() == [2, 4]
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(4 + np.sqrt(8))


def test_three_digits_are_the_first_of_their_classes():
    x = torch.arange(6.0).reshape(6, 1, 1, 1)
    found = three_digits(x, torch.tensor([0, 1, 1, 2, 0, 2]), (2, 0, 1))
    assert [each.item() for each in found] == [3, 0, 1]


def test_cells_have_the_hue_of_their_class_where_the_network_is_sure():
    corners = 4 * torch.eye(3)
    found = decision_map(lambda x: 9 * x, *corners, resolution=9)
    drawn = figure()
    paint_cells(drawn, {"net": found}, (7, 8, 9))
    (axes,) = drawn.axes
    colours = np.asarray(axes.images[0].get_array())
    hues = np.asarray(require("matplotlib").colormaps["tab10"].colors)
    sure = (found.norm < 1e-6 * found.norm.max()).numpy()
    assert sure.any()
    assert np.allclose(colours[sure], hues[found.classes.numpy()[sure]], atol=1e-2)
    assert colours.max() == pytest.approx(1)
    assert [text.get_text() for text in axes.texts] == ["7", "8", "9"]
    assert axes.get_title() == "net"


@pytest.mark.parametrize(("size", "steps"), [(1000, 30), (4000, 30), (10_000, 75), (60_000, 150)])
def test_more_images_take_more_steps_up_to_five_times_as_many(size: int, steps: int) -> None:
    assert steps_for(30, size) == steps
