"""What a plan says of itself, and the time that it predicts."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from time import thread_time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from pushforward import costs
from pushforward.explaining import WIDE, facts, passes_in_words, si
from pushforward.meter import measure
from pushforward.work import Op, elements


def burgers(u: Tensor) -> Tensor:
    rate = torch.zeros_like(u)
    rate[1:-1] = u[2:] - 2 * u[1:-1] + u[:-2] - u[1:-1] * (u[2:] - u[:-2])
    return rate


def arrowhead(x: Tensor) -> Tensor:
    return torch.cat(((x * x).sum()[None], x[1:].sin() * x[0]))


def chain(x: Tensor) -> Tensor:
    return ((x[1:] - x[:-1] ** 2) ** 2).sum()


def net(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(6, 6).tril(-1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.mask @ x).sin()


PLANS: dict[str, tuple[Callable[[], pf.Plan], tuple[str, ...]]] = {
    "sparse": (
        lambda: pf.plan(burgers, torch.randn(100)),
        (
            "plan       jacobian of burgers",
            "size       100 x 100",
            "input      float32[100]",
            "of 10000 entries, density 2.94%; followed: elements",
            "strategy   sparse: 3 ",
            "3 colours, no fewer than 3 will do",
            "ops, flat",
            "no products of matrices, ",
            "B moved",
            "rejected   constant: the map is not affine",
            "batch:    no batch of independent samples was found",
            "reverse:  100 passes, ",
            "holds for  shapes, dtypes, devices, training mode, Python state",
            "checked    products agree with a backward pass",
        ),
    ),
    "both": (
        lambda: pf.plan(arrowhead, torch.randn(500)),
        ("sparse: 3 passes (", " forward, ", " backward), 3 at a time", "rows and columns (both)"),
    ),
    "star": (
        lambda: pf.plan(chain, torch.randn(60), quantity="hessian"),
        (
            "plan       hessian of chain",
            "sparse: 3 Hessian-vector products, 3 at a time",
            "star colouring",
        ),
    ),
    "batch": (
        lambda: pf.plan(net(8, 9, 7), torch.randn(64, 8)),
        ("batch: 7 backward passes", "blocks     64 blocks of 7 x 8, one for each sample"),
    ),
    "samples": (
        lambda: pf.plan(net(8, 9, 7), torch.randn(64, 8), batch_dim=0),
        ("7 x 8, 64 samples", "input      float32[64, 8]", "samples are independent: checked"),
    ),
    "split": (
        lambda: pf.plan(net(150, 40, 6, 50, 140), torch.randn(150)),
        (
            "split: 12 passes (6 forward, 6 backward)",
            "cut        of width 6 at tanh -> addmm",
            "order      (output <- cut of 6 by columns) x (cut of 6 <- input by rows)",
            "one pass",
        ),
    ),
    "constant": (
        lambda: pf.plan(lambda x: 2 * x.flip(0), torch.randn(30)),
        ("strategy   constant: no passes, its entries are constants",),
    ),
    "diagonal": (
        lambda: pf.plan(burgers, torch.randn(100), quantity="diagonal"),
        ("plan       diagonal of burgers", "by diagonal colouring"),
    ),
    "budget": (
        lambda: pf.plan(net(60, 40, 50), torch.randn(60), memory=10**7),
        ("program    none, through the tape: a memory budget", "memory     10 MB"),
    ),
    "mask": (
        lambda: pf.plan(Masked(), torch.randn(6)),
        ("Python state; values of constants that serve as", "(6, 6)", "15 of 36 entries"),
    ),
    "loop": (
        lambda: pf.jacobian(burgers, torch.randn(100), plan="loop").plan,
        ("loop: 100 backward passes, one by one", "pattern    not detected: not looked for"),
    ),
}


class TestTable:
    @pytest.mark.parametrize("name", PLANS)
    def test_says(self, name: str):
        make, expected = PLANS[name]
        text = str(make())
        assert [part for part in expected if part not in text] == []

    @pytest.mark.parametrize("name", PLANS)
    def test_is_aligned_and_not_wide(self, name: str):
        lines = str(PLANS[name][0]()).splitlines()
        assert max(map(len, lines)) <= WIDE
        assert all(line[:9].strip() == "" or line[9:11] == "  " for line in lines), lines
        assert all(line[11:].strip() for line in lines)

    def test_long_reasons_are_wrapped(self):
        plan = pf.plan(lambda x: torch.cat([x.sin()] * 40), torch.zeros(2))
        wide = pf.plan(lambda *xs: sum(xs), *[torch.zeros(3)] * 40, argnums=tuple(range(40)))
        assert max(map(len, str(plan).splitlines())) <= WIDE
        lines = str(wide).splitlines()
        assert max(map(len, lines)) <= WIDE
        assert str(wide).count("float32[3]") == 41

    def test_dense_ops_are_named(self):
        plan = pf.plan(burgers, torch.randn(20))
        structure = replace(plan.recipe.structure, dense_ops=(("eigh", 1), ("sort", 3)))
        told = str(replace(plan, recipe=replace(plan.recipe, structure=structure)))
        assert "dense ops  eigh: no rule, taken as dense (once)" in told
        assert "           sort: no rule, taken as dense (3 times)" in told

    def test_the_jacobian_says_the_same(self):
        plan = pf.plan(burgers, torch.randn(20))
        assert plan(torch.randn(20)).explain() == str(plan)

    @pytest.mark.parametrize(
        ("jvps", "vjps", "quantity", "text"),
        [
            (1, 0, "jacobian", "1 forward pass"),
            (0, 2, "jacobian", "2 backward passes"),
            (1, 2, "jacobian", "3 passes (1 forward, 2 backward)"),
            (0, 1, "hessian", "1 Hessian-vector product"),
        ],
    )
    def test_passes(self, jvps: int, vjps: int, quantity: str, text: str):
        assert passes_in_words(jvps, vjps, quantity) == text

    @pytest.mark.parametrize(
        ("number", "text"),
        [(0, "0 "), (999, "999 "), (1500, "1.5 k"), (2e12, "2 T"), (2e-3, "2 m"), (45e-6, "45 µ")],
    )
    def test_units(self, number: float, text: str):
        assert si(number) == text

    @pytest.mark.parametrize("name", PLANS)
    def test_facts_are_plain(self, name: str):
        plan = PLANS[name][0]()
        found = json.loads(json.dumps(facts(plan), allow_nan=False))
        assert found["passes"] == plan.passes == found["jvps"] + found["vjps"]
        assert found["nnz"] == plan.nnz
        assert found["shape"] == [plan.codomain.size, plan.domain.size]
        assert {each["strategy"] for each in found["rejected"]} == dict(plan.rejected).keys()


class TestCounts:
    def test_what_ops_do(self):
        a, b, x = torch.ones(5, 7), torch.ones(7, 3), torch.ones(4, 6, 8, 8)
        w = torch.ones(2, 6, 3, 3)
        _, cost = measure(lambda: (a @ b, a.tanh(), a.T, a[0].index_select(0, torch.arange(3))))
        product, curved, view, *_, picked = cost.ops
        assert (product.flops, product.moved) == (2 * 5 * 7 * 3, 4 * (35 + 21 + 15))
        assert (curved.curved, curved.moved) == (35, 4 * 70)
        assert view == Op()
        assert (picked.picked, picked.flops) == (3, 0)
        _, cost = measure(lambda: torch.conv2d(x, w))
        (op,) = [op for op in cost.ops if op.channels]
        assert op.flops == 2 * 4 * 2 * 36 * 6 * 9
        assert (op.channels, op.transposed) == (2, False)
        assert op.padding == pytest.approx(8 / 2 * 8 / 6)

    def test_programs_count_what_the_meter_counts(self):
        """Two ways to count: from the shapes of the recording, and from tensors as they run."""
        x = torch.randn(64, 8)
        plan = pf.plan(net(8, 9, 7), x)
        program = plan.recipe.evaluation.program
        with torch.no_grad():
            _, cost = measure(lambda: program(x))
        assert sum(op.flops for op in program.ops) == cost.flops > 0
        assert sum(op.moved for op in program.ops) == pytest.approx(
            sum(op.moved for op in cost.ops), rel=0.25
        )
        assert plan.cost.flops == cost.flops
        assert plan.cost.ops == program.length

    def test_expanded_axes_lie_once(self):
        assert elements(torch.ones(3, 1).expand(3, 5)) == 3
        assert elements(torch.ones(0, 3)) == 0
        assert elements(torch.ones(())) == 1

    def test_the_product_of_factors_is_counted(self):
        plan = pf.plan(net(150, 40, 6, 50, 140), torch.randn(150))
        program = plan.recipe.evaluation.program
        extra = plan.cost.flops - sum(op.flops for op in program.ops)
        assert extra == 2 * 150 * 6 * 140

    def test_passes_through_the_tape(self):
        plan = pf.plan(net(60, 40, 50), torch.randn(60), memory=10**7)
        one, chunks = plan.recipe.candidate.cost, -(-plan.passes // plan.chunk)
        assert plan.cost.ops == len(one.ops) * chunks + len(one.ops[::2])
        assert plan.cost.flops >= plan.passes * one.flops

    def test_nothing_where_nothing_was_counted(self):
        plan = pf.jacobian(torch.sin, torch.ones(3), plan="loop").plan
        assert plan.cost is None
        assert "cost" not in str(plan)


class TestSeconds:
    @pytest.fixture(autouse=True)
    def fixed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A device whose every op takes a microsecond more for each thousand bytes or flops."""
        monkeypatch.setattr(
            costs.Device, "_clock", lambda self, work: (work(), 1e-6)[1], raising=True
        )

    def device(self) -> costs.Device:
        return costs.Device(torch.device("cpu"), torch.float32)

    def test_more_work_takes_longer(self):
        device = self.device()
        for name in ("flops", "moved", "curved", "picked"):
            times = [device.seconds(Op(**{name: 10**k})) for k in range(2, 11)]
            assert times == sorted(times)
            assert times[-1] > times[0] > 0
        assert device.seconds(Op(taped=True)) > device.seconds(Op())

    def test_lines(self):
        points = ((10.0, 1.0), (20.0, 3.0))
        assert costs._on_a_line(points, 0) == 0
        assert costs._on_a_line(points, 5) == pytest.approx(0.5)
        assert costs._on_a_line(points, 15) == pytest.approx(2.0)
        assert costs._on_a_line(points, 40) == pytest.approx(6.0)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_convolutions(self, transposed: bool):
        device = self.device()
        few = device.seconds(Op(10**9, channels=3, padding=8 / 3, transposed=transposed))
        padded = device.seconds(Op(10**9, channels=3, transposed=transposed))
        assert few > padded > 0
        assert device.seconds(Op(10**9, channels=64, transposed=transposed)) > 0

    def test_repeats(self):
        plan = pf.plan(burgers, torch.randn(20))
        once = costs.prediction([Op(moved=10**6)], plan.domain).seconds
        thrice = costs.prediction([Op(moved=10**6, repeats=3)], plan.domain).seconds
        alone = costs.prediction([], plan.domain).seconds
        assert thrice - alone == pytest.approx(3 * (once - alone))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("f", "x"),
    [
        (burgers, torch.randn(10_000)),
        (arrowhead, torch.randn(500)),
        (net(32, 64, 64, 32), torch.randn(256, 32)),
        (net(784, 256, 32, 256, 784), torch.randn(784)),
        (net(64, 256, 256, 64), torch.randn(64)),
    ],
)
def test_seconds_are_about_right(f: Callable[..., Any], x: Tensor):
    """Within a factor of 2 on a quiet machine; a busy one is granted as much again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan, times = pf.plan(f, x), []
        for _ in range(60):
            start = thread_time()
            J = plan(x)
            J.sparse() if plan.compressed else J.matrix()
            times.append(thread_time() - start)
        assert 0.25 < plan.cost.seconds / sorted(times)[10] < 4
    finally:
        torch.set_num_threads(threads)
