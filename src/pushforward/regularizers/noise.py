"""Gaussian noise on the activations of a network while it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pushforward.regularizers.randomness import source_of
from pushforward.regularizers.sites import Layers, Sigma, Sites


class GaussianNoise:
    """Add noise N(0, sigma^2) to the input and the hidden activations of a model, for a while.

    Args:
        model: the module that runs inside of the context, in training or evaluation mode alike.
        sigma: the standard deviation, one number or a dict by names and globs, the first that fits
            deciding.
        layers: names of modules whose outputs get noise, or globs ("block*.act"); "input" is the
            first real tensor that the model is called with. None takes the keys of a dict
            ``sigma``, otherwise the input and what every activation of torch returns, be it a
            module or a function (softmax is none, ``clamp(min=0)`` is one); a module of one's own
            without parameters that uses one is one activation with it, up to where a linear layer
            or a convolution comes inside. What the model returns gets noise from no glob and not
            with None, so that logits stay as they are, nor does it where it was viewed, moved,
            copied, cast or written to in place since. Other arithmetic (``2 * torch.tanh(z)``, a
            mean) makes what goes into it hidden.
        seed: of a generator that belongs to this object; each evaluation draws on.
        generator: drawn from instead; with neither of them torch's default generator is.

    As a context manager it returns the model and takes its hooks away at the end, whatever
    happened. Gradients may be taken after that.

    Raises:
        InputError: ``sigma`` out of range or without an entry for a layer, a name that fits no
            module, a module that returns no real tensor, no activation in a model of several
            layers.

    Cost: one draw for each place. Checkpointed parts of a model run again after the context and
    would then see other noise; leave them out of ``layers``.

    From Camuto, Willetts, Simsekli, Roberts and Holmes, "Explicit regularisation in Gaussian noise
    injections", NeurIPS 2020.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> x = torch.ones(1, 2)
        >>> with GaussianNoise(model, 0.1, seed=0):
        ...     noisy = model(x)
        >>> bool((noisy != model(x)).all())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: Sigma,
        layers: Layers = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._model, self._sites = model, Sites(sigma, layers)
        self._source = source_of(seed, generator)
        self._handles: list[list[Any]] = []
        for handle in self._sites.attach(model, self._noisy):  # to see that names fit
            handle.remove()

    def __enter__(self) -> nn.Module:
        self._handles.append(self._sites.attach(self._model, self._noisy))
        return self._model

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.pop():
            handle.remove()

    def _noisy(self, name: str, clean: Tensor) -> Tensor:
        sigma = self._sites.sigma_at(name)
        noise = self._source.normal(tuple(clean.shape), clean)
        return clean + (sigma * noise).to(clean.dtype)
