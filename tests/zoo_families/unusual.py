"""Maps that trip tools up: custom backwards, detach, in-place writes, branches, noise, complex."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo_families.case import Problem, block_diagonal, case, module, of_module, randn


class StraightThrough(torch.autograd.Function):
    """Rounds, and passes gradients on as if it had not."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.clone()


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is halved; written the old way, with ctx in forward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else 0.5 * gradient


class SavedSquare(torch.autograd.Function):
    """x^2 with its input saved, written the old way."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Opaque(torch.autograd.Function):
    """3x, with a backward that autograd cannot see into."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.from_numpy(3 * gradient.detach().double().numpy()).to(gradient.dtype)


@case("opaque_backward", "batched", "square", "symmetric")
def opaque_backward() -> Problem:
    """Its J^T u has no graph, so that J v cannot come from differentiating it once more."""
    return Problem(
        Opaque.apply, (randn(3, 4),), jacobian=lambda: 3 * torch.eye(12, dtype=torch.float64)
    )


@case("straight_through", "batched", "square", "symmetric", "surrogate")
def straight_through() -> Problem:
    x = randn(3, 4)
    return Problem(
        lambda x: StraightThrough.apply(2 * x),
        (x,),
        jacobian=lambda: 2 * torch.eye(12, dtype=torch.float64),
        pattern=lambda: np.eye(12, dtype=bool),
    )


@case("straight_through_by_detach", "batched", "square", "symmetric", "surrogate")
def straight_through_by_detach() -> Problem:
    x = randn(3, 4)
    return Problem(
        lambda x: x + (x.round() - x).detach(),
        (x,),
        jacobian=lambda: torch.eye(12, dtype=torch.float64),
    )


@case("old_style_function", "batched", "square", "symmetric", "surrogate")
def old_style_function() -> Problem:
    return Problem(
        ScaledGradient.apply,
        (randn(3, 4),),
        jacobian=lambda: 0.5 * torch.eye(12, dtype=torch.float64),
    )


@case("old_style_saved", "batched", "square", "symmetric")
def old_style_saved() -> Problem:
    x = randn(3, 4)
    return Problem(SavedSquare.apply, (x,), jacobian=lambda: torch.diag(2 * x.reshape(-1)))


@case("detached_factor", "batched", "square", "symmetric", "surrogate")
def detached_factor() -> Problem:
    x = randn(3, 4)
    return Problem(lambda x: x * x.detach(), (x,), jacobian=lambda: torch.diag(x.reshape(-1)))


@case("detached_whole", "batched", "square", "symmetric", "surrogate")
def detached_whole() -> Problem:
    return Problem(
        lambda x: x.sin().detach(),
        (randn(3, 4),),
        jacobian=lambda: torch.zeros(12, 12, dtype=torch.float64),
        pattern=lambda: np.zeros((12, 12), dtype=bool),
    )


@case("constant_output", "surrogate")
def constant_output() -> Problem:
    y = randn(3, seed=2)
    return Problem(
        lambda x: y, (randn(4),), jacobian=lambda: torch.zeros(3, 4, dtype=torch.float64)
    )


@case("straight_through_network", "batched", "surrogate", "network")
def straight_through_network() -> Problem:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(StraightThrough.apply(4 * torch.tanh(self.first(x))) / 4)

    return of_module(Quantised, randn(3, 4))


@case("in_place", "batched", "square")
def in_place() -> Problem:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y[:, 1:] *= y[:, :-1].clone()
        y.view(-1).mul_(2)
        y[:, 0] = x[:, 3] ** 2
        return y

    def reference(x: Tensor) -> Tensor:
        tail = 2 * x[:, 1:].sin() * x[:, :-1].sin()
        return torch.cat([x[:, 3:] ** 2, tail], dim=1)

    return Problem(f, (randn(3, 4),), reference=reference)


@case("in_place_on_the_input", "batched", "square", "symmetric")
def in_place_on_the_input() -> Problem:
    x = randn(3, 4)
    return Problem(
        lambda x: x.mul_(2).sin(),
        (x,),
        jacobian=lambda: torch.diag(2 * torch.cos(2 * x.reshape(-1))),
        reference=lambda x: torch.sin(2 * x),
    )


@case("branch", "square", "symmetric")
def branch() -> Problem:
    x = randn(4)
    return Problem(
        lambda x: x**2 if x.sum() > 0 else x.sin(),
        (x,),
        jacobian=lambda: torch.diag(2 * x if x.sum() > 0 else x.cos()),
    )


@case("loop_until_small", "square", "symmetric")
def loop_until_small() -> Problem:
    def f(x: Tensor) -> Tensor:
        while x.norm().item() > 0.5:
            x = x / 2
        return x

    x = torch.full((4,), 1.6, dtype=torch.float64)
    return Problem(f, (x,), jacobian=lambda: torch.eye(4, dtype=torch.float64) / 8)


@case("dropout_train", "batched", "square", "symmetric", "random")
def dropout_train() -> Problem:
    net = nn.Dropout(0.5).train()
    return Problem(net, (randn(3, 4).abs() + 0.1,))


@case("dropout_network", "batched", "random", "network")
def dropout_network() -> Problem:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3))

    return of_module(build, randn(3, 4), train=True)


@case("dropout_eval", "batched", "network")
def dropout_eval() -> Problem:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3))

    return of_module(build, randn(3, 4))


@case("spectral_norm", "network")
def spectral_norm() -> Problem:
    """In training mode each call runs a step of power iteration, which writes buffers."""
    net = module(lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)))
    return Problem(net.eval(), (randn(4),), parameters=tuple(net.parameters()))


@case("complex_square", "complex", "square")
def complex_square() -> Problem:
    return Problem(lambda z: z * z, (randn(3, dtype=torch.complex128),))


@case("complex_conjugate", "complex", "square")
def complex_conjugate() -> Problem:
    return Problem(lambda z: z.conj() * z[0], (randn(3, dtype=torch.complex128),))


@case("complex_to_real", "complex")
def complex_to_real() -> Problem:
    return Problem(lambda z: z.abs() ** 2, (randn(3, dtype=torch.complex128),))


@case("complex_batched", "complex", "batched", "square")
def complex_batched() -> Problem:
    w = randn(3, 3, seed=1, dtype=torch.complex128)
    return Problem(lambda z: torch.sin(z @ w), (randn(2, 3, dtype=torch.complex128),))


@case("complex_inside", "batched", "square")
def complex_inside() -> Problem:
    """Real in, real out, complex between: a circular convolution by Fourier transforms."""
    kernel = randn(5, seed=3)

    def circulant() -> Tensor:
        return torch.stack([kernel.roll(k) for k in range(5)], dim=1)

    return Problem(
        lambda x: torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(kernel)).real,
        (randn(2, 5),),
        jacobian=lambda: block_diagonal(circulant().expand(2, 5, 5)),
    )


@case("cross_entropy_closure")
def cross_entropy_closure() -> Problem:
    labels, x = torch.tensor([1, 0, 2]), randn(3, 4)
    onehot = functional.one_hot(labels, 4)
    return Problem(
        lambda x: functional.cross_entropy(x, labels, reduction="none"),
        (x,),
        jacobian=lambda: block_diagonal((torch.softmax(x, -1) - onehot)[:, None, :]),
    )


@case("batch_mean_removed", "coupled", "square", "symmetric")
def batch_mean_removed() -> Problem:
    centring = torch.eye(3, dtype=torch.float64) - 1 / 3
    return Problem(
        lambda x: x - x.mean(0),
        (randn(3, 4),),
        jacobian=lambda: torch.kron(centring, torch.eye(4, dtype=torch.float64)),
    )


@case("batch_reversed", "coupled", "square", "symmetric")
def batch_reversed() -> Problem:
    """Every sample goes to another's place: as many entries, none of them at home."""
    swap = torch.eye(3, dtype=torch.float64).flip(0)
    return Problem(
        lambda x: x.flip(0),
        (randn(3, 4),),
        jacobian=lambda: torch.kron(swap, torch.eye(4, dtype=torch.float64)),
    )
