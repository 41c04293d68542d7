"""Maps with ways of their own, at one point after the other, on plans that are used again.

Custom functions, hooks, transforms inside, layers with state, writes through views: each is
compared with the row loop at every point, with gradients on and off.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import pushforward as pf
from oracles import as_real, loop_jacobian
from zoo_families.case import module, randn

F64 = {"dtype": torch.float64}
Map = Callable[[Tensor], Tensor]


class Scaled(torch.autograd.Function):
    """Keeps a plain number beside tensors."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(x)
        return x**2 * factor

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * 2 * x * ctx.factor, None


class Branching(torch.autograd.Function):
    """A backward that looks at what was saved."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 * x if x.sum() > 0 else gradient * 3 * x


class Straight(torch.autograd.Function):
    """Rounds, and passes gradients through."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Rolled(torch.autograd.Function):
    """Its backward moves what its forward leaves in place: what it says is what counts."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.roll(1, -1)


def hooked(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 2)
    return y.roll(1, 1) * x


def clipped(x: Tensor) -> Tensor:
    """Backward is not linear: rows of the identity are what is meant."""
    y = x * 1
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.clamp(-0.5, 0.5))
    return y * 2


def blanked(x: Tensor) -> Tensor:
    y = x * 2
    y[x[:, 0] > 0, :2] = 0.0
    return y


def lengths(x: Tensor) -> Tensor:
    return torch.stack([x[i, int(x[i].argmax()) :].sum() for i in range(len(x))])


def updated(x: Tensor) -> Tensor:
    """Writes through views of views, and reads before and after."""
    y = x.clone()
    top, before = y.view(-1)[:8].view(2, 4), y.sum(0)
    top.mul_(2)
    y[1:].add_(top.reshape(-1)[:6])
    return y * before


LSTM = module(lambda: nn.LSTM(6, 3, batch_first=True))
CELL = module(lambda: nn.GRUCell(6, 3))
ATTENTION = module(lambda: nn.MultiheadAttention(6, 2, batch_first=True))
ENCODER = module(lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0))
WEIGHT = module(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
SPECTRAL = module(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))).eval()
BAG = module(lambda: nn.EmbeddingBag(10, 6, mode="sum"))
CAUSAL = torch.ones(4, 4).triu(1).bool()
DOUBLED = {name: 2 * tensor.detach() for name, tensor in WEIGHT.state_dict().items()}
IMAGE = randn(6, 6, seed=3)

MAPS: dict[str, Map] = {
    "custom, with a number": lambda x: Scaled.apply(x, 2.0).roll(1, 1),
    "custom, that branches": Branching.apply,
    "custom, straight through": lambda x: Straight.apply(x) * x,
    "custom, with another pattern backwards": lambda x: Rolled.apply(x).sin(),
    "checkpoint": lambda x: checkpoint(lambda z: z.sin() * z.roll(1), x, use_reentrant=False),
    "vmap inside": lambda x: vmap(lambda row: row.sin() * row.sum())(x),
    "grad inside": lambda x: vmap(grad(lambda row: (row**3).sum() * row[0]))(x),
    "jacrev inside": lambda x: jacrev(lambda row: row**2)(x[0]).sum(0) * x,
    "a Jacobian inside": lambda x: pf.jacobian(lambda r: r**2 * r.roll(1), x[0]).dense().sum(0) * x,
    "functional_call": lambda x: functional_call(WEIGHT, DOUBLED, (x,)),
    "weight_norm": WEIGHT,
    "spectral_norm": SPECTRAL,
    "LSTM": lambda x: LSTM(x[None])[0][0],
    "GRU cell": CELL,
    "attention": lambda x: ATTENTION(x[None], x[None], x[None])[0][0],
    "causal attention": lambda x: ATTENTION(*[x[None]] * 3, attn_mask=CAUSAL, need_weights=False)[
        0
    ][0],
    "transformer": lambda x: ENCODER(x[None])[0],
    "embedding bag": lambda x: BAG(
        torch.arange(6).view(2, 3), per_sample_weights=x[:2, :3].contiguous()
    ),
    "a hook on gradients": hooked,
    "a hook that clips": clipped,
    "written to by mask": blanked,
    "written to through views": updated,
    "loops of lengths from values": lengths,
    "sorted and gathered": lambda x: x.gather(1, x.argsort(1)).cumsum(1),
    "the largest two": lambda x: x.topk(2, 1)[0] * x[:, :2],
    "scattered": lambda x: torch.zeros(4, 6, **F64).scatter(1, x.mul(3).long().abs() % 6, x**2),
    "scattered and added": lambda x: torch.zeros(4, 6, **F64).scatter_add(1, x.argsort(1), x**2),
    "buckets": lambda x: x * torch.bucketize(x.detach(), torch.linspace(-1, 1, 4, **F64)),
    "gumbel": lambda x: functional.one_hot(x.argmax(1), 6) + (s := x.softmax(1)) - s.detach(),
    "sampled": lambda x: functional.grid_sample(
        IMAGE[None, None], torch.tanh(x[:, :4].reshape(1, 2, 4, 2)), align_corners=True
    )[0, 0],
    "solved": lambda x: torch.linalg.solve(
        IMAGE @ IMAGE.T + torch.eye(6, **F64) * (1 + x[0] ** 2), x.T
    ),
    "batch norm": lambda x: functional.batch_norm(x, None, None, training=True),
    "under no_grad in part": lambda x: x * torch.no_grad()(torch.sin)(x),
}


def points() -> list[Tensor]:
    x = randn(4, 6)
    return [x, -x, 2 * x.flip(0), x.abs(), x]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.filterwarnings("ignore:.*nested_tensor")
def test_right_at_each_point(name: str):
    f = MAPS[name]
    plan = pf.plan(f, randn(4, 6, seed=7))
    for x in points():
        expected = loop_jacobian(f, x)
        for J in (pf.jacobian(f, x), plan(x)):
            torch.testing.assert_close(J.dense().detach(), expected, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            found = pf.jacobian(f, x)
            torch.testing.assert_close(found.dense(), expected, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(found.value, f(x))


def test_conjugates_that_are_no_copies():
    """Complex points that carry a flag instead of other numbers."""

    def f(z: Tensor) -> Tensor:
        return (z * z.conj()).roll(1) * z

    z = torch.complex(randn(4), randn(4, seed=1))
    for point in (z, z.conj(), (-z).conj(), z.imag + 0j * z):
        plain = torch.view_as_real(point.resolve_conj().resolve_neg().clone())
        expected = loop_jacobian(as_real(f), plain).reshape(8, 8)
        torch.testing.assert_close(pf.jacobian(f, point).matrix(), expected)


def test_trees_in_another_order():
    def f(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"u": tree["a"] * tree["b"].sum(), "v": tree["b"].roll(1) ** 2}

    a, b = randn(3), randn(4, seed=1)
    first, second = (
        pf.jacobian(f, {"a": a, "b": b}).dense(),
        pf.jacobian(f, {"b": b, "a": a}).dense(),
    )
    for out in ("u", "v"):
        for name in ("a", "b"):
            torch.testing.assert_close(first[out][name], second[out][name])
    torch.testing.assert_close(first["u"]["a"], b.sum() * torch.eye(3, **F64))


def test_a_function_that_counts_its_calls():
    """Each Jacobian is that of one of the calls."""

    class Counting:
        calls = 0

        def __call__(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x**2 * self.calls

    f, x = Counting(), randn(6)
    for _ in range(4):
        before = f.calls
        factor = pf.jacobian(f, x).dense().diagonal() / (2 * x)
        torch.testing.assert_close(factor, factor[:1].expand(6))
        assert before < float(factor[0]) <= f.calls


INFERRED: dict[str, Map] = {
    "sparse": lambda x: x.roll(1) * x,
    "constant": lambda x: 2 * x.flip(0) + 0.5 * x,
    "sparse, with constants": lambda x: (x * torch.arange(5.0, **F64)).sin() + torch.ones(5, **F64),
    "dense": lambda x: x.cumsum(0).sin(),
    "arrow": lambda x: torch.cat([x.square().sum()[None], x[1:].sin() * x[:1]]),
}


@pytest.mark.parametrize("name", INFERRED)
def test_plans_made_in_inference_mode_train_later(name: str):
    f = INFERRED[name]
    with torch.inference_mode():
        x = randn(5)
        J = pf.jacobian(f, x)
        found, diagonal, product = J.dense(), J.diagonal(), J @ x
    leaf, other = randn(5).requires_grad_(), randn(5).requires_grad_()
    expected = loop_jacobian(f, other, create_graph=True)
    torch.testing.assert_close(found.clone(), expected.detach())
    torch.testing.assert_close(diagonal.clone(), expected.detach().diagonal())
    torch.testing.assert_close(product.clone(), expected.detach() @ other.detach())
    for _ in range(2):
        J = pf.jacobian(f, leaf)
        assert J.sparse().shape == (5, 5)
        if name == "constant":
            continue
        loss = J.dense().square().sum() + J.diagonal().sum() + (J @ leaf.detach()).sum()
        (actual,) = torch.autograd.grad(loss, leaf)
        theirs = (
            expected.square().sum() + expected.diagonal().sum() + (expected @ other.detach()).sum()
        )
        (wanted,) = torch.autograd.grad(theirs, other, retain_graph=True)
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-10)
