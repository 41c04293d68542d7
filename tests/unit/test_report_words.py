"""Numbers and verdicts in words."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pushforward.report.data import DataSet
from pushforward.report.measure import Measurement, measure
from pushforward.report.summary import NoiseMean, Step
from pushforward.report.verdict import (
    accuracy,
    bound_sentence,
    departs,
    linearity,
    path_sentence,
    path_title,
    verdict,
)
from pushforward.report.words import number, percent, readable, share, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.12345, "0.123"),
        (12345.6, "12,300"),
        (-7.5, "-7.5"),
        (1.5e-7, "1.5e-7"),
        (1e-24, "1e-24"),
        (2.5e10, "2.5e10"),
        (math.inf, "infinite"),
        (-math.inf, "-infinite"),
        (math.nan, "undefined"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_number_with_places() -> None:
    assert number(16.62, places=1) == "16.6"
    assert number(-0.01, places=1) == "0.0"


def test_percent() -> None:
    assert [percent(f) for f in (0.0, 0.015, 0.1, 0.986, 1.0)] == [
        "0 %",
        "1.5 %",
        "10 %",
        "99 %",
        "100 %",
    ]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.02, "less than a tenth"),
        (0.1, "a tenth"),
        (0.34, "a third"),
        (0.52, "half"),
        (0.74, "three quarters"),
        (0.99, "all"),
    ],
)
def test_share(fraction: float, text: str) -> None:
    assert share(fraction) == text


def test_signed() -> None:
    assert [signed(value) for value in (0.5, -0.25, -0.0)] == ["+0.50", "−0.25", "+0.00"]


def test_readable_escapes_what_moves_the_cursor() -> None:
    assert readable("a\x1b[31m\n\u202eb é 層") == "a\\x1b[31m\\n\\u202eb é 層"


def path(*gains: float) -> tuple[Step, ...]:
    return tuple(Step(f"layer{i}", gain, 0.0, 0.0, True) for i, gain in enumerate(gains))


class TestPath:
    def test_largest_gain_and_its_share(self) -> None:
        found = path(0.1, 0.8, -0.2, 1.5, 9.0)
        assert (
            path_sentence(found) == "layer3 gains 1.5 decades, three fifths of all that is gained"
        )
        assert path_title(found) == "layer3 gains most on the way back from the output"

    def test_largest_loss(self) -> None:
        assert path_sentence(path(0.1, -0.9, 0.5)) == "layer1 loses 0.9 decades, all that is lost"

    def test_number_as_a_name(self) -> None:
        found = (replace(path(2.0)[0], name="3"), *path(0.1))
        assert path_sentence(found) == "Layer 3 gains 2.0 decades, all that is gained"
        assert path_title(found) == "Layer 3 gains most on the way back from the output"

    def test_nothing_notable(self) -> None:
        assert path_sentence(path(0.01, -0.01, 5.0)) == "No layer gains or loses notably"
        assert path_title(path(0.01, -0.01, 5.0)) == "The size of the derivative, layer by layer"

    def test_many_small_steps(self) -> None:
        found = path(*[-0.3] * 60, 1.0)
        assert path_sentence(found) == (
            "60 layers together lose 18.0 decades in small steps, the largest 0.3 in layer0"
        )
        assert path_title(found) == "60 layers together lose 18.0 decades in small steps"

    def test_single_step(self) -> None:
        assert path_sentence(path(0.4)) == "The model is a single step, layer0, of 0.4 decades"


def level(sigma: float, ratio: float, reach: float = 0.01) -> NoiseMean:
    return NoiseMean(sigma, ratio, ratio - reach, ratio + reach, linear=1.0)


class TestNoise:
    def test_linear_throughout(self) -> None:
        words = linearity((level(0.1, 1.0), level(1.0, 1.05)))
        assert words == (
            "The Jacobian predicts the response to noise to 10 % up to sigma = 1, the largest that "
            "was tried."
        )

    def test_departure(self) -> None:
        words = linearity((level(0.1, 1.0), level(1.0, 1.8), level(3.0, 0.4)))
        assert words == (
            "The Jacobian predicts the response to noise to 10 % up to sigma = 0.1; at 3 it is "
            "40 % of the prediction."
        )

    def test_departure_from_the_start(self) -> None:
        words = linearity((level(0.1, 1.5), level(1.0, 1800)))
        assert words == (
            "Even little noise is not answered as the Jacobian predicts: at 1 it is 1,800 times "
            "the prediction."
        )

    def test_response_where_the_jacobian_sees_none(self) -> None:
        flat = NoiseMean(1.0, 0.5, 0.4, 0.6, linear=0.0)
        assert "infinitely many times the prediction" in str(linearity((flat,)))

    def test_rounding_hides_the_response(self) -> None:
        assert linearity((level(0.1, 1.0, reach=5.0),)) == (
            "The response to noise drowns in rounding, so that nothing can be said of it."
        )

    def test_interval_decides(self) -> None:
        assert not departs(level(1.0, 1.2, reach=0.2))
        assert departs(level(1.0, 1.2, reach=0.05))
        assert departs(level(1.0, 0.8, reach=0.05))

    def test_no_level(self) -> None:
        assert linearity(()) is None


def measured(model: nn.Module, x: Tensor) -> Measurement:
    return measure(model, DataSet("test", x, None, tuple(range(len(x))), len(x)))


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def numbers() -> Measurement:
    return measured(classifier(), torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))


class TestVerdict:
    def test_headline_and_details(self, numbers: Measurement) -> None:
        words = verdict(numbers, torch.zeros(6, dtype=torch.long))
        assert "; the Frobenius bound is 0." in words.headline
        assert words.headline.endswith(" decades above the truth, and the segments rung meets it.")
        text = " ".join(words.details)
        for phrase in (
            "for the median sample",
            "Of 2 possible directions",
            "change their class within a distance of",
            "are classified rightly",
            "response to noise",
        ):
            assert phrase in text

    def test_bound_that_is_met_or_estimated(self, numbers: Measurement) -> None:
        met = replace(numbers.path, rungs={"frobenius": numbers.path.log_norm})
        assert bound_sentence(replace(numbers, path=met)) == ("the Frobenius bound meets the truth")
        guess = replace(numbers.path, certified=dict.fromkeys(numbers.path.certified, False))
        words = bound_sentence(replace(numbers, path=guess))
        assert "the estimated Frobenius bound is" in words
        assert words.endswith("above the truth")

    def test_the_best_of_the_certified_rungs_is_named(self, numbers: Measurement) -> None:
        certified = {"frobenius": True, "mixed": True, "spectral": False, "segments": False}
        far = numbers.path.log_norm + 3
        rungs = {**numbers.path.rungs, "frobenius": far + 3, "mixed": far}
        path = replace(numbers.path, certified=certified, rungs=rungs)
        words = bound_sentence(replace(numbers, path=path))
        assert (
            words
            == "the Frobenius bound is 2.6 decades above the truth, the mixed rung 1.3 decades"
        )
        alone = replace(path, certified={**certified, "mixed": False})
        assert bound_sentence(replace(numbers, path=alone)).endswith("above the truth")

    def test_accuracy_needs_labels_of_these_classes(self, numbers: Measurement) -> None:
        assert numbers.jacobians.margins is not None
        right = numbers.jacobians.margins.prediction
        assert accuracy(numbers, right) == 1
        assert accuracy(numbers, 1 - right) == 0
        assert accuracy(numbers, None) is None
        assert accuracy(numbers, right + 5) is None

    def test_no_classes_are_said(self) -> None:
        words = verdict(measured(nn.Linear(3, 1), torch.randn(3, 3)))
        assert any("no margins and no robustness radii" in line for line in words.details)
        assert not any("directions" in line for line in words.details)

    def test_zero_jacobians(self) -> None:
        model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
        words = verdict(measured(model, torch.tensor([[1.0, 2], [-1, -2], [3, 1]])))
        assert words.details[0].startswith("1 of 3 samples have a Jacobian of zero")
        words = verdict(measured(model, torch.tensor([[-1.0, -2]])))
        assert words.headline.startswith("The output does not answer to the input at all")
        assert "no small change of the input changes the class" in words.details[0]

    def test_derivatives_below_the_dtype(self) -> None:
        class Tiny(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.steps = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                for step in self.steps:
                    x = step(x) * 1e-20
                return x

        words = verdict(measured(Tiny(), torch.ones(2, 2)))
        assert "too small for the model's dtype" in words.details[0]

    def test_length_of_the_radius(self) -> None:
        near = verdict(measured(classifier(), 1e-3 * torch.ones(2, 3)))
        assert any("times the input's length" in line for line in near.details)
        origin = verdict(measured(classifier(), torch.zeros(2, 3)))
        assert not any("input's length" in line for line in origin.details)

    def test_noise_out_of_the_domain(self) -> None:
        class Logarithm(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.log()

        words = verdict(measured(Logarithm(), torch.linspace(1, 3, 6).view(2, 3)))
        assert "noise leads to inputs where the model is not finite" in words.details[-1]
