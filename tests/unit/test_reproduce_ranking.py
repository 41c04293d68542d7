"""Rank correlation and the area under the curve against their definitions."""

import math

import pytest
import torch

from pushforward.reproduce.ranking import area_under_curve, rank_correlation, ranks


def test_equal_numbers_share_a_rank():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_rank_correlation_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(6, (2, 40), generator=generator).double().tolist()
    assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)


def test_rank_correlation_sees_order_alone():
    assert rank_correlation([1, 2, 3, 4], [1, 10, 11, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 8, 7, -5]) == pytest.approx(-1)


def test_rank_correlation_of_numbers_without_spread():
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(rank_correlation([1], [2]))


def test_the_area_is_the_share_of_pairs():
    scores = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.2])
    positive = torch.tensor([False, True, False, True, False])
    pairs = [
        float(a > b) + 0.5 * float(a == b) for a in scores[positive] for b in scores[~positive]
    ]
    assert area_under_curve(scores, positive) == pytest.approx(sum(pairs) / len(pairs))


def test_the_area_needs_both_kinds():
    assert math.isnan(area_under_curve(torch.ones(3), torch.ones(3, dtype=torch.bool)))
    assert math.isnan(area_under_curve(torch.ones(3), torch.zeros(3, dtype=torch.bool)))
