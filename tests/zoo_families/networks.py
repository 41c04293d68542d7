"""Networks people train: perceptrons, convolutional, residual, recurrent, attention."""

import itertools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo_families.case import Problem, case, module, of_module, randn


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers = [
        layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), activation())
    ]
    return nn.Sequential(*layers[:-1])


@case("mlp_tanh", "batched", "network")
def mlp_tanh() -> Problem:
    net, x = module(lambda: mlp(4, 7, 3)), randn(3, 4)

    def jacobian() -> Tensor:
        with torch.no_grad():
            slope = torch.diag_embed(1 - torch.tanh(net[0](x)) ** 2)
            return torch.block_diag(*(net[2].weight @ slope @ net[0].weight))

    return Problem(net, (x,), jacobian=jacobian, parameters=tuple(net.parameters()))


@case("mlp_relu", "batched", "network")
def mlp_relu() -> Problem:
    return of_module(lambda: mlp(4, 9, 8, 3, activation=nn.ReLU), randn(3, 4))


@case("mlp_scalar", "batched", "network")
def mlp_scalar() -> Problem:
    return of_module(lambda: mlp(4, 7, 1), randn(3, 4))


class Residual(nn.Module):
    """x + g(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp(4, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@case("residual", "batched", "square", "network")
def residual() -> Problem:
    return of_module(Residual, randn(3, 4))


def lenet() -> nn.Sequential:
    """Two convolutions with pooling and two linear layers, for 1 x 14 x 14 images."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    )


@case("lenet", "batched", "network")
def lenet_case() -> Problem:
    return of_module(lenet, randn(2, 1, 14, 14))


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm round a skip, as in residual networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        h = self.norm2(self.conv2(h))
        h += x
        return functional.relu(h)


@case("residual_block", "batched", "square", "network")
def residual_block() -> Problem:
    return of_module(ResidualBlock, randn(2, 2, 3, 4))


class LastOutput(nn.Module):
    """All outputs of a recurrent layer, without its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def _causal(steps: int, outputs: int, inputs: int) -> np.ndarray:
    return np.kron(np.tril(np.ones((steps, steps))), np.ones((outputs, inputs)))


@case("lstm", "batched", "network")
def lstm() -> Problem:
    net = module(lambda: LastOutput(nn.LSTM(4, 5, batch_first=True)))
    return Problem(
        net,
        (randn(2, 3, 4),),
        pattern=lambda: np.kron(np.eye(2), _causal(3, 5, 4)) != 0,
        parameters=tuple(net.parameters()),
    )


@case("gru", "batched", "network")
def gru() -> Problem:
    net = module(lambda: LastOutput(nn.GRU(4, 5, batch_first=True)))
    return Problem(
        net,
        (randn(2, 3, 4),),
        pattern=lambda: np.kron(np.eye(2), _causal(3, 5, 4)) != 0,
        parameters=tuple(net.parameters()),
    )


@case("rnn_cell_loop", "batched", "network")
def rnn_cell_loop() -> Problem:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNNCell(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(len(x), 5)
            for step in x.unbind(1):
                state = self.cell(step, state)
            return state

    return of_module(Loop, randn(2, 3, 4))


def explicit_attention(x: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention of x with itself, out of simple operations."""
    scores = x @ x.mT / x.shape[-1] ** 0.5
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    return torch.softmax(scores, -1) @ x


@case("attention", "batched", "square")
def attention() -> Problem:
    return Problem(
        lambda x: functional.scaled_dot_product_attention(x, x, x),
        (randn(2, 1, 3, 4),),
        reference=lambda x: explicit_attention(x, causal=False),
    )


@case("attention_causal", "batched", "square")
def attention_causal() -> Problem:
    return Problem(
        lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True),
        (randn(2, 1, 3, 4),),
        pattern=lambda: _causal_attention_pattern(),
        reference=lambda x: explicit_attention(x, causal=True),
    )


def _causal_attention_pattern() -> np.ndarray:
    """The first step attends to itself alone, so that it is copied: the identity."""
    block = _causal(3, 4, 4)
    block[:4, :4] = np.eye(4)
    return np.kron(np.eye(2), block) != 0


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a layer norm and beside a skip."""

    def __init__(self, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width, 2 * width, width, activation=nn.GELU)
        self.explicit = False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(*self.mix(self.norm1(x)).chunk(3, dim=-1)))
        return x + self.mlp(self.norm2(x))

    def attend(self, *qkv: Tensor) -> Tensor:
        """(B, T, width) out of queries, keys and values."""
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in qkv)
        if self.explicit:
            mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(2)

    def reference(self, x: Tensor) -> Tensor:
        """The same with the attention written out."""
        self.explicit = True
        try:
            return self(x)
        finally:
            self.explicit = False


@case("transformer_block", "batched", "square", "network")
def transformer_block() -> Problem:
    net = module(TransformerBlock)
    return Problem(
        net,
        (randn(2, 3, 6),),
        reference=net.reference,
        parameters=tuple(net.parameters()),
    )


@case("encoder_layer", "batched", "square", "network")
def encoder_layer() -> Problem:
    """PyTorch's own layer, which takes a fused path where no gradient is asked for."""
    problem = of_module(
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), randn(2, 3, 6)
    )

    def reference(x: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return problem.f(x)

    return Problem(problem.f, problem.args, reference=reference, parameters=problem.parameters)
