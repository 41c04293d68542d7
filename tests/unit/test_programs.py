"""Programs: what can be recorded and what is refused, each shortcut, and guards on values."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint

import pushforward as pf
from pushforward.program import CannotRecord, Program, Recorder, Stale, program
from zoo_families.case import module, randn

F64 = {"dtype": torch.float64}
Work = Callable[[Tensor], Tensor]


def recorded(work: Work, x: Tensor, constants: Sequence[Tensor] = ()) -> Program:
    """The program of a map from one tensor to one."""
    own = x.clone()
    with torch.no_grad():
        return program(lambda: [work(own)], Recorder([own], constants))


def right(work: Work, x: Tensor, *points: Tensor) -> Program:
    """Record at one point, and compare with the map at this and at others."""
    made = recorded(work, x)
    for point in (x, x.cos() + 0.5, *points):
        kept = point.clone()
        (found,) = made(point)
        torch.testing.assert_close(found, work(point.clone()), rtol=1e-12, atol=1e-12)
        assert torch.equal(point, kept)
    return made


def ramp(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.arange(1, 4, dtype=dtype)


def eye(*rows: int) -> Tensor:
    return torch.eye(3, **F64)[list(rows)] if rows else torch.eye(3, **F64)


def halves(x: Tensor) -> Tensor:
    y = x * 2
    y[1:].mul_(3)
    y[:2] += y[1:].clone()
    return y


def read_then_written(x: Tensor) -> Tensor:
    y = x.sin()
    before = y * 2
    y.add_(1)
    return before * y


def overlapping(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] = y[:-1].clone() * x[1:]
    y[:-1].copy_(y[1:] + 1)
    return y.view(3, 1) @ y.view(1, 3)


def several(x: Tensor) -> Tensor:
    values, places = x.sort()
    first, *rest = values.split(1)
    return first * values + rest[0] + places


WORKS: dict[str, Work] = {
    "writes to slices": halves,
    "reads before and after a write": read_then_written,
    "writes that overlap": overlapping,
    "several results": several,
    "an op that gives lists": lambda x: torch.stack(torch.unbind(x.view(3, 1).expand(3, 2))).sum(1),
    "complex numbers inside": lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2j, 3),
    "conjugates": lambda x: (torch.complex(x, 2 * x).conj() * (1 + 1j)).real,
    "integers": lambda x: x[(x * 10).long() % 3] * 2,
    "masks": lambda x: torch.where(x > 0.5, x, x**2).masked_fill(x < 0, 1.0),
    "other dtypes": lambda x: (x.float() * ramp(torch.float32)).double() + x.half().double(),
    "no elements": lambda x: x[:0].sum() * x + x[3:].prod(),
    "a scalar": lambda x: x[0] * x[1],
    "keywords": lambda x: torch.add(x, x.sin(), alpha=3).sum(dim=0, keepdim=True),
    "out=": lambda x: torch.mul(x, 2, out=torch.empty(3, **F64)),
    "a copy that is written to": lambda x: torch.ones_like(x).index_put_(
        (torch.tensor([1]),), x[:1]
    ),
    "a constant result": lambda x: torch.ones(3, **F64) * 2,
    "the input itself": lambda x: x,
    "a view of the input": lambda x: x[1:],
    "set to a value": lambda x: torch.empty(3, **F64).fill_(2.0) * x,
    "zeros that are written to": lambda x: torch.zeros(5, **F64).index_add_(
        0, torch.tensor([4, 1, 1]), x
    ),
}


@pytest.mark.parametrize("name", WORKS)
def test_the_same_at_other_points(name: str):
    right(WORKS[name], randn(3))


def test_several_results():
    x = randn(3)
    own = x.clone()
    with torch.no_grad():
        made = program(lambda: [own * 2, own, own * 2, own[1:]], Recorder([own]))
    for found, expected in zip(made(-x), (-2 * x, -x, -2 * x, -x[1:]), strict=True):
        assert torch.equal(found, expected)


# Each with the number of calls that are left.
SHORT: dict[str, tuple[Work, int]] = {
    "adding zeros": (lambda x: x * 2 + torch.zeros(3, **F64), 1),
    "taking zeros away": (lambda x: x * 2 - torch.zeros(3, **F64), 1),
    "times ones": (lambda x: (x * torch.ones(3, **F64)).sin(), 1),
    "times the identity": (lambda x: eye() @ (x.view(3, 1) * 2), 2),
    "the identity at the right": (lambda x: (x.view(1, 3) * 2) @ eye(), 2),
    "plus a negative": (lambda x: x.sin() + (-x.cos()), 3),
    "a negative plus": (lambda x: (-x.cos()) + x.sin(), 3),
    "minus a negative": (lambda x: x - (-x.cos()), 2),
    "a constant times a negative": (lambda x: ramp() * (-x), 1),
    "two constants added": (lambda x: (x + ramp()) + ramp(), 1),
    "a product added": (lambda x: x.sin() + x * x.cos(), 3),
    "two products added": (lambda x: x.sin() + (x * x.cos() + x * x.exp()), 5),
    "a number times a multiple": (lambda x: 2 * (ramp() * x), 1),
    "a number times a sum of multiples": (
        lambda x: 2.0 * (ramp() * x + (2 * torch.ones(3, **F64)) * x.sin()),
        3,
    ),
    "a multiple by a number": (lambda x: (ramp() * x) / 4, 1),
    "the same twice": (lambda x: x.sin() * x.sin(), 2),
    "the same of the same": (lambda x: (x + x.sin()).exp() * (x + x.sin()).exp(), 4),
    "copies": (lambda x: x.clone().contiguous().clone() * 2, 1),
    "views of views": (lambda x: x.sin().view(3, 1).view(1, 3), 2),
    "constants among themselves": (lambda x: x * (ramp().sin().cumsum(0) + 1).flip(0), 1),
    "what nobody needs": (lambda x: (x.sin().exp(), x * 2)[1], 1),
    "a constant written to before it is used": (lambda x: torch.zeros(3, **F64).add_(2) * x, 1),
}


@pytest.mark.parametrize("name", SHORT)
def test_shortcuts(name: str):
    work, calls = SHORT[name]
    assert right(work, randn(3)).length == calls


# What looks like a shortcut and is none.
LONG: dict[str, tuple[Work, int]] = {
    "zeros of another shape": (lambda x: x + torch.zeros(2, 3, **F64), 1),
    "zeros of another dtype": (lambda x: x.float() + torch.zeros(3, **F64), 2),
    "ones of another shape": (lambda x: x * torch.ones(2, 3, **F64), 1),
    "nearly ones": (lambda x: x * (torch.ones(3, **F64) + 1e-12), 1),
    "zeros with a factor": (lambda x: torch.add(x, torch.ones(3, **F64), alpha=2), 1),
    "minus twice a negative": (lambda x: torch.sub(x, -x.sin(), alpha=2), 3),
    "booleans times a negative": (lambda x: -x * (torch.arange(3) > 0), 2),
    "bytes times a negative": (lambda x: ramp(torch.uint8) * (-x), 2),
    "integers that would overflow": (
        lambda x: (x + 100 * ramp(torch.int8) // 2) + 100 * ramp(torch.int8) // 2,
        2,
    ),
    "a product that would vanish": (
        lambda x: ((ramp() * 1e-200) * (x * 1e200)) * 1e-200 * 1e200,
        4,
    ),
    "random-looking but different": (lambda x: x.sin() * x.cos(), 3),
    "a sum that was written to": (lambda x: (x + ramp()).add_(1) + ramp(), 3),
}


@pytest.mark.parametrize("name", LONG)
def test_no_shortcuts(name: str):
    work, calls = LONG[name]
    assert right(work, randn(3)).length == calls


def test_picking_rows_by_a_product():
    """A product with unit vectors becomes a choice of rows or columns."""
    units = torch.zeros(4, 3, **F64)
    units[[0, 1, 2, 3], [2, 0, 2, 1]] = 1
    x = randn(3, 2)
    for work in (lambda x: units @ x, lambda x: x.T @ units.T):
        made = recorded(work, x, [units])
        torch.testing.assert_close(made(2 * x)[0], work(2 * x))
        assert "index_select" in made.source
        assert "mm" not in made.source


def test_twos_are_no_unit_vectors():
    units = 2 * torch.eye(3, **F64)
    made = recorded(lambda x: units @ x, randn(3, 2), [units])
    assert "mm" in made.source


class TestRefusals:
    @pytest.mark.parametrize(
        "work",
        [
            lambda x: x * torch.rand(3, **F64),
            lambda x: functional.dropout(x, 0.5),
            lambda x: x * torch.empty(3, **F64).normal_(),
            lambda x: x * torch.randperm(3),
        ],
    )
    def test_random_numbers(self, work: Work):
        with torch.random.fork_rng(), pytest.raises(CannotRecord, match="draws random numbers"):
            recorded(work, randn(3))

    @pytest.mark.parametrize(
        "work",
        [
            lambda x: x.nonzero().double(),
            lambda x: x[x > 0],
            lambda x: x.round().unique(),
            lambda x: x.masked_select(x > 0),
        ],
    )
    def test_shapes_out_of_values(self, work: Work):
        with pytest.raises(CannotRecord, match="makes shapes from values"):
            recorded(work, randn(3))

    @pytest.mark.parametrize(
        "write",
        [
            lambda kept, x: kept.add_(x),
            lambda kept, x: kept[1:].mul_(x[0]),
            lambda kept, x: kept.zero_(),
            lambda kept, x: torch.mul(x, 2, out=kept),
        ],
    )
    def test_writes_to_tensors_from_outside(self, write: Callable[[Tensor, Tensor], Tensor]):
        kept = randn(3, seed=1)
        with pytest.raises(CannotRecord, match="a tensor from outside is written to"):
            recorded(lambda x: write(kept, x).sum() * x, randn(3))

    def test_writes_to_the_input(self):
        with pytest.raises(CannotRecord, match="a tensor from outside is written to"):
            recorded(lambda x: x.add_(1) * 2, randn(3))

    def test_writes_that_the_schema_does_not_tell_of(self):
        net = module(lambda: nn.BatchNorm1d(3)).train()
        with pytest.raises(CannotRecord, match="a tensor from outside is written to"):
            recorded(net, randn(4, 3))
        right(net.eval(), randn(4, 3))

    def test_constants_that_are_overwritten_after_use(self):
        def work(x: Tensor) -> Tensor:
            zeros = torch.zeros(3, **F64)
            y = x + zeros
            return y * zeros.add_(1)

        with pytest.raises(CannotRecord, match="overwritten after it was used"):
            recorded(work, randn(3))

    @pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
    @pytest.mark.filterwarnings("ignore:Sparse CSR")
    def test_sparse_tensors(self, kind: str):
        outside = getattr(torch.eye(3, **F64), kind)()
        for work in (
            lambda x: outside @ x.view(3, 1),
            lambda x: getattr(torch.eye(3, **F64), kind)() @ x.view(3, 1),
        ):
            with pytest.raises(CannotRecord, match="a sparse tensor takes part"):
                recorded(work, randn(3))


class TestOutside:
    def test_read_anew_at_each_run(self):
        kept, x = randn(3, seed=1), randn(3)
        made = recorded(lambda x: x * kept, x)
        kept.mul_(2)
        assert torch.equal(made(x)[0], x * kept)

    def test_views_of_what_is_outside(self):
        kept, x = randn(5, seed=1), randn(3)
        made = recorded(lambda x: x * kept[1:4] + kept.view(5, 1)[2], x)
        kept.add_(1)
        torch.testing.assert_close(made(x)[0], x * kept[1:4] + kept[2])

    def test_aliases_of_the_input_are_other_tensors(self):
        """A closure may hold what is also given: that copy stays, and the argument is new."""
        x = randn(3)
        made = recorded(lambda z: z * x, x)
        assert torch.equal(made(2 * x)[0], 2 * x * x)

    def test_originals_stand_for_copies(self):
        original, copy = randn(3, seed=1), randn(3, seed=1)
        own = randn(3)
        with torch.no_grad():
            made = program(
                lambda: [own * copy], Recorder([own]), lambda t: original if t is copy else t
            )
        original.fill_(5.0)
        assert torch.equal(made(own)[0], own * 5)

    def test_what_somebody_else_keeps_may_go(self):
        kept, own = [randn(3, seed=1)], randn(3)
        with torch.no_grad():
            made = program(lambda: [own * kept[0]], Recorder([own]), owned=lambda t: t is kept[0])
        assert torch.equal(made(own)[0], own * kept[0])
        kept.clear()
        with pytest.raises(Stale):
            made(own)


GUARDED: dict[str, Work] = {
    "a sign": lambda x: x.sin() if x.sum() > 0 else x.cos(),
    "a number": lambda x: x * int(x[0] > 0),
    "equality": lambda x: x * 2 if torch.equal(x, x.abs()) else x.cos(),
    "closeness": lambda x: x * 2 if torch.allclose(x, x.abs()) else x.cos(),
    "not zero": lambda x: x * 2 if torch.is_nonzero((x > 0).all().double()) else x.cos(),
}


@pytest.mark.parametrize("name", GUARDED)
def test_guards(name: str):
    work, x = GUARDED[name], randn(3).abs()
    made = recorded(work, x)
    assert made.guards == 1
    torch.testing.assert_close(made(x)[0], work(x))
    with pytest.raises(Stale):
        made(-x)


def test_guards_that_hold_elsewhere_too():
    made = recorded(GUARDED["a sign"], randn(3).abs())
    assert made(torch.ones(3, **F64))[0][0] == torch.ones(1, **F64).sin()


def test_guards_on_what_is_outside():
    kept = torch.ones(3, **F64)
    made = recorded(lambda x: x * 2 if kept.sum() > 0 else x, randn(3))
    assert made.guards == 1
    kept.neg_()
    with pytest.raises(Stale):
        made(randn(3))


def test_branches_on_constants_need_none():
    made = recorded(lambda x: x * 2 if float(ramp().sum()) > 0 else x, randn(3))
    assert made.guards == 0


def test_guards_on_whole_tensors():
    x = torch.arange(3.0, **F64)
    own = x.clone()
    recorder = Recorder([own])

    def work() -> list[Tensor]:
        values, order = own.sort()
        recorder.expect(order)
        return [values * 2]

    with torch.no_grad():
        made = program(work, recorder)
    assert torch.equal(made(3 * x)[0], 6 * x)
    with pytest.raises(Stale):
        made(-x)


class TestVaries:
    @pytest.mark.parametrize(
        ("work", "expected"),
        [
            (lambda x: x * 2, True),
            (lambda x: torch.ones(3) * 3, False),
            (lambda x: torch.zeros(3) + len(x), False),
            (lambda x: x.detach()[:1], True),
        ],
    )
    def test_with_the_input(self, work: Work, expected: bool):
        assert recorded(work, randn(3)).varies == expected

    def test_with_a_branch(self):
        assert recorded(lambda x: ramp() if x.sum() > 0 else -ramp(), randn(3)).varies


def test_gradients_are_recorded_too():
    def work(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = (leaf * leaf.sin()).cumsum(0)
            return torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    right(work, randn(3))


def test_checkpoints_are_recorded_too():
    def work(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = checkpoint.checkpoint(lambda z: z.sin() * z, leaf, use_reentrant=False)
            return torch.autograd.grad(y.sum(), leaf)[0]

    right(work, randn(3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
def test_programs_for_the_compiler():
    """``compile=True`` gives the same numbers and gradients, and leaves torch's settings alone."""
    checks = torch.distributions.Distribution._validate_args

    def f(x):
        return x[1:] * x[:-1].sin()

    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    plan = pf.plan(f, x, compile=True)
    wanted = torch.autograd.functional.jacobian(f, x, create_graph=True)
    found = plan(x).matrix()
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(J.square().sum(), x)[0] for J in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert "handed to torch.compile" in str(plan)
    assert torch.distributions.Distribution._validate_args == checks
