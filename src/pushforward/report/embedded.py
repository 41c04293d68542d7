"""The model that the report looks at when none is given: a small residual net on real digits.

It is trained here in a few seconds, on the four fifths of scikit-learn's digits that the report
does not measure, and kept as safetensors in the user's cache.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pushforward.report.data import HELD_OUT, digits
from pushforward.report.models import LoadedModel
from pushforward.report.optional import require
from pushforward.report.randomness import one_thread, seeded
from pushforward.report.writing import write_together

EPOCHS = 10
BATCH = 48
PEAK_RATE = 4e-3
RECIPE = 1  # raised when the architecture or the training changes; old caches are left alone

Progress = Callable[[int, int], None]


class Residual(nn.Module):
    """relu(x + branch(x)) with two convolutions of equal width in the branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(inner)))


def stage(width_in: int, width_out: int, stride: int) -> nn.Sequential:
    """A convolution that changes the width, and a residual block behind it."""
    steps: dict[str, nn.Module] = {
        "conv": nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False),
        "norm": nn.BatchNorm2d(width_out),
        "relu": nn.ReLU(),
        "block": Residual(width_out),
    }
    return nn.Sequential(OrderedDict(steps))


class DigitsNet(nn.Module):
    """(B, 1, 8, 8) pixels to (B, 10) logits in three stages, about 90 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = stage(1, 16, stride=1)
        self.stage2 = stage(16, 32, stride=2)
        self.stage3 = stage(32, 48, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(x)))
        return self.head(self.flatten(self.pool(features)))


def embedded_model(seed: int = 0, progress: Progress = lambda done, total: None) -> LoadedModel:
    """The trained net, from the cache where it is sound, else trained now.

    ``progress(done, total)`` is called after each step of the training.
    """
    path = cache_directory() / f"digits-net-{RECIPE}-seed{seed}.safetensors"
    model = cached(path)
    if model is None:
        model = trained(seed, progress)
        _keep(model, path)
    source = f"the embedded residual net, trained on four fifths of the digits (seed {seed})"
    return LoadedModel(model.eval(), "DigitsNet (embedded)", source)


def trained(seed: int, progress: Progress = lambda done, total: None) -> DigitsNet:
    """A net trained with Adam and a one-cycle rate; the same bits for the same seed."""
    x, y = training_digits()
    with seeded(seed), one_thread(), torch.enable_grad():
        model = DigitsNet()
        _train(model, x, y, progress)
    return model.eval()


def training_digits() -> tuple[Tensor, Tensor]:
    """The digits that ``held_out_digits`` leaves."""
    x, y = digits()
    kept = torch.arange(len(x)) % HELD_OUT != HELD_OUT - 1
    return x[kept], y[kept]


def _train(model: DigitsNet, x: Tensor, y: Tensor, progress: Progress) -> None:
    steps = EPOCHS * (len(x) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps)
    for step, rows in enumerate(_batches(len(x)), start=1):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
        schedule.step()
        progress(step, steps)


def _batches(size: int) -> list[Tensor]:
    """Shuffled rows, epoch by epoch; the few that fill no batch are left for another epoch."""
    whole = size - size % BATCH
    return [rows for _ in range(EPOCHS) for rows in torch.randperm(size)[:whole].split(BATCH)]


# --- the cache ----------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where the user's caches go on this system: XDG_CACHE_HOME where it is set."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if Path(chosen).is_absolute():  # the specification says that relative paths are to be ignored
        return Path(chosen) / "pushforward"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pushforward"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "pushforward" / "cache"
    return Path.home() / ".cache" / "pushforward"


def cached(path: Path) -> DigitsNet | None:
    """The net kept at ``path``; None where there is none, or the file is damaged."""
    safetensors = require("safetensors.torch")
    with seeded(0):
        model = DigitsNet()
    try:
        state = safetensors.load_file(path)
        model.load_state_dict(state)
    except Exception:  # whatever is wrong with a cache, training again mends it
        return None
    sound = all(torch.isfinite(tensor).all() for tensor in state.values())
    return model if sound else None


def _keep(model: DigitsNet, path: Path) -> None:
    """Save the net; a cache that cannot be written to costs a training at the next run, no more."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_together({path: require("safetensors.torch").save(state)})
    except OSError:
        return
