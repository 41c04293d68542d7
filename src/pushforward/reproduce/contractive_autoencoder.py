"""Rifai, Vincent, Muller, Glorot and Bengio (2011): features that contract around the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pushforward.regularizers import ContractivePenalty, TiedAutoencoder
from pushforward.report.canvas import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PURPLE,
    Picture,
    draw,
    legend,
    log_axis,
)
from pushforward.reproduce.curves import Curve, paint_curves
from pushforward.reproduce.data import Images
from pushforward.reproduce.paper import Claim, Outcome, Paper, Progress, at_least, at_most
from pushforward.reproduce.training import (
    accuracy,
    finite_mean,
    minimise,
    outputs,
    steps_for,
    ticking,
)
from pushforward.sensitivity import effective_dimension

LOW, HIGH = 0.05, 0.95  # beyond these a sigmoid unit counts as saturated, as in the paper
LEAST = 1e-5  # of the largest singular value: smaller ones are left out of the picture
COLOURS = {"AE": ORANGE, "AE+wd": MUTED, "DAE-b": GREEN, "DAE-g": PURPLE, "CAE": BLUE}


@dataclass(frozen=True)
class Settings:
    """Sizes, rates, and how strongly each autoencoder is regularised."""

    train: int = 60_000
    test: int = 5_000
    hidden: int = 300
    steps: int = 3000
    batch: int = 50
    rate: float = 0.03
    contraction: float = 1.0
    weight_decay: float = 1e-3
    masked: float = 0.5
    sigma: float = 0.5
    tuning_steps: int = 2500
    tuning_rate: float = 0.1
    measured: int = 100
    directions: int = 10
    distances: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0)


@dataclass(frozen=True)
class Recipe:
    """What is added to the error of reconstruction, and what is done to its input."""

    weight_decay: float = 0.0
    contraction: float = 0.0
    corrupt: Callable[[Tensor], Tensor] = lambda x: x


def recipes(settings: Settings) -> dict[str, Recipe]:
    """The autoencoders by their names in the paper."""
    return {
        "AE": Recipe(),
        "AE+wd": Recipe(weight_decay=settings.weight_decay),
        "DAE-b": Recipe(corrupt=lambda x: x * (torch.rand_like(x) >= settings.masked)),
        "DAE-g": Recipe(corrupt=lambda x: x + settings.sigma * torch.randn_like(x)),
        "CAE": Recipe(contraction=settings.contraction),
    }


def measure(images: Images, settings: Settings, progress: Progress) -> Outcome:
    """All autoencoders for one seed, and the classifiers that begin with them."""
    images = images.first(settings.train, settings.test)
    settings = replace(
        settings,
        steps=steps_for(settings.steps, len(images.train_x)),
        tuning_steps=steps_for(settings.tuning_steps, len(images.train_x)),
    )
    choices = recipes(settings)
    tick = ticking(progress, len(choices) * (settings.steps + settings.tuning_steps))
    numbers: dict[str, float] = {}
    drawn: dict[str, Any] = {"spectra": {}, "ratios": {}, "distances": settings.distances}
    for name, recipe in choices.items():
        encoder = trained(recipe, images.train_x, settings, tick)
        x = images.test_x[: settings.measured]
        found = effective_dimension(encoder, x, progress=False)
        drawn["spectra"][name] = found.svdvals.detach().double().mean(0).tolist()
        drawn["ratios"][name] = contraction(encoder, x, settings)
        facts = {
            "norm of J": finite_mean(found.svdvals.detach().norm(dim=1)),
            "saturated units": saturated(outputs(encoder, images.test_x)),
            "participation rank": finite_mean(found.participation.detach()),
            "test error": tuned_error(encoder, images, settings, tick),
        }
        numbers |= {f"{key}, {name}": value for key, value in facts.items()}
    return Outcome(numbers, drawn)


def trained(
    recipe: Recipe, x: Tensor, settings: Settings, tick: Callable[[], None]
) -> nn.Sequential:
    """The encoder of an autoencoder trained by ``recipe`` on the cross entropy of its pixels."""
    model = TiedAutoencoder(x[0].numel(), settings.hidden)
    penalty = ContractivePenalty()

    def loss(x: Tensor, _: Tensor) -> Tensor:
        logits = model(recipe.corrupt(x))
        error = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        return (
            error + recipe.contraction * penalty(model.encode, x) if recipe.contraction else error
        )

    minimise(
        loss,
        model.parameters(),
        x.flatten(1),
        x,
        steps=settings.steps,
        batch=settings.batch,
        rate=settings.rate,
        weight_decay=recipe.weight_decay,
        advance=tick,
    )
    return nn.Sequential(nn.Flatten(), model.encoder, nn.Sigmoid())


def tuned_error(
    encoder: nn.Module, images: Images, settings: Settings, tick: Callable[[], None]
) -> float:
    """Percentage of test images that a classifier gets wrong which began as ``encoder``."""
    model = nn.Sequential(encoder, nn.Linear(settings.hidden, 10))
    minimise(
        lambda x, y: F.cross_entropy(model(x), y),
        model.parameters(),
        images.train_x,
        images.train_y,
        steps=settings.tuning_steps,
        batch=settings.batch,
        rate=settings.tuning_rate,
        advance=tick,
    )
    return 100 - accuracy(model, images.test_x, images.test_y)


# --- measurements -------------------------------------------------------------------------------


def saturated(features: Tensor) -> float:
    """Percentage of units, over images, that are almost off or almost on."""
    return 100 * finite_mean(((features < LOW) | (features > HIGH)).float())


@torch.no_grad()
def contraction(encoder: nn.Module, x: Tensor, settings: Settings) -> list[float]:
    """|h(x + d) - h(x)| / |d| for random d of given lengths, means over images and directions."""
    center = encoder(x)
    ratios = []
    for distance in settings.distances:
        steps = torch.randn(settings.directions, *x.shape)
        steps *= distance / steps.flatten(2).norm(dim=2).reshape(*steps.shape[:2], 1, 1, 1)
        moved = encoder((x + steps).flatten(0, 1)).unflatten(0, steps.shape[:2])
        ratios.append(finite_mean((moved - center).norm(dim=2)) / distance)
    return ratios


# --- figures ------------------------------------------------------------------------------------


def figures(outcomes: Sequence[Outcome]) -> tuple[Picture, ...]:
    """Spectra and contraction ratios, means over seeds."""
    return spectrum(outcomes), ratios(outcomes)


def _curves(outcomes: Sequence[Outcome], kind: str, places: Sequence[float]) -> dict[str, Curve]:
    return {
        name: Curve(places, np.array([outcome.drawn[kind][name] for outcome in outcomes]), colour)
        for name, colour in COLOURS.items()
    }


def spectrum(outcomes: Sequence[Outcome]) -> Picture:
    """Singular values of the encoder's Jacobian."""
    count = len(outcomes[0].drawn["spectra"]["AE"])
    curves = _curves(outcomes, "spectra", range(1, count + 1))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        paint_curves(axes, curves, marker=None)
        axes.set_ylim(bottom=LEAST * max(each.values.max() for each in curves.values()))
        log_axis(axes, "y")
        axes.set_xlabel("singular value of the encoder's Jacobian, largest first")
        axes.set_ylabel("size")
        legend(axes)

    return Picture(
        key="spectrum",
        title="Singular spectra of the encoders",
        caption=(
            "Averaged over test images. Where the curve falls early, features follow few "
            "directions of the input and ignore the others. After figure 2 of the paper."
        ),
        alt="Average singular values of the Jacobians of five encoders on a logarithmic axis.",
        svg=draw("spectrum", (5.6, 3.6), paint),
    )


def ratios(outcomes: Sequence[Outcome]) -> Picture:
    """How distances shrink on the way to the features."""
    distances = outcomes[0].drawn["distances"]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        paint_curves(axes, _curves(outcomes, "ratios", distances))
        log_axis(axes, "x")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("distance from a test image, random directions")
        axes.set_ylabel("distance of features / distance of inputs")
        legend(axes)

    return Picture(
        key="ratios",
        title="Contraction by distance from the data",
        caption=(
            "How far features move for each unit that the input moves away from a test image. Low "
            "near the data is contraction. After figure 1 of the paper."
        ),
        alt="Ratio of distances in feature space and in input space for five encoders, against "
        "the distance from test images.",
        svg=draw("ratios", (5.6, 3.6), paint),
    )


# --- claims -------------------------------------------------------------------------------------


def _lowest_other(numbers: Any, key: str) -> float:
    return min(numbers[f"{key}, {name}"] for name in COLOURS if name != "CAE")


def _of_all(key: str) -> tuple[str, ...]:
    return tuple(f"{key}, {name}" for name in COLOURS)


CLAIMS = (
    Claim(
        text="The Jacobian of the contractive encoder is smaller than the plain one's",
        published="0.73e-4 against 17.5e-4, a ratio of 0.04 (Table 1, MNIST)",
        value=lambda m: m["norm of J, CAE"] / m["norm of J, AE"],
        unit="times",
        criterion=at_most(0.6),
        shown=_of_all("norm of J"),
    ),
    Claim(
        text="It is the smallest of all",
        published="0.73e-4; next is DAE-g with 0.86e-4, a ratio of 0.85 (Table 1, MNIST)",
        value=lambda m: m["norm of J, CAE"] / _lowest_other(m, "norm of J"),
        unit="times",
        criterion=at_most(1.0),
    ),
    Claim(
        text="More of its units are saturated",
        published="86.4 % against 49.9 % of the plain one (Table 1, MNIST)",
        value=lambda m: m["saturated units, CAE"] - m["saturated units, AE"],
        unit="points",
        criterion=at_least(10),
        shown=_of_all("saturated units"),
    ),
    Claim(
        text="Its features follow fewer directions",
        published="direction only (Figure 2, CIFAR-bw: fewer large singular values)",
        value=lambda m: m["participation rank, CAE"] / m["participation rank, AE"],
        unit="times",
        criterion=at_most(0.75),
        shown=_of_all("participation rank"),
    ),
    Claim(
        text="A classifier that begins with it errs less than one that begins with the plain one",
        published="1.14 % against 1.78 %, 0.64 points (Table 1, MNIST)",
        value=lambda m: m["test error, AE"] - m["test error, CAE"],
        unit="points",
        criterion=at_least(0.5),
        shown=_of_all("test error"),
    ),
    Claim(
        text="It errs less than one that begins with a denoising one",
        published="1.14 % against 1.57 % of DAE-b and 1.18 % of DAE-g (Table 1, MNIST)",
        value=lambda m: (
            (m["test error, DAE-b"] + m["test error, DAE-g"]) / 2 - m["test error, CAE"]
        ),
        unit="points",
        criterion=at_least(0),
        shown=("test error, CAE", "test error, DAE-b", "test error, DAE-g"),
    ),
    Claim(
        text="Denoising in turn beats the plain one",
        published="1.57 % and 1.18 % against 1.78 % (Table 1, MNIST)",
        value=lambda m: m["test error, AE"] - (m["test error, DAE-b"] + m["test error, DAE-g"]) / 2,
        unit="points",
        criterion=at_least(0),
        shown=("test error, AE", "test error, DAE-b", "test error, DAE-g"),
    ),
    Claim(
        text="It errs less than one that begins with weight decay",
        published="1.14 % against 1.68 % (Table 1, MNIST)",
        value=lambda m: m["test error, AE+wd"] - m["test error, CAE"],
        unit="points",
        criterion=at_least(0),
        shown=("test error, AE+wd", "test error, CAE"),
    ),
)

PAPER = Paper(
    name="contractive-autoencoder",
    title="Contractive Auto-Encoders: Explicit Invariance During Feature Extraction",
    authors="S. Rifai, P. Vincent, X. Muller, X. Glorot, Y. Bengio",
    source="ICML 2011",
    summary=(
        "Autoencoders with tied weights and 300 sigmoid units are trained on images of digits: "
        "plain (AE), with weight decay (AE+wd), denoising with masked pixels (DAE-b) and with "
        "Gaussian noise (DAE-g), and with pf.regularizers.ContractivePenalty (CAE). Each then "
        "becomes the first layer of a classifier that is trained on the labels. The paper trains "
        "1000 units on 60,000 images and chooses all rates and strengths by validation."
    ),
    data="mnist5k",
    settings=Settings(),
    quick=Settings(500, 200, hidden=40, steps=60, tuning_steps=60, measured=30, directions=2),
    measure=measure,
    figures=figures,
    claims=CLAIMS,
    notes=(
        "Norms are means over test images of the Frobenius norm of the whole Jacobian; the "
        "paper's are scaled otherwise, so that ratios are what compares.",
        "The strength of the penalty (0.3 or 1) and the share of masked pixels (0.3 or 0.5) were "
        "chosen by the error on training images held out for that.",
    ),
)
