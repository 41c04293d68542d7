"""Penalties and noise for training: each is one line in a training loop, on any model."""

from pushforward.regularizers.contractive import ContractivePenalty
from pushforward.regularizers.equilibrium import EquilibriumPenalty
from pushforward.regularizers.jacobian import JacobianPenalty
from pushforward.regularizers.noise import GaussianNoise
from pushforward.regularizers.noise_penalty import NoisePenalty
from pushforward.regularizers.tied import TiedAutoencoder

__all__ = [
    "ContractivePenalty",
    "EquilibriumPenalty",
    "GaussianNoise",
    "JacobianPenalty",
    "NoisePenalty",
    "TiedAutoencoder",
]
