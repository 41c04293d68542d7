"""Time exact Jacobians against torch.func, in one run, on one thread.

    python benchmarks/exact.py [--rounds 15] [--json FILE]

Each round times every contender once, in turn, so that a change of the machine's speed meets all of
them. Quoted are medians, and the ratio of this library to the best peer; values are compared first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vmap
from torch.nn import functional as F

import pushforward as pf

Contender = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A function at a point, what others do there, and the ratio that is aimed at."""

    name: str
    function: Callable[..., Tensor]
    point: Tensor
    peers: dict[str, Contender]
    batch_dim: int | None = None
    aim: float = 1.15

    def ours(self) -> Any:
        """The same by this library."""
        return pf.jacobian(self.function, self.point, batch_dim=self.batch_dim).dense()


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

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        *lead, steps, width = x.shape
        parts = self.into(self.norm1(x)).reshape(*lead, steps, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(-2, -3) for part in parts.unbind(-3))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-2, -3)
        x = x + self.out(mixed.reshape(*lead, steps, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def mlp() -> nn.Module:
    """64-256-256-64 with tanh."""
    return nn.Sequential(
        nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 64)
    )


def single(name: str, function: Callable[..., Tensor], x: Tensor, aim: float = 1.15) -> Case:
    """One map, against both modes of torch.func."""
    peers = {"jacrev": lambda: jacrev(function)(x), "jacfwd": lambda: jacfwd(function)(x)}
    return Case(name, function, x, peers, aim=aim)


def batch(
    name: str, function: Callable[..., Tensor], x: Tensor, one: Callable[..., Tensor] | None = None
) -> Case:
    """Samples, against vmap; ``one`` is the function of a single sample where that differs."""
    of_one = one or function
    peers = {
        "vmap(jacrev)": lambda: vmap(jacrev(of_one))(x),
        "vmap(jacfwd)": lambda: vmap(jacfwd(of_one))(x),
    }
    return Case(name, function, x, peers, batch_dim=0)


def cases() -> list[Case]:
    """What the README and the documentation quote."""
    torch.manual_seed(0)
    lenet, block, net = LeNet().eval(), Block().eval(), mlp()
    weight = torch.randn(3, 3)
    images = torch.randn(32, 1, 28, 28)

    def of_image(x: Tensor) -> Tensor:
        return lenet(x[None])[0]

    return [
        single("call at n = 3", lambda x: torch.tanh(x @ weight).sin(), torch.randn(3), aim=3.0),
        single("MLP 64-256-256-64", net, torch.randn(64)),
        batch("MLP 64-256-256-64, batch 256", net, torch.randn(256, 64)),
        single("LeNet", of_image, images[0]),
        batch("LeNet, batch 32", lenet, images, of_image),
        single("transformer block 16 x 32", block, torch.randn(16, 32)),
        batch("transformer block 16 x 32, batch 4", block, torch.randn(4, 16, 32)),
    ]


def seconds(work: Contender) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def repeated(work: Contender, count: int) -> None:
    for _ in range(count):
        work()


def run(case: Case, rounds: int) -> dict[str, Any]:
    """Compare values, warm up, then time everybody in turn."""
    contenders = {"pushforward": case.ours, **case.peers}
    reference = next(iter(case.peers.values()))()
    difference = (case.ours() - reference).detach()
    error = float(difference.abs().max() / reference.detach().abs().max())
    if error > 1e-4:
        raise SystemExit(f"{case.name}: values differ by {error:.1e}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for name, work in contenders.items():
        # Short calls are repeated, so that every round takes about as long.
        repeat = max(1, int(0.02 / max(seconds(work), 1e-6)))
        times[name] = [float(repeat)]
    for _ in range(rounds):
        for name, work in contenders.items():
            repeat = int(times[name][0])
            times[name].append(seconds(lambda w=work, r=repeat: repeated(w, r)) / repeat)
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    best = min((name for name in medians if name != "pushforward"), key=medians.__getitem__)
    ratio = medians["pushforward"] / medians[best]
    return {"case": case.name, "medians": medians, "best": best, "ratio": ratio, "aim": case.aim}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = []
    print(f"{'case':36} {'pushforward':>12} {'best peer':>12}  {'ratio':>5}  {'aim':>5}")
    for case in cases():
        row = run(case, options.rounds)
        rows.append(row)
        ours, best = row["medians"]["pushforward"], row["medians"][row["best"]]
        print(
            f"{row['case']:36} {ours * 1e3:9.2f} ms {best * 1e3:9.2f} ms  {row['ratio']:5.2f}  "
            f"{row['aim']:5.2f}  {row['best']}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
