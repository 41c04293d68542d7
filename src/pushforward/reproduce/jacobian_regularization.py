"""Hoffman, Roberts and Yaida (2019): a penalty on the Jacobian makes classifiers robust."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from pushforward.regularizers import JacobianPenalty
from pushforward.report.canvas import BLUE, GREEN, ORANGE, Picture, draw, legend
from pushforward.report.words import number
from pushforward.reproduce.cells import paint_cells, three_digits
from pushforward.reproduce.curves import Curve, paint_curves
from pushforward.reproduce.data import Images
from pushforward.reproduce.paper import (
    Claim,
    Outcome,
    Paper,
    Progress,
    at_least,
    at_most,
)
from pushforward.reproduce.training import (
    accuracy,
    attacked_accuracy,
    few_of_each,
    finite_mean,
    minimise,
    mlp,
    noisy_accuracy,
    steps_for,
    ticking,
)
from pushforward.sensitivity import decision_map, jacobian_norm

SHOWN_DIGITS = (3, 5, 8)
RADII = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2)
SIGMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
COLOURS = {"none": ORANGE, "L2": GREEN, "Jacobian": BLUE}


@dataclass(frozen=True)
class Settings:
    """Sizes and strengths; ``strength`` multiplies 1/2 mean ||J||_F^2."""

    train: int = 60_000
    test: int = 5_000
    hidden: int = 200
    steps: int = 2500
    batch: int = 64
    rate: float = 0.1
    weight_decay: float = 5e-4
    dropout: float = 0.5
    strength: float = 0.05
    few_labels: int = 10
    few_steps: int = 500
    few_strength: float = 0.05
    subsets: int = 4
    radius: float = 0.1
    sigma: float = 0.5
    attack_steps: int = 20
    resolution: int = 110


@dataclass(frozen=True)
class Recipe:
    """What is added to the cross entropy."""

    weight_decay: float = 0.0
    dropout: float = 0.0
    strength: float = 0.0
    projections: int | str = 1


def recipes(settings: Settings) -> dict[str, Recipe]:
    """The networks that see all images."""
    return {
        "none": Recipe(),
        "L2": Recipe(weight_decay=settings.weight_decay),
        "Jacobian": Recipe(strength=settings.strength),
        "exact Jacobian": Recipe(strength=settings.strength, projections="exact"),
    }


def few_recipes(settings: Settings) -> dict[str, Recipe]:
    """The networks that see a few images of each class."""
    together = Recipe(settings.weight_decay, settings.dropout, settings.few_strength)
    return {"none": Recipe(), "all": together}


def measure(images: Images, settings: Settings, progress: Progress) -> Outcome:
    """All networks for one seed."""
    images = images.first(settings.train, settings.test)
    settings = replace(settings, steps=steps_for(settings.steps, len(images.train_x)))
    few = few_recipes(settings)
    total = len(recipes(settings)) * settings.steps
    tick = ticking(progress, total + len(few) * settings.subsets * settings.few_steps)
    nets = {
        name: trained(recipe, images.train_x, images.train_y, settings, settings.steps, tick)
        for name, recipe in recipes(settings).items()
    }
    curves = {name: robustness(nets[name], images, settings) for name in COLOURS}
    numbers = {}
    for name, net in nets.items():
        numbers |= {f"{key}, {name}": value for key, value in facts(net, images, settings).items()}
    numbers |= few_label_accuracies(images, settings, tick)
    a, b, c = three_digits(images.test_x, images.test_y, SHOWN_DIGITS)
    maps = {
        name: decision_map(nets[name], a, b, c, settings.resolution, progress=False)
        for name in COLOURS
    }
    return Outcome(numbers, {"cells": maps, "curves": curves})


def trained(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    settings: Settings,
    steps: int,
    tick: Callable[[], None],
) -> nn.Module:
    """A network with two hidden layers, trained by ``recipe``."""
    model = mlp((x[0].numel(), settings.hidden, settings.hidden, 10), recipe.dropout)
    penalty = JacobianPenalty(projections=recipe.projections)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if not recipe.strength:
            return F.cross_entropy(model(x), y)
        logits = model(x.requires_grad_())
        return F.cross_entropy(logits, y) + recipe.strength * penalty(x, logits)

    model.train()
    minimise(
        loss,
        model.parameters(),
        x,
        y,
        steps=steps,
        batch=settings.batch,
        rate=settings.rate,
        weight_decay=recipe.weight_decay,
        advance=tick,
    )
    return model.eval()


def facts(model: nn.Module, images: Images, settings: Settings) -> dict[str, float]:
    """Accuracies on test images, clean and disturbed, and the mean ||J||_F of the logits."""
    x, y = images.test_x, images.test_y
    return {
        "accuracy": accuracy(model, x, y),
        "PGD accuracy": attacked_accuracy(model, x, y, settings.radius, settings.attack_steps),
        "noise accuracy": noisy_accuracy(model, x, y, settings.sigma),
        "norm of J": finite_mean(jacobian_norm(model, x, of="logits", progress=False).detach()),
    }


def robustness(model: nn.Module, images: Images, settings: Settings) -> dict[str, list[float]]:
    """Accuracy against the radius of an attack, and against the size of noise."""
    x, y = images.test_x, images.test_y
    return {
        "attack": [attacked_accuracy(model, x, y, r, settings.attack_steps) for r in RADII],
        "noise": [noisy_accuracy(model, x, y, sigma) for sigma in SIGMAS],
    }


def few_label_accuracies(
    images: Images, settings: Settings, tick: Callable[[], None]
) -> dict[str, float]:
    """Mean accuracy over several random choices of a few images of each class."""
    found: dict[str, list[float]] = {name: [] for name in few_recipes(settings)}
    for _ in range(settings.subsets):
        rows = few_of_each(images.train_y, settings.few_labels)
        x, y = images.train_x[rows], images.train_y[rows]
        for name, recipe in few_recipes(settings).items():
            net = trained(recipe, x, y, settings, settings.few_steps, tick)
            found[name].append(accuracy(net, images.test_x, images.test_y))
    return {
        f"accuracy with few labels, {name}": sum(values) / len(values)
        for name, values in found.items()
    }


# --- figures ------------------------------------------------------------------------------------


def figures(outcomes: Sequence[Outcome]) -> tuple[Picture, ...]:
    """Decision cells of the first seed, and robustness over all seeds."""
    return decision_cells(outcomes[0]), robustness_curves(outcomes)


def decision_cells(outcome: Outcome) -> Picture:
    """The figure that the paper opens with."""
    maps = outcome.drawn["cells"]
    a, b, c = SHOWN_DIGITS
    return Picture(
        key="cells",
        title="Decision cells without penalty, with weight decay, and with the Jacobian penalty",
        caption=(
            f"The plane through three test images, a {a}, a {b} and a {c} (dots). Hues are the "
            "classes that a network sees, fading to white where its probabilities answer most to "
            "the input. After figure 1 of the paper; the networks of the first seed."
        ),
        alt=f"Three maps of classes in the plane through a {a}, a {b} and a {c}: without penalty, "
        "with weight decay, and with the Jacobian penalty.",
        svg=draw("cells", (6.6, 2.7), lambda figure: paint_cells(figure, maps, (a, b, c))),
    )


def robustness_curves(outcomes: Sequence[Outcome]) -> Picture:
    """Accuracy against the size of the disturbance."""

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        paint_curves(left, _curves(outcomes, "attack", RADII))
        paint_curves(right, _curves(outcomes, "noise", SIGMAS))
        left.set_xlabel("radius of the attack")
        right.set_xlabel("σ of the noise")
        left.set_ylabel("accuracy on test images, %")
        legend(left)

    return Picture(
        key="robustness",
        title="Accuracy under attack and under noise",
        caption=(
            "Left: projected gradient descent on the cross entropy, radius in each pixel. Right: "
            "Gaussian noise of standard deviation σ on each pixel. Means "
            "over seeds, bands of one standard deviation. After figure 3 of the paper."
        ),
        alt="Accuracy against the size of disturbances, without penalty, with weight decay and "
        "with the Jacobian penalty. " + _in_words(outcomes),
        svg=draw("robustness", (6.4, 3.2), paint),
    )


def _curves(outcomes: Sequence[Outcome], kind: str, places: Sequence[float]) -> dict[str, Curve]:
    return {
        name: Curve(
            places,
            np.array([outcome.drawn["curves"][name][kind] for outcome in outcomes]),
            colour,
        )
        for name, colour in COLOURS.items()
    }


def _in_words(outcomes: Sequence[Outcome]) -> str:
    last = {
        name: curve.values.mean(0)[-1] for name, curve in _curves(outcomes, "attack", RADII).items()
    }
    told = ", ".join(f"{name} {number(value)} %" for name, value in last.items())
    return f"Under an attack of radius {RADII[-1]}: {told}."


# --- claims -------------------------------------------------------------------------------------

CLAIMS = (
    Claim(
        text="The penalty lowers the norm of the Jacobian on test images",
        published="32.9 to 1.1, a factor of 30 (Table 1: MNIST, LeNet, all labels)",
        value=lambda m: m["norm of J, none"] / m["norm of J, Jacobian"],
        unit="times lower",
        criterion=at_least(3),
        shown=("norm of J, none", "norm of J, Jacobian"),
    ),
    Claim(
        text="Accuracy on clean images stays",
        published="98.9 % without, 99.0 % with (Table 1)",
        value=lambda m: m["accuracy, Jacobian"] - m["accuracy, none"],
        unit="points",
        criterion=at_least(-1.5),
        shown=("accuracy, none", "accuracy, Jacobian"),
    ),
    Claim(
        text="Accuracy under attack by projected gradient descent rises",
        published="direction only (Figure 3, MNIST)",
        value=lambda m: m["PGD accuracy, Jacobian"] - m["PGD accuracy, none"],
        unit="points",
        criterion=at_least(10),
        shown=("PGD accuracy, none", "PGD accuracy, L2", "PGD accuracy, Jacobian"),
    ),
    Claim(
        text="Accuracy under Gaussian noise rises",
        published="direction only (Figure 3, MNIST)",
        value=lambda m: m["noise accuracy, Jacobian"] - m["noise accuracy, none"],
        unit="points",
        criterion=at_least(3),
        shown=("noise accuracy, none", "noise accuracy, L2", "noise accuracy, Jacobian"),
    ),
    Claim(
        text="With 10 labels a class, all regularisers together beat none",
        published="83.3 % to 86.3 %, 3.0 points (Table 1)",
        value=lambda m: m["accuracy with few labels, all"] - m["accuracy with few labels, none"],
        unit="points",
        criterion=at_least(3),
        shown=("accuracy with few labels, none", "accuracy with few labels, all"),
    ),
    Claim(
        text="One random projection keeps the norm as low as the exact penalty",
        published="difference negligible (Figure 2)",
        value=lambda m: m["norm of J, Jacobian"] / m["norm of J, exact Jacobian"],
        unit="times",
        criterion=at_most(1.25),
        shown=("norm of J, Jacobian", "norm of J, exact Jacobian"),
    ),
    Claim(
        text="One random projection costs no accuracy against the exact penalty",
        published="difference negligible (Figure 2)",
        value=lambda m: m["accuracy, Jacobian"] - m["accuracy, exact Jacobian"],
        unit="points",
        criterion=at_least(-1),
        shown=("accuracy, Jacobian", "accuracy, exact Jacobian"),
    ),
)

PAPER = Paper(
    name="jacobian-regularization",
    title="Robust Learning with Jacobian Regularization",
    authors="J. Hoffman, D. A. Roberts, S. Yaida",
    source="arXiv:1908.02729 (2019)",
    summary=(
        "Classifiers of digits with two hidden layers of 200 ReLU units are trained with nothing "
        "but the cross entropy, with weight decay, and with pf.regularizers.JacobianPenalty, by "
        "one random projection and exactly. The paper trains a LeNet on 60,000 images."
    ),
    data="mnist5k",
    settings=Settings(),
    quick=Settings(
        train=600, test=200, hidden=50, steps=60, few_steps=30, subsets=1, resolution=40
    ),
    measure=measure,
    figures=figures,
    claims=CLAIMS,
    notes=(
        "The penalty is weighted by 0.05 here and by 0.01 in the paper, since the network and the "
        "data are smaller.",
        "'all' is weight decay, dropout and the Jacobian penalty; accuracy with few labels is the "
        "mean over several random choices of the labelled images for each seed.",
    ),
)
