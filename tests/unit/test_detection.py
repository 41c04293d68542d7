"""Tiers of detection: which labellings are followed, what each finds, and when it is given up."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from detected import draw
from pushforward.boundary import Arguments
from pushforward.structure import detection
from pushforward.structure.detection import NOTHING, Detector, Structure, merged
from pushforward.structure.follow import Follower
from pushforward.structure.sets import FIRST
from pushforward.tape import record
from zoo_families.case import module


def detected(f: Callable[..., Any], x: Tensor, fine: bool | None = None) -> Structure:
    detector = Detector(fine)
    tape = record(f, Arguments.of((x,), 0, None), None, watch=detector)
    return detector.structure(tape.outputs, tape.domain, tape.codomain)


def promising(f: Callable[..., Any], x: Tensor) -> bool:
    detector = Detector(fine=False)
    tape = record(f, Arguments.of((x,), 0, None), None, watch=detector)
    return detector.promises(tape.outputs, tape.codomain)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of inputs count as many."""
    monkeypatch.setattr(detection, "_FEW", 16)


def mixes(x: Tensor) -> Tensor:
    return (x @ draw(x.shape[1], x.shape[1], seed=1)).tanh()


class TestTiers:
    def test_few_inputs_are_followed_at_once(self):
        structure = detected(torch.sin, draw(3, 4))
        assert structure.tiers == ("elements", "samples")
        assert structure.pattern.todense().tolist() == np.eye(12, dtype=bool).tolist()

    @pytest.mark.usefixtures("few")
    def test_many_are_drawn_first(self):
        structure = detected(torch.sin, draw(40))
        assert structure.tiers == ("drawn",)
        assert structure.pattern is None
        assert "by inputs at random" in structure.note

    @pytest.mark.usefixtures("few")
    def test_what_promises_zeros_is_followed_finely(self):
        plan = pf.plan(lambda x: x.sin() * x.roll(1), draw(300))
        assert plan.recipe.structure.tiers == ("drawn", "elements")
        assert plan.nnz == 600

    @pytest.mark.usefixtures("few")
    def test_what_is_dense_is_given_up(self):
        plan = pf.plan(lambda x: x.sin() * x.sum(), draw(200))
        assert plan.recipe.structure.tiers == ("drawn",)
        assert plan.pattern is None
        assert "100% of the entries" in plan.recipe.structure.note

    def test_density_among_inputs_drawn(self):
        dense, half = lambda x: x.sum() * x, lambda x: torch.cat([x.cumsum(0), x])
        assert not promising(dense, draw(200))
        assert promising(half, draw(200))
        assert promising(torch.sin, draw(200))

    @pytest.mark.usefixtures("few")
    def test_samples_without_the_finest_tier_are_full_blocks(self):
        structure = detected(mixes, draw(5, 4))
        assert structure.tiers == ("drawn", "samples")
        assert structure.samples == 5
        blocks = np.kron(np.eye(5), np.ones((4, 4))).astype(bool)
        assert (structure.pattern.todense() == blocks).all()

    def test_nothing_is_followed_inside_a_transform(self):
        seen = []

        def inner(x: Tensor) -> Tensor:
            seen.append(detected(torch.sin, x))
            return x.sum()

        torch.func.grad(inner)(draw(3))
        assert seen == [NOTHING]


class TestSamples:
    @pytest.mark.parametrize(
        "f",
        [mixes, lambda x: x.sum(1), lambda x: x.flatten(1)[:, None], lambda x: x.softmax(1) * 0],
        ids=["rows", "sums", "shaped", "zero"],
    )
    def test_are_found(self, f: Callable[[Tensor], Tensor]):
        assert detected(f, draw(5, 3)).samples == 5

    @pytest.mark.parametrize(
        "f",
        [
            lambda x: x - x.mean(0),
            lambda x: x.flip(0),
            lambda x: x.sum(),
            lambda x: x[:4],
            lambda x: torch.cat([x[1:], x[:1]]),
            lambda x: x.mT,
        ],
        ids=["centred", "flipped", "summed", "fewer", "rolled", "transposed"],
    )
    def test_are_not_found_where_they_meet_or_move(self, f: Callable[[Tensor], Tensor]):
        structure = detected(f, draw(5, 3))
        assert structure.samples is None
        assert structure.pattern is not None  # it is known all the same, entry by entry

    def test_of_several_leaves(self):
        def f(pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            one, other = pair
            return {"a": one * other.sum(1, keepdim=True), "b": other.cos()}

        plan = pf.plan(f, (draw(4, 3), draw(4, 2)))
        assert plan.recipe.structure.samples == 4
        assert pf.plan(f, (draw(4, 3), draw(1, 2))).recipe.structure.samples is None

    def test_a_column_is_no_batch(self):
        """One number a sample: the finest tier says all there is to say."""
        assert detected(torch.sin, draw(5)).tiers == ("elements",)
        assert detected(torch.sin, draw(1, 5)).tiers == ("elements",)

    def test_a_buffer_that_mixes_samples(self):
        net = module(lambda: nn.BatchNorm1d(3))
        assert detected(net.train(), draw(5, 3)).samples is None
        assert detected(net.eval(), draw(5, 3)).samples == 5


class TestGivingUp:
    def test_sets_outgrow_their_budget(self, monkeypatch: pytest.MonkeyPatch):
        class Small(Follower):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options, budget=12_000)

        monkeypatch.setattr(detection, "Follower", Small)
        structure = detected(lambda x: x.cumsum(0).cumsum(0).sin(), draw(400))
        assert structure.pattern is None
        assert structure.tiers == ()
        assert "budget" in structure.note

    def test_samples_outlive_the_elements(self, monkeypatch: pytest.MonkeyPatch):
        class Small(Follower):
            def __init__(self, inputs: Any, labels: Any, count: int, **options: Any) -> None:
                budget = 10_000 if count > 10 else 1 << 20
                super().__init__(inputs, labels, count, **options, budget=budget)

        monkeypatch.setattr(detection, "Follower", Small)
        structure = detected(lambda x: x.cumsum(1) * x, draw(5, 100))
        assert structure.tiers == ("samples",)
        assert structure.pattern.nnz == 5 * 100 * 100

    def test_patterns_as_good_as_dense_are_not_listed(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(detection, "_SHOWN", 100)
        structure = detected(lambda x: x.sum() * x, draw(30))
        assert structure.pattern is None
        assert structure.note == "100% of the entries: as good as dense"
        assert detected(lambda x: x.sum() * x, draw(9)).pattern.density == 1

    def test_an_op_that_cannot_be_followed_ends_it(self, monkeypatch: pytest.MonkeyPatch):
        from pushforward.structure.rules.registry import RULES

        def broken(_: Any) -> Any:
            raise IndexError("out of reach")

        monkeypatch.setitem(RULES, torch.ops.aten.flip, broken)
        x = draw(5)
        structure = detected(lambda x: x.sin().flip(0), x)
        assert structure.pattern is None
        assert structure.note == "flip could not be followed (IndexError: out of reach)"
        J = pf.jacobian(lambda x: x.sin().flip(0), x)  # and the function does not notice
        torch.testing.assert_close(J.matrix(), torch.diag(x.cos()).flip(0))


def test_merged_keeps_what_only_the_first_run_knows():
    first, finer = detected(mixes, draw(5, 4), fine=False), detected(mixes, draw(5, 4), fine=True)
    both = merged(first, finer)
    assert both.samples == 5
    assert both.tiers == ("drawn", "samples", "elements")
    assert both.pattern is finer.pattern
    assert both.graph is first.graph


def test_outputs_that_depend_on_nothing():
    structure = detected(lambda x: torch.ones(3, dtype=x.dtype), draw(2))
    assert structure.pattern.nnz == 0
    assert structure.pattern.shape == (3, 2)


def test_labels_of_a_batch_are_the_same_in_every_sample():
    detector = Detector()
    x = draw(4, 3)
    tape = record(lambda x: x.cumsum(1), Arguments.of((x,), 0, 0), 0, watch=detector)
    structure = detector.structure(tape.outputs, tape.domain, tape.codomain)
    assert (structure.pattern.todense() == np.tril(np.ones((3, 3), bool))).all()
    numbers = detector.followers["elements"].numbers(tape.outputs[0])
    assert (numbers[0] == numbers).all()
    assert numbers[0, 0] == FIRST
