"""The networks and functions that the benchmarks differentiate."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LeNet(nn.Module):
    """Two convolutions and three linear layers, 1 x 28 x 28 to 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.linear1, self.linear2 = nn.Linear(400, 120), nn.Linear(120, 84)
        self.head = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(F.relu(self.linear2(F.relu(self.linear1(x.flatten(1))))))


class Block(nn.Module):
    """A pre-norm transformer block on (..., T, width)."""

    def __init__(self, width: int = 32, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        *lead, steps, width = x.shape
        parts = self.into(self.norm1(x)).reshape(*lead, steps, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(-2, -3) for part in parts.unbind(-3))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(-2, -3)
        x = x + self.out(mixed.reshape(*lead, steps, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or into != out:
            projection = nn.Conv2d(into, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet18(classes: int = 1000) -> nn.Sequential:
    """ResNet-18, in evaluation mode."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [
        block
        for into, out, stride in stages
        for block in (Residual(into, out, stride), Residual(out, out, 1))
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head).eval()


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, with tanh between them."""
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convolutions(*channels: int) -> nn.Sequential:
    """3 x 3 convolutions that keep the size, with tanh between them."""
    layers: list[nn.Module] = []
    for into, out in pairwise(channels):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def autoencoder(waist: int = 16) -> nn.Sequential:
    """1 x 28 x 28 through a waist and back, by convolutions of stride 2."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(784, waist),
        nn.Linear(waist, 784),
        nn.Tanh(),
        nn.Unflatten(1, (16, 7, 7)),
        nn.ConvTranspose2d(16, 8, 4, 2, 1),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1),
    )


def burgers(u: Tensor) -> Tensor:
    """u_t = -u u_x + u_xx / 100 by central differences on (0, 1), zero at both ends."""
    points = u.shape[0] + 1
    padded = F.pad(u, (1, 1))
    left, right = padded[:-2], padded[2:]
    return -u * (right - left) * (points / 2) + (left - 2 * u + right) * (points**2 / 100)


def laplacian(u: Tensor) -> Tensor:
    """The periodic five-point Laplacian over the last two axes."""
    near = u.roll(1, -1) + u.roll(-1, -1) + u.roll(1, -2) + u.roll(-1, -2)
    return near - 4 * u


def brusselator(state: Tensor) -> Tensor:
    """Two species on a periodic grid: a + u^2 v - (b + 1) u and b u - u^2 v, with diffusion."""
    u, v = state.unbind()
    change = u * u * v
    return torch.stack((1 + change - 4.4 * u, 3.4 * u - change)) + 10 * laplacian(state)


def heat(u: Tensor) -> Tensor:
    """Heat on a ring whose conductivity grows with the temperature."""
    flux = u + u * u
    return flux.roll(1) - 2 * flux + flux.roll(-1)


def arrowhead(x: Tensor) -> Tensor:
    """First output of all inputs, every other of its own input and of the first."""
    return torch.cat(((x * x).sum()[None], x[1:].sin() * x[0]))
