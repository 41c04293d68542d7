"""What a penalty adds to a training step, against a plain step and the usual module for it.

    python benchmarks/penalties.py [--rounds N] [--peer PATH] [--json FILE]

A step is an evaluation, its loss, the backward pass and one step of SGD with momentum, on a batch
of 64 images; times are medians over rounds in which all contenders take turns, on one thread, as
ratios to the plain step. What counts is the time of the processor: other work on the machine does
not. The peer is ``JacobianReg`` of facebookresearch/jacobian_regularizer:
PATH is the file ``jacobian/jacobian.py`` of a checkout. Without one, `PublishedPenalty` stands in
for it, written from the algorithm that its paper gives.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import timing

timing.pin_to_one_thread()

import models  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import pushforward as pf  # noqa: E402

BATCH = 64
NAMES = {"mlp": "MLP 784-200-200-10", "lenet": "LeNet"}


class PublishedPenalty(nn.Module):
    """Algorithm 1 of Hoffman, Roberts and Yaida (2019): one backward pass for each projection."""

    def __init__(self, projections: int) -> None:
        super().__init__()
        self.projections = projections

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        batch, classes = y.shape
        count = classes if self.projections == -1 else self.projections
        total = torch.zeros(())
        for i in range(count):
            if self.projections == -1:
                v = nn.functional.one_hot(torch.full((batch,), i), classes).to(y.dtype)
            else:
                v = nn.functional.normalize(torch.randn(batch, classes), dim=1)
            (row,) = torch.autograd.grad(y, x, v, retain_graph=True, create_graph=True)
            total = total + classes * row.square().sum() / (count * batch)
        return total / 2


def peer_from(path: Path | None) -> Callable[[int], nn.Module]:
    if path is None:
        return PublishedPenalty
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.JacobianReg


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "lenet":
        return models.LeNet()
    sizes = (784, 200, 200, 10)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def steps(name: str, peer: Callable[[int], nn.Module]) -> dict[str, timing.Contender]:
    """Training steps by name, each on a network of its own."""
    penalty = pf.regularizers.JacobianPenalty
    return {
        "plain": _step(name),
        "peer, 1 projection": _step(name, pair=peer(1)),
        "one projection (x, y)": _step(name, pair=penalty(1)),
        "the same, gradients of parameters alone": _step(name, pair=penalty(1), alone=True),
        "one projection (model, x)": _step(name, own=penalty(1)),
        "3 projections (x, y)": _step(name, pair=penalty(3)),
        "peer, 3 projections": _step(name, pair=peer(3)),
        "exact (x, y)": _step(name, pair=penalty("exact")),
        "exact (model, x)": _step(name, own=penalty("exact")),
        "peer, exact": _step(name, pair=peer(-1)),
        "noise penalty (model, x)": _step(name, own=pf.regularizers.NoisePenalty(0.1)),
        "noise on activations": _step(name, noise=True),
    }


def _step(
    name: str,
    pair: Any = None,
    own: Any = None,
    alone: bool = False,
    noise: bool = False,
) -> timing.Contender:
    model = network(name)
    shape = (1, 28, 28) if name == "lenet" else (784,)
    x, labels = torch.randn(BATCH, *shape), torch.randint(10, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    noisy = pf.regularizers.GaussianNoise(model, 0.1) if noise else None

    def evaluate(data: Tensor) -> Tensor:
        if noisy is None:
            return model(data)
        with noisy:
            return model(data)

    def step() -> None:
        optimizer.zero_grad()
        data = x.clone().requires_grad_(pair is not None)
        y = evaluate(data)
        loss = nn.functional.cross_entropy(y, labels)
        if pair is not None:
            loss = loss + 0.01 * pair(data, y)
        if own is not None:
            loss = loss + 0.01 * own(model, data)
        loss.backward(inputs=list(model.parameters()) if alone else None)
        optimizer.step()

    return step


def medians(contenders: Mapping[str, timing.Contender], rounds: int) -> dict[str, float]:
    """Seconds of the processor for one call of each, in turns, the first one left out."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, work in contenders.items():
            work()  # what others left in the caches is nobody's
            start = time.thread_time()
            work()
            work()
            times[name].append((time.thread_time() - start) / 2)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name, title in NAMES.items():
        times = medians(steps(name, peer_from(options.peer)), options.rounds)
        print(f"\n{title}, batch {BATCH}: plain step {times['plain'] * 1e3:.2f} ms")
        for contender, seconds in times.items():
            ratio = seconds / times["plain"]
            print(f"  {contender:42} {ratio:6.2f}")
            rows.append({"network": name, "contender": contender, "ratio": ratio})
    timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
