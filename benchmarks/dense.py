"""Time dense Jacobians, where there is no structure to use, against torch.func, on one thread.

    python benchmarks/dense.py [--rounds 15] [--json FILE]

Each round times every contender once, in turn, so that a change of the machine's speed meets all of
them. Quoted are medians, and the ratio of this library to the best peer; values are compared first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timing
import torch
from models import Block, LeNet, mlp
from timing import Contender
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

import pushforward as pf


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
    lenet, block, net = LeNet().eval(), Block().eval(), mlp(64, 256, 256, 64)
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


def run(case: Case, rounds: int) -> dict[str, Any]:
    """Compare values, warm up, then time everybody in turn."""
    contenders = {"pushforward": case.ours, **case.peers}
    reference = next(iter(case.peers.values()))()
    difference = (case.ours() - reference).detach()
    error = float(difference.abs().max() / reference.detach().abs().max())
    if error > 1e-4:
        raise SystemExit(f"{case.name}: values differ by {error:.1e}")
    medians = timing.medians(contenders, rounds)
    best = min((name for name in medians if name != "pushforward"), key=medians.__getitem__)
    ratio = medians["pushforward"] / medians[best]
    return {"case": case.name, "medians": medians, "best": best, "ratio": ratio, "aim": case.aim}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    timing.pin_to_one_thread()
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
    timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
