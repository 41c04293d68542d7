"""`fixed_point` against unrolled iterations and closed forms."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from pushforward.errors import (
    ConvergenceError,
    CouplingError,
    DifferentiationError,
    InputError,
    ShapeError,
)
from pushforward.implicit import ConvergenceWarning, fixed_point

SOLVERS = ("anderson", "broyden", "iteration")
B, N = 3, 5


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=source(seed))


class Layer:
    """z -> tanh(W z + x), whose iteration contracts."""

    def __init__(self, gain: float = 0.5) -> None:
        self.weight = (normal(N, N) * gain / N**0.5).requires_grad_()
        self.x = normal(B, N, seed=1).requires_grad_()
        self.start = torch.zeros(B, N, dtype=torch.float64)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + self.x)

    def unrolled(self, steps: int = 200) -> Tensor:
        z = self.start
        for _ in range(steps):
            z = self(z)
        return z

    @property
    def sources(self) -> list[Tensor]:
        return [self.weight, self.x]


def loss(z: Tensor) -> Tensor:
    return (z.sin() * torch.arange(1.0, N + 1)).sum()


def assert_close(ours, theirs, atol: float = 1e-10) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


# Values


@pytest.mark.parametrize("solver", SOLVERS)
def test_it_finds_the_point_that_iteration_ends_at(solver: str):
    layer = Layer()
    found = fixed_point(layer, layer.start, solver=solver, rtol=1e-12)
    assert_close([found.z], [layer.unrolled()], 1e-11)
    assert found.converged.all()
    assert found.converged.shape == found.counts.shape == found.residual.shape == (B,)
    torch.testing.assert_close(found.residual, (layer(found.z) - found.z).norm(dim=1))
    assert (found.relative_residual <= 1e-12).all()


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_acceleration_solves_what_iteration_cannot(solver: str):
    """Linear maps with eigenvalues outside of the unit circle, in any direction."""
    matrix = normal(8, 8) * 1.5
    b = normal(4, 8, seed=1)
    found = fixed_point(lambda z: z @ matrix.T + b, torch.zeros_like(b), solver=solver, history=20)
    truth = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - matrix, b.T).T
    assert_close([found.z], [truth], 1e-7)
    lost = fixed_point(
        lambda z: z @ matrix.T + b, torch.zeros_like(b), solver="iteration", unconverged="allow"
    )
    assert not lost.converged.any()
    assert lost.z.isfinite().all()


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_acceleration_takes_fewer_evaluations_than_iteration(solver: str):
    matrix = torch.diag(torch.linspace(0.5, 0.97, 10, dtype=torch.float64))
    b = normal(2, 10)
    counts = {
        name: fixed_point(
            lambda z: z @ matrix + b, torch.zeros_like(b), solver=name, max_evals=2000
        ).evaluations
        for name in (solver, "iteration")
    }
    assert counts[solver] < counts["iteration"] / 5


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_the_scale_of_the_state_changes_nothing(solver: str, scale: float):
    """Powers of two would give the same bits; what is regularised is relative."""
    matrix, b = normal(6, 6) * 0.3, normal(2, 6, seed=1)
    plain = fixed_point(lambda z: z @ matrix + b, torch.zeros_like(b), solver=solver)
    scaled = fixed_point(lambda z: z @ matrix + scale * b, torch.zeros_like(b), solver=solver)
    assert scaled.converged.all()
    assert abs(scaled.evaluations - plain.evaluations) <= 1
    torch.testing.assert_close(scaled.z / scale, plain.z, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_is_a_fixed_point_like_others(solver: str):
    found = fixed_point(lambda z: 0.5 * z.sin(), normal(3, 4), solver=solver)
    assert found.converged.all()
    assert found.z.abs().max() < 1e-9


def test_a_start_at_the_solution_takes_one_evaluation():
    found = fixed_point(lambda z: 0.5 * z, torch.zeros(3, 4))
    assert found.evaluations == 1
    assert found.counts.tolist() == [1, 1, 1]
    assert found.relative_residual.tolist() == [0, 0, 0]


def test_evaluations_are_those_that_were_made():
    calls = []

    def f(z: Tensor) -> Tensor:
        calls.append(z)
        return 0.5 * z.cos()

    with torch.no_grad():
        found = fixed_point(f, torch.zeros(2, 3))
    assert found.evaluations == len(calls) == len(found.trace)
    assert found.counts.max() == found.evaluations
    assert found.trace.shape == (found.evaluations, 2)


def test_nothing_is_evaluated_with_a_graph_where_nothing_requires_one():
    found = fixed_point(lambda z: 0.5 * z.cos(), torch.zeros(2, 3))
    assert not found.z.requires_grad
    with torch.no_grad():
        assert not fixed_point(Layer(), torch.zeros(B, N, dtype=torch.float64)).z.requires_grad


# Samples


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_that_has_arrived_does_not_move(solver: str):
    slopes = torch.tensor([[0.0], [0.3], [0.9]], dtype=torch.float64)
    seen = []

    def f(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return slopes * z.sin() + 1

    found = fixed_point(f, torch.zeros(3, 4, dtype=torch.float64), solver=solver)
    counts = found.counts.tolist()
    assert counts == sorted(counts)
    assert counts[0] < counts[2]
    for sample, count in enumerate(counts):
        later = torch.stack(seen)[count - 1 :, sample]
        assert (later == found.z[sample]).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_is_solved_as_if_it_were_alone(solver: str):
    layer = Layer()
    together = fixed_point(layer, layer.start, solver=solver)
    for sample in range(B):
        x = layer.x[sample : sample + 1]
        alone = fixed_point(
            lambda z, x=x: torch.tanh(z @ layer.weight.T + x), layer.start[:1], solver=solver
        )
        assert alone.counts == together.counts[sample]
        torch.testing.assert_close(alone.z[0], together.z[sample], rtol=1e-9, atol=1e-9)


def test_samples_that_influence_each_other_are_refused():
    start = torch.zeros(2, 3, dtype=torch.float64)

    def coupled(z: Tensor) -> Tensor:
        """The first sample stands still for a while, the second moves on, and then so must it."""
        return torch.stack([0.5 * z[0] + (z[1] - 0.5).relu(), 0.9 * z[1] + 0.1])

    with pytest.raises(CouplingError, match="no fixed point any more although only others moved"):
        fixed_point(coupled, start, solver="iteration")
    together = fixed_point(coupled, start, batch_dim=None)
    assert together.converged
    torch.testing.assert_close(together.z, torch.ones_like(start), rtol=0, atol=1e-8)


def test_one_state_without_a_batch():
    matrix = normal(4, 4) * 0.3
    found = fixed_point(lambda z: matrix @ z + 1, torch.zeros(4, dtype=torch.float64))
    assert found.converged.shape == found.residual.shape == found.counts.shape == ()
    assert found.trace.shape == (found.evaluations,)
    truth = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - matrix, torch.ones(4).double())
    assert_close([found.z], [truth], 1e-9)


def test_a_matrix_can_be_one_state():
    matrix = normal(3, 3) * 0.2
    eye = torch.eye(3, dtype=torch.float64)
    found = fixed_point(
        lambda X: matrix @ X @ matrix.T + eye, torch.zeros_like(eye), batch_dim=None
    )
    residual = found.z - matrix @ found.z @ matrix.T - eye  # a discrete Lyapunov equation
    assert residual.abs().max() < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tree_of_tensors(solver: str):
    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def f(state: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = state["a"], state["b"]
        return {"a": weight * b.mean(dim=1) + 1, "b": weight * (b + a[:, None])}

    start = {"a": torch.zeros(2, 3).double(), "b": torch.zeros(2, 4, 3).double()}
    found = fixed_point(f, start, solver=solver)
    again = f(found.z)
    assert_close([again["a"], again["b"]], [found.z["a"], found.z["b"]], 1e-9)
    (gradient,) = torch.autograd.grad(found.z["b"].sum(), weight)
    # a = w b + 1, b = w (a + b): b = w / (1 - w - w^2)
    w = weight.detach()
    truth = 2 * 4 * 3 * (1 + w**2) / (1 - w - w**2) ** 2
    torch.testing.assert_close(gradient, truth, rtol=1e-8, atol=0)


def test_a_complex_state():
    turn = torch.tensor(0.8j, dtype=torch.complex128)
    found = fixed_point(lambda z: turn * z + 1, torch.zeros(2, 3, dtype=torch.complex128))
    torch.testing.assert_close(found.z, (1 / (1 - turn)).expand(2, 3), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_shorter_dtypes(dtype: torch.dtype, solver: str):
    x = normal(4, 6).to(dtype)
    found = fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x), solver=solver)
    assert found.z.dtype is dtype
    assert found.converged.all()
    exact = x.double()
    for _ in range(100):
        exact = torch.tanh(0.5 * exact + x.double())
    reached = {torch.float32: 3e-5}.get(dtype, 30 * torch.finfo(dtype).eps)
    assert (found.z.double() - exact).norm(dim=1).max() < reached


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_empty_and_single_states(shape: tuple[int, int], solver: str):
    w = torch.tensor(0.5, requires_grad=True)
    found = fixed_point(lambda z: w * z + 1, torch.zeros(shape), solver=solver)
    assert found.z.shape == shape
    assert found.converged.shape == shape[:1]
    assert found.converged.all()
    found.z.sum().backward()
    assert repr(found).startswith("FixedPoint(")


# Gradients


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_are_those_of_the_unrolled_iteration(solver: str, order: int):
    """To parameters and to the injected input, through a layer that ends in tanh."""
    layer = Layer()
    found = fixed_point(layer, layer.start, solver=solver, rtol=1e-13, order=order)
    ours = torch.autograd.grad(loss(found.z), layer.sources)
    theirs = torch.autograd.grad(loss(layer.unrolled()), layer.sources)
    assert_close(ours, theirs)
    assert found.backward.converged
    assert found.backward.evaluations > 0
    assert found.backward.counts.shape == (B,)
    assert found.backward.residual <= 1e-13


@pytest.mark.parametrize("last", [torch.tanh, torch.sigmoid, torch.exp, nn.Softmax(dim=-1)])
def test_ops_that_save_their_output_may_end_the_map(last):
    """Nothing is hooked on f's value, which such an op reads again in each product with J^T."""
    layer = Layer()
    hooked = []

    def f(z: Tensor) -> Tensor:
        y = last(0.3 * z @ layer.weight.T + 0.1 * layer.x)
        if y.requires_grad:
            y.register_hook(lambda v: hooked.append(v) or 2 * v)
        return 0.5 * y

    def unrolled() -> Tensor:
        z = layer.start
        for _ in range(100):
            z = f(z)
        return z

    z = fixed_point(f, layer.start, rtol=1e-13).z
    ours = [torch.autograd.grad(loss(z), layer.sources, retain_graph=True) for _ in range(2)]
    assert hooked
    theirs = torch.autograd.grad(loss(unrolled()), layer.sources)
    for gradients in ours:
        assert_close(gradients, theirs)


def test_gradients_reach_an_input_that_something_else_made():
    layer = Layer()
    encoder = normal(N, N, seed=2).requires_grad_()
    x = layer.x @ encoder
    layer.x = x
    found = fixed_point(layer, layer.start, rtol=1e-13)
    ours = torch.autograd.grad(loss(found.z), [encoder, x], retain_graph=True)
    theirs = torch.autograd.grad(loss(layer.unrolled()), [encoder, x])
    assert_close(ours, theirs)


def test_the_start_gets_no_gradient():
    layer = Layer()
    start = layer.start.clone().requires_grad_()
    fixed_point(layer, start).z.sum().backward()
    assert start.grad is None
    assert layer.weight.grad is not None


def test_backward_twice_adds_up():
    layer = Layer()
    z = fixed_point(layer, layer.start, rtol=1e-13).z
    loss(z).backward(retain_graph=True)
    once = layer.weight.grad.clone()
    loss(z).backward()
    assert_close([layer.weight.grad], [2 * once])


def test_second_derivatives():
    layer = Layer()

    def second(z: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(z), layer.sources, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), layer.sources)

    found = fixed_point(layer, layer.start, rtol=1e-14)
    assert_close(second(found.z), second(layer.unrolled()), 1e-10)


def test_third_derivatives_with_order_3():
    layer = Layer()

    def third(z: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(z), layer.sources, create_graph=True)
        total = sum(g.sin().sum() for g in first)
        second = torch.autograd.grad(total, layer.sources, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in second), layer.sources)

    found = fixed_point(layer, layer.start, rtol=1e-14, order=3)
    assert_close(third(found.z), third(layer.unrolled()), 1e-8)


@pytest.mark.parametrize("order", [1, 2])
def test_more_derivatives_than_asked_for_are_refused(order: int):
    layer = Layer()
    value = loss(fixed_point(layer, layer.start, order=order).z)
    for _ in range(order - 1):
        (gradient,) = torch.autograd.grad(value, layer.weight, create_graph=True)
        value = gradient.sin().sum()
    with pytest.raises(DifferentiationError, match=f"pass order={order + 1} to fixed_point"):
        torch.autograd.grad(value, layer.weight, create_graph=True)


def test_second_derivatives_of_ops_that_torch_gets_wrong():
    """Weight normalisation is written out where its second derivative is needed."""
    direction = normal(N, N).requires_grad_()
    length = torch.full((N, 1), 0.6, dtype=torch.float64, requires_grad=True)
    x = normal(B, N, seed=1)

    def layer(z: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T + x)

    def fused(z: Tensor) -> Tensor:
        return layer(z, torch._weight_norm(direction, length, 0))

    def written_out(z: Tensor) -> Tensor:
        return layer(z, length * direction / direction.norm(dim=1, keepdim=True))

    def second(f) -> tuple[Tensor, ...]:
        z = fixed_point(f, torch.zeros_like(x), rtol=1e-13).z
        first = torch.autograd.grad(loss(z), [direction, length], create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), [direction, length])

    assert_close(second(fused), second(written_out))


def test_the_jacobian_of_a_layer_that_solves():
    layer = Layer()
    weight = layer.weight

    def solved(x: Tensor) -> Tensor:
        f = lambda z: torch.tanh(z @ weight.T + x)  # noqa: E731
        return fixed_point(f, torch.zeros_like(x), rtol=1e-13).z

    x = layer.x.detach()
    J = pf.jacobian(solved, x, batch_dim=0).matrix()
    slopes = 1 - solved(x) ** 2
    eye = torch.eye(N, dtype=torch.float64)
    truth = torch.linalg.solve(eye - slopes[..., None] * weight, torch.diag_embed(slopes))
    torch.testing.assert_close(J, truth, rtol=0, atol=1e-10)
    (ours,) = torch.autograd.grad(J.square().sum(), weight)
    (theirs,) = torch.autograd.grad(truth.square().sum(), weight)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_a_cotangent_that_is_not_finite_goes_through():
    layer = Layer()
    z = fixed_point(layer, layer.start).z
    (z.sum(dim=1) * torch.tensor([1.0, math.nan, 1.0])).sum().backward()
    assert layer.x.grad[[0, 2]].isfinite().all()
    assert layer.x.grad[1].isnan().all()


def test_a_map_that_ignores_its_state():
    x = normal(2, 3).requires_grad_()
    found = fixed_point(lambda z: x.sin(), torch.zeros(2, 3, dtype=torch.float64))
    found.z.sum().backward()
    assert_close([x.grad], [x.detach().cos()])


def test_second_derivatives_of_a_map_that_ignores_its_state():
    x = normal(2, 3).requires_grad_()
    z = fixed_point(lambda z: x.sin(), torch.zeros(2, 3, dtype=torch.float64)).z
    (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_close([second], [2 * (2 * x.detach()).cos()])


def test_inference_mode():
    layer = Layer()
    with torch.inference_mode():
        found = fixed_point(layer, layer.start)
    assert not found.z.requires_grad
    assert_close([found.z], [layer.unrolled()], 1e-8)


# What stays as it was


def test_batch_norm_keeps_its_statistics_and_dropout_its_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = normal(4, 6)
    found = fixed_point(lambda z: 0.2 * model(z + x), torch.zeros_like(x), batch_dim=None)
    assert found.converged
    found.z.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_random_numbers_are_drawn_as_by_one_call():
    dropout = nn.Dropout(0.5)
    x = torch.ones(2, 8, requires_grad=True)

    def f(z: Tensor) -> Tensor:
        return dropout(0.4 * z + x)

    torch.manual_seed(0)
    first = fixed_point(f, torch.zeros(2, 8)).z
    after = torch.get_rng_state()
    torch.manual_seed(0)
    f(torch.zeros(2, 8))
    assert torch.equal(after, torch.get_rng_state())
    assert not torch.equal(first, fixed_point(f, torch.zeros(2, 8)).z)


def test_a_map_may_write_to_its_argument():
    start = torch.zeros(2, 3)
    found = fixed_point(lambda z: z.mul_(0.5).add_(1), start)
    torch.testing.assert_close(found.z, torch.full((2, 3), 2.0), rtol=1e-4, atol=0)
    assert (start == 0).all()


# Failures


def test_what_has_not_converged_says_so():
    f = lambda z: 1 + 2 * z.cos()  # noqa: E731
    start = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="2 of 2 samples fell short of it in 7 evaluations"):
        found = fixed_point(f, start, solver="iteration", max_evals=7)
    assert not found.converged.any()
    assert found.z.isfinite().all()
    best = found.trace.min(dim=0).values
    torch.testing.assert_close(found.residual, best)
    with pytest.raises(ConvergenceError, match="expected a relative residual of 1e-10"):
        fixed_point(f, start, solver="iteration", max_evals=7, unconverged="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed_point(f, start, solver="iteration", max_evals=7, unconverged="allow")


def test_a_backward_pass_that_has_not_converged_says_so():
    layer = Layer()
    with pytest.warns(ConvergenceWarning, match="a backward pass for the fixed point of Layer"):
        fixed_point(layer, layer.start, backward_max_evals=2).z.sum().backward()
    found = fixed_point(layer, layer.start, backward_max_evals=2, unconverged="allow")
    found.z.sum().backward()
    assert not found.backward.converged
    assert found.backward.residual > 1e-10
    strict = fixed_point(layer, layer.start, backward_max_evals=2, unconverged="raise")
    with pytest.raises(ConvergenceError, match="a backward pass"):
        strict.z.sum().backward()


def test_backward_passes_can_have_settings_of_their_own():
    layer = Layer()
    found = fixed_point(
        layer, layer.start, rtol=1e-12, backward_solver="broyden", backward_rtol=1e-3
    )
    found.z.sum().backward()
    assert 1e-6 < found.backward.residual <= 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_map_that_runs_away_leaves_the_best_point(solver: str):
    found = fixed_point(
        lambda z: z.square().square() + 2,
        torch.zeros(2, 3),
        solver=solver,
        unconverged="allow",
        max_evals=60,
    )
    assert not found.converged.any()
    assert found.z.isfinite().all()
    assert found.residual.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_that_leaves_the_domain_comes_back(solver: str):
    """The first steps overflow in one sample, and do not disturb the other."""
    steepness = torch.tensor([[20.0], [0.5]], dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return (-steepness * z).exp() - (steepness * z).exp() * 1e-3

    start = torch.full((2, 2), -1.0, dtype=torch.float64)
    found = fixed_point(f, start, solver=solver, unconverged="allow", max_evals=300)
    assert found.z.isfinite().all()
    assert not found.trace[:, 0].isfinite().all() or found.converged[0]
    assert found.converged[1]


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
@pytest.mark.parametrize("history", [1, 2, 9])
def test_short_histories(solver: str, history: int):
    layer = Layer()
    found = fixed_point(layer, layer.start, solver=solver, history=history)
    assert found.converged.all()
    assert_close([found.z], [layer.unrolled()], 1e-8)


def test_a_map_that_is_nan_at_the_start_is_refused():
    with pytest.raises(
        InputError, match="to be finite where the search starts, got NaN in sample 1"
    ):
        fixed_point(lambda z: z.sqrt(), torch.tensor([[1.0], [-1.0]]))
    with pytest.raises(InputError, match="got an infinite value in sample 0"):
        fixed_point(lambda z: 1 / z, torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "newton"}, 'solver expects one of "anderson", "broyden", "iteration"'),
        ({"backward_solver": "newton"}, "solver expects one of"),
        ({"unconverged": "ignore"}, 'unconverged expects one of "warn", "raise", "allow"'),
        ({"tol": -1.0}, "tol expects a number of at least 0, got -1.0"),
        ({"rtol": math.nan}, "rtol expects a number of at least 0, got nan"),
        ({"max_evals": 0}, "max_evals expects a whole number of at least 1, got 0"),
        ({"history": 2.5}, "history expects a whole number"),
        ({"order": True}, "order expects a whole number"),
        ({"mixing": 0.0}, "mixing expects a number over 0 and up to 2"),
        ({"batch_dim": 1}, 'batch_dim expects None, 0 or "auto", got 1'),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        fixed_point(lambda z: z / 2, torch.zeros(2, 3), **arguments)


def test_what_cannot_be_iterated():
    with pytest.raises(InputError, match="expected a function or module f to iterate, got Tensor"):
        fixed_point(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match="floating-point or complex tensors, got int64"):
        fixed_point(lambda z: z, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"float32\[2, 3\], got float32\[2, 4\]"):
        fixed_point(lambda z: torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="got int"):
        fixed_point(lambda z: 1, torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="to have the batch as dimension 0"):
        fixed_point(lambda z: z, (torch.zeros(2, 3), torch.zeros(3, 3)), batch_dim=0)


def test_tolerances():
    f = lambda z: 0.5 * z + 500  # noqa: E731
    start = torch.zeros(1, 1, dtype=torch.float64)
    ends = [
        fixed_point(f, start, solver="iteration", **limits).residual.item()
        for limits in ({"tol": 1e-3}, {"rtol": 1e-3}, {"tol": 1e-3, "rtol": 1e-6})
    ]
    assert 1e-4 < ends[0] <= 1e-3
    assert 0.1 < ends[1] <= 1
    assert 1e-4 < ends[2] <= 1e-3


def test_mixing_shortens_the_plain_step():
    f = lambda z: -1.5 * z + 5  # noqa: E731
    start = torch.zeros(1, 1, dtype=torch.float64)
    found = fixed_point(f, start, solver="iteration", mixing=0.5)
    torch.testing.assert_close(found.z.item(), 2.0, rtol=1e-9, atol=0)
    for solver in ("anderson", "broyden"):
        assert fixed_point(f, start, solver=solver, mixing=0.5).converged
