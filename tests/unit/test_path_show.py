"""What a `PathBound` shows: text, HTML, JSON and pictures."""

import json
import math
import sys

import pytest
import torch
from torch import nn

from pushforward.errors import MissingDependencyError
from pushforward.path import path_bound

HEADINGS = "step log gain decades log ‖J_l‖_F log ‖J_l‖_2 alignment rank bound so far"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.fixture
def path(model):
    return path_bound(model, torch.randn(4, 3, dtype=torch.float64))


def test_the_table_is_aligned_and_says_what_holds(path):
    lines = path.table().splitlines()
    assert " ".join(lines[0].split()) == HEADINGS
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert lines[6].startswith("log ‖J‖_F")
    ends = {len(line) for line in (lines[0], *lines[2:5])}
    assert len(ends) == 1
    assert "means over 4 samples, in nats" in lines
    assert any("frobenius: certified bound" in line for line in lines)
    assert any("loses most: -" in line for line in lines)
    assert any("the Frobenius bound loses most where" in line for line in lines)
    assert lines[-1] == path.verdict()


def test_a_path_that_only_gains(model):
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(10 * torch.eye(2))
    text = path_bound(nn.Sequential(layer, nn.Identity()), torch.ones(1, 2)).table()
    assert "no step loses; 0 gains most: +1.00 decades" in text
    assert "means over" not in text


def test_one_step_blames_nobody():
    assert "loses" not in path_bound(nn.Linear(2, 2), torch.ones(1, 2)).table()


def test_repr_is_one_line(path):
    assert repr(path).startswith("PathBound(3 steps, log_norm=")
    assert "frobenius=" in repr(path)
    assert "\n" not in repr(path)


def test_html_escapes_names():
    model = nn.Sequential()
    model.add_module("<script>", nn.Linear(2, 2))
    shown = path_bound(model, torch.ones(1, 2))._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert shown.count("<tr>") == 3


def test_json_is_strict_and_holds_samples_and_means(path):
    data = json.loads(json.dumps(path.to_dict(), allow_nan=False))
    assert [row["name"] for row in data["layers"]] == ["0", "1", "2"]
    assert data["log_norm"]["per_sample"] == path.log_norm.tolist()
    assert data["log_norm"]["mean"] == pytest.approx(path.log_norm.mean().item())
    assert data["rungs"]["frobenius"]["per_sample"] == path.rungs["frobenius"].tolist()
    assert data["certified"] == dict.fromkeys(path.rungs, True)
    row = data["layers"][1]
    assert row["log_gain"]["per_sample"] == path.layers[1].log_gain.tolist()
    assert row["log_spectral"]["per_sample"] == path.layers[1].log_spectral.tolist()
    assert row["exact"] is True


def test_infinite_numbers_are_text_that_float_reads():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[1].weight)
    data = path_bound(model, torch.ones(1, 2)).to_dict()
    assert float(data["log_norm"]["per_sample"][0]) == float("-inf")
    json.dumps(data, allow_nan=False)


def test_the_picture_has_a_bar_per_step(path, tmp_path):
    figure = path.plot()
    gains, bound, ladder = figure.axes
    assert len(gains.patches) == 3
    heights = [bar.get_height() for bar in gains.patches]
    assert sum(heights) == pytest.approx(path.log_norm.mean().item() / 2.302585093)
    assert [len(line.get_xdata()) for line in bound.lines] == [3, 3, 3]
    truth, product, mixed = (line.get_ydata() for line in bound.lines)
    order = zip(truth, mixed, product, strict=True)
    assert all(low - 1e-12 <= middle <= high + 1e-12 for low, middle, high in order)
    assert mixed[0] == pytest.approx(path.rungs["mixed"].mean().item() / math.log(10))
    lengths = [bar.get_width() * math.log(10) for bar in ladder.patches]
    expected = [(rung - path.log_norm).mean().item() for rung in path.rungs.values()]
    assert lengths == pytest.approx(expected)
    figure.savefig(tmp_path / "path.png")


def test_names_with_dollars_are_drawn_as_text(tmp_path):
    model = nn.Sequential()
    model.add_module("$x^$", nn.Linear(2, 2))
    path_bound(model, torch.ones(1, 2)).plot().savefig(tmp_path / "path.png")


def test_plot_without_matplotlib(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="plot expects matplotlib"):
        path.plot()


def test_columns_that_hold_nothing_are_left_out(model):
    x = torch.randn(4, 3, dtype=torch.float64)
    gains = path_bound(model, x, rungs=())
    assert gains.table().splitlines()[0].split() == ["step", "log", "gain", "decades"]
    assert gains._repr_html_().count("<th>") == 2 * 3
    assert gains.verdict() is None
    alone = path_bound(model, x, rungs="frobenius")
    assert "‖J_l‖_2" not in alone.table()
    assert len(alone.plot().axes[1].lines) == 2


def test_labels_stand_beside_the_numbers(model):
    x = torch.randn(4, 3, dtype=torch.float64)
    path = path_bound(model, x, rungs=("frobenius", "sampled"), exact_passes=0, seed=0)
    assert "sampled: bound from below, 0.00 decades below the truth" in path.table()
    assert "(lower bound)" in repr(path)
    data = path.to_dict()
    assert data["labels"] == {"frobenius": "certified", "sampled": "lower bound"}
    assert data["certified"] == {"frobenius": True, "sampled": False}
    assert data["interval"] is None
    assert path.plot().axes[2].patches[1].get_hatch()


def test_bounds_are_held_against_an_estimate_where_that_is_all(model):
    path = path_bound(model, torch.randn(4, 3).double(), probes=3, seed=0)
    text = path.table()
    assert "the truth" not in text
    assert "decades above the estimate" in text or "decades below the estimate" in text
    estimate, level = (
        n.mean().item() / math.log(10) for n in (path.log_norm, path.rungs["segments"])
    )
    assert path.verdict() == (
        f"‖J‖_F is about 10^{estimate:.2f}, an estimate; the segments rung proves that it is at "
        f"most 10^{level:.2f}"
    )
    assert "estimate (line)" in path.plot().axes[2].get_title()


def test_an_estimate_may_be_above_a_bound():
    """Of a matrix of rank one the estimate spreads widely: both sides occur."""
    model = nn.Linear(1, 1, bias=False).double()
    sides = set()
    for seed in range(12):
        path = path_bound(model, torch.ones(1, 1).double(), probes=1, seed=seed, rungs="frobenius")
        side = "below" if path.rungs["frobenius"] < path.log_norm else "above"
        assert f"decades {side} the estimate" in path.table()
        sides.add(side)
    assert sides == {"above", "below"}


def test_estimated_gains_say_so(model):
    path = path_bound(model, torch.randn(4, 3).double(), rungs=(), probes=3, seed=0)
    assert "gains are estimates; 95 % of the time log ‖J‖_F is in [" in path.table()
    data = json.loads(json.dumps(path.to_dict(), allow_nan=False))
    assert set(data["interval"]) == set(data["layers"][0]["gain_interval"]) == {"low", "high"}


@pytest.mark.parametrize(
    ("rungs", "words"),
    [
        ("segments", "and the segments rung proves it"),
        ("frobenius", "all that the frobenius rung says is at most 10^"),
    ],
)
def test_the_verdict_goes_by_the_best_rung(model, rungs, words):
    assert words in path_bound(model, torch.randn(4, 3).double(), rungs=rungs).verdict()


def test_a_chain_without_slack_has_no_joint():
    model = nn.Sequential(nn.Linear(1, 1).double(), nn.Identity())
    assert "meets" not in path_bound(model, torch.ones(1, 1).double()).table()
