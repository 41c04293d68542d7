"""Trap 6: vmap over a user's code fails on ordinary code, and ``torch.func`` refuses more.

On this build vmap refuses in-place writes, branches on data, ``.item()``, recurrent layers and
batch norm in training; jacrev and jacfwd refuse batch norm in training, complex inputs and outputs,
integer leaves and dataclasses; jacfwd has no chunk size.
"""

import inspect
from dataclasses import dataclass

import pytest
import torch
from pins import forward_mode, normal, pinned, pinned_raise
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vmap

import pushforward as pf
from oracles import loop_jacobian

pytestmark = forward_mode
REVISIT = "pushforward.passes, which runs vmap over recorded graphs alone"


@dataclass
class Pair:
    """Two tensors, unknown to torch's pytrees."""

    a: Tensor
    b: Tensor


def writes(x: Tensor) -> Tensor:
    y = torch.zeros_like(x[..., :1]).expand(x.shape).clone()
    buffer = torch.zeros(4, dtype=x.dtype)
    buffer[0] = x.flatten()[0]
    return y + buffer.sum() * x


def branches(x: Tensor) -> Tensor:
    return x.sin() if x.sum() > 0 else x**2


def reads_a_number(x: Tensor) -> Tensor:
    return x * x.max().item()


CODE = {
    "in_place": (writes, "inplace arithmetic"),
    "branch": (branches, "data-dependent control flow"),
    "item": (reads_a_number, "item"),
}
LAYERS = {
    "gru": lambda: nn.GRU(4, 5, batch_first=True),
    "lstm": lambda: nn.LSTM(4, 5, batch_first=True),
}


@pytest.mark.parametrize("name", CODE)
def test_vmap_refuses_ordinary_code(name: str):
    f, message = CODE[name]
    with pinned_raise(message, f"vmap refusing {name}", REVISIT):
        vmap(f)(normal(3, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_refuses_recurrent_layers(name: str):
    layer = LAYERS[name]().double()
    with pinned_raise("Batching rule not implemented", f"vmap refusing {name}", REVISIT):
        vmap(lambda x: layer(x[None])[0])(normal(2, 3, 4))


def test_batch_norm_in_training_is_refused():
    net = nn.BatchNorm1d(4).double()
    with pinned_raise("running_mean", "vmap refusing batch norm", REVISIT):
        vmap(net)(normal(2, 3, 4))
    for jacobian in (jacrev, jacfwd):
        with pinned_raise("mutate a captured Tensor", "torch.func refusing batch norm", REVISIT):
            jacobian(net)(normal(3, 4))


def test_torch_func_refuses_complex_numbers_and_dataclasses():
    z, x = normal(3, dtype=torch.complex128), normal(3)
    with pinned_raise("to be real", "jacrev refusing complex inputs", REVISIT):
        jacrev(lambda z: z * z)(z)
    with pinned_raise("to be real", "jacrev refusing complex outputs", REVISIT):
        jacrev(lambda x: torch.complex(x, x))(x)
    with pinned_raise("must be Tensor", "jacrev refusing dataclasses", REVISIT, ValueError):
        jacrev(lambda pair: pair.a * pair.b)(Pair(x, x))
    with pinned_raise("floating point dtype", "jacrev refusing integer leaves", REVISIT):
        jacrev(lambda d: d["x"] * d["i"])({"x": x, "i": torch.arange(3)})


def test_jacfwd_has_no_chunk_size():
    pinned("chunk_size" in inspect.signature(jacrev).parameters, "jacrev in chunks", REVISIT)
    pinned("chunk_size" not in inspect.signature(jacfwd).parameters, "jacfwd whole", REVISIT)


@pytest.mark.parametrize("name", CODE)
def test_the_library_takes_ordinary_code(name: str):
    f, _ = CODE[name]
    x = normal(3, 4)
    torch.testing.assert_close(pf.jacobian(f, x).dense(), loop_jacobian(f, x))


@pytest.mark.parametrize("name", LAYERS)
def test_the_library_takes_recurrent_layers(name: str):
    layer, x = LAYERS[name]().double(), normal(2, 3, 4)

    def f(x: Tensor) -> Tensor:
        return layer(x)[0]

    torch.testing.assert_close(pf.jacobian(f, x).dense().detach(), loop_jacobian(f, x))


def test_the_library_takes_batch_norm_complex_numbers_and_dataclasses():
    x = normal(3)
    net, point = nn.BatchNorm1d(4).double(), normal(3, 4)
    torch.testing.assert_close(
        pf.jacobian(net, point).dense().detach(),
        loop_jacobian(nn.BatchNorm1d(4).double(), point).detach(),
    )
    pair = pf.jacobian(lambda pair: Pair(pair.a * pair.b, pair.a), Pair(x, 2 * x)).dense()
    torch.testing.assert_close(pair.a.a, torch.diag(2 * x))
    torch.testing.assert_close(pair.a.b, torch.diag(x))
    assert not pair.b.b.any()
    mixed = pf.jacobian(lambda d: d["x"] * d["i"], {"x": x, "i": torch.arange(3)}).dense()
    torch.testing.assert_close(mixed["x"], torch.diag(torch.arange(3).double()))
    assert mixed["i"] is None


def test_complex_jacobians_are_real_blocks():
    """d(z^2)/dz = 2z is the 2 x 2 block of multiplication by 2z."""
    z = torch.tensor([1.5 - 0.5j, -0.3 + 2j], dtype=torch.complex128)
    J = pf.jacobian(lambda z: z * z, z)
    assert J.shape == (4, 4)
    blocks = [torch.tensor([[w.real, -w.imag], [w.imag, w.real]]) for w in (2 * z).tolist()]
    expected = torch.block_diag(*blocks).double()
    torch.testing.assert_close(J.matrix(), expected)


def test_forward_passes_come_in_chunks():
    x = normal(6)
    tall = normal(400, 6, seed=1)
    plain = pf.jacobian(lambda x: torch.tanh(tall @ x), x, plan="forward")
    held = 400 * 6 * 8
    chunked = pf.jacobian(lambda x: torch.tanh(tall @ x), x, plan="forward", memory=4 * held)
    assert chunked.plan.jvps == plain.plan.jvps == 6
    torch.testing.assert_close(chunked.matrix(), plain.matrix())
