"""Time planned Jacobians against torch.func, asdex, sparsejac and jax, in one run, on one thread.

    python benchmarks/exact.py [--only NAME] [--rounds 15] [--double] [--json FILE]
    python benchmarks/exact.py --planning

Each round times every contender once, in turn. Quoted are medians, and how many times faster the
planned Jacobian of this library is than each of the others, beside the factor that is aimed at.
Values are compared before anything is timed. Everything is float32, the default of jax, unless
``--double`` is given. Peers come with ``pip install 'pushforward[peers]'``; what is not installed
is left out and named. ``--planning`` times the way from a call to a plan instead.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import models
import planning
import timing
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

import pushforward as pf

PLANNED, ONE_CALL, BEST_DENSE = "pushforward, planned", "pushforward, one call", "best dense mode"
PLAIN = "pushforward, plain route"
PACKAGES = {
    "asdex": ("jax", "asdex"),
    "sparsejac": ("jax", "asdex", "sparsejac"),
    "jax.jacrev": ("jax",),
    "jax.vmap(jacrev)": ("jax",),
}
STENCIL = ("asdex", "sparsejac", "jacrev", "jacfwd")
DENSE = ("jax.jacrev", "asdex", "jacrev", "jacfwd")
PATIENCE = 20.0  # seconds: a dense mode that needs more for one Jacobian is only forecast


@dataclass(frozen=True)
class Aim:
    """A contender is to be at least ``factor`` times faster than a peer."""

    peer: str
    factor: float
    of: str = PLANNED


@dataclass(frozen=True)
class Case:
    """A function at a point, who differentiates it, and what is aimed at."""

    name: str
    function: Callable[..., Tensor]
    point: Tensor
    peers: tuple[str, ...]
    aims: tuple[Aim, ...] = ()
    sparse: bool = True
    batch_dim: int | None = None
    chunk: int | None = None  # directions at a time, where the dense modes do not fit in memory

    @property
    def rows(self) -> int:
        return self.function(self.point).numel()

    @property
    def costly(self) -> bool:
        """Whether a dense mode might take long enough to ask first."""
        return self.point.numel() > 4096


@dataclass
class Row:
    """What was found in a case."""

    case: str
    plan: str
    medians: dict[str, float] = field(default_factory=dict)
    forecasts: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    aims: list[dict[str, Any]] = field(default_factory=list)


def stencils() -> Iterator[Case]:
    to_beat = (Aim("asdex", 1 / 1.5),)
    yield Case("Burgers, N = 1000", models.burgers, torch.rand(1000), STENCIL, to_beat)
    far_ahead = (Aim("asdex", 1.0), Aim("jacrev", 50_000))
    yield Case("Burgers, N = 10000", models.burgers, torch.rand(10_000), STENCIL, far_ahead)
    aims = (Aim("asdex", 1 / 3), Aim("jacfwd", 1000))
    yield Case("Brusselator 32 x 32", models.brusselator, torch.rand(2, 32, 32), STENCIL, aims)
    yield Case("heat on a ring of 200", models.heat, torch.rand(200), STENCIL)
    yield Case("arrowhead 500", models.arrowhead, torch.rand(500), STENCIL)


def networks() -> Iterator[Case]:
    net, samples = models.mlp(32, 64, 64, 32), torch.randn(256, 32)
    name = "MLP 32-64-64-32, batch 256"
    yield Case(f"{name}, no hint", net, samples, ("asdex", "jacrev"), (Aim("jacrev", 800),))
    vmaps = ("jax.vmap(jacrev)", "vmap(jacrev)", "vmap(jacfwd)")
    aims = (Aim("vmap(jacrev)", 1.5),)
    yield Case(f"{name}, batch_dim=0", net, samples, vmaps, aims, sparse=False, batch_dim=0)
    net, x = models.mlp(784, 256, 32, 256, 784), torch.randn(784)
    aims = (Aim("jacrev", 9), Aim("jax.jacrev", 3))
    yield Case("hourglass 784-256-32-256-784", net, x, DENSE, aims, sparse=False)
    net, x = models.convolutions(3, 8, 8, 8, 8, 3), torch.randn(3, 64, 64)
    aims, whom = (Aim(BEST_DENSE, 10),), ("asdex", "jacrev", "jacfwd")
    yield Case("five 3x3 convolutions, 3x64x64", net, x, whom, aims, chunk=64)
    net, x, aims = models.autoencoder(), torch.randn(1, 1, 28, 28), (Aim(BEST_DENSE, 8),)
    yield Case("autoencoder, waist 16", net, x, DENSE, aims, sparse=False)
    net, x, aims = models.mlp(64, 256, 256, 64), torch.randn(64), (Aim(PLAIN, 1 / 1.15, ONE_CALL),)
    yield Case("dense MLP 64-256-256-64", net, x, (PLAIN, *DENSE), aims, sparse=False)


def entries(jacobian: Any, case: Case) -> Any:
    return jacobian.sparse() if case.sparse else jacobian.dense()


def ours(case: Case) -> tuple[Any, dict[str, timing.Contender]]:
    """The plan, and this library with it and without."""
    f, x, batch_dim = case.function, case.point, case.batch_dim
    plan = pf.plan(f, x, batch_dim=batch_dim)
    return plan, {
        PLANNED: lambda: entries(plan(x), case),
        ONE_CALL: lambda: entries(pf.jacobian(f, x, batch_dim=batch_dim), case),
    }


def plain(case: Case) -> timing.Contender:
    return lambda: entries(pf.jacobian(case.function, case.point, plan="reverse"), case)


def reverse(case: Case) -> timing.Contender:
    jacobian = jacrev(case.function, chunk_size=case.chunk)
    return lambda: jacobian(case.point)


def forward(case: Case) -> timing.Contender:
    if case.chunk is None:
        return lambda: jacfwd(case.function)(case.point)
    return lambda: in_chunks(case)


def in_chunks(case: Case) -> Tensor:
    """As jacfwd, which takes all directions at once, but some at a time; columns stand first."""
    basis = torch.eye(case.point.numel()).unflatten(1, case.point.shape)
    pushed = torch.cat([push(case, some) for some in basis.split(case.chunk or len(basis))])
    return pushed.flatten(1).T


def push(case: Case, directions: Tensor) -> Any:
    return vmap(lambda v: jvp(case.function, (case.point,), (v,))[1])(directions)


def pull(case: Case, directions: Tensor) -> Any:
    return vmap(vjp(case.function, case.point)[1])(directions)


def of_samples(mode: Callable[..., Any]) -> Callable[[Case], timing.Contender]:
    return lambda case: lambda: vmap(mode(case.function))(case.point)


def by_jax(name: str) -> Callable[[Case], timing.Contender]:
    return lambda case: getattr(import_module("peers"), name)(case.function, case.point)


MAKERS: dict[str, Callable[[Case], timing.Contender]] = {
    PLAIN: plain,
    "jacrev": reverse,
    "jacfwd": forward,
    "vmap(jacrev)": of_samples(jacrev),
    "vmap(jacfwd)": of_samples(jacfwd),
    "asdex": by_jax("asdex"),
    "sparsejac": by_jax("sparsejac"),
    "jax.jacrev": by_jax("dense"),
    "jax.vmap(jacrev)": by_jax("batched"),
}


def forecast(case: Case, name: str, directions: int = 64) -> float:
    """Seconds that a dense mode will take, from some of its directions."""
    if name not in ("jacrev", "jacfwd") or not case.costly:
        return 0.0
    shape = case.function(case.point).shape if name == "jacrev" else case.point.shape
    one_way = pull if name == "jacrev" else push
    some = torch.randn(directions, *shape)
    one_way(case, some)
    return timing.seconds(lambda: one_way(case, some)) * math.prod(shape) / directions


def contenders(case: Case, row: Row) -> dict[str, timing.Contender]:
    """Those peers that can take part; why the others cannot is entered in ``row``."""
    chosen = {}
    for name in case.peers:
        absent = [package for package in PACKAGES.get(name, ()) if find_spec(package) is None]
        expected = forecast(case, name)
        if absent:
            row.skipped[name] = f"{', '.join(absent)} not installed"
        elif expected > PATIENCE:
            row.forecasts[name] = expected
        else:
            chosen[name] = MAKERS[name](case)
    return chosen


def as_matrix(result: Any, rows: int) -> Any:
    """Whatever a contender returned as a numpy or scipy matrix."""
    import numpy as np
    import scipy.sparse as sp

    if isinstance(result, torch.Tensor) and result.layout == torch.sparse_csr:
        parts = (result.values(), result.col_indices(), result.crow_indices())
        return sp.csr_array(tuple(part.detach().numpy() for part in parts), shape=result.shape)
    if isinstance(result, torch.Tensor):
        return result.detach().numpy().reshape(rows, -1)
    if hasattr(result, "indices"):
        where = tuple(np.asarray(result.indices).T)
        return sp.csr_array((np.asarray(result.data), where), shape=result.shape)
    return np.asarray(result).reshape(rows, -1)


def distance(one: Any, other: Any) -> float:
    """The largest difference, relative to the largest entry."""
    import scipy.sparse as sp

    if sp.issparse(one) != sp.issparse(other):
        one, other = (each.toarray() if sp.issparse(each) else each for each in (one, other))
    return float(abs(one - other).max() / abs(other).max())


def compare(case: Case, work: dict[str, timing.Contender]) -> None:
    """Everybody's values against those of the last peer, which knows nothing of structure."""
    *others, reference = work
    rows, bound = case.rows, 1e-4 if torch.get_default_dtype() == torch.float32 else 1e-10
    truth = as_matrix(work[reference](), rows)
    for name in others:
        error = distance(as_matrix(work[name](), rows), truth)
        if not error <= bound:
            raise SystemExit(f"{case.name}: {name} and {reference} differ by {error:.1e}")


def run(case: Case, rounds: int, budget: float) -> Row:
    """Plan, compare values, then time everybody in turn."""
    plan, work = ours(case)
    row = Row(case.name, f"{plan.strategy}, {plan.passes} passes")
    work |= contenders(case, row)
    compare(case, work)
    row.medians = timing.medians(work, rounds, budget)
    known = row.forecasts | row.medians
    row.aims = [reached(aim, known) for aim in case.aims if math.isfinite(of_peer(aim.peer, known))]
    return row


def of_peer(name: str, known: dict[str, float]) -> float:
    names = ("jacrev", "jacfwd") if name == BEST_DENSE else (name,)
    return min(known.get(each, math.inf) for each in names)


def reached(aim: Aim, known: dict[str, float]) -> dict[str, Any]:
    factor = of_peer(aim.peer, known) / known[aim.of]
    return {"of": aim.of, "peer": aim.peer, "factor": factor, "aim": aim.factor}


def show(row: Row) -> None:
    """One line for each contender, then one for each aim."""
    print(f"\n{row.case}  ({row.plan})")
    for name, median in row.medians.items():
        ratio = median / row.medians[PLANNED]
        print(f"  {name:26} {median * 1e3:12.4f} ms  {ratio:12.4g} x")
    for name, expected in row.forecasts.items():
        ratio = expected / row.medians[PLANNED]
        print(f"  {name:26} {expected * 1e3:12.4g} ms  {ratio:12.4g} x  (forecast, not run)")
    for name, reason in row.skipped.items():
        print(f"  {name:26} left out: {reason}")
    for aim in row.aims:
        verdict = "reached" if aim["factor"] >= aim["aim"] else "MISSED"
        what = f"{aim['peer']} takes {aim['factor']:.4g} times as long as {aim['of']}"
        print(f"  {verdict}: {what}, aim {aim['aim']:.4g}")
    print(end="", flush=True)


def prepare(double: bool) -> None:
    """One thread, the precision, and fixed parameters, before anybody imports jax."""
    timing.pin_to_one_thread()
    torch.manual_seed(0)
    if double:
        torch.set_default_dtype(torch.float64)
        if find_spec("jax"):
            import_module("jax").config.update("jax_enable_x64", True)


def evaluate(options: argparse.Namespace) -> list[dict[str, Any]]:
    prepare(options.double)
    rows = []
    print(f"{'float64' if options.double else 'float32'}, one thread, medians of "
          f"{options.rounds} rounds; x: times the planned call")  # fmt: skip
    for case in (*stencils(), *networks()):
        if options.only.lower() in case.name.lower():
            rows.append(run(case, options.rounds, options.budget))
            show(rows[-1])
    return [vars(row) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each contender")
    parser.add_argument("--double", action="store_true", help="float64 instead of float32")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--planning", action="store_true", help="time planning instead")
    options = parser.parse_args()
    if options.planning:
        timing.write_json(options.json, planning.main(options.only))
    else:
        timing.write_json(options.json, evaluate(options))


if __name__ == "__main__":
    main()
