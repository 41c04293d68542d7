"""Plans: what is chosen, what is said of it, when it no longer holds, and budgets."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from oracles import loop_jacobian
from pushforward.errors import (
    CouplingError,
    DifferentiationError,
    InputError,
    MemoryBudgetError,
    PlanError,
    ShapeError,
)
from pushforward.meter import measure

F64 = {"dtype": torch.float64}


def wide_net(m: int, n: int, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, width), nn.Tanh(), nn.Linear(width, m))


class Counted(torch.autograd.Function):
    """Three times x, counting how often its backward runs."""

    calls = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        Counted.calls += 1
        return 3 * gradient


class TestChoice:
    @pytest.mark.parametrize(
        ("m", "n", "strategy"),
        [(3, 500, "reverse"), (500, 3, "forward"), (40, 40, "reverse"), (1, 1, "reverse")],
    )
    def test_the_fewer_passes_win(self, m: int, n: int, strategy: str):
        plan = pf.plan(wide_net(m, n), torch.ones(n))
        assert plan.strategy == strategy
        assert plan.passes == min(m, n)
        assert (plan.jvps, plan.vjps) == ((n, 0) if strategy == "forward" else (0, m))
        assert plan.nnz == m * n  # all of it may be nonzero, and was looked at

    def test_costs_decide_between_near_counts(self):
        """A narrow middle makes passes alike, so that 200 beat 260; both were counted."""
        plan = pf.plan(wide_net(260, 200), torch.ones(200))
        assert plan.strategy == "forward"
        assert dict(plan.rejected)["reverse"].startswith("260 passes")
        assert plan.recipe.candidate.cost.flops > 0

    def test_a_second_derivative_that_lies_is_found_out(self):
        class Clipped(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x: Tensor) -> Tensor:
                return x.repeat(50)

            @staticmethod
            def backward(ctx, gradient: Tensor) -> Tensor:
                return torch.from_numpy(gradient.detach().numpy()).reshape(50, -1).sum(0)

        plan = pf.plan(Clipped.apply, torch.ones(2, **F64))
        assert plan.strategy == "loop"
        assert "J v is made of rows" in dict(plan.rejected)["forward"]
        v = torch.tensor([1.0, 2.0], **F64)
        torch.testing.assert_close(plan(v) @ v, v.repeat(50))
        torch.testing.assert_close(
            plan(torch.ones(2, **F64)).matrix(), torch.eye(2, **F64).repeat(50, 1)
        )

    @pytest.mark.parametrize("strategy", ["sparse", "reverse", "forward", "loop"])
    def test_a_strategy_by_name(self, strategy: str):
        x = torch.tensor([0.5, 1.0, 2.0], **F64)
        J = pf.jacobian(torch.sin, x, plan=strategy)
        assert J.plan.strategy == strategy
        torch.testing.assert_close(J.matrix(), torch.diag(x.cos()))

    def test_loop_makes_one_plain_pass_for_each_output(self):
        J = pf.jacobian(Counted.apply, torch.ones(4), plan="loop")
        Counted.calls = 0
        J.matrix()
        assert Counted.calls == J.plan.passes == 4

    def test_large_passes_go_one_by_one(self):
        """A batch of passes that hold megabytes each is slower than the passes in turn."""
        body = nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten()
        net = nn.Sequential(*body, nn.Linear(2048, 4))
        few, many = (pf.plan(net, torch.ones(n, 1, 16, 16), batch_dim=0) for n in (1, 300))
        assert few.strategy == "reverse"
        assert many.strategy == "loop"

    def test_samples_share_a_pass(self):
        Counted.calls = 0
        x = torch.ones(7, 4)
        J = pf.jacobian(Counted.apply, x, batch_dim=0, plan="loop")
        Counted.calls = 0
        torch.testing.assert_close(J.matrix(), 3 * torch.eye(4).expand(7, 4, 4))
        assert J.plan.passes == 4
        assert Counted.calls == 4

    def test_hessian_counts_its_products(self):
        plan = pf.plan(lambda x: x.sum() ** 3, torch.ones(5), quantity="hessian")
        assert (plan.passes, plan.jvps, plan.vjps) == (5, 0, 5)
        assert "symmetric" in dict(plan.rejected)["forward"]
        torch.testing.assert_close(plan(torch.ones(5) * 2).matrix(), torch.full((5, 5), 60.0))


class TestReuse:
    def test_at_another_point(self):
        net = wide_net(4, 3).double()
        plan = pf.plan(net, torch.zeros(3, **F64))
        x = torch.tensor([1.0, -2.0, 3.0], **F64)
        torch.testing.assert_close(plan(x).dense(), loop_jacobian(net, x))
        torch.testing.assert_close(pf.jacobian(net, x, plan=plan).dense(), loop_jacobian(net, x))

    def test_is_remembered_for_a_function(self):
        def f(x: Tensor) -> Tensor:
            return x.sin()

        first = pf.jacobian(f, torch.ones(3))
        second = pf.jacobian(f, torch.zeros(3))
        assert first.plan.recipe is second.plan.recipe
        assert pf.jacobian(f, torch.zeros(4)).plan.recipe is not first.plan.recipe
        assert pf.jacobian(f, torch.zeros(3, **F64)).plan.recipe is not first.plan.recipe

    def test_is_made_anew_when_the_training_mode_changes(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        train = pf.jacobian(net, torch.ones(3)).plan
        evaluation = pf.jacobian(net.eval(), torch.ones(3)).plan
        assert train.recipe is not evaluation.recipe
        assert train(torch.ones(3)).plan.recipe is not train.recipe  # made anew, never used

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.ones(4), r"the input float32\[3\], got float32\[4\]"),
            (torch.ones(3, **F64), r"the input float32\[3\], got float64\[3\]"),
        ],
    )
    def test_not_for_other_arguments(self, x: Tensor, message: str):
        plan = pf.plan(torch.sin, torch.ones(3))
        with pytest.raises(PlanError, match=message):
            plan(x)

    def test_not_for_other_terms(self):
        x = torch.ones(3)
        plan = pf.plan(torch.add, x, x)
        with pytest.raises(PlanError, match="argnums=0, got 1"):
            pf.jacobian(torch.add, x, x, argnums=1, plan=plan)
        with pytest.raises(PlanError, match="memory=None, got 1000000"):
            pf.jacobian(torch.add, x, x, plan=plan, memory=10**6)

    def test_not_for_a_matrix_that_begins_to_mix_samples(self):
        mixing = torch.eye(6)

        def f(x: Tensor) -> Tensor:
            return mixing @ x

        x = torch.ones(6, 3)
        for _ in range(3):
            assert pf.jacobian(f, x, batch_dim=0).matrix().shape == (6, 3, 3)
        mixing.fill_(1.0)
        for _ in range(3):
            with pytest.raises(CouplingError, match="through mm"):
                pf.jacobian(f, x, batch_dim=0)

    def test_not_for_another_quantity(self):
        plan = pf.plan(torch.sum, torch.ones(3), quantity="hessian")
        with pytest.raises(PlanError, match="the quantity hessian, got jacobian"):
            pf.jacobian(torch.sum, torch.ones(3), plan=plan)

    def test_not_where_the_output_depends_on_data(self):
        def f(x: Tensor) -> Tensor:
            return x[x > 0]

        plan = pf.plan(f, torch.tensor([1.0, 2.0]))
        with pytest.raises(PlanError, match=r"the output float32\[2\], got float32\[1\]"):
            plan(torch.tensor([1.0, -1.0]))
        assert pf.jacobian(f, torch.tensor([1.0, -1.0])).shape == (1, 2)

    def test_functions_without_weak_references_are_planned_each_time(self):
        class Slotted:
            __slots__ = ()

            def __call__(self, x: Tensor) -> Tensor:
                return x * 2

        torch.testing.assert_close(pf.jacobian(Slotted(), torch.ones(2)).matrix(), 2 * torch.eye(2))


class TestText:
    def test_a_table(self):
        plan = pf.plan(wide_net(200, 100), torch.ones(100), memory=10**8)
        text = str(plan)
        assert pf.jacobian(plan.function, torch.ones(100), plan=plan).explain() == text
        for part in (
            "jacobian of Sequential",
            "200 x 100",
            "float32[100]",
            "forward: 100 forward passes",
            "FLOP",
            "100 MB",
            "rejected",
        ):
            assert part in text

    def test_samples_are_named(self):
        plan = pf.plan(torch.sin, torch.ones(5, 3), batch_dim=0)
        assert "3 x 3, 5 samples" in str(plan)
        assert "samples are independent: checked" in str(plan)

    def test_loop_and_hessian(self):
        J = pf.hessian(torch.sum, torch.ones(3), plan="loop")
        assert "3 Hessian-vector products, one by one" in J.explain()
        assert repr(J).startswith("Hessian(3 x 3, float32, cpu, of sum; loop, 3 passes)")

    def test_html_is_escaped(self):
        def f(x: Tensor) -> Tensor:
            return x

        f.__name__ = "<script>"
        html = pf.jacobian(f, torch.ones(2))._repr_html_()
        assert "<script>" not in html
        assert "&lt;script&gt;" in html

    def test_repr(self):
        assert repr(pf.plan(torch.sin, torch.ones(3))) == "Plan(jacobian 3 x 3: sparse, 1 passes)"


class TestBudget:
    @pytest.mark.parametrize("attached", [False, True])
    @pytest.mark.parametrize("what", ["fro_norm", "diagonal", "matrix"])
    @pytest.mark.parametrize("strategy", ["auto", "reverse", "forward"])
    def test_is_kept(self, what: str, attached: bool, strategy: str):
        net = wide_net(128, 128, width=512)
        x = torch.ones(8, 128)
        budget = 8 * 128 * 128 * 4 * 3  # three times the entries

        def work() -> Tensor:
            J = pf.jacobian(net, x, batch_dim=0, memory=budget, plan=strategy)
            assert J.plan.chunk < J.plan.passes
            return getattr(J, what)()

        with torch.set_grad_enabled(attached):
            work()
            result, cost = measure(work)
        assert cost.peak <= budget
        assert result.requires_grad == attached
        with torch.no_grad():
            expected = getattr(pf.jacobian(net, x, batch_dim=0), what)()
        torch.testing.assert_close(result.detach(), expected)

    @pytest.mark.parametrize("strategy", ["reverse", "forward"])
    def test_results_train_under_a_budget(self, strategy: str):
        net = wide_net(64, 64).double()
        x = torch.ones(64, **F64)
        budget = 64 * 64 * 8 * 4

        def gradient(**options) -> Tensor:
            J = pf.jacobian(net, x, plan=strategy, **options)
            return torch.autograd.grad(J.fro_norm() + (J @ x).sum(), net[0].weight)[0]

        torch.testing.assert_close(gradient(memory=budget), gradient())

    def test_too_small_for_a_pass(self):
        with pytest.raises(MemoryBudgetError, match=r"expects at least \d+.*single pass"):
            pf.jacobian(wide_net(300, 300), torch.ones(300), memory=1000)

    def test_too_small_for_the_entries(self):
        J = pf.jacobian(wide_net(300, 300), torch.ones(300), memory=10**5)
        assert torch.isfinite(J.fro_norm())
        with pytest.raises(MemoryBudgetError, match=r"360000 bytes of entries.*fro_norm"):
            J.matrix()

    @pytest.mark.parametrize("memory", [0, -1, 1.5])
    def test_is_a_number_of_bytes(self, memory):
        with pytest.raises(InputError, match="positive whole number of bytes"):
            pf.jacobian(torch.sin, torch.ones(2), memory=memory)


class TestRefusals:
    def test_a_name_that_is_none(self):
        with pytest.raises(PlanError, match=r'"auto", a Plan or one of .*reverse.*got \'fast\''):
            pf.jacobian(torch.sin, torch.ones(2), plan="fast")

    def test_a_strategy_that_does_not_apply(self):
        x = torch.eye(3, **F64)
        with pytest.raises(PlanError, match=r"a strategy that applies.*vmap"):
            pf.jacobian(lambda a: torch.linalg.det(a).reshape(1), x, plan="reverse")

    def test_a_quantity_that_is_none(self):
        with pytest.raises(InputError, match="jacobian, hessian, diagonal, got 'trace'"):
            pf.plan(torch.sin, torch.ones(2), quantity="trace")

    def test_a_hessian_of_a_vector(self):
        with pytest.raises(ShapeError, match=r"one output scalar, got 2"):
            pf.hessian(torch.sin, torch.ones(2))
        with pytest.raises(ShapeError, match=r"one output scalar per sample, got 2"):
            pf.hessian(torch.sin, torch.ones(3, 2), batch_dim=0)

    def test_an_op_without_a_derivative(self):
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x: Tensor) -> Tensor:
                return x**2

            @staticmethod
            def backward(ctx, gradient: Tensor) -> Tensor:
                raise NotImplementedError("this one is not implemented")

        with pytest.raises(DifferentiationError, match=r"this one is not implemented; replace"):
            pf.jacobian(Once.apply, torch.ones(2)).matrix()

    def test_coupled_samples_name_the_op(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
        with pytest.raises(CouplingError, match=r"through native_batch_norm; call .eval\(\)"):
            pf.jacobian(net, torch.randn(6, 3), batch_dim=0)
        assert pf.jacobian(net.eval(), torch.randn(6, 3), batch_dim=0).shape == (3, 3)

    @pytest.mark.parametrize(
        ("f", "op"),
        [
            (lambda x: x - x.mean(0), "mean"),
            (lambda x: x.roll(1, 0), "roll"),
            (lambda x: x.cumsum(0), "cumsum"),
            (lambda x: x.softmax(0), "softmax"),
            (lambda x: (x @ x.T) @ x, "mm"),
        ],
    )
    def test_other_couplings(self, f, op: str):
        with pytest.raises(CouplingError, match=rf"through \w*{op}"):
            pf.jacobian(f, torch.randn(6, 3), batch_dim=0)

    def test_a_single_pair_of_samples(self):
        def f(x: Tensor) -> Tensor:
            y = x.clone()
            y[17] = x[17] * x[16]
            return y

        with pytest.raises(CouplingError, match="influence each other"):
            pf.jacobian(f, torch.randn(40, 3), batch_dim=0)


class TestFreedGraphs:
    def test_a_backward_pass_may_come_between(self):
        net = wide_net(3, 3).double()
        J = pf.jacobian(net, torch.ones(3, **F64))
        expected = J.matrix().detach()
        J.fro_norm().backward()
        torch.testing.assert_close(J.matrix().detach(), expected)
        torch.testing.assert_close((J @ torch.ones(3, **F64)).detach(), expected.sum(1))

    def test_but_not_a_step(self):
        net = wide_net(3, 3).double()
        J = pf.jacobian(net, torch.ones(3, **F64))
        J.fro_norm().backward()
        with torch.no_grad():
            net[0].weight.add_(1)
        with pytest.raises(DifferentiationError, match=r"changed in place.*pf.jacobian again"):
            J.T @ torch.ones(3, **F64)

    def test_several_losses_of_one_jacobian(self):
        net = wide_net(3, 3).double()
        J = pf.jacobian(net, torch.ones(3, **F64))
        J.fro_norm().backward()
        first = net[0].weight.grad.clone()
        J.logabsdet().backward()
        assert not torch.equal(net[0].weight.grad, first)


class TestKept:
    def test_quantities_share_the_entries(self):
        Counted.calls = 0
        J = pf.jacobian(Counted.apply, torch.ones(3, **F64), plan="loop")
        Counted.calls = 0
        J.svdvals(), J.rank(), J.cond(), J.logvol(), J.slogdet(), J.fro_norm()
        assert Counted.calls == 3  # three rows, once

    def test_a_decomposition_needs_more_than_its_entries(self):
        J = pf.jacobian(wide_net(64, 64), torch.ones(64), memory=64 * 64 * 4 * 8)
        assert J.matrix().shape == (64, 64)
        with pytest.raises(MemoryBudgetError, match="expects a result that fits"):
            J.pdet()

    def test_few_functions_keep_many_shapes(self):
        from pushforward.memory import _CACHE, _REMEMBERED

        def f(x: Tensor) -> Tensor:
            return x.sin()

        for n in range(1, 2 * _REMEMBERED):
            pf.jacobian(f, torch.ones(n))
        assert len(_CACHE[f.__code__]) == _REMEMBERED

    def test_an_empty_one_under_a_budget(self):
        assert pf.jacobian(lambda x: x[:0], torch.ones(3), memory=10**6).fro_norm() == 0


class TestHessian:
    def test_weight_norm(self):
        """The fused op has a wrong second derivative: it is recorded written out."""
        g, v = torch.tensor([[1.5], [0.5]], **F64), torch.tensor([[1.0, 2.0], [3.0, -1.0]], **F64)

        def fused(p: dict[str, Tensor]) -> Tensor:
            return torch._weight_norm(p["v"], p["g"], 0).pow(3).sum()

        def plain(p: dict[str, Tensor]) -> Tensor:
            return (p["v"] * p["g"] / p["v"].norm(dim=1, keepdim=True)).pow(3).sum()

        point = {"g": g, "v": v}
        torch.testing.assert_close(
            pf.hessian(fused, point).matrix(), pf.hessian(plain, point).matrix()
        )

    def test_a_backward_that_is_no_derivative_is_found_out(self):
        def f(z: Tensor) -> Tensor:
            return Twisted.apply(z)

        class Twisted(torch.autograd.Function):
            @staticmethod
            def forward(ctx, z: Tensor) -> Tensor:
                ctx.save_for_backward(z)
                return (z**2).sum()

            @staticmethod
            def backward(ctx, gradient: Tensor) -> Tensor:
                (z,) = ctx.saved_tensors
                return gradient * torch.stack((z[0], z[0] * z[1]))

        with pytest.raises(
            DifferentiationError, match="symmetric Hessian, got entries that differ"
        ):
            pf.hessian(f, torch.tensor([1.0, 2.0], **F64)).matrix()


class TestThreads:
    def test_calls_in_threads_leave_no_trace(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).eval()
        buffer, flash = net[1].running_mean, torch.backends.cuda.flash_sdp_enabled()
        expected = pf.jacobian(net, torch.ones(5, 4), batch_dim=0).matrix().detach()
        with ThreadPoolExecutor(4) as pool:
            found = list(
                pool.map(
                    lambda _: pf.jacobian(net, torch.ones(5, 4), batch_dim=0).matrix().detach(),
                    range(40),
                )
            )
        assert all(torch.equal(matrix, expected) for matrix in found)
        assert net[1].running_mean is buffer
        assert torch.backends.cuda.flash_sdp_enabled() == flash


class TestDifferential:
    def test_divergence_between_dimensions(self):
        with pytest.raises(pf.errors.DimensionError, match="got 2 outputs and 3 inputs"):
            pf.divergence(lambda x: x[:2], torch.ones(3))

    def test_laplacian_of_complex_maps(self):
        with pytest.raises(InputError, match="real inputs and outputs"):
            pf.laplacian(lambda z: z.abs().sum(), torch.ones(2, dtype=torch.complex64))

    def test_laplacian_of_coupled_samples(self):
        with pytest.raises(CouplingError, match="mean"):
            pf.laplacian(lambda x: x - x.mean(0), torch.ones(4, 2), batch_dim=0)

    def test_divergence_under_a_budget(self):
        net = wide_net(100, 100, width=256)
        x = torch.ones(100)
        torch.testing.assert_close(
            pf.divergence(net, x, memory=10**5).detach(),
            pf.jacobian(net, x).matrix().trace().detach(),
        )
