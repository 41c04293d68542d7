"""Camuto, Willetts, Simsekli, Roberts and Holmes (2020): what noise on activations amounts to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pushforward.regularizers import GaussianNoise, NoisePenalty
from pushforward.report.canvas import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    Picture,
    draw,
    legend,
    log_axis,
)
from pushforward.reproduce.data import Images
from pushforward.reproduce.paper import Claim, Outcome, Paper, Progress, at_least, at_most
from pushforward.reproduce.training import (
    accuracy,
    finite_mean,
    minimise,
    mlp,
    outputs,
    same_draws,
    steps_for,
    ticking,
)
from pushforward.sensitivity import margin

SMALL = 1e-2  # the largest variance for which second order is claimed to be enough
BINS = 15
COLOURS = {"none": ORANGE, "injection": GREEN, "penalty": BLUE}


@dataclass(frozen=True)
class Settings:
    """Sizes, the variance of the noise, and the variances at which its effect is measured."""

    train: int = 60_000
    test: int = 5_000
    hidden: int = 256
    layers: int = 2
    steps: int = 2000
    batch: int = 64
    rate: float = 0.05
    longest: float = 1.0
    variance: float = 0.1
    measured: int = 256
    pairs: int = 40
    inits: int = 30
    init_measured: int = 32
    init_pairs: int = 20
    variances: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
    init_variances: tuple[float, ...] = (0.1, 0.25, 1.0)


def network(images: Images, settings: Settings) -> nn.Sequential:
    """Equally wide hidden layers with ELU: kinks would add effects that no Hessian shows."""
    return mlp((images.pixels, *[settings.hidden] * settings.layers, 10), activation=nn.ELU)


def measure(images: Images, settings: Settings, progress: Progress) -> Outcome:
    """The three networks for one seed, and the effect of noise before and after training."""
    images = images.first(settings.train, settings.test)
    settings = replace(settings, steps=steps_for(settings.steps, len(images.train_x)))
    tick = ticking(progress, len(COLOURS) * settings.steps + settings.inits)
    initial = initial_effects(images, settings, tick)
    nets = {name: trained(name, images, settings, tick) for name in COLOURS}
    x, y = images.test_x[: settings.measured], images.test_y[: settings.measured]
    final = {
        name: effects(net, x, y, settings.variances, settings.pairs) for name, net in nets.items()
    }
    numbers = {"deviation at initialisation": largest_deviation(initial.mean(0))}
    small = torch.tensor(settings.variances) <= SMALL
    for name, net in nets.items():
        found = {**facts(net, images), "deviation": largest_deviation(final[name][small])}
        numbers |= {f"{key}, {name}": value for key, value in found.items()}
    drawn = {
        "initial": initial,
        "final": final,
        "settings": settings,
        "reliability": {name: reliability(net, images) for name, net in nets.items()},
    }
    return Outcome(numbers, drawn)


def trained(
    name: str, images: Images, settings: Settings, tick: Callable[[], None]
) -> nn.Sequential:
    """A network trained plainly, with noise on its activations, or with the explicit penalty."""
    sigma = settings.variance**0.5
    penalty = NoisePenalty(sigma)
    with same_draws():  # all three begin with the same weights
        model = network(images, settings)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if name == "injection":
            with GaussianNoise(model, sigma):
                return F.cross_entropy(model(x), y)
        plain = F.cross_entropy(model(x), y)
        return plain + penalty(model, x) if name == "penalty" else plain

    minimise(
        loss,
        model.parameters(),
        images.train_x,
        images.train_y,
        steps=settings.steps,
        batch=settings.batch,
        rate=settings.rate,
        longest=settings.longest,  # the estimate of the penalty has heavy tails
        advance=tick,
    )
    return model.eval()


# --- measurements -------------------------------------------------------------------------------


def facts(model: nn.Module, images: Images) -> dict[str, float]:
    """Accuracy, calibration and margin on the test images."""
    x, y = images.test_x, images.test_y
    radius = margin(model, x, y, progress=False).radius.detach()
    return {
        "accuracy": accuracy(model, x, y),
        "calibration error": calibration_error(outputs(model, x), y),
        "margin": finite_mean(radius),
    }


def calibration_error(logits: Tensor, y: Tensor) -> float:
    """Expected calibration error in points, over bins of equal width (Guo et al., ICML 2017)."""
    confidence, share, right = calibration(logits, y)
    return 100 * (share * (confidence - right).abs()).sum().item()


def calibration(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, share of samples and share of right classes, for each bin."""
    top = logits.double().softmax(1).max(1)
    bins = (top.values * BINS).ceil().long().clamp(1, BINS) - 1
    count = torch.bincount(bins, minlength=BINS).double()

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(bins, values.double(), minlength=BINS) / count.clamp_min(1)

    return mean(top.values), count / len(y), mean(top.indices == y)


def reliability(model: nn.Module, images: Images) -> tuple[Tensor, Tensor, Tensor]:
    """What `calibration` says of the test images."""
    return calibration(outputs(model, images.test_x), images.test_y)


def initial_effects(images: Images, settings: Settings, tick: Callable[[], None]) -> Tensor:
    """`effects` of networks at initialisation, each on images of its own: (inits, variances, 2)."""
    found = []
    for _ in range(settings.inits):
        rows = torch.randperm(len(images.test_x))[: settings.init_measured]
        found.append(
            effects(
                network(images, settings),
                images.test_x[rows],
                images.test_y[rows],
                settings.init_variances,
                settings.init_pairs,
            )
        )
        tick()
    return torch.stack(found)


def effects(
    model: nn.Sequential, x: Tensor, y: Tensor, variances: Sequence[float], pairs: int
) -> Tensor:
    """What noise adds to the loss, measured, and the penalty, for each variance: (variances, 2)."""
    model = copy.deepcopy(model).double().eval()
    x = x.double()
    found = []
    for variance in variances:
        sigma = variance**0.5
        with torch.no_grad():
            penalty = NoisePenalty(sigma, projections="exact")(model, x)
        found.append([effect(model, x, y, sigma, pairs), penalty.item()])
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def effect(model: nn.Sequential, x: Tensor, y: Tensor, sigma: float, pairs: int) -> float:
    """E[loss with noise] - loss; each draw is used with both signs, so that odd orders cancel."""
    gains = []
    for _ in range(pairs):
        noise = [sigma * torch.randn_like(place) for place in noisy_places(model, x)]
        for sign in (1, -1):
            logits = with_noise(model, x, [sign * each for each in noise])
            gains.append(F.cross_entropy(logits, y))
    return (torch.stack(gains).mean() - F.cross_entropy(model(x), y)).item()


def noisy_places(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The input and every hidden activation, without noise."""
    places = [x]
    for module in model:
        x = module(x)
        if isinstance(module, nn.ELU):
            places.append(x)
    return places


def with_noise(model: nn.Sequential, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
    """The logits with given noise on the places of `noisy_places`."""
    following = iter(noise)
    x = x + next(following)
    for module in model:
        x = module(x)
        if isinstance(module, nn.ELU):
            x = x + next(following)
    return x


def largest_deviation(pairs: Tensor) -> float:
    """The largest |penalty / effect - 1| in per cent over variances, from (variances, 2)."""
    return 100 * (pairs[:, 1] / pairs[:, 0] - 1).abs().max().item()


# --- figures ------------------------------------------------------------------------------------


def figures(outcomes: Sequence[Outcome]) -> tuple[Picture, ...]:
    """Penalty against effect, before and after training, and reliability."""
    return penalty_against_effect(outcomes), reliability_diagram(outcomes)


def penalty_against_effect(outcomes: Sequence[Outcome]) -> Picture:
    """Every network and variance as a dot; on the diagonal the penalty is the effect."""
    initial = torch.cat([outcome.drawn["initial"] for outcome in outcomes]).flatten(0, 1)

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        _scatter(left, {"at initialisation": (initial, MUTED)})
        _scatter(right, {name: (_final(outcomes, name), COLOURS[name]) for name in COLOURS})
        left.set_ylabel("penalty")
        figure.supxlabel("measured effect of the noise on the loss", color=MUTED, fontsize=10.5)

    return Picture(
        key="effect",
        title="The penalty against the measured effect of noise",
        caption=(
            "Left: networks at initialisation. Right: trained networks on test images. Dots of one "
            "colour are networks and variances; on the line both numbers are equal. For large "
            "noise on trained networks, right and up, terms beyond second order show. After the "
            "paper's comparison at initialisation."
        ),
        alt="Scatter plots of the explicit penalty against the measured effect of noise, with the "
        "diagonal, on logarithmic axes.",
        svg=draw("effect", (6.2, 3.4), paint),
    )


def _final(outcomes: Sequence[Outcome], name: str) -> Tensor:
    return torch.cat([outcome.drawn["final"][name] for outcome in outcomes])


def _scatter(axes: Any, groups: dict[str, tuple[Tensor, str]]) -> None:
    """Dots and the diagonal; an effect that is not positive has no place on the axes."""
    for name, (pairs, colour) in groups.items():
        kept = pairs[(pairs > 0).all(1)]
        axes.plot(*kept.T.numpy(), "o", color=colour, markersize=4, alpha=0.6, label=name)
    shown = torch.cat([pairs for pairs, _ in groups.values()])
    shown = shown[shown > 0]
    ends = [shown.min().item(), shown.max().item()]
    axes.plot(ends, ends, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.legend(loc="upper left", labelcolor=INK, fontsize=8.5)  # far from the diagonal


def reliability_diagram(outcomes: Sequence[Outcome]) -> Picture:
    """Share of right classes against confidence."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for name, colour in COLOURS.items():
            confidence, right = _pooled(outcomes, name)
            axes.plot(confidence, right, "o-", color=colour, markersize=4.5, label=name)
        axes.set_xlabel("probability that the network gives its class")
        axes.set_ylabel("share of right classes")
        legend(axes)

    return Picture(
        key="reliability",
        title="Calibration on test images",
        caption=(
            f"Test images of all seeds in {BINS} bins by the probability that the network gives "
            "the class it chooses. Below the dashed line it is surer than it should be."
        ),
        alt="Reliability diagram: share of right classes against confidence for three networks.",
        svg=draw("reliability", (5.6, 3.6), paint),
    )


def _pooled(outcomes: Sequence[Outcome], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and accuracy of the bins that hold anything, weighted over seeds."""
    found = [outcome.drawn["reliability"][name] for outcome in outcomes]
    share = torch.stack([each[1] for each in found])
    total = share.sum(0)
    full = total > 0
    confidence, right = (
        (torch.stack([each[part] for each in found]) * share).sum(0)[full] / total[full]
        for part in (0, 2)
    )
    return confidence.numpy(), right.numpy()


# --- claims -------------------------------------------------------------------------------------


def _of_all(key: str) -> tuple[str, ...]:
    return tuple(f"{key}, {name}" for name in COLOURS)


CLAIMS = (
    Claim(
        text="At initialisation the penalty is the effect of the noise",
        published="on the diagonal, variances 0.1 to 4 (scatter at initialisation, CIFAR10 and "
        "Boston housing; direction only)",
        value=lambda m: m["deviation at initialisation"],
        unit="%",
        criterion=at_most(12),
    ),
    Claim(
        text="After training too, for variances up to 0.01",
        published="equal to second order in the noise (theory)",
        value=lambda m: max(m[name] for name in _of_all("deviation")),
        unit="%",
        criterion=at_most(12),
        shown=_of_all("deviation"),
    ),
    Claim(
        text="Injected noise makes confidence calibrated",
        published="direction only (abstract: 'calibrated classifiers')",
        value=lambda m: m["calibration error, none"] - m["calibration error, injection"],
        unit="points lower",
        criterion=at_least(0.8),
        shown=_of_all("calibration error"),
    ),
    Claim(
        text="The explicit penalty makes confidence calibrated",
        published="direction only (abstract)",
        value=lambda m: m["calibration error, none"] - m["calibration error, penalty"],
        unit="points lower",
        criterion=at_least(0.8),
    ),
    Claim(
        text="Injected noise widens margins",
        published="direction only (abstract: 'large classification margins')",
        value=lambda m: m["margin, injection"] / m["margin, none"],
        unit="times",
        criterion=at_least(1.5),
        shown=_of_all("margin"),
    ),
    Claim(
        text="The explicit penalty widens margins",
        published="direction only (abstract)",
        value=lambda m: m["margin, penalty"] / m["margin, none"],
        unit="times",
        criterion=at_least(1.5),
    ),
    Claim(
        text="Injected noise raises accuracy",
        published="direction only (test loss on SVHN and CIFAR10)",
        value=lambda m: m["accuracy, injection"] - m["accuracy, none"],
        unit="points",
        criterion=at_least(0.5),
        shown=_of_all("accuracy"),
    ),
    Claim(
        text="The explicit penalty raises accuracy",
        published="direction only (test loss on SVHN and CIFAR10)",
        value=lambda m: m["accuracy, penalty"] - m["accuracy, none"],
        unit="points",
        criterion=at_least(0.5),
    ),
)

PAPER = Paper(
    name="gaussian-noise-injection",
    title="Explicit Regularisation in Gaussian Noise Injections",
    authors="A. Camuto, M. Willetts, U. Simsekli, S. Roberts, C. Holmes",
    source="NeurIPS 2020",
    summary=(
        "Classifiers of digits with two hidden layers of 256 ELU units are trained plainly, with "
        "Gaussian noise of variance 0.1 on the input and on every activation "
        "(pf.regularizers.GaussianNoise), and with what that amounts to on average "
        "(pf.regularizers.NoisePenalty). The effect of noise is measured by adding it. The paper "
        "trains on SVHN and CIFAR10."
    ),
    data="mnist5k",
    settings=Settings(),
    quick=Settings(
        600, 200, hidden=40, steps=60, measured=64, pairs=10, inits=4, variances=(1e-3, 1e-2)
    ),
    measure=measure,
    figures=figures,
    claims=CLAIMS,
    notes=(
        "The margin is the distance at which the linearised logit of the right class ties with "
        "another one, negative where the network is wrong, a mean over test images.",
        "Effects of noise are measured in float64 with each draw taken with both signs. The "
        "penalty is the Gauss-Newton one and leaves out terms with second derivatives of the "
        "network, and all terms beyond second order.",
        "The deviation is the largest one over variances; at initialisation of the means over "
        "networks.",
    ),
)
