"""The autoencoder that contractive penalties were made for: a decoder with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.errors import InputError


class TiedAutoencoder(nn.Module):
    r"""One hidden layer whose weights decode, transposed, what they encoded.

    .. math::
        h = s(W x + b), \quad r = W^\top h + c

    Args:
        inputs: number of input scalars.
        units: number of hidden units.
        activation: the elementwise function s.
        output: applied to r, where the reconstruction is a probability for instance; None leaves
            logits, for ``binary_cross_entropy_with_logits``.

    ``model(x)`` takes ``(B, inputs)`` to its reconstruction, ``(B, inputs)``; ``encode`` and
    ``decode`` are the two halves. ``ContractivePenalty()(model.encode, x)`` has its closed form.

    Raises:
        InputError: sizes that are not positive.

    From Rifai et al., "Contractive auto-encoders", ICML 2011, section 4.

    Example:
        >>> model = TiedAutoencoder(5, 3)
        >>> model(torch.zeros(2, 5)).shape, model.encode(torch.zeros(2, 5)).shape
        (torch.Size([2, 5]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        activation: Callable[[Tensor], Tensor] = torch.sigmoid,
        output: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("inputs", inputs), ("units", units)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"{name} expects a whole number of at least 1, got {size!r}")
        self.activation: Any = activation
        self.output: Any = output
        self.encoder = nn.Linear(inputs, units)
        self.bias = nn.Parameter(torch.zeros(inputs))

    @property
    def weight(self) -> Tensor:
        """W, ``(units, inputs)``."""
        return self.encoder.weight

    def encode(self, x: Tensor) -> Tensor:
        """s(W x + b), ``(B, units)``."""
        return self.activation(self.encoder(x))

    def decode(self, h: Tensor) -> Tensor:
        """W^T h + c, ``(B, inputs)``."""
        logits = nn.functional.linear(h, self.weight.t(), self.bias)
        return logits if self.output is None else self.output(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
