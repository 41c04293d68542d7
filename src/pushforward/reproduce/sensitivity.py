"""Novak et al. (2018): networks that generalise answer less to changes of their input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pushforward.reproduce.data import Images
from pushforward.reproduce.paper import Claim, Outcome, Paper, Progress, at_least, at_most
from pushforward.reproduce.ranking import area_under_curve, rank_correlation
from pushforward.reproduce.sensitivity_figures import PATHS, figures
from pushforward.reproduce.training import accuracy, batches, finite_mean, mlp, outputs, ticking
from pushforward.sensitivity import great_circle, jacobian_norm, linear_regions

LARGE = 200  # pixels from which images are taken at half their resolution
SMALL_BATCHES, WIDTHS, DEPTHS = (32, 64, 256), (64, 128, 256), (1, 2, 3)
OPTIMISERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "SGD": lambda parameters, rate: torch.optim.SGD(parameters, rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, rate / 4, momentum=0.9),
    "Adam": lambda parameters, rate: torch.optim.Adam(parameters, rate / 50),
}
RATES = (0.1, 0.5)
LOSSES = (0.003, 0.2)  # of training images, at which training may end


@dataclass(frozen=True)
class Settings:
    """Sizes; ``wrong_labels`` is the largest part of labels that are drawn at random."""

    train: int = 1000
    measured: int = 1000
    nets: int = 24
    wrong_labels: float = 0.3
    steps: int = 3000
    full_batch_steps: int = 800
    paths: int = 10
    path_steps: int = 180


@dataclass(frozen=True)
class Recipe:
    """How one network is made and trained; ``batch`` 0 takes all images at once."""

    width: int = 128
    depth: int = 2
    optimiser: str = "momentum"
    batch: int = 64
    rate: float = 0.5
    loss: float = 0.01
    moved: bool = False
    wrong_labels: float = 0.0

    @property
    def kind(self) -> str:
        """What stands in the legend."""
        if self.moved:
            return "moved images"
        return "wrong labels" if self.wrong_labels else "right labels"


@dataclass(frozen=True)
class Measured:
    """Of one network: accuracies in percent, mean norms, and how well norms tell mistakes."""

    kind: str
    train_accuracy: float
    gap: float
    norm: float
    norm_of_logits: float
    transitions: float
    area: float


# --- training -----------------------------------------------------------------------------------


def prepared(images: Images, settings: Settings) -> Images:
    """A part to train on, and all other images to test on; large ones at half their resolution."""
    test_x = torch.cat([images.test_x, images.train_x[settings.train :]])
    test_y = torch.cat([images.test_y, images.train_y[settings.train :]])
    kept = replace(images.first(settings.train), test_x=test_x, test_y=test_y)
    if images.pixels <= LARGE:
        return kept
    return replace(kept, train_x=F.avg_pool2d(kept.train_x, 2), test_x=F.avg_pool2d(kept.test_x, 2))


def drawn_recipe(settings: Settings) -> Recipe:
    """A recipe at random: a quarter with moved images, about half with some wrong labels."""
    moved = bool(torch.rand(()) < 0.25)
    wrong = 0.0 if moved else max(0.0, _between(-settings.wrong_labels / 3, settings.wrong_labels))
    return Recipe(
        width=_one_of(WIDTHS),
        depth=_one_of(DEPTHS),
        optimiser=_one_of(tuple(OPTIMISERS)),
        batch=_one_of((*SMALL_BATCHES, 0)),
        rate=math.exp(_between(*map(math.log, RATES))),
        loss=math.exp(_between(*map(math.log, LOSSES))),
        moved=moved,
        wrong_labels=wrong,
    )


def _one_of(choices: Sequence[Any]) -> Any:
    return choices[int(torch.randint(len(choices), ()))]


def _between(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def labelled(y: Tensor, part: float) -> Tensor:
    """Labels, a part of them drawn at random."""
    return torch.where(torch.rand(len(y)) < part, torch.randint(10, y.shape), y)


def moved(x: Tensor) -> Tensor:
    """Half of the time the images as they are, else all of them up to one pixel away."""
    if torch.rand(()) < 0.5:
        return x
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(x, (down, right), (2, 3))


def trained(recipe: Recipe, x: Tensor, y: Tensor, settings: Settings) -> nn.Sequential:
    """Trained until all of ``x`` is classified as ``y`` at the loss of the recipe, or no longer."""
    model = mlp((x[0].numel(), *[recipe.width] * recipe.depth, 10))
    optimiser = OPTIMISERS[recipe.optimiser](model.parameters(), recipe.rate)
    batch = recipe.batch or len(x)
    steps = settings.steps if batch < len(x) else settings.full_batch_steps
    epoch = math.ceil(len(x) / batch)
    for step, rows in enumerate(batches(len(x), batch, steps), start=1):
        optimiser.zero_grad()
        seen = moved(x[rows]) if recipe.moved else x[rows]
        F.cross_entropy(model(seen), y[rows]).backward()
        optimiser.step()
        if step % epoch == 0 and _is_fitted(model, x, y, recipe.loss):
            break
    return model.eval()


def _is_fitted(model: nn.Module, x: Tensor, y: Tensor, loss: float) -> bool:
    logits = outputs(model, x)
    return bool((logits.argmax(1) == y).all()) and bool(F.cross_entropy(logits, y) < loss)


# --- measuring ----------------------------------------------------------------------------------


def measure(images: Images, settings: Settings, progress: Progress) -> Outcome:
    """Networks by random recipes, networks with one factor changed, and paths through digits."""
    images = prepared(images, settings)
    factors = {
        "base": Recipe(),
        "moved images": Recipe(moved=True),
        "all images at once": Recipe(batch=0),
        "random labels": Recipe(wrong_labels=1.0),
    }
    tick = ticking(progress, settings.nets + len(factors))
    paths = ellipses(images, settings)
    population = []
    for _ in range(settings.nets):
        recipe = drawn_recipe(settings)
        population.append(measured(recipe, images, paths["different classes"], settings)[1])
        tick()
    alone = {}
    for name, recipe in factors.items():
        alone[name] = measured(recipe, images, paths["different classes"], settings)
        tick()
    base = alone["base"][0]
    along = {name: profile(base, path, settings) for name, path in paths.items()}
    numbers = {
        **in_population(population),
        **of_factors({name: found for name, (_, found) in alone.items()}),
        **along_paths(along),
    }
    return Outcome(numbers, {"population": population, "along": along, "base": base})


def measured(
    recipe: Recipe, images: Images, path: Tensor, settings: Settings
) -> tuple[nn.Sequential, Measured]:
    """A network by a recipe, and what it does on images that it has not seen."""
    y = labelled(images.train_y, recipe.wrong_labels)
    model = trained(recipe, images.train_x, y, settings)
    fitted = accuracy(model, images.train_x, y)
    x, classes = images.test_x[: settings.measured], images.test_y[: settings.measured]
    with torch.no_grad():
        norms = jacobian_norm(model, x)
        of_logits = jacobian_norm(model, x, of="logits")
    return model, Measured(
        kind=recipe.kind,
        train_accuracy=fitted,
        gap=fitted - accuracy(model, images.test_x, images.test_y),
        norm=finite_mean(norms),
        norm_of_logits=finite_mean(of_logits),
        transitions=finite_mean(steps_per_unit(model, path)),
        area=area_under_curve(norms, outputs(model, x).argmax(1) != classes),
    )


def steps_per_unit(model: nn.Sequential, path: Tensor) -> Tensor:
    """For each step of paths (P, T, *in), how many of 100 hidden units change; (P, T - 1)."""
    hidden = sum(layer.out_features for layer in model if isinstance(layer, nn.Linear)) - 10
    changes = torch.stack([linear_regions(model, each) for each in path])
    return 100 * changes.double() / hidden


def ellipses(images: Images, settings: Settings) -> dict[str, Tensor]:
    """Paths (P, T, *in) through three training images each, and through none."""
    x, y = images.train_x, images.train_y
    present = y.unique()
    triples: dict[str, list[Sequence[Tensor]]] = {name: [] for name in PATHS}
    for _ in range(settings.paths):
        classes = present[torch.randperm(len(present))[:3]]
        apart = [x[_some_of(y == each, 1)[0]] for each in classes]
        triples["different classes"].append(apart)
        triples["one class"].append(x[_some_of(y == classes[0], 3)].unbind())
        triples["pixels at random"].append([_shuffled(image) for image in apart])
    return {
        name: torch.stack([great_circle(*three, steps=settings.path_steps) for three in each])
        for name, each in triples.items()
    }


def _some_of(mask: Tensor, count: int) -> Tensor:
    """Places, at random, where a mask is true."""
    places = mask.nonzero().flatten()
    return places[torch.randperm(len(places))[:count]]


def _shuffled(image: Tensor) -> Tensor:
    """The same pixels in another order."""
    return image.flatten()[torch.randperm(image.numel())].reshape(image.shape)


def profile(model: nn.Sequential, paths: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Means over paths: norms (T,), and the share of units that change at each step, (T - 1,)."""
    with torch.no_grad():
        norms = jacobian_norm(model, paths.flatten(0, 1)).reshape(paths.shape[:2])
    return {
        "norms": norms.double().mean(0),
        "transitions": steps_per_unit(model, paths).mean(0),
    }


# --- numbers ------------------------------------------------------------------------------------


def in_population(nets: Sequence[Measured]) -> dict[str, float]:
    """Rank correlations with the gap, of networks that fit all training images."""
    fitted = [net for net in nets if net.train_accuracy == 100]
    right = [net for net in fitted if net.kind != "wrong labels"]
    told = [net.area for net in right if math.isfinite(net.area)]  # of those that make mistakes
    return {
        "fitted networks": float(len(fitted)),
        **_correlations(fitted, "rank correlation"),
        **_correlations(right, "rank correlation with right labels"),
        "area under the curve": finite_mean(torch.tensor(told)),
    }


def _correlations(nets: Sequence[Measured], name: str) -> dict[str, float]:
    gaps = [net.gap for net in nets]
    columns = {
        "probabilities": [net.norm for net in nets],
        "logits": [net.norm_of_logits for net in nets],
        "transitions": [net.transitions for net in nets],
    }
    return {f"{name}, {what}": rank_correlation(gaps, some) for what, some in columns.items()}


def of_factors(nets: dict[str, Measured]) -> dict[str, float]:
    """Gap, norm and transitions of each network, one factor apart from the base."""
    return {
        f"{what}, {name}": value
        for name, net in nets.items()
        for what, value in (
            ("gap", net.gap),
            ("norm", net.norm),
            ("transitions", net.transitions),
        )
    }


def along_paths(along: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Norms at the images and midway between them, and means over whole paths."""
    apart = along["different classes"]["norms"]
    third = len(apart) // 3
    places = torch.arange(3) * third
    return {
        "norm at images": apart[places].mean().item(),
        "norm midway": apart[places + third // 2].mean().item(),
        **{f"norm on path, {name}": found["norms"].mean().item() for name, found in along.items()},
        **{
            f"transitions on path, {name}": found["transitions"].mean().item()
            for name, found in along.items()
        },
    }


def worse(numbers: Any, what: str) -> int:
    """In how many of three comparisons the factor that generalises worse has more of ``what``."""
    base, alike = numbers[f"{what}, base"], f"{what}, moved images"
    return sum(
        (
            base > numbers[alike],
            numbers[f"{what}, all images at once"] > base,
            numbers[f"{what}, random labels"] > base,
        )
    )


def transitions_of_the_worse(numbers: Any) -> float:
    """Transitions with all images at once against the base; NaN unless the gap is larger."""
    larger = numbers["gap, all images at once"] > numbers["gap, base"]
    ratio = numbers["transitions, all images at once"] / numbers["transitions, base"]
    return ratio if larger else math.nan


# --- claims -------------------------------------------------------------------------------------

CLAIMS = (
    Claim(
        text="Networks with a larger gap have larger norms of the probabilities' Jacobian",
        published="scatter plots, no coefficient (section 4.3)",
        value=lambda m: m["rank correlation, probabilities"],
        unit="rank correlation",
        criterion=at_least(0.75),
        shown=("fitted networks",),
    ),
    Claim(
        text="The norm of the logits' Jacobian follows the gap less well",
        published="not in the paper, which takes probabilities throughout",
        value=lambda m: m["rank correlation, probabilities"] - m["rank correlation, logits"],
        unit="lower",
        criterion=at_least(0.2),
        shown=("rank correlation, probabilities", "rank correlation, logits"),
    ),
    Claim(
        text="At single test images the norm tells wrong decisions from right ones",
        published="scatter plots, no area (section 4.4)",
        value=lambda m: m["area under the curve"],
        unit="area under the curve",
        criterion=at_least(0.8),
    ),
    Claim(
        text="Moving images, small batches and right labels each lower gap and norm together",
        published="in each comparison (section 4.2)",
        value=lambda m: min(worse(m, "gap"), worse(m, "norm")),
        unit="of 3 comparisons",
        criterion=at_least(3),
    ),
    Claim(
        text="Norms are low at training images and rise between them",
        published="direction only (section 4.1)",
        value=lambda m: m["norm midway"] / m["norm at images"],
        unit="times higher",
        criterion=at_least(3),
        shown=("norm at images", "norm midway"),
    ),
    Claim(
        text="Norms are higher on paths between classes than within one",
        published="direction only (section 4.1)",
        value=lambda m: m["norm on path, different classes"] / m["norm on path, one class"],
        unit="times higher",
        criterion=at_least(1.5),
        shown=tuple(f"norm on path, {name}" for name in PATHS),
    ),
    Claim(
        text="Transitions do not tell optimisers apart: all images at once have the larger gap and "
        "no more transitions",
        published="the one comparison where they fail (section 4.2)",
        value=transitions_of_the_worse,
        unit="times as many",
        criterion=at_most(1),
        shown=tuple(
            f"{what}, {name}"
            for what in ("transitions", "gap")
            for name in ("base", "all images at once")
        ),
    ),
    Claim(
        text="Over all networks transitions follow the gap less well than norms",
        published="they follow it in all comparisons but that of optimisers (section 4.2)",
        value=lambda m: m["rank correlation, probabilities"] - m["rank correlation, transitions"],
        unit="lower",
        criterion=at_least(0.2),
        shown=("rank correlation, probabilities", "rank correlation, transitions"),
    ),
)

PAPER = Paper(
    name="sensitivity",
    title="Sensitivity and Generalization in Neural Networks: an Empirical Study",
    authors="R. Novak, Y. Bahri, D. A. Abolafia, J. Pennington, J. Sohl-Dickstein",
    source="ICLR 2018, arXiv:1802.08760",
    summary=(
        "Networks of ReLU units are trained until they classify all of 1000 images as labelled. "
        "Width, depth, optimiser, batch, rate and the loss at which training ends are drawn at "
        "random; a quarter sees moved images, and about half has some labels drawn at random. "
        "Norms and transitions come from pf.sensitivity. The paper trains thousands of "
        "networks on four data sets."
    ),
    data="mnist5k",
    settings=Settings(),
    quick=Settings(
        train=200, measured=200, nets=6, steps=300, full_batch_steps=100, paths=2, path_steps=30
    ),
    measure=measure,
    figures=figures,
    claims=CLAIMS,
    notes=(
        "Images of more than 200 pixels are taken at half their resolution, in order to train many "
        "networks in minutes. What is not trained on is tested on.",
        "A network that does not fit all its training images in the steps that it has does not "
        "count, as in the paper.",
        "Wrong labels raise the gap and both norms, which makes up a part of the correlations; "
        "those among networks with right labels alone stand among the numbers.",
        "Transitions are counted per hundred hidden units, so that widths can be compared; the "
        "paper compares networks of one width.",
    ),
)
