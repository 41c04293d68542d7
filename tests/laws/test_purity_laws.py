"""Nothing that a call does is visible afterwards."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lawbook import jacobian
from torch import Tensor, nn

import pushforward as pf
from oracles import leaves
from zoo import Case, Problem, named, over


def everything(J: pf.Jacobian) -> None:
    """Ask for all that a Jacobian has to give."""
    J.matrix(), J.dense(), J.fro_norm(), J.svdvals(), J.sparse()
    m, n = J.shape
    if 0 not in (m, n):
        _ = J.T @ torch.ones(m, 2, dtype=torch.float64)
        _ = J @ torch.ones(n, 2, dtype=torch.float64)
    if m == n:
        J.trace(), J.slogdet()


def snapshot(problem: Problem) -> list[Any]:
    """All that could be seen to change: data, gradients, flags, versions, hooks, modes, noise."""
    seen: list[Any] = [torch.get_rng_state(), torch.is_grad_enabled()]
    tensors = [x for x in leaves(problem.args) if isinstance(x, Tensor)]
    for tensor in [*tensors, *problem.parameters]:
        seen += [tensor.detach().clone(), tensor.grad, tensor.requires_grad, tensor._version]
        seen += [len(tensor._backward_hooks or ())]
    if isinstance(problem.f, nn.Module):
        seen += list(_of_module(problem.f))
    return seen


def _of_module(net: nn.Module) -> Iterator[Any]:
    for tensor in itertools.chain(net.parameters(), net.buffers()):
        yield from (tensor.detach().clone(), id(tensor), tensor._version, tensor.requires_grad)
    for module in net.modules():
        yield from (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        yield from (len(module._backward_hooks), sorted(vars(module)))


def assert_unchanged(before: list[Any], after: list[Any]) -> None:
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        if isinstance(old, Tensor):
            assert torch.equal(old, new)
        else:
            assert old == new


@over()
def test_a_jacobian_leaves_no_trace(case: Case):
    problem = case.make()
    before = snapshot(problem)
    everything(pf.jacobian(problem.f, *problem.args, argnums=problem.argnums))
    assert_unchanged(before, snapshot(problem))


@over("batched")
def test_a_jacobian_per_sample_leaves_no_trace(case: Case):
    problem = case.make()
    before = snapshot(problem)
    J = pf.jacobian(problem.f, problem.x, batch_dim=0)
    J.matrix(), J.fro_norm(), J.value
    assert_unchanged(before, snapshot(problem))


@over("coupled")
def test_a_refusal_leaves_no_trace(case: Case):
    problem = case.make()
    before = snapshot(problem)
    with pytest.raises(pf.errors.CouplingError):
        pf.jacobian(problem.f, problem.x, batch_dim=0)
    assert_unchanged(before, snapshot(problem))


@over("network", without=("tree",))
def test_a_point_that_wants_gradients_is_left_alone(case: Case):
    problem = case.make()
    x = problem.x.clone().requires_grad_()
    jacobian(Problem(problem.f, (x,))).fro_norm().backward()
    assert x.is_leaf
    assert x.requires_grad


OPERATIONS: dict[str, Callable[[Problem], Any]] = {
    "divergence": lambda p: pf.divergence(p.f, p.x, batch_dim=0),
    "laplacian": lambda p: pf.laplacian(p.f, p.x, batch_dim=0),
    "plan": lambda p: pf.plan(p.f, p.x, batch_dim=0),
    "noise_response": lambda p: pf.noise_response(p.f, p.x, 0.1, samples=8, seed=0),
    "value_and_logabsdet": lambda p: pf.value_and_logabsdet(p.f, p.x),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["residual", "triangular_flow", "layer_norm_affine"])
def test_other_operations_leave_no_trace(name: str, operation: str):
    problem = named(name)
    before = snapshot(problem)
    OPERATIONS[operation](problem)
    assert_unchanged(before, snapshot(problem))


def test_statistics_of_batch_norm_stay():
    problem = named("batch_norm_train")
    net = problem.f
    reference = copy.deepcopy(net)
    everything(pf.jacobian(net, problem.x))
    pf.jacobian(net, problem.x, plan="loop").matrix()
    assert torch.equal(net.running_mean, reference.running_mean)
    assert torch.equal(net.running_var, reference.running_var)
    assert net.num_batches_tracked == reference.num_batches_tracked
    assert net.training


def test_a_failing_map_leaves_no_trace():
    problem = named("batch_norm_train")
    before = snapshot(problem)

    def failing(x: Tensor) -> Tensor:
        torch.rand(3)
        problem.f(x)
        raise KeyError("the map's own trouble")

    with pytest.raises(KeyError, match="own trouble"):
        pf.jacobian(failing, problem.x)
    assert_unchanged(before, snapshot(problem))


def test_power_iterations_of_spectral_norm_stay():
    net = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).double().train()
    problem = Problem(
        net, (torch.ones(4, dtype=torch.float64),), parameters=tuple(net.parameters())
    )
    before = snapshot(problem)
    everything(pf.jacobian(net, problem.x))
    assert_unchanged(before, snapshot(problem))


def test_a_backward_pass_through_the_same_network_still_works():
    """Graphs that were recorded before a call survive it."""
    problem = named("residual_block")
    loss = problem.f(problem.x).sum()
    everything(pf.jacobian(problem.f, problem.x))
    loss.backward()
    assert all(p.grad is not None for p in problem.parameters)


def test_calls_work_inside_other_gradient_modes():
    problem = named("residual")
    expected = pf.jacobian(problem.f, problem.x).matrix().detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            actual = pf.jacobian(problem.f, problem.x.clone()).matrix()
        torch.testing.assert_close(actual.clone(), expected)


def test_results_do_not_share_memory_with_what_is_kept():
    problem = named("residual")
    J = pf.jacobian(problem.f, problem.x)
    with torch.no_grad():
        first = J.matrix()
        expected = first.clone()
        first.zero_()
        assert torch.equal(J.matrix(), expected)
