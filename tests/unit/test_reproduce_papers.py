"""The papers in tiny configurations: their measurements against definitions, claims, figures."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pushforward.reproduce import contractive_autoencoder as contractive
from pushforward.reproduce import gaussian_noise_injection as injection
from pushforward.reproduce import jacobian_regularization as regularization
from pushforward.reproduce.data import Images, load_images
from pushforward.reproduce.page import to_html
from pushforward.reproduce.paper import Outcome, Paper
from pushforward.reproduce.study import Study, study

TINY = {
    "jacobian-regularization": replace(
        regularization.PAPER.quick,
        train=100,
        test=60,
        hidden=12,
        steps=4,
        few_steps=2,
        resolution=6,
    ),
    "contractive-autoencoder": replace(
        contractive.PAPER.quick, train=100, test=60, hidden=8, steps=4, tuning_steps=4, measured=6
    ),
    "gaussian-noise-injection": replace(
        injection.PAPER.quick, train=300, test=60, hidden=12, steps=40, pairs=2, inits=2
    ),
}
MODULES = (regularization, contractive, injection)


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits")


@pytest.fixture(scope="module")
def studies(digits: Images) -> dict[str, Study]:
    return {
        name: study(module.PAPER, digits, 2, TINY[name])
        for name, module in zip(TINY, MODULES, strict=True)
    }


@pytest.mark.parametrize("name", TINY)
def test_every_claim_has_a_number(studies: dict[str, Study], name: str) -> None:
    found = studies[name]
    assert len(found.findings) == len(found.paper.claims)
    for finding in found.findings:
        assert math.isfinite(finding.measured.mean), finding.claim.text
        assert len(finding.measured.values) == 2
    assert all(map(math.isfinite, (spread.mean for spread in found.numbers.values())))


@pytest.mark.parametrize("name", TINY)
def test_pages_show_their_figures(studies: dict[str, Study], name: str) -> None:
    page = to_html(studies[name])
    assert page.count("<figure") == 2
    assert len(page) < 2_000_000


@pytest.mark.parametrize("name", TINY)
def test_the_same_seed_gives_the_same_numbers(
    studies: dict[str, Study], digits: Images, name: str
) -> None:
    again = study(studies[name].paper, digits, 1, TINY[name])
    for key, spread in again.numbers.items():
        assert spread.values[0] == studies[name].numbers[key].values[0], key


@pytest.mark.parametrize("name", TINY)
def test_progress_ends_at_the_end(digits: Images, name: str) -> None:
    paper: Paper = dict(zip(TINY, (module.PAPER for module in MODULES), strict=True))[name]
    heard: list[float] = []
    study(paper, digits, 1, TINY[name], lambda done, total: heard.append(done / total))
    assert heard[-1] == 1
    assert heard == sorted(heard)


# --- what claims make of numbers ----------------------------------------------------------------


def verdicts(paper: Paper, numbers: dict[str, float]) -> list[bool]:
    return [claim.criterion.met(claim.value(numbers)) for claim in paper.claims]


HOFFMAN = {
    "norm of J, none": 30.0,
    "norm of J, Jacobian": 2.0,
    "norm of J, exact Jacobian": 2.0,
    "accuracy, none": 96.0,
    "accuracy, Jacobian": 96.0,
    "accuracy, exact Jacobian": 96.0,
    "PGD accuracy, none": 20.0,
    "PGD accuracy, Jacobian": 70.0,
    "noise accuracy, none": 80.0,
    "noise accuracy, Jacobian": 90.0,
    "accuracy with few labels, none": 75.0,
    "accuracy with few labels, all": 79.0,
}


def test_claims_of_jacobian_regularization():
    paper = regularization.PAPER
    assert all(verdicts(paper, HOFFMAN))
    for change, failed in (
        ({"norm of J, none": 5.0}, 0),
        ({"accuracy, none": 97.6, "accuracy, exact Jacobian": 96.0}, 1),
        ({"PGD accuracy, none": 61.0}, 2),
        ({"noise accuracy, none": 88.0}, 3),
        ({"accuracy with few labels, none": 77.0}, 4),
        ({"norm of J, exact Jacobian": 1.5}, 5),
        ({"accuracy, exact Jacobian": 97.5}, 6),
    ):
        found = verdicts(paper, {**HOFFMAN, **change})
        assert [place for place, holds in enumerate(found) if not holds] == [failed]


RIFAI = {
    f"{key}, {name}": value
    for key, values in {
        "norm of J": (10, 9, 8, 7, 5),
        "saturated units": (50, 50, 50, 50, 70),
        "participation rank": (40, 40, 40, 40, 20),
        "test error": (6, 5.9, 5.5, 5.3, 5.0),
    }.items()
    for name, value in zip(contractive.COLOURS, values, strict=True)
}


def test_claims_of_contractive_autoencoders():
    paper = contractive.PAPER
    assert all(verdicts(paper, RIFAI))
    for change, failed in (
        ({"norm of J, AE": 8}, [0]),
        ({"norm of J, DAE-g": 4}, [1]),
        ({"saturated units, AE": 61}, [2]),
        ({"participation rank, AE": 25}, [3]),
        ({"test error, AE": 5.41}, [4]),
        ({"test error, DAE-b": 4.6}, [5]),
        ({"test error, DAE-g": 6.7}, [6]),
        ({"test error, AE+wd": 4.9}, [7]),
    ):
        found = verdicts(paper, {**RIFAI, **change})
        assert [place for place, holds in enumerate(found) if not holds] == failed


CAMUTO = {
    f"{key}, {name}": value
    for key, values in {
        "deviation": (5, 6, 7),
        "calibration error": (3, 2, 2),
        "margin": (1, 2, 2),
        "accuracy": (95, 96, 96),
    }.items()
    for name, value in zip(injection.COLOURS, values, strict=True)
} | {"deviation at initialisation": 5}


def test_claims_of_noise_injection():
    paper = injection.PAPER
    assert all(verdicts(paper, CAMUTO))
    for change, failed in (
        ({"deviation at initialisation": 13}, [0]),
        ({"deviation, injection": 13}, [1]),
        ({"calibration error, injection": 2.3}, [2]),
        ({"calibration error, penalty": 2.3}, [3]),
        ({"margin, injection": 1.4}, [4]),
        ({"margin, penalty": 1.4}, [5]),
        ({"accuracy, injection": 95.4}, [6]),
        ({"accuracy, penalty": 95.4}, [7]),
    ):
        found = verdicts(paper, {**CAMUTO, **change})
        assert [place for place, holds in enumerate(found) if not holds] == failed


# --- contractive autoencoders -------------------------------------------------------------------


def test_norms_ranks_and_saturation_of_an_encoder_in_closed_form(digits: Images):
    """At weights zero every unit is a half; a large bias saturates it."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Sigmoid())
    nn.init.zeros_(encoder[1].bias)
    assert contractive.saturated(torch.tensor([[0.01, 0.5], [0.96, 0.05]])) == 50
    x = digits.test_x[:5]
    weight = torch.linalg.qr(torch.randn(64, 4)).Q.T
    with torch.no_grad():
        encoder[1].weight.copy_(1e-3 * weight)
    settings = replace(contractive.Settings(), distances=(0.1, 1.0), directions=200)
    ratios = contractive.contraction(encoder, x, settings)
    # E|W d| / |d| for four orthonormal rows of 64 is near sqrt(4 / 64), and sigmoid' is a quarter.
    assert ratios == pytest.approx([1e-3 * 0.25 * 0.25] * 2, rel=0.1)


def test_recipes_corrupt_and_penalise_as_their_names_say():
    settings = contractive.Settings(masked=0.25, sigma=0.5)
    found = contractive.recipes(settings)
    x = torch.ones(100, 64)
    torch.manual_seed(0)
    assert torch.equal(found["AE"].corrupt(x), x)
    masked = found["DAE-b"].corrupt(x)
    assert masked.unique().tolist() == [0, 1]
    assert masked.mean().item() == pytest.approx(0.75, abs=0.02)
    assert (found["DAE-g"].corrupt(x) - x).std().item() == pytest.approx(0.5, abs=0.02)
    assert found["CAE"].contraction == settings.contraction
    assert found["AE+wd"].weight_decay == settings.weight_decay


# --- noise --------------------------------------------------------------------------------------


def test_effect_of_noise_on_a_quadratic_in_closed_form():
    """Of cross entropy of two linear logits of one input it is p (1 - p) w^2 sigma^2 / 2."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.5], [0.0]]))
    x, y = torch.full((4000, 1), 0.4, dtype=torch.float64), torch.zeros(4000, dtype=torch.long)
    p = torch.sigmoid(torch.tensor(0.6, dtype=torch.float64)).item()
    expected = p * (1 - p) * 1.5**2 * 1e-2**2 / 2
    torch.manual_seed(0)
    assert injection.effect(model, x, y, 1e-2, 10) == pytest.approx(expected, rel=0.03)
    found = injection.effects(model.float(), x.float(), y, (1e-4,), 10)
    assert found[0, 1].item() == pytest.approx(expected, rel=1e-6)
    assert found[0, 0].item() == pytest.approx(expected, rel=0.03)


def test_noise_goes_to_the_input_and_every_activation():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.ELU(), nn.Linear(2, 2))
    x = torch.randn(5, 3)
    places = injection.noisy_places(model, x)
    assert [tuple(place.shape) for place in places] == [(5, 3), (5, 2)]
    silent = [torch.zeros_like(place) for place in places]
    assert torch.equal(injection.with_noise(model, x, silent), model(x))
    shifted = injection.with_noise(model, x, [silent[0], torch.ones(5, 2)])
    assert torch.allclose(shifted - model(x), model[3].weight.sum(1).expand(5, 2), atol=1e-6)


def test_calibration_error_by_hand():
    """Two images at confidence 0.9, one of them right, and two at 0.6, both right."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]).log()
    y = torch.tensor([0, 1, 0, 1])
    assert injection.calibration_error(logits, y) == pytest.approx(100 * (0.4 + 0.4) / 2, rel=1e-6)


def test_a_network_that_is_always_sure_and_right_is_calibrated():
    assert injection.calibration_error(torch.tensor([[50.0, 0.0]]), torch.tensor([0])) == 0


def test_reliability_pools_seeds_by_their_samples():
    shares = [torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])]
    outcomes = [
        Outcome({}, {"reliability": {"none": (torch.tensor(c), share, torch.tensor(r))}})
        for c, share, r in (
            ([0.0, 0.8], shares[0], [0.0, 1.0]),
            ([0.3, 0.9], shares[1], [0.0, 0.4]),
        )
    ]
    confidence, right = injection._pooled(outcomes, "none")
    assert confidence.tolist() == pytest.approx([0.3, (0.8 + 0.9 / 2) / 1.5])
    assert right.tolist() == pytest.approx([0.0, (1.0 + 0.4 / 2) / 1.5])


def test_largest_deviation_is_in_per_cent():
    pairs = torch.tensor([[1.0, 1.1], [2.0, 1.5]], dtype=torch.float64)
    assert injection.largest_deviation(pairs) == pytest.approx(25)


# --- effects, at a fraction of the default size -------------------------------------------------


@pytest.mark.slow
def test_the_jacobian_penalty_makes_small_networks_robust(digits: Images):
    settings = replace(
        regularization.Settings(), hidden=60, steps=400, few_steps=60, subsets=1, resolution=10
    )
    found = study(regularization.PAPER, digits, 1, settings).numbers
    assert found["norm of J, none"].mean > 2 * found["norm of J, Jacobian"].mean
    assert found["PGD accuracy, Jacobian"].mean > found["PGD accuracy, none"].mean + 10
    assert found["accuracy, Jacobian"].mean > 90


@pytest.mark.slow
def test_contraction_saturates_and_shrinks_small_encoders(digits: Images):
    settings = replace(contractive.Settings(), hidden=50, steps=800, tuning_steps=300, measured=50)
    found = study(contractive.PAPER, digits, 1, settings).numbers
    assert found["norm of J, CAE"].mean < 0.8 * found["norm of J, AE"].mean
    assert found["saturated units, CAE"].mean > found["saturated units, AE"].mean
    assert found["test error, CAE"].mean < 15


@pytest.mark.slow
def test_noise_widens_margins_and_the_penalty_is_its_effect(digits: Images):
    settings = replace(injection.Settings(), hidden=60, steps=500, pairs=60, inits=4)
    found = study(injection.PAPER, digits, 1, settings).numbers
    assert found["margin, injection"].mean > found["margin, none"].mean
    assert found["margin, penalty"].mean > found["margin, none"].mean
    assert found["deviation, injection"].mean < 20
