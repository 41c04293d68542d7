"""The `Estimate` and Student's quantiles."""

import dataclasses

import pytest
import torch
from scipy import stats

from pushforward.errors import InputError
from pushforward.estimate import Estimate, student_quantile, student_upper_tail, with_error


def estimate(value=22.42, stderr=0.13, **changes):
    value, stderr = torch.tensor(value), torch.tensor(stderr)
    interval = (value - 2 * stderr, value + 2 * stderr)
    plain = Estimate(value, stderr, interval, 65, 64, "hutchinson", seed=7)
    return dataclasses.replace(plain, **changes)


def test_repr_shows_number_interval_and_origin():
    expected = "22.42 ± 0.13 (95 % in [22.16, 22.68]; 64 probes, hutchinson, seed 7)"
    assert repr(estimate()) == expected


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"converged": False}, "(not converged, no 95 % interval; 64"),
        ({"unbiased": False}, "hutchinson, biased, seed 7)"),
        ({"seed": None}, "64 probes, hutchinson)"),
        ({"confidence": 0.999}, "(99.9 % in ["),
    ],
)
def test_repr_says_what_is_unusual(changes, part):
    assert part in repr(estimate(**changes))


def test_repr_of_many_values():
    shown = repr(estimate([1.0, 2.0, 3.5], [0.1, 0.2, 0.1]))
    assert shown == (
        "3 values from 1 to 3.5, each ± 0.2 or less (95 % intervals; 64 probes, hutchinson, seed 7)"
    )
    assert repr(estimate([], [])).startswith("no samples, shape (0,)")


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (22.4213, 0.1342, "22.42 ± 0.13"),
        (1234.5, 12.3, "1234 ± 12"),
        (1.5, 0.0, "1.5 ± 0"),
        (2e-9, 1e-10, "2e-09 ± 1e-10"),
        (3e12, 0.5, "3e+12 ± 0.50"),
        (float("inf"), float("nan"), "inf ± nan"),
        (float("nan"), 0.1, "nan ± 0.10"),
    ],
)
def test_digits_follow_the_error(value, error, shown):
    assert with_error(value, error) == shown


def test_html_is_escaped():
    shown = estimate(method="<script>")._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "<b>22.42 ± 0.13</b>" in shown


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate().value = torch.tensor(1.0)


@pytest.mark.parametrize("freedom", [0.5, 1, 2, 3.7, 10, 62, 126.3, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.975, 0.995, 0.9999, 0.025])
def test_quantiles_agree_with_scipy(probability, freedom):
    expected = stats.t.ppf(probability, freedom)
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("t", [0.0, 1e-8, 0.3, 2.0, 40.0])
def test_tails_agree_with_scipy(t):
    assert student_upper_tail(t, 7) == pytest.approx(stats.t.sf(t, 7), rel=1e-9, abs=1e-8)


def test_quantiles_outside_are_refused():
    for probability in (0.0, 1.0, 95):
        with pytest.raises(InputError, match="needs a probability between 0 and 1, got"):
            student_quantile(probability, 3)
    with pytest.raises(InputError, match="positive degrees of freedom, got 0"):
        student_quantile(0.9, 0)
