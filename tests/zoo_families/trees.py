"""Pytrees in and out, several arguments, integer leaves, parameters as inputs."""

from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils import _pytree

from zoo_families.case import Problem, case, module, randn

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class State:
    """Position and momentum."""

    position: Tensor
    momentum: Tensor


_pytree.register_dataclass(State)


@case("dictionary", "tree")
def dictionary() -> Problem:
    x = {"a": randn(3), "b": randn(2, 2, seed=1)}
    return Problem(lambda d: {"u": d["a"].sin() * d["b"].sum(), "v": d["b"] @ d["b"]}, (x,))


@case("tuple_out", "tree")
def tuple_out() -> Problem:
    return Problem(lambda x: (x.sin(), x.sum()), (randn(3, 4),))


@case("list_in", "tree")
def list_in() -> Problem:
    return Problem(lambda pair: pair[0] * pair[1].sum(), ([randn(3), randn(2, seed=1)],))


@case("named_tuple", "tree")
def named_tuple() -> Problem:
    x = Pair(randn(3), randn(2, seed=1))
    return Problem(lambda p: Pair(p.left * p.right[0], p.right.cumsum(0)), (x,))


@case("dataclass", "tree")
def dataclass_case() -> Problem:
    """One symplectic step of a pendulum."""

    def step(state: State) -> State:
        momentum = state.momentum - 0.1 * state.position.sin()
        return State(state.position + 0.1 * momentum, momentum)

    return Problem(step, (State(randn(3), randn(3, seed=1)),))


@case("nested_tree", "tree")
def nested_tree() -> Problem:
    x = {"a": (randn(2), [randn(3, seed=1)]), "b": {"c": randn(1, seed=2)}}

    def f(tree: dict) -> tuple:
        (left, (middle,)), right = tree["a"], tree["b"]["c"]
        return left * right, {"m": middle.prod() + left.sum()}

    return Problem(f, (x,))


@case("several_arguments", "tree")
def several_arguments() -> Problem:
    args = (randn(3), randn(2, seed=1), randn(4, seed=2))
    return Problem(lambda a, b, c: torch.outer(a, c) * b.prod(), args, argnums=(0, 2))


@case("second_argument", "tree")
def second_argument() -> Problem:
    return Problem(lambda a, b: a @ b.sin(), (randn(3, 4), randn(4, seed=1)), argnums=1)


@case("arguments_in_reverse", "tree")
def arguments_in_reverse() -> Problem:
    return Problem(lambda a, b: a * b.sum(), (randn(3), randn(2, seed=1)), argnums=(1, 0))


@case("unused_argument", "tree")
def unused_argument() -> Problem:
    return Problem(lambda a, b: a.sin(), (randn(3), randn(2, seed=1)), argnums=(0, 1))


@case("integer_leaf", "tree")
def integer_leaf() -> Problem:
    """An embedding looked up by tokens that travel with the floats."""
    table = randn(6, 3, seed=4)
    x = {"scale": randn(3), "tokens": torch.tensor([4, 0, 4])}
    return Problem(
        lambda batch: functional.embedding(batch["tokens"], table) * batch["scale"], (x,)
    )


@case("class_labels", "tree")
def class_labels() -> Problem:
    labels = torch.tensor([1, 0, 3])
    return Problem(
        lambda x, y: functional.cross_entropy(x, y, reduction="none"), (randn(3, 4), labels)
    )


@case("boolean_leaf", "tree")
def boolean_leaf() -> Problem:
    mask = torch.tensor([True, False, True])
    return Problem(lambda pair: torch.where(pair[1], pair[0], 0.0), ((randn(3), mask),))


@case("embedding_table", "tree")
def embedding_table() -> Problem:
    tokens = torch.tensor([4, 0, 4])
    return Problem(lambda table: functional.embedding(tokens, table), (randn(6, 2),))


@case("parameters_as_inputs", "tree", "network")
def parameters_as_inputs() -> Problem:
    net = module(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    x = randn(5, 3)
    return Problem(lambda w: functional_call(net, w, (x,)), (weights,))


@case("module_of_two", "tree", "network")
def module_of_two() -> Problem:
    net = module(lambda: nn.Bilinear(3, 4, 2))
    return Problem(
        net,
        (randn(3), randn(4, seed=1)),
        argnums=(0, 1),
        parameters=tuple(net.parameters()),
    )
