"""Trees, complex numbers and batches at the border of the flat world."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from oracles import loop_jacobian
from pushforward.boundary import Layout, Structure
from pushforward.errors import InputError, ShapeError

F64 = {"dtype": torch.float64}
Pair = namedtuple("Pair", "first second")


@dataclass
class State:
    position: Tensor
    label: Tensor
    name: str


@dataclass(frozen=True)
class Frozen:
    inner: State
    scale: float


def state() -> State:
    return State(torch.tensor([1.0, 2.0], **F64), torch.tensor([3]), "moving")


@pytest.mark.parametrize(
    "tree",
    [
        torch.ones(2),
        {"b": torch.ones(2), "a": (torch.zeros(1), [torch.ones(3)])},
        Pair(torch.ones(1), torch.zeros(2)),
        OrderedDict(z=torch.ones(1), a=torch.zeros(2)),
        [state(), Frozen(state(), 2.0)],
    ],
    ids=["tensor", "nest", "namedtuple", "ordered", "dataclasses"],
)
def test_a_tree_is_rebuilt_from_its_leaves(tree):
    leaves, structure = Structure.of(tree)
    again, same = Structure.of(structure.rebuild(leaves))
    assert all(a is b for a, b in zip(leaves, again, strict=True))
    assert structure.signature == same.signature
    assert type(structure.rebuild(leaves)) is type(tree)


def test_dataclasses_go_in_and_come_out():
    def move(s: State) -> State:
        return State(s.position**2, s.label, s.name)

    J = pf.jacobian(move, state())
    dense = J.dense()
    assert isinstance(dense, State)
    assert isinstance(dense.position, State)
    torch.testing.assert_close(dense.position.position, torch.diag(torch.tensor([2.0, 4.0], **F64)))
    assert dense.position.label is None
    assert dense.label is None
    assert J.value.name == "moving"


def test_products_take_and_return_trees():
    def f(tree):
        return {"sum": tree["a"].sum(), "outer": torch.outer(tree["a"], tree["b"])}

    x = {"a": torch.tensor([1.0, 2.0], **F64), "b": torch.tensor([3.0, 4.0, 5.0], **F64)}
    J = pf.jacobian(f, x)
    v = {"a": torch.tensor([1.0, 0.0], **F64), "b": torch.zeros(3, **F64)}
    pushed = J @ v
    torch.testing.assert_close(pushed["sum"], torch.tensor(1.0, **F64))
    torch.testing.assert_close(pushed["outer"][0], x["b"])
    pulled = J.T @ pushed
    flat = J.matrix().T @ (J.matrix() @ torch.tensor([1.0, 0, 0, 0, 0], **F64))
    torch.testing.assert_close(torch.cat((pulled["a"], pulled["b"])), flat)


def test_trees_are_matched_by_name():
    x = {"a": torch.tensor([1.0, 2.0], **F64), "b": torch.tensor([3.0, 4.0], **F64)}
    J = pf.jacobian(lambda t: t["a"] * 10 + t["b"], x)
    v = {"b": torch.tensor([1.0, 0.0], **F64), "a": torch.tensor([0.0, 1.0], **F64)}
    torch.testing.assert_close(J @ v, torch.tensor([1.0, 10.0], **F64))
    with pytest.raises(ShapeError, match="J @ v expects v like"):
        J @ {"zz": v["a"], "y": v["b"]}
    J = pf.jacobian(lambda s: s.position, state())
    with pytest.raises(ShapeError, match="J @ v expects v like"):
        J @ {"position": v["a"]}


def test_integer_leaves_stand_aside_in_products_too():
    def f(tree):
        values, index = tree
        return values[index]

    x = (torch.tensor([1.0, 2.0, 3.0], **F64), torch.tensor([2, 0]))
    J = pf.jacobian(f, x)
    assert J.shape == (2, 3)
    assert J.dense()[1] is None
    v = torch.tensor([5.0, 6.0, 7.0], **F64)
    expected = torch.tensor([7.0, 5.0], **F64)
    torch.testing.assert_close(J @ (v, None), expected)
    torch.testing.assert_close(J @ v, expected)
    assert (J.T @ expected)[1] is None


def test_complex_scalars_are_two_real_ones():
    z = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    J = pf.jacobian(lambda z: z**2, z)
    assert J.shape == (4, 4)
    assert J.dense().shape == (2, 2, 2, 2)
    derivative = 2 * z
    for i in range(2):
        a, b = derivative[i].real, derivative[i].imag
        torch.testing.assert_close(J.dense()[i, :, i], torch.stack((a, -b, b, a)).reshape(2, 2))
    v = torch.tensor([1j, 2.0], dtype=torch.complex128)
    torch.testing.assert_close(J @ v, derivative * v)
    torch.testing.assert_close(J.T @ v, (derivative.conj() * v))


def test_not_holomorphic_maps_are_right_too():
    z = torch.tensor([1 + 2j], dtype=torch.complex128)
    expected = loop_jacobian(lambda x: x.square().sum(-1), torch.view_as_real(z).clone())
    torch.testing.assert_close(pf.jacobian(lambda z: z.abs() ** 2, z).dense(), expected)


def test_mixed_dtypes_meet_in_the_wider():
    def f(a: Tensor, b: Tensor) -> Tensor:
        return a.double() * b

    a, b = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0], **F64)
    J = pf.jacobian(f, a, b, argnums=(0, 1))
    assert J.dtype == torch.float64
    into_a, into_b = J.dense()
    torch.testing.assert_close(into_a, torch.diag(b))
    torch.testing.assert_close(into_b, torch.diag(a.double()))


def test_other_arguments_are_passed_and_left_alone():
    shift = torch.ones(2)

    def f(x: Tensor, shift: Tensor, options: dict) -> Tensor:
        shift.add_(1)
        return x * shift * options["scale"]

    J = pf.jacobian(f, torch.ones(2), shift, {"scale": 3.0})
    torch.testing.assert_close(J.matrix(), 6 * torch.eye(2))
    assert torch.equal(shift, torch.ones(2))


def test_parameters_as_inputs():
    net = nn.Linear(3, 2).double()
    x = torch.ones(3, **F64)
    params = dict(net.named_parameters())
    dense = pf.jacobian(lambda p: torch.func.functional_call(net, p, (x,)), params).dense()
    torch.testing.assert_close(dense["bias"], torch.eye(2, **F64))
    assert dense["weight"].shape == (2, 2, 3)
    assert net.weight.grad is None


class TestRefusals:
    def test_nothing_to_differentiate(self):
        with pytest.raises(InputError, match=r"at least one floating-point.*got int64\[2\]"):
            pf.jacobian(lambda x: x, torch.tensor([1, 2]))

    @pytest.mark.parametrize(
        ("given", "named"), [(np.ones(2), "ndarray"), (3.0, "float"), (None, "NoneType")]
    )
    def test_no_tensor_goes_in(self, given, named):
        with pytest.raises(InputError, match=f"to differentiate, got {named};"):
            pf.jacobian(lambda x: x, given)

    def test_no_tensor_comes_out(self):
        with pytest.raises(InputError, match=r"returns a floating-point or complex tensor.*float"):
            pf.jacobian(lambda x: x.sum().item(), torch.ones(2))

    @pytest.mark.parametrize("argnums", [2, (), (0, 5), "x"])
    def test_positions_that_are_not_there(self, argnums):
        with pytest.raises(InputError, match="argnums expects positions of the 1 arguments"):
            pf.jacobian(torch.sin, torch.ones(2), argnums=argnums)

    def test_a_position_twice(self):
        with pytest.raises(InputError, match="distinct positions"):
            pf.jacobian(torch.add, torch.ones(2), torch.ones(2), argnums=(0, -2))

    def test_another_batch_dimension(self):
        with pytest.raises(InputError, match="None or 0, got 1"):
            pf.jacobian(torch.sin, torch.ones(2, 2), batch_dim=1)

    def test_inputs_without_a_common_batch(self):
        with pytest.raises(ShapeError, match=r"every floating-point input.*\(3, 2\), \(4,\)"):
            pf.jacobian(lambda t: t[0], (torch.ones(3, 2), torch.ones(4)), batch_dim=0)

    def test_a_scalar_has_no_batch(self):
        with pytest.raises(ShapeError, match="to have the batch as dimension 0"):
            pf.jacobian(torch.sin, torch.tensor(1.0), batch_dim=0)

    def test_outputs_without_the_batch(self):
        with pytest.raises(ShapeError, match="outputs with the batch of the input, 3"):
            pf.jacobian(lambda x: x.T, torch.ones(3, 2), batch_dim=0)

    def test_something_that_is_not_a_function(self):
        with pytest.raises(InputError, match="function or module to differentiate, got Tensor"):
            pf.jacobian(torch.ones(2), torch.ones(2))

    @pytest.mark.parametrize("v", [torch.ones(5), torch.ones(2, 2, 2), [1.0, 2.0, 3.0]])
    def test_vectors_of_another_shape(self, v):
        J = pf.jacobian(torch.sin, torch.ones(3))
        with pytest.raises(ShapeError, match=r"J @ v expects v like float32\[3\]"):
            J @ v
        with pytest.raises(ShapeError, match=r"J.T @ u expects u like"):
            J.T @ v

    def test_blocks_of_another_shape(self):
        J = pf.jacobian(torch.sin, torch.ones(3))
        with pytest.raises(ShapeError, match=r"push expects.*\(3\), or a block \(3, k\)"):
            J.push(torch.ones(4, 2))


def test_a_layout_describes_itself():
    _, layout = Layout.of((torch.ones(2, 3), torch.tensor(1), "x"), None, "input")
    assert layout.describe() == "float32[2, 3], int64[]"
    _, empty = Layout.of(("x",), None, "input")
    assert empty.describe() == "nothing"
