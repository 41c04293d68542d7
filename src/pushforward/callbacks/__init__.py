"""Gains of a network logged while it trains, in any loop and in Lightning.

logger.py      the hook for any loop
lightning.py   the same as a callback of Lightning
gauge.py       the gains of a batch, by one forward and one backward pass
route.py       where the steps of a network end, found once
wrapped.py     what stands around a model: compilation, data parallelism, sharding
sinks.py       where numbers go: TensorBoard, Weights & Biases, functions
"""

from pushforward.callbacks.lightning import LightningGainLogger
from pushforward.callbacks.logger import GainLogger

__all__ = ["GainLogger", "LightningGainLogger"]
