"""Maps of decisions on the plane through three inputs."""

import io
import sys

import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from pushforward.sensitivity import DecisionMap, decision_map, jacobian_norm

CORNERS = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, classes)).double()


def inputs(found: DecisionMap) -> Tensor:
    """The grid by its coordinates, from the corners at their anchors: (R, R, *in)."""
    a, b, c = CORNERS
    (ua, va), (ub, vb), (uc, vc) = found.anchors.tolist()
    weights = torch.linalg.inv(
        torch.tensor([[ub - ua, uc - ua], [vb - va, vc - va]], dtype=torch.float64)
    )
    v, u = torch.meshgrid(found.v - va, found.u - ua, indexing="ij")
    s, t = weights @ torch.stack((u.flatten(), v.flatten()))
    s, t = (each.reshape(*u.shape, 1, 1) for each in (s, t))
    return a + s * (b - a) + t * (c - a)


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_classes_and_norms_on_the_grid(of):
    net = network()
    found = decision_map(net, *CORNERS, resolution=9, of=of)
    points = inputs(found).reshape(81, 2, 3)
    assert torch.equal(found.classes, net(points).argmax(1).reshape(9, 9))
    torch.testing.assert_close(found.norm, jacobian_norm(net, points, of).detach().reshape(9, 9))
    assert found.of == of
    assert not found.norm.requires_grad


def test_distances_on_the_map_are_those_in_the_input():
    found = decision_map(network(), *CORNERS, resolution=5)
    for i in range(3):
        for j in range(3):
            apart = (CORNERS[i] - CORNERS[j]).norm()
            torch.testing.assert_close((found.anchors[i] - found.anchors[j]).norm(), apart)
    points = inputs(found)
    torch.testing.assert_close((points[1, 2] - points[1, 3]).norm(), found.u[1] - found.u[0])
    torch.testing.assert_close((points[1, 2] - points[2, 2]).norm(), found.v[1] - found.v[0])


def test_the_window_is_a_square_with_the_corners_well_inside():
    found = decision_map(network(), *CORNERS, resolution=30)
    side = found.u[-1] - found.u[0]
    torch.testing.assert_close(found.v[-1] - found.v[0], side)
    lows, highs = found.anchors.amin(0), found.anchors.amax(0)
    torch.testing.assert_close(side, 1.5 * (highs - lows).max())
    assert lows[0] > found.u[0]
    assert highs[1] < found.v[-1]


def test_in_the_dtype_of_the_model():
    found = decision_map(network().float(), *CORNERS.float(), resolution=4)
    assert found.norm.dtype == torch.float32
    expected = decision_map(network(), *CORNERS, resolution=4).norm
    torch.testing.assert_close(found.norm.double(), expected, rtol=1e-4, atol=1e-6)


REFUSED = {
    "one line": (lambda: decision_map(network(), A, 2 * A, 3 * A), "on one line"),
    "one point": (lambda: decision_map(network(), A, A, A), "on one line"),
    "two points": (lambda: decision_map(network(), A, CORNERS[1], A), "on one line"),
    "shapes": (lambda: decision_map(network(), A, A, torch.zeros(2).double()), "one shape"),
    "resolution": (lambda: decision_map(network(), *CORNERS, resolution=1), "at least 2"),
    "half of it": (lambda: decision_map(network(), *CORNERS, resolution=4.5), "at least 2"),
    "positions": (lambda: decision_map(lambda x: x, *CORNERS, 3), r"logits \(B, C\)"),
    "of": (lambda: decision_map(network(), *CORNERS, of="loss"), "of expects"),
}
A = CORNERS[0]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(pf.errors.InputError, match=message):
        call()


def test_in_words():
    text = repr(decision_map(network(), *CORNERS, resolution=6))
    assert text.startswith("DecisionMap(6 x 6, classes [")


def test_a_picture_of_it():
    found = decision_map(network(12), *CORNERS, resolution=12)
    figure = found.plot()
    decisions, norms = figure.axes[:2]
    assert decisions.get_title() == "decision"
    assert "probabilities" in norms.get_title()
    classes = [text.get_text() for text in decisions.get_legend().get_texts()]
    assert classes == [str(k) for k in found.classes.unique().tolist()]
    shown = norms.images[0].get_array()
    torch.testing.assert_close(torch.as_tensor(shown.data), found.norm.log10())
    left, right, bottom, top = norms.images[0].get_extent()
    assert (left + right) / 2 == pytest.approx(float(found.u.mean()))
    assert (top - bottom) / 12 == pytest.approx(float(found.v[1] - found.v[0]))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_a_picture_of_one_class_that_nothing_moves():
    def constant(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 2).double() * x.sum() + torch.tensor([1.0, 0.0]).double()

    figure = decision_map(constant, *CORNERS, resolution=4).plot()
    figure.savefig(io.BytesIO(), format="png")
    assert not figure.axes[1].collections


def test_pictures_need_matplotlib(monkeypatch):
    found = decision_map(network(), *CORNERS, resolution=3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(pf.errors.MissingDependencyError, match="matplotlib"):
        found.plot()
