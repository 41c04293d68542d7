"""Networks of the kinds that are met: residual, concatenating, gated, attending, with tied layers.

They are built under a fixed seed, in float64 and evaluation mode unless a test says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

F = nn.functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, "Deep Residual Learning")."""

    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(leaving)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(leaving)
        self.act = nn.ReLU(inplace=True)
        same = stride == 1 and entering == leaving
        project = nn.Conv2d(entering, leaving, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(project, nn.BatchNorm2d(leaving))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(inner + self.shortcut(x))


def resnet20(width: int = 16, outputs: int = 10) -> nn.Sequential:
    """The ResNet-20 of the same paper, for 32 x 32 images of three channels."""
    blocks, entering = [], width
    for stage in range(3):
        for number in range(3):
            leaving = width * 2**stage
            blocks.append(BasicBlock(entering, leaving, 2 if stage and not number else 1))
            entering = leaving
    stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(entering, outputs))
    return nn.Sequential(stem, *blocks, head)


class VitBlock(nn.Module):
    """Attention and a perceptron, each behind a layer norm and around a shortcut."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class RmsBlock(nn.Module):
    """A gated perceptron behind a norm by the root mean square, as in language models."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.gate, self.up = (
            nn.Linear(width, inner, bias=False),
            nn.Linear(width, inner, bias=False),
        )
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class DenseBlock(nn.Module):
    """Each layer sees all before it (Huang et al. 2017)."""

    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width + growth * number, growth) for number in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.tanh(layer(x))], dim=-1)
        return x


class SqueezeExcite(nn.Module):
    """Channels scaled by gates that see the mean of all of them: a product that is broadcast."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * torch.sigmoid(self.gate(y.mean(dim=(2, 3))))[:, :, None, None]


class Heads(nn.Module):
    """A body of which a tuple of a dict and a tensor comes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(width, width)
        self.left, self.right = nn.Linear(width, 2), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        h = torch.relu(self.body(x))
        return {"left": self.left(h)}, self.right(h)


class Tied(nn.Module):
    """One layer, called again and again, with a skip around every second call."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(width, width), times

    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.times):
            y = torch.tanh(self.layer(x))
            x = x + y if number % 2 else y
        return x


class Fixed(nn.Module):
    """Attention whose pattern does not depend on the input."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(positions, positions))
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores.softmax(-1) @ self.value(x)


class Functional(nn.Module):
    """Functions alone between two layers: windows, powers, differences, a norm, a maximum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.inner(x)) ** 2
        h = torch.where(h > 0.5, h, -h) - h.flip(-1).cumsum(-1) / 3
        h = F.normalize(h, dim=-1) * torch.maximum(h, h.roll(1, -1)).clamp(-2, 2)
        return F.log_softmax(self.outer(h), dim=-1)


@dataclass(frozen=True)
class Net:
    """A model and the shape of one sample."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def built(self, samples: int = 3, seed: int = 0) -> tuple[nn.Module, Tensor]:
        """The model in evaluation mode and a batch, in float64."""
        torch.manual_seed(seed)
        model = self.model().double().eval()
        return model, torch.randn(samples, *self.shape, dtype=torch.float64)


def _strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2, stride=1),
        nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.GroupNorm(1, 2),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def _lazy(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    model(torch.zeros(1, *shape))
    return model


NETS = {
    "perceptron": Net(lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), (5,)),
    "residual convolutions": Net(lambda: nn.Sequential(BasicBlock(2, 3, 2)), (2, 5, 6)),
    "two residual blocks": Net(
        lambda: nn.Sequential(
            BasicBlock(2, 2, 1), BasicBlock(2, 4, 2), nn.Flatten(), nn.Linear(24, 3)
        ),
        (2, 3, 5),
    ),
    "strides, groups, dilation": Net(lambda: _lazy(_strided(), (2, 7, 6)), (2, 7, 6)),
    "circular padding": Net(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), nn.ELU()),
        (2, 6),
    ),
    "vision transformer": Net(
        lambda: nn.Sequential(VitBlock(4, 2, 8), nn.Flatten(), nn.Linear(12, 2)), (3, 4)
    ),
    "encoder layer": Net(
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True), (3, 4)
    ),
    "root mean square": Net(lambda: nn.Sequential(RmsBlock(6, 8), nn.Linear(6, 2)), (3, 6)),
    "dense": Net(lambda: nn.Sequential(DenseBlock(3, 2, 3), nn.Linear(9, 2)), (3,)),
    "squeeze and excite": Net(
        lambda: nn.Sequential(SqueezeExcite(3), nn.Flatten(), nn.Linear(48, 4)), (3, 4, 4)
    ),
    "heads": Net(lambda: Heads(4), (4,)),
    "tied": Net(lambda: nn.Sequential(Tied(4, 5), nn.Linear(4, 2)), (4,)),
    "fixed attention": Net(lambda: nn.Sequential(Fixed(4, 3), nn.Tanh(), Fixed(4, 3)), (4, 3)),
    "functional": Net(lambda: Functional(5), (5,)),
    "recurrent": Net(lambda: nn.Sequential(nn.LSTM(3, 4, batch_first=True), Last()), (4, 3)),
    "a softmax in the middle": Net(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.LayerNorm(6), nn.Linear(6, 2)),
        (4,),
    ),
}


class Last(nn.Module):
    """The last output of a recurrent layer, which returns a tuple."""

    def forward(self, states: tuple[Tensor, object]) -> Tensor:
        return states[0][:, -1]
