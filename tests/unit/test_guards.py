"""Plans that are remembered are used where they hold, and made anew where they do not.

Each test calls the same function several times, while something that it reads changes, and
compares every result with the row loop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pushforward as pf
from oracles import dense_per_sample, loop_hessian, loop_jacobian
from zoo_families.case import randn

F64 = {"dtype": torch.float64}


def checked(f: Callable[..., Tensor], x: Tensor, *rest: Any) -> Any:
    """Compare the Jacobian with the row loop, and return what it was made by."""
    J = pf.jacobian(f, x, *rest)
    expected = loop_jacobian(lambda z: f(z, *rest), x)
    torch.testing.assert_close(J.dense().detach(), expected, rtol=1e-10, atol=1e-12)
    return J.plan.recipe


def kept(f: Callable[..., Tensor], *points: Tensor) -> None:
    """The plan of the first point serves all of them, and is right at each."""
    assert len({id(checked(f, point)) for point in points}) == 1


def changing(f: Callable[[Tensor], Tensor], changes: Sequence[Callable[[], Any]]) -> None:
    """Right before and after each change, with a plan that is not the one before it."""
    x = randn(6)
    recipe = checked(f, x)
    assert checked(f, 2 * x) is recipe
    for change in changes:
        change()
        assert checked(f, x) is not recipe
        recipe = checked(f, x.flip(0))


# Each depends on its input in another way at other points.
BY_VALUE: dict[str, Callable[[Tensor], Tensor]] = {
    "branch on the sign": lambda x: x.sin() if x.sum() > 0 else x.cumsum(0) ** 3,
    "branch on a comparison of all": lambda x: x * 2 if torch.equal(x, x.abs()) else x.cos(),
    "branch on closeness": lambda x: x * 2 if torch.allclose(x, x.abs()) else x.cos(),
    "branch on what is detached": lambda x: x if (x.detach() > 0).all() else x.flip(0) * 2,
    "loop until it is large": lambda x: _doubled(x) * x,
    "an integer out of it": lambda x: x.roll(int(x.abs().argmax())) * x,
    "a float out of it": lambda x: x * float(x.detach()[0]),
    "a list out of it": lambda x: x * sum(x.tolist()),
    "an array out of it": lambda x: x * torch.from_numpy(x.detach().numpy().copy()),
    "an array by its protocol": lambda x: x * torch.from_dlpack(np.from_dlpack(x.detach()) * 2),
    "an array of it": lambda x: x * torch.tensor(np.asarray(x.detach()) * 2),
    "an entry of its array": lambda x: x * float(x.detach().numpy()[0]),
    "how many are positive": lambda x: x[x > 0].sum() * x,
    "how many are different": lambda x: x * len(x.detach().round().unique()),
    "sorted": lambda x: x.sort().values ** 2,
    "gathered in order": lambda x: x[x.argsort()] * torch.arange(6.0, **F64),
    "the largest": lambda x: x.topk(3).values.cumsum(0),
    "the largest of each row": lambda x: x.reshape(2, 3).max(1).values ** 2,
    "the median": lambda x: x.median() * x,
    "the third": lambda x: x.kthvalue(3).values * x,
    "the largest so far": lambda x: x.cummax(0).values * 2,
    "where": lambda x: torch.where(x > 0, x.sin(), x.flip(0) ** 2),
    "filled": lambda x: x.masked_fill(x < 0, 0.0) * x,
    "written where positive": lambda x: (x * 2).index_put((x > 0,), torch.zeros((), **F64)),
    "taken at whole numbers": lambda x: x[(x.abs() * 2).floor().long().clamp(max=5)] * 2,
    "one-hot": lambda x: functional.one_hot(x.argmax(), 6).double() * x,
    "rounded": lambda x: x.round() * x,
    "its sign": lambda x: x.sign() * x * x,
    "itself detached": lambda x: x.detach() * x,
    "its data": lambda x: x.data * x,
    "relu": lambda x: torch.relu(x) * x.roll(1),
}


def _doubled(x: Tensor) -> Tensor:
    while x.norm() < 10:
        x = x * 2
    return x


@pytest.mark.parametrize("name", BY_VALUE)
def test_what_depends_on_the_point(name: str):
    x, f = randn(6), BY_VALUE[name]
    for point in (x.abs(), x, -x, 3 * x.flip(0), x, torch.zeros(6, **F64), x.abs() * 2):
        if name != "loop until it is large" or point.any():
            checked(f, point)


def test_both_branches_are_remembered():
    x = randn(6).abs()
    f = BY_VALUE["branch on the sign"]
    positive, negative = checked(f, x), checked(f, -x)
    assert positive is not negative
    assert checked(f, 2 * x) is positive
    assert checked(f, -2 * x) is negative


def test_an_order_that_stays_keeps_the_plan():
    x = torch.arange(6.0, **F64)
    kept(lambda x: x.sort().values ** 2, x, 2 * x + 1, x**3)


def test_a_branch_for_each_sample():
    def f(x: Tensor) -> Tensor:
        return x.sin() if bool((x[:, 0] > 0).any()) else x.roll(1, 1) * x

    x = randn(5, 3).abs()
    for point in (x, -x, 2 * x, -x):
        found = pf.jacobian(f, point, batch_dim=0).dense()
        torch.testing.assert_close(found, dense_per_sample(f, point))


def test_a_branch_of_a_hessian():
    def f(x: Tensor) -> Tensor:
        return (x**4).sum() if x.sum() > 0 else (x[1:] ** 2 * x[:-1]).sum()

    x = randn(5).abs()
    for point in (x, -x, 2 * x, -2 * x):
        torch.testing.assert_close(pf.hessian(f, point).dense(), loop_hessian(f, point))


class TestMasks:
    """Constants whose zeros are structure: a plan that took them for zeros must see them go."""

    weight = randn(6, 6, seed=2)

    @pytest.mark.parametrize(
        "write",
        [
            lambda mask: mask.fill_(1.0),
            lambda mask: mask[0].fill_(1.0),
            lambda mask: mask.data.fill_(1.0),
            lambda mask: mask.numpy().fill(1.0),
            lambda mask: mask.view(-1)[1:2].add_(1.0),
            lambda mask: mask.set_(torch.ones(6, 6, **F64)),
            lambda mask: setattr(mask, "data", torch.ones(6, 6, **F64)),
        ],
    )
    def test_written_to(self, write: Callable[[Tensor], Any]):
        mask = torch.eye(6, **F64)
        changing(lambda x: ((mask * self.weight) @ x).tanh(), [lambda: write(mask)])

    def test_with_infinities(self):
        mask = torch.full((6, 6), -torch.inf, **F64).triu(1)
        changing(
            lambda x: torch.softmax(x[None] * x[:, None] + mask, -1) @ x,
            [lambda: mask.fill_(0.0)],
        )

    def test_of_booleans(self):
        mask = torch.eye(6).bool()
        changing(
            lambda x: torch.where(mask, x[None] ** 2, 0.0).sum(1), [lambda: mask.logical_not_()]
        )

    def test_replaced_in_a_list(self):
        masks = [torch.eye(6, **F64)]
        changing(
            lambda x: (masks[0] @ x).tanh(),
            [lambda: masks.__setitem__(0, torch.ones(6, 6, **F64))],
        )

    def test_buffers_of_modules(self):
        net = Masked()
        changing(
            net,
            [
                lambda: net.mask[0].fill_(1.0),
                lambda: net.mask.fill_(1.0),
                lambda: setattr(net, "mask", torch.eye(6, **F64)),
                lambda: net.load_state_dict({"mask": torch.ones(6, 6, **F64)}),
            ],
        )

    def test_indices(self):
        order = torch.arange(6)
        changing(lambda x: x[order] ** 2, [lambda: order.copy_(order.flip(0))])

    def test_values_without_zeros_are_read_anew(self):
        """Nothing was concluded from them: they are inputs of the program."""
        scale, x = randn(6, seed=3), randn(6)

        def f(x: Tensor) -> Tensor:
            return (x * scale).sin()

        first = checked(f, x)
        scale.mul_(2)
        checked(f, x)
        with torch.no_grad():
            scale.zero_()
        checked(f, x)
        assert first.candidate.strategy == "sparse"

    def test_parameters_that_are_zero_are_no_structure(self):
        net = nn.Linear(6, 6).double()
        nn.init.zeros_(net.weight)
        x = randn(6)
        first = pf.jacobian(net, x)
        assert not first.dense().detach().any()
        nn.init.eye_(net.weight)
        assert checked(net, x) is first.plan.recipe

    def test_a_constant_that_becomes_a_parameter(self):
        zeros = torch.zeros(6, 6, **F64)
        changing(lambda x: (zeros @ x).tanh() + x**2, [lambda: zeros.requires_grad_()])


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.eye(6, **F64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.mask @ x).tanh()


class TestModes:
    def test_of_training(self):
        net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(1.0), nn.Tanh()).double().eval()
        changing(net, [net.train, net.eval, lambda: net[1].train()])

    def test_of_batch_norm(self):
        net, x = nn.BatchNorm1d(3).double().eval(), randn(4, 3)
        recipe = checked(net, x)
        net.train()
        trained = pf.jacobian(net, x)
        assert trained.plan.recipe is not recipe
        torch.testing.assert_close(trained.dense().detach(), loop_jacobian(net, x))

    def test_default_dtype(self):
        def f(x: Tensor) -> Tensor:
            ones = torch.ones(6)
            return x**2 if ones.dtype == torch.float32 else x.flip(0) ** 3

        x = randn(6)
        checked(f, x)
        torch.set_default_dtype(torch.float64)
        try:
            checked(f, x)
        finally:
            torch.set_default_dtype(torch.float32)
        checked(f, x)

    def test_gradients_off(self):
        """What a function asks of the gradient mode is answered as where it is differentiated."""

        def f(x: Tensor) -> Tensor:
            return x**2 if torch.is_grad_enabled() else x**3

        x = randn(6)
        checked(f, x)
        with torch.no_grad():
            found = pf.jacobian(f, x).dense()
        torch.testing.assert_close(found, torch.diag(2 * x))

    def test_frozen_parameters(self):
        net, x = nn.Linear(6, 6).double(), randn(6)
        checked(net, x)
        net.requires_grad_(False)
        checked(net, x)
        with torch.no_grad():
            net.weight.fill_(2.0)
        checked(net, x)
        net.requires_grad_(True)
        assert pf.jacobian(net, x).dense().requires_grad

    def test_other_precision_of_parameters(self):
        net, x = nn.Linear(6, 6), randn(6)
        single = pf.jacobian(net, x.float())
        assert single.dense().dtype == torch.float32
        net.double()
        checked(net, x)


class TestArguments:
    @pytest.mark.parametrize("kind", [int, torch.tensor])
    def test_whole_numbers(self, kind: Callable[[int], Any]):
        def f(x: Tensor, shift: Any) -> Tensor:
            return x.roll(int(shift)) ** 2 + x[int(shift)]

        x, first = randn(6), None
        for shift in (1, 2, 1, 3, 2):
            recipe = checked(f, x, kind(shift))
            assert recipe is not first
            first = recipe

    @pytest.mark.parametrize(
        "values", [(True, False, True), ("a", "b", "a"), (None, 2.0, None), ((1, 2), (1, 3))]
    )
    def test_plain_values(self, values: tuple[Any, ...]):
        def f(x: Tensor, how: Any) -> Tensor:
            return x.cumsum(0) ** 2 if how == values[0] else x.sin() * (how == values[1])

        for how in values:
            checked(f, randn(6), how)

    def test_indices(self):
        """Used several times before they change, so that no check now and then helps."""

        def f(x: Tensor, order: Tensor) -> Tensor:
            return x[order] ** 2

        x, order = randn(6), torch.arange(6)
        for changed in (order, order, order, order.flip(0), order, order.roll(2), order % 2):
            checked(f, x, changed)

    def test_masks(self):
        def f(x: Tensor, mask: Tensor) -> Tensor:
            return (mask @ x).tanh()

        x = randn(6)
        for mask in (torch.eye(6, **F64), torch.ones(6, 6, **F64), torch.zeros(6, 6, **F64)):
            checked(f, x, mask)

    def test_functions(self):
        def f(x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
            return inner(x)

        for inner in (torch.sin, lambda x: x.cumsum(0), torch.cos, lambda x: x.flip(0) ** 2):
            checked(f, randn(6), inner)

    def test_containers(self):
        def f(x: Tensor, settings: dict[str, float]) -> Tensor:
            return x**2 * settings["scale"]

        settings = {"scale": 2.0}
        checked(f, randn(6), settings)
        settings["scale"] = 3.0
        checked(f, randn(6), settings)

    def test_one_tensor_in_two_places(self):
        """A plan made where two arguments are one tensor serves where they are two."""

        def f(x: Tensor, y: Tensor) -> Tensor:
            return x * y + y.flip(0)

        x, y = randn(6), randn(6, seed=1)
        for other in (x, y, x):
            torch.testing.assert_close(pf.jacobian(f, x, other).dense(), torch.diag(other))

    def test_one_tensor_in_two_places_that_are_differentiated(self):
        x, y = randn(6), randn(6, seed=1)
        for other in (x, y, x):
            J = pf.jacobian(lambda x, y: x * y.sin(), x, other, argnums=(0, 1))
            expected = torch.diag(other.sin()), torch.diag(x * other.cos())
            for ours, theirs in zip(J.dense(), expected, strict=True):
                torch.testing.assert_close(ours, theirs)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "branches on strides": lambda x: x * 2 if x.is_contiguous() else x.flip(0).sin(),
    "counts in strides": lambda x: x.as_strided((2, 2), (5, 1)).sin(),
    "makes views where it can": lambda x: x.reshape(-1)[1:] ** 2 * x.reshape(-1)[:-1],
    "does not care": lambda x: x.roll(1, 1) * x,
}


@pytest.mark.parametrize("name", STRIDED)
def test_how_arguments_lie_in_memory(name: str):
    """The same shapes in another order; what is no plain block of memory arrives as one."""
    x, turned, f = randn(3, 5), randn(5, 3, seed=1).T, STRIDED[name]
    plan = pf.plan(f, x)
    for point in (x, turned, x, x, x, turned, randn(6, 10)[::2, ::2], turned, x.clone()):
        for J in (pf.jacobian(f, point), plan(point)):
            torch.testing.assert_close(J.dense(), loop_jacobian(f, point))


class TestPlansInHand:
    def test_another_branch(self):
        f, x = BY_VALUE["branch on the sign"], randn(6).abs()
        plan = pf.plan(f, x)
        for point in (x, -x, 2 * x):
            torch.testing.assert_close(plan(point).dense(), loop_jacobian(f, point))

    def test_another_mask(self):
        mask = torch.eye(6, **F64)

        def f(x: Tensor) -> Tensor:
            return (mask @ x).tanh()

        plan, x = pf.plan(f, randn(6)), randn(6, seed=1)
        assert plan.nnz == 6
        mask.fill_(1.0)
        made = plan(x)
        assert made.plan.nnz == 36
        torch.testing.assert_close(made.dense(), loop_jacobian(f, x))

    def test_given_to_another_function(self):
        """A plan says how, and the function is the one that is given."""
        x = randn(6)
        plan = pf.plan(torch.sin, x)
        found = pf.jacobian(torch.cos, x, plan=plan).dense()
        torch.testing.assert_close(found, torch.diag(-x.sin()))
