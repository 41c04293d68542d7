"""The equilibrium models in a tiny configuration: what is measured, claims, figures."""

import math
from dataclasses import replace

import pytest
import torch

from pushforward.reproduce.data import Images, load_images
from pushforward.reproduce.equilibrium import (
    PAPER,
    EquilibriumClassifier,
    look,
    summary,
    watched_training,
)
from pushforward.reproduce.page import to_html
from pushforward.reproduce.study import Study, study

TINY = replace(PAPER.quick, train=200, test=40, width=10, steps=8, radii=6)


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits").first(TINY.train, TINY.test)


@pytest.fixture(scope="module")
def found(digits: Images) -> Study:
    return study(PAPER, digits, 2, TINY)


def test_every_claim_has_a_number(found: Study):
    assert len(found.findings) == len(PAPER.claims)
    for finding in found.findings:
        assert math.isfinite(finding.measured.mean)
        assert len(finding.measured.values) == 2


def test_both_networks_begin_alike_and_are_looked_at_alike(found: Study):
    for outcome in found.outcomes:
        without, penalised = (outcome.drawn["curves"][name] for name in ("none", "penalty"))
        assert without[0] == penalised[0]
        assert without[-1] != penalised[-1]
        assert [each["step"] for each in without] == [0.0, 4.0, 8.0]


def test_the_same_seed_gives_the_same_numbers(found: Study, digits: Images):
    again = study(PAPER, digits, 1, TINY)
    for name, spread in again.numbers.items():
        assert spread.values[0] == found.numbers[name].values[0]


def test_progress_ends_at_the_end(digits: Images):
    heard: list[float] = []
    study(PAPER, digits, 1, TINY, lambda done, total: heard.append(done / total))
    assert heard == sorted(heard)
    assert heard[-1] == 1


def test_the_page_shows_the_figure_and_says_what_it_shows(found: Study):
    (picture,) = PAPER.figures(found.outcomes)
    assert "evaluations without the penalty" in picture.alt
    page = to_html(found)
    assert page.count("<figure") == 1
    assert "spectral radius" in page


def test_what_a_look_sees(digits: Images):
    torch.manual_seed(0)
    model = EquilibriumClassifier(64, TINY.width)
    seen = look(model, digits, TINY, 3)
    x, y = digits.test_x, digits.test_y
    with torch.no_grad():
        z = torch.zeros(len(x), TINY.width)
        for _ in range(200):
            z = model.layer(x)(z)
        accuracy = 100 * (model.head(z).argmax(1) == y).double().mean().item()
        slopes = (z[: TINY.radii] > 0).float()
        J = slopes[..., None] * model.recurrent.weight
    radius = torch.linalg.eigvals(J.double()).abs().amax(-1).mean().item()
    assert seen["step"] == 3
    assert seen["accuracy"] == pytest.approx(accuracy)
    assert seen["spectral radius"] == pytest.approx(radius, rel=1e-5)
    assert seen["converged"] == 100
    assert 2 < seen["evaluations"] < 60


@pytest.mark.slow
def test_the_penalty_lowers_evaluations_and_radius(digits: Images):
    settings = replace(TINY, steps=60, looks=2, strength=3.0)
    torch.manual_seed(0)
    penalised = watched_training(digits, settings, lambda: None)
    torch.manual_seed(0)
    plain = watched_training(digits, replace(settings, strength=0.0), lambda: None)
    assert penalised[-1]["evaluations"] < plain[-1]["evaluations"]
    assert penalised[-1]["spectral radius"] < plain[-1]["spectral radius"]


def test_growth_is_counted_from_the_first_look_after_training_began():
    looks = [{"step": float(i), "evaluations": e} for i, e in enumerate((30.0, 10.0, 15.0))]
    assert summary(looks) == {"evaluations": 15.0, "growth": 1.5}


NUMBERS = {
    "evaluations, none": 20.0,
    "evaluations, penalty": 8.0,
    "accuracy, none": 97.0,
    "accuracy, penalty": 96.0,
    "spectral radius, none": 0.9,
    "spectral radius, penalty": 0.5,
    "growth, none": 1.2,
    "growth, penalty": 0.9,
}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, None),
        ({"evaluations, penalty": 11.0}, 0),
        ({"accuracy, penalty": 95.0}, 1),
        ({"spectral radius, none": 0.7}, 2),
        ({"growth, penalty": 1.1}, 3),
        ({"growth, penalty": math.nan}, 3),
    ],
)
def test_claims(change: dict[str, float], failed: int | None):
    numbers = {**NUMBERS, **change}
    verdicts = [claim.criterion.met(claim.value(numbers)) for claim in PAPER.claims]
    assert [place for place, holds in enumerate(verdicts) if not holds] == (
        [] if failed is None else [failed]
    )
