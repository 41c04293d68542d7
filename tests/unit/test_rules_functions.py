"""Custom functions, views, copies and transforms inside of a function, against autograd."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from detected import detect, draw, exact, sound


class StraightThrough(torch.autograd.Function):
    """Rounds, and passes gradients on as they come."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Mixed(torch.autograd.Function):
    """Two inputs, two outputs and a mask without a derivative."""

    @staticmethod
    def forward(ctx, x, y, shift):
        mask = x > 0
        ctx.save_for_backward(x, y)
        ctx.mark_non_differentiable(mask)
        ctx.shift = shift
        return x * y.roll(shift), y.cumsum(0), mask

    @staticmethod
    def backward(ctx, first, second, _):
        x, y = ctx.saved_tensors
        left = first * y.roll(ctx.shift)
        right = (first * x).roll(-ctx.shift) + second.flip(0).cumsum(0).flip(0)
        return left, right, None


class Reversed(torch.autograd.Function):
    """A backward that says something else than the forward does."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(0)


class Silent(torch.autograd.Function):
    """No gradient at all."""

    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return None


class Opaque(torch.autograd.Function):
    """A backward that leaves torch."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return torch.from_numpy(np.flip(gradient.detach().numpy()).copy())


class Doubling(torch.autograd.Function):
    """Works on its input in place."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Clipped(torch.autograd.Function):
    """Lets gradients through where a mask, saved in the forward pass, says so."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.abs() < 1)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient * inside


CUSTOM = {
    "straight through": lambda x: StraightThrough.apply(x) * x.roll(1),
    "straight through alone": lambda x: StraightThrough.apply(x),
    "another backward": lambda x: Reversed.apply(x),
    "silent": lambda x: Silent.apply(x) + x.flip(0),
    "first of two": lambda x: Mixed.apply(x, x.exp(), 1)[0],
    "second of two": lambda x: Mixed.apply(x, x.flip(0), 1)[1],
    "both": lambda x: torch.cat(Mixed.apply(x, x.exp(), 2)[:2]),
    "in place": lambda x: Doubling.apply(x.clone()) * x.roll(1),
    "one after the other": lambda x: Reversed.apply(StraightThrough.apply(x.roll(1))),
    "on rows": lambda x: StraightThrough.apply(x.reshape(2, 2)).cumsum(1),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_functions(name):
    exact(CUSTOM[name], draw(4))


def test_masks_saved_in_a_custom_function_may_change():
    structure = sound(lambda x: Clipped.apply(3 * x), draw(4))
    assert structure.pattern.nnz == 4


def test_an_output_without_a_derivative():
    structure = sound(lambda x: x * Mixed.apply(x, x, 1)[2], draw(4))
    assert structure.pattern.nnz == 4


class Twice(torch.autograd.Function):
    """A backward of several steps without a graph."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        doubled = gradient * 2
        return doubled.flip(0) / 2


class Detached(torch.autograd.Function):
    """A backward that detaches."""

    @staticmethod
    def forward(ctx, x):
        return x.roll(1)

    @staticmethod
    def backward(ctx, gradient):
        kept = gradient.detach()
        return kept.roll(-1) + torch.zeros(4).double()


class Counting(torch.autograd.Function):
    """A backward that looks at the numbers."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full((3,), float(gradient), dtype=torch.float64)


@pytest.mark.parametrize("function", [Twice, Detached])
def test_a_backward_without_a_graph_is_followed(function):
    exact(lambda x: function.apply(x), draw(4))


@pytest.mark.parametrize("function", [Opaque, Counting])
def test_a_backward_that_leaves_torch_is_dense_and_named(function):
    structure = sound(lambda x: function.apply(x).reshape(-1), draw(3))
    assert structure.pattern.density == 1
    assert structure.dense_ops == ((f"{function.__name__}Backward", 1),)


EXITS = {
    "numpy": lambda x: torch.from_numpy(x.detach().numpy() > 0),
    "an array": lambda x: torch.from_numpy(np.asarray(x.detach()) > 0),
    "a list": lambda x: torch.tensor([v > 0 for v in x.tolist()]),
    "an item": lambda x: torch.tensor([x[0].item() > 0, True, False]),
}


@pytest.mark.parametrize("name", EXITS)
def test_masks_made_outside_of_torch_hold_at_this_point(name):
    exact(lambda x: x[EXITS[name](x)], draw(3), at_point=True)


def test_constants_made_outside_of_torch_are_structure():
    exact(lambda x: x[torch.from_numpy(CONSTANT.numpy()[0] > 0)], draw(4))


def _data_written(x):
    y = 2 * x
    y.data.clamp_(-1, 1)
    return y


def _written_without_gradients(x):
    y = 2 * x
    with torch.no_grad():
        y.copy_(x.flip(0))
    return y


def _written_through_detach(x):
    y = 2 * x
    y.detach().zero_()
    return y + 0


def _view_of_a_view(x):
    y = x.clone().reshape(2, 3)
    y[:, 1:][0].mul_(x[0])
    y.t()[2] += x[3:5].exp()
    return y


def _swapped(x):
    y = x.clone()
    y[0], y[1] = x[1] * 2, x[0] * 3
    return y


def _filled(x):
    y = torch.empty(2, 6, dtype=x.dtype)
    y[0] = x
    y[1] = x.cumsum(0)
    return y


def _doubled_diagonal(x):
    y = torch.zeros(6, 6, dtype=x.dtype)
    y.diagonal().copy_(x)
    y.fill_diagonal_(1.0).triu_()
    return y @ x


def _transposed_in_place(x):
    y = x.reshape(2, 3).clone()
    y.t_()
    y[0] = 0
    return y


def _expanded(x):
    return (x[:, None].expand(6, 2) * torch.tensor([1.0, 0.0]).double()).contiguous()


PIECES = {
    "views of views": _view_of_a_view,
    "swapped": _swapped,
    "filled": _filled,
    "a diagonal": _doubled_diagonal,
    "transposed in place": _transposed_in_place,
    "expanded": _expanded,
    "detached": lambda x: x * x.flip(0).detach(),
    "no_grad": lambda x: x + _constant(x),
    "unbound": lambda x: torch.stack([a * b for a, b in zip(x, x.flip(0), strict=True)][:2]),
    "chunks": lambda x: torch.cat([c.cumsum(0) for c in x.chunk(3)]),
    "written without gradients": _written_without_gradients,
    "data": _data_written,
    "written through detach": _written_through_detach,
}


def _constant(x):
    with torch.no_grad():
        return x.flip(0).exp()


@pytest.mark.parametrize("name", PIECES)
def test_views_and_copies(name):
    exact(PIECES[name], draw(6))


CHECKPOINTED = {
    "plain": lambda x: checkpoint(lambda y: y.cumsum(0).tanh(), x, use_reentrant=False),
    "two": lambda x: checkpoint(torch.mul, x, x.flip(0), use_reentrant=False),
    "a module": lambda x: checkpoint(TIED, x[None], use_reentrant=False)[0],
}


class _Tied(nn.Module):
    """One layer used twice, the second time transposed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.float64)
        self.again = self.first
        self.register_buffer("mask", torch.eye(4, dtype=torch.float64))

    def forward(self, x):
        hidden = nn.functional.linear(x, self.first.weight * self.mask)
        return hidden + nn.functional.linear(hidden.tanh(), self.again.weight.T * self.mask)


TIED = _Tied()


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoints(name):
    exact(CHECKPOINTED[name], draw(4))


def test_tied_modules():
    structure = exact(TIED, draw(2, 4))
    assert structure.pattern.nnz == 8
    weight = torch.nn.functional.linear
    exact(lambda w: weight(weight(CONSTANT[:1, :3], w), w.T), draw(2, 3))


CONSTANT = draw(4, 4, seed=9)
TRANSFORMS = {
    "gradient": lambda x: torch.func.grad(lambda y: (y[1:] * y[:-1]).sin().sum())(x),
    "gradient of a convolution": lambda x: torch.func.grad(
        lambda y: nn.functional.conv1d(y[None, None], CONSTANT[None, :1, :2]).pow(3).sum()
    )(x),
    "vmap": lambda x: torch.func.vmap(lambda row: row.cumsum(0))(x.reshape(2, 2)),
    "vmap of a product": lambda x: torch.func.vmap(lambda r: CONSTANT[:2, :2] @ r)(x.reshape(2, 2)),
    "vmap of a gradient": lambda x: torch.func.vmap(torch.func.grad(lambda y: y.pow(3)))(x),
    "vjp": lambda x: torch.func.vjp(lambda y: y.roll(1).exp(), x)[1](torch.ones(4).double())[0],
    "jvp": lambda x: torch.func.jvp(lambda y: y.roll(1).exp(), (x,), (torch.ones(4).double(),))[1],
    "autograd.grad": lambda x: torch.autograd.grad(
        (x[1:] * x[:-1]).exp().sum(), x, create_graph=True
    )[0],
    "functional_call": lambda x: torch.func.functional_call(TIED, {}, (x[None],)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_transforms_inside(name):
    exact(TRANSFORMS[name], draw(4))


def _parts_scaled(x):
    z = torch.view_as_complex(x.reshape(3, 2))
    parts = torch.view_as_real(z).clone()
    parts[:, 0] *= x[0]
    return parts


def _written_into_parts(x):
    z = torch.complex(x[:3], x[3:])
    parts = torch.view_as_real(z)
    parts[:, 1] = 0
    return z.abs()


COMPLEX = {
    "there and back": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(3, 2))),
    "parts scaled": _parts_scaled,
    "a product": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(3, 2)) * (1 + 2j)),
    "a modulus": lambda x: torch.complex(x[:3], x[3:]).abs(),
    "conjugate and modulus": lambda x: torch.complex(x[:3], x[3:]).conj().abs(),
    "real part of a view": lambda x: torch.view_as_complex(x.reshape(3, 2)).real,
    "imaginary part of a view": lambda x: torch.view_as_complex(x.reshape(3, 2)).imag,
    "polar": lambda x: torch.polar(x[:3].exp(), x[3:]).square().abs() + x[:3],
}
UNSPLIT = {
    "real part": lambda x: torch.complex(x[:3], x[3:]).real,
    "conjugate": lambda x: torch.view_as_real(torch.complex(x[:3], x[3:]).conj().resolve_conj()),
    "written into": _written_into_parts,
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name):
    exact(COMPLEX[name], draw(6))


@pytest.mark.parametrize("name", UNSPLIT)
def test_complex_numbers_that_are_computed_share_a_set(name):
    """Both parts of a complex number that is computed hold what either depends on."""
    structure = sound(UNSPLIT[name], draw(6))
    assert structure.pattern.nnz <= 12


def test_lists_of_tensors_changed_in_place():
    def stepped(x):
        rows = [2 * row for row in x]
        torch._foreach_add_(rows, [row.exp() for row in x.flip(0)])
        return torch.stack(rows)

    sound(stepped, draw(2, 3))


def test_running_statistics_are_no_constants():
    norm = nn.BatchNorm1d(2, affine=False, dtype=torch.float64)

    def f(x):
        return norm(x) * 0 + norm.running_mean * x

    structure = detect(f, draw(3, 2))
    assert structure.guards.constants == {} or all(
        c is not norm.running_mean for c in structure.guards.constants.values()
    )
    sound(f, draw(3, 2))


def test_results_written_to_a_buffer_without_gradients():
    buffer = torch.zeros(3, dtype=torch.float64)

    def f(x):
        with torch.no_grad():
            torch.mul(x, 2, out=buffer)
        return x * buffer

    assert detect(f, draw(3)).pattern.nnz == 3
