"""Jacobians kept as two factors: products, singular values, volumes, against dense ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from pushforward.factors import Split
from pushforward.jacobians import Jacobian
from pushforward.lowrank import core

F64 = {"dtype": torch.float64}
M, N, WIDTH = 150, 130, 6

QUESTIONS: dict[str, Callable[[Jacobian], Tensor]] = {
    "svdvals": lambda J: J.svdvals(),
    "svdvals(4)": lambda J: J.svdvals(4),
    "spectral_norm": lambda J: J.spectral_norm(),
    "stable_rank": lambda J: J.stable_rank(),
    "log_pdet": lambda J: J.log_pdet(),
    "log_pdet(0.1)": lambda J: J.log_pdet(0.1),
    "pdet": lambda J: J.pdet(),
    "fro_norm": lambda J: J.fro_norm(),
}


def hourglass(activation: type[nn.Module] = nn.Tanh, m: int = M, n: int = N) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(n, 40), activation(), nn.Linear(40, WIDTH), activation()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 50), activation(), nn.Linear(50, m)).double()


def point(*lead: int, n: int = N) -> Tensor:
    return torch.randn(*lead, n, generator=torch.Generator().manual_seed(1), **F64)


@pytest.fixture
def no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the two factors are multiplied out."""

    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("the m x n matrix was formed")

    monkeypatch.setattr(Split, "matrix", staticmethod(refuse))


def with_gradients(question: Callable[[Jacobian], Tensor], J: Jacobian, net: nn.Module, x: Tensor):
    """An answer, and the gradient of its sum with respect to input and parameters."""
    answer = question(J)
    return answer, torch.autograd.grad(answer.sum(), [x, *net.parameters()], allow_unused=True)


class TestSpectra:
    @pytest.mark.usefixtures("no_matrix")
    @pytest.mark.parametrize("question", QUESTIONS)
    @pytest.mark.parametrize("shape", [(M, N), (N, M)])
    def test_as_of_the_dense_matrix(self, question: str, shape: tuple[int, int]):
        net, x = hourglass(m=shape[0], n=shape[1]), point(n=shape[1]).requires_grad_()
        J, dense = pf.jacobian(net, x), pf.jacobian(net, x, plan="reverse")
        assert J.plan.strategy == "split"
        found, gradients = with_gradients(QUESTIONS[question], J, net, x)
        expected, wanted = with_gradients(QUESTIONS[question], dense, net, x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        for one, other in zip(gradients, wanted, strict=True):
            assert (one is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * other.abs().max())

    @pytest.mark.usefixtures("no_matrix")
    def test_rank_and_volume(self):
        net, x = hourglass(), point().requires_grad_()
        J = pf.jacobian(net, x)
        assert J.rank() == WIDTH
        assert J.rank(rtol=0.999) == 1
        volume = J.logvol()
        assert volume == -torch.inf
        assert J.logvol(rtol=0.0) == -torch.inf
        (gradient,) = torch.autograd.grad(volume, x)
        assert torch.equal(gradient, torch.zeros_like(x))
        with pytest.raises(pf.errors.InputError, match="rtol expects"):
            J.logvol(rtol=-1.0)

    @pytest.mark.usefixtures("no_matrix")
    def test_zeros_fill_up_the_singular_values(self):
        values = pf.jacobian(hourglass(), point()).svdvals()
        assert values.shape == (N,)
        assert torch.equal(values[WIDTH:], torch.zeros_like(values[WIDTH:]))
        assert values[WIDTH - 1] > 0

    @pytest.mark.usefixtures("no_matrix")
    def test_single_precision_keeps_its_dtype_and_its_rank(self):
        J = pf.jacobian(hourglass().float(), point().float())
        assert J.plan.strategy == "split"
        assert J.svdvals().dtype == J.pdet().dtype == J.fro_norm().dtype == torch.float32
        assert J.rank() == WIDTH

    @pytest.mark.usefixtures("no_matrix")
    def test_samples_have_factors_of_their_own(self):
        net, x = hourglass(), point(3)
        J = pf.jacobian(net, x, batch_dim=0)
        assert J.plan.strategy == "split"
        each = torch.stack([pf.jacobian(net, row, plan="reverse").svdvals() for row in x])
        torch.testing.assert_close(J.svdvals(), each, atol=1e-12, rtol=1e-10)
        assert J.rank().tolist() == [WIDTH] * 3

    def test_dead_units_take_the_dense_way_to_their_derivatives(self):
        """A zero column has no QR to differentiate; the product has derivatives all the same."""
        net, x = hourglass(nn.ReLU), point().requires_grad_()
        with torch.no_grad():
            net[2].bias[0] = -100.0  # this one never fires
        J, dense = pf.jacobian(net, x), pf.jacobian(net, x, plan="reverse")
        assert J.plan.strategy == "split"
        for question in ("spectral_norm", "log_pdet"):
            found, gradients = with_gradients(QUESTIONS[question], J, net, x)
            expected, wanted = with_gradients(QUESTIONS[question], dense, net, x)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradients[1], wanted[1], rtol=1e-8, atol=1e-8)
        with torch.no_grad():
            assert pf.jacobian(net, x).rank() == dense.rank() < WIDTH

    def test_second_derivatives(self):
        net, x = hourglass(), point().requires_grad_()

        def twice(plan: str) -> Tensor:
            norm = pf.jacobian(net, x, plan=plan).spectral_norm()
            (first,) = torch.autograd.grad(norm, x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), x)[0]

        torch.testing.assert_close(twice("split"), twice("reverse"), rtol=1e-7, atol=1e-10)

    def test_a_wide_cut_gains_nothing(self):
        """Where the waist is not less than both sides, entries are what is decomposed."""
        J = pf.jacobian(hourglass(), point())
        assert J.logvol() == pf.linalg.logvol(J.matrix())


class TestCore:
    def test_singular_values(self):
        tall, wide = torch.randn(7, 3, **F64), torch.randn(3, 5, **F64)
        found = torch.linalg.svdvals(core(tall, wide))
        torch.testing.assert_close(found, torch.linalg.svdvals(tall @ wide)[:3])

    def test_nothing_for_what_is_not_finite(self):
        tall, wide = torch.randn(7, 3), torch.randn(3, 5)
        wide[0, 0] = torch.nan
        assert core(tall, wide) is None

    def test_nothing_for_derivatives_of_dependent_columns(self):
        tall, wide = torch.ones(7, 3).requires_grad_(), torch.randn(3, 5)
        assert core(tall, wide) is None
        with torch.no_grad():
            assert core(tall, wide) is not None

    def test_entries_that_are_not_finite_are_an_error(self):
        net = hourglass()
        with torch.no_grad():
            net[0].weight[0, 0] = torch.inf
        J = pf.jacobian(net, point())
        with pytest.raises(pf.errors.InputError, match="finite entries"):
            J.spectral_norm()


def stencil(x: Tensor) -> Tensor:
    return x[1:] ** 2 * x[:-1]


class TestProducts:
    @pytest.mark.parametrize("count", [1, 40])
    @pytest.mark.parametrize("grad", [False, True])
    def test_by_factors(self, count: int, grad: bool):
        net, x = hourglass(), point().requires_grad_(grad)
        dense = pf.jacobian(net, x, plan="reverse").matrix()
        J = pf.jacobian(net, x)
        with torch.set_grad_enabled(grad):
            J.fro_norm()  # the factors are there
            v, u = torch.randn(N, count, **F64), torch.randn(M, count, **F64)
            torch.testing.assert_close(J @ v, dense @ v)
            torch.testing.assert_close(J.T @ u, dense.mT @ u)
            torch.testing.assert_close(J @ v[:, 0], dense @ v[:, 0])

    @pytest.mark.parametrize("batch_dim", [None, 0])
    def test_by_sparse_entries(self, batch_dim: int | None):
        lead = () if batch_dim is None else (4,)
        x = point(*lead, n=30)
        J = pf.jacobian(lambda x: x[..., 1:] ** 2 * x[..., :-1], x, batch_dim=batch_dim)
        assert J.plan.compressed is not None
        dense = J.matrix()
        v, u = torch.randn(*lead, 30, **F64), torch.randn(*lead, 29, 7, **F64)
        torch.testing.assert_close(J @ v, (dense @ v.unsqueeze(-1)).squeeze(-1))
        torch.testing.assert_close(J.T @ u, dense.mT @ u)

    def test_entries_that_are_there_need_no_tape(self, monkeypatch: pytest.MonkeyPatch):
        J = pf.plan(stencil, point(n=30))(point(n=30))
        dense, v = J.matrix(), torch.randn(30, **F64)
        monkeypatch.setattr(pf.Plan, "linearise", lambda *_: pytest.fail("a tape was made"))
        torch.testing.assert_close(J @ v, dense @ v)
        torch.testing.assert_close(J.fro_norm(), dense.norm())

    def test_as_many_vectors_as_passes_make_the_entries(self, monkeypatch: pytest.MonkeyPatch):
        plan = pf.plan(stencil, point(n=30))
        v = torch.randn(30, plan.passes, **F64)
        dense = plan(point(n=30)).matrix()
        monkeypatch.setattr(pf.Plan, "linearise", lambda *_: pytest.fail("a tape was made"))
        torch.testing.assert_close(plan(point(n=30)) @ v, dense @ v)

    def test_no_vectors(self):
        J = pf.jacobian(stencil, point(n=30))
        J.matrix()
        assert (J @ torch.zeros(30, 0, **F64)).shape == (29, 0)
        assert (J.T @ torch.zeros(29, 0, **F64)).shape == (30, 0)

    def test_large_blocks_go_in_parts(self, monkeypatch: pytest.MonkeyPatch):
        from pushforward import compressed

        J = pf.jacobian(stencil, point(n=30))
        dense, v = J.matrix(), torch.randn(30, 11, **F64)
        monkeypatch.setattr(compressed, "_TERMS", 150)
        torch.testing.assert_close(J @ v, dense @ v)

    @pytest.mark.parametrize("net", [hourglass(), nn.Conv1d(1, 1, 3, padding=1).double()])
    def test_kept_entries_do_not_hide_gradients(self, net: nn.Module):
        """What was computed without a graph is not handed to who wants one."""
        x = point() if isinstance(net, nn.Sequential) else point(1)
        J = pf.jacobian(net, x)
        with torch.no_grad():
            J.matrix(), J.fro_norm()
        v = torch.randn(J.shape[1], **F64)
        for answer in (J @ v, J.fro_norm(), J.matrix(), J.svdvals()):
            first = next(iter(net.parameters()))
            (gradient,) = torch.autograd.grad(answer.sum(), first, retain_graph=True)
            assert gradient.abs().sum() > 0

    def test_vectors_have_gradients(self):
        J = pf.jacobian(stencil, point(n=30))
        dense, v = J.matrix(), torch.randn(30, requires_grad=True, **F64)
        (gradient,) = torch.autograd.grad((J @ v).sum(), v)
        torch.testing.assert_close(gradient, dense.sum(0))

    def test_wrong_shapes(self):
        J = pf.jacobian(stencil, point(n=30))
        with pytest.raises(pf.errors.ShapeError, match=r"J @ v expects v like float64\[30\]"):
            J @ torch.zeros(29, **F64)
        with pytest.raises(pf.errors.ShapeError, match=r"J.T @ u expects u like float64\[29\]"):
            J.T @ "nothing"
        with pytest.raises(pf.errors.ShapeError, match="push expects"):
            J.push(torch.zeros(29, 2, **F64))


class TestResultsAreOnesOwn:
    """Whoever gets a result may write to it: models, plans and later answers stay as they are."""

    @pytest.mark.parametrize("plan", ["auto", "reverse", "forward"])
    def test_parameters(self, plan: str):
        layer, x = nn.Linear(4, 3).double(), point(n=4)
        before = layer.weight.detach().clone()
        with torch.no_grad():
            J = pf.jacobian(layer, x, plan=plan)
            J.matrix().zero_(), J.sparse().values().zero_(), J.dense().zero_()
            assert torch.equal(layer.weight, before)
            torch.testing.assert_close(J.matrix(), before)
            torch.testing.assert_close(pf.jacobian(layer, x, plan=plan).matrix(), before)

    def test_constants_of_a_plan(self):
        plan = pf.plan(lambda x: 2 * x.flip(0), point(n=9))
        for take in (lambda J: J.matrix(), lambda J: J.sparse().values(), lambda J: J.diagonal()):
            take(plan(point(n=9))).zero_()
            expected = 2 * torch.eye(9, **F64).flip(0)
            torch.testing.assert_close(plan(point(n=9)).matrix(), expected)

    @pytest.mark.parametrize("f", [stencil, nn.Linear(4, 3).double(), hourglass()])
    def test_later_answers(self, f: Callable[[Tensor], Tensor]):
        x = point(n=4) if isinstance(f, nn.Linear) else point(n=N)
        with torch.no_grad():
            J = pf.jacobian(f, x)
            expected = J.matrix().clone()
            J.matrix().zero_(), J.sparse().values().zero_()
            if J.shape[0] == J.shape[1]:
                J.diagonal().zero_()
            torch.testing.assert_close(J.matrix(), expected)
            torch.testing.assert_close(J.fro_norm(), expected.norm())

    def test_tensors_of_the_function_get_no_graph(self):
        a, x = torch.randn(3, 4, **F64), point(n=4).requires_grad_()
        for plan in ("auto", "forward", "reverse"):
            J = pf.jacobian(lambda x: a @ x, x, plan=plan)
            J.matrix().sum().backward()
            assert not a.requires_grad
            assert a.grad_fn is None
