"""Frobenius norms of the Jacobians of single modules, in closed form or with very few passes.

A rule takes the call of a module as `Leaf` and returns log ||J||_F per sample, or None where it
does not hold. It is looked up by exact type: a subclass may do anything in its ``forward``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.path.pull import Passes, blocks, sample_norms
from pushforward.path.record import Crossing


@dataclass(frozen=True, eq=False)
class Leaf:
    """A module that maps one place to another, and nothing else happens between them."""

    module: Any
    start: Crossing
    stop: Crossing
    samples: int
    passes: Passes

    @property
    def entering(self) -> int:
        """Input scalars of one sample."""
        return math.prod(self.start.shape) // self.samples

    @property
    def leaving(self) -> int:
        """Output scalars of one sample."""
        return math.prod(self.stop.shape) // self.samples

    def same(self, squared: float) -> Tensor:
        """The logarithm of a norm that is the same for each sample."""
        log = math.log(squared) / 2 if squared > 0 else -math.inf
        return torch.full((self.samples,), log, dtype=torch.float64, device=self.stop.device)


MOST_BLOCK_PASSES = 4096

Rule = Callable[[Leaf], Tensor | None]
RULES: dict[type[nn.Module], Rule] = {}


def rule(*kinds: Any) -> Callable[[Rule], Rule]:
    """Enter a rule for types of modules."""

    def enter(function: Rule) -> Rule:
        RULES.update((kind, function) for kind in kinds)
        return function

    return enter


def log_norm_of_leaf(leaf: Leaf) -> Tensor | None:
    """Return log ||J||_F per sample by the rule for a module; None where none holds."""
    found = RULES.get(type(leaf.module))
    return found(leaf) if found is not None and _in_its_dtype(leaf) else None


def _in_its_dtype(leaf: Leaf) -> bool:
    """Whether weights take part as they are: autocast uses rounded copies of them."""
    weights = leaf.module.parameters(recurse=False)
    return all(weight.dtype == leaf.stop.dtype for weight in weights)


@rule(nn.Linear)
def _linear(leaf: Leaf) -> Tensor:
    rows = leaf.leaving // max(1, leaf.module.out_features)
    return leaf.same(rows * _squared(leaf.module.weight).sum().item())


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(leaf: Leaf) -> Tensor | None:
    """Each tap counts as often as it meets an input and not the padding."""
    conv = leaf.module
    if conv.padding_mode != "zeros":
        return None
    ones, images = _ones_image(leaf, conv.in_channels, len(conv.kernel_size))
    apply = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)
    counted = apply[len(conv.kernel_size) - 1](
        ones, _squared(conv.weight), None, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    return leaf.same(images * counted.sum().item())


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(leaf: Leaf) -> Tensor:
    conv = leaf.module
    ones, images = _ones_image(leaf, conv.in_channels, len(conv.kernel_size))
    apply = (
        nn.functional.conv_transpose1d,
        nn.functional.conv_transpose2d,
        nn.functional.conv_transpose3d,
    )
    counted = apply[len(conv.kernel_size) - 1](
        ones,
        _squared(conv.weight),
        None,
        conv.stride,
        conv.padding,
        conv.output_padding,
        conv.groups,
        conv.dilation,
    )
    return leaf.same(images * counted.sum().item())


def _squared(weight: Tensor) -> Tensor:
    return weight.detach().double().square()


def _ones_image(leaf: Leaf, channels: int, dims: int) -> tuple[Tensor, int]:
    """One image of ones, and how many images make a sample."""
    shape = (1, channels, *leaf.start.shape[-dims:])
    ones = torch.ones(shape, dtype=torch.float64, device=leaf.start.device)
    return ones, leaf.entering // ones.numel()


# Each input reaches at most one output, so that a column of J holds at most one entry, and J^T 1
# lists the entries.
@rule(
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.LogSigmoid),
    *(nn.Hardsigmoid, nn.Hardswish, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    nn.FeatureAlphaDropout,
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.GLU),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
)
def _one_output_per_input(leaf: Leaf) -> Tensor:
    ones = torch.ones(1, *leaf.stop.shape, dtype=leaf.stop.dtype, device=leaf.stop.device)
    entries = leaf.passes.pull(leaf.stop, leaf.start, ones)
    return sample_norms(entries, leaf.samples).log()


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(leaf: Leaf) -> Tensor | None:
    norm = leaf.module
    fixed = not norm.training and norm.running_mean is not None
    return _one_output_per_input(leaf) if fixed else None


# Each output is one of the inputs: a row of J holds one entry, which is 1.
@rule(
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.UpsamplingNearest2d),
)
def _one_input_per_output(leaf: Leaf) -> Tensor:
    return leaf.same(float(leaf.leaving))


@rule(nn.Upsample)
def _upsample(leaf: Leaf) -> Tensor | None:
    return _one_input_per_output(leaf) if leaf.module.mode.startswith("nearest") else None


@rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _average(leaf: Leaf) -> Tensor | None:
    pool, dims = leaf.module, DIMENSIONS[type(leaf.module)]
    sizes = zip(_tuple(pool.stride, dims), _tuple(pool.kernel_size, dims), strict=True)
    tiles = all(stride >= kernel for stride, kernel in sizes)
    return _one_output_per_input(leaf) if tiles else _over_blocks(leaf, first=-dims)


@rule(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_average(leaf: Leaf) -> Tensor | None:
    dims = DIMENSIONS[type(leaf.module)]
    sizes = zip(leaf.start.shape[-dims:], leaf.stop.shape[-dims:], strict=True)
    tiles = all(entering % leaving == 0 for entering, leaving in sizes)
    return _one_output_per_input(leaf) if tiles else _over_blocks(leaf, first=-dims)


DIMENSIONS = {
    kind: dims
    for dims, kinds in {
        1: (nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.InstanceNorm1d),
        2: (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.InstanceNorm2d),
        3: (nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.InstanceNorm3d),
    }.items()
    for kind in kinds
}


def _tuple(size: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (size,) * dims if isinstance(size, int) else tuple(size)


@rule(nn.LayerNorm, nn.RMSNorm)
def _norm_of_last(leaf: Leaf) -> Tensor | None:
    return _over_blocks(leaf, first=-len(leaf.module.normalized_shape))


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _norm_of_channels(leaf: Leaf) -> Tensor | None:
    return _over_blocks(leaf, first=-DIMENSIONS[type(leaf.module)])


@rule(nn.GroupNorm)
def _norm_of_groups(leaf: Leaf) -> Tensor | None:
    before, groups = leaf.stop.shape[0], leaf.module.num_groups
    block = math.prod(leaf.stop.shape[1:]) // groups
    return _disjoint(leaf, before * groups, block, 1)


@rule(nn.Softmax, nn.LogSoftmax, nn.Softmin)
def _softmax(leaf: Leaf) -> Tensor | None:
    if leaf.module.dim is None:
        return None
    shape, dim = leaf.stop.shape, leaf.module.dim % max(1, len(leaf.stop.shape))
    return _disjoint(leaf, math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]))


def _over_blocks(leaf: Leaf, first: int) -> Tensor | None:
    """A module that treats each slice of the last dimensions, from ``first`` on, for itself."""
    shape = leaf.stop.shape
    return _disjoint(leaf, math.prod(shape[:first]), math.prod(shape[first:]), 1)


def _disjoint(leaf: Leaf, before: int, block: int, after: int) -> Tensor | None:
    """``before * after`` blocks with inputs of their own: the same unit vector in all of them.

    The gradients do not overlap, so that one pass gives a row of every block.
    """
    if block > MOST_BLOCK_PASSES:
        return None
    squares = torch.zeros(leaf.samples, dtype=torch.float64, device=leaf.stop.device)
    for start, stop in blocks(block, leaf.start, leaf.stop):
        seeds = _repeated_units(leaf, (before, block, after), range(start, stop))
        squares += sample_norms(leaf.passes.pull(leaf.stop, leaf.start, seeds), leaf.samples) ** 2
    return squares.log() / 2


def _repeated_units(leaf: Leaf, view: tuple[int, int, int], chosen: Iterable[int]) -> Tensor:
    numbers = torch.tensor(list(chosen), device=leaf.stop.device)
    before, block, after = view
    units = torch.zeros(len(numbers), block, dtype=leaf.stop.dtype, device=leaf.stop.device)
    units[torch.arange(len(numbers), device=numbers.device), numbers] = 1
    spread = units[:, None, :, None].expand(-1, before, -1, after)
    return spread.reshape(len(numbers), *leaf.stop.shape)
