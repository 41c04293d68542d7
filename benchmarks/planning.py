"""The way from a call to a plan, beside the detection and colouring of asdex.

Every measurement is a process of its own, so that its peak memory is its own. The process first
plans a small network, so that what is loaded or compiled once is not counted. All cores are free.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import models
import timing
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import pushforward as pf

LIMIT = 120.0  # seconds for one process


@dataclass(frozen=True)
class Case:
    """A function at a point; the seconds and bytes that planning it may cost, and what is due."""

    name: str
    make: Callable[[], tuple[Any, Tensor]]
    aim: float
    passes: float = math.inf
    memory: float = math.inf


def of_points(function: Any, *shape: int) -> Callable[[], tuple[Any, Tensor]]:
    return lambda: (function, torch.rand(shape))


def of_network(make: Callable[..., Any], *sizes: int, at: Sequence[int]) -> Callable[[], Any]:
    return lambda: (make(*sizes), torch.randn(*at))


def causal(width: int, heads: int) -> models.Block:
    return models.Block(width, heads, causal=True)


CASES = (
    Case("Burgers, N = 100000", of_points(models.burgers, 100_000), 0.5, 3),
    Case(
        "MLP 32-64-64-32, batch 256", of_network(models.mlp, 32, 64, 64, 32, at=(256, 32)), 0.3, 32
    ),
    Case(
        "five 3x3 convolutions, 3x64x64",
        of_network(models.convolutions, 3, 8, 8, 8, 8, 3, at=(3, 64, 64)),
        1.0,
        363,
    ),
    Case("causal transformer block 64 x 64", of_network(causal, 64, 4, at=(64, 64)), 1.0),
    Case(
        "ResNet-18, 112 x 112", of_network(models.resnet18, at=(1, 3, 112, 112)), 10.0, memory=4e9
    ),
    Case("dense MLP 64-256-256-64", of_network(models.mlp, 64, 256, 256, 64, at=(64,)), 0.25),
)


def by_pushforward(function: Any, point: Tensor) -> tuple[int, str]:
    plan = pf.plan(function, point)
    return plan.passes, f"{plan.strategy}, {plan.passes} passes"


def by_asdex(function: Any, point: Tensor) -> tuple[int, str]:
    import peers

    found = peers.detect(function, point)
    return found.num_colors, f"{found.mode}, {found.num_colors} colours"


def by_tracing(function: Any, point: Tensor) -> tuple[int, str]:
    """What it costs to trace the function and do nothing with it, for comparison."""
    return 0, f"{len(make_fx(function)(point).graph.nodes)} nodes"


PLANNERS = {"pushforward": by_pushforward, "asdex": by_asdex, "make_fx alone": by_tracing}


def peak() -> int:
    """Bytes of the largest resident set so far; Linux counts in kilobytes, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def warm_up(planner: Callable[[Any, Tensor], tuple[int, str]]) -> None:
    planner(models.convolutions(1, 1, 1), torch.randn(1, 4, 4))
    planner(models.mlp(3, 2, 3), torch.randn(2, 3))


def measure(name: str, planner: str) -> dict[str, Any]:
    """Seconds, and bytes at the peak and above the state before, in this process."""
    torch.manual_seed(0)
    case = next(case for case in CASES if case.name == name)
    warm_up(PLANNERS[planner])
    function, point = case.make()
    before, found = peak(), []
    span = timing.seconds(lambda: found.append(PLANNERS[planner](function, point)))
    passes, text = found[0]
    memory = {"peak": peak(), "rise": peak() - before}
    return {"seconds": span, **memory, "passes": passes, "found": text}


def in_process(name: str, planner: str) -> dict[str, Any]:
    """The same in a fresh process, or why there is nothing to tell."""
    command = [sys.executable, __file__, name, planner]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LIMIT:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def show(case: Case, planner: str, row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"  {planner:14} {row['failed'][:100]}", flush=True)
        return
    text = f"{row['seconds']:8.3f} s  peak {row['peak'] / 1e6:7.0f} MB (+{row['rise'] / 1e6:.0f})"
    judged = f"  {verdict(case, row)}" if planner == "pushforward" else ""
    print(f"  {planner:14} {text}  {row['found']}{judged}", flush=True)


def verdict(case: Case, row: dict[str, Any]) -> str:
    """Whether time, passes and memory are within what was aimed at."""
    bounds = {"seconds": case.aim, "passes": case.passes, "peak": case.memory}
    bounds = {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    good = all(row[name] <= bound for name, bound in bounds.items())
    aims = ", ".join(f"{name} <= {bound:g}" for name, bound in bounds.items())
    return f"{'reached' if good else 'MISSED'}: {aims}"


def main(only: str = "") -> list[dict[str, Any]]:
    rows = []
    for case in CASES:
        if only.lower() in case.name.lower():
            print(f"\n{case.name}")
            for planner in PLANNERS:
                row = in_process(case.name, planner)
                rows.append({"case": case.name, "planner": planner, "aim": case.aim, **row})
                show(case, planner, row)
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
