"""What every benchmark here shares: one thread, contenders in turn, medians."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Contender = Callable[[], Any]

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def pin_to_one_thread() -> None:
    """One core and one thread for every library; jax obeys only if it is imported later."""
    os.environ.update(ONE_THREAD)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def seconds(work: Contender) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def repeated(work: Contender, count: int) -> None:
    for _ in range(count):
        work()


def medians(
    contenders: Mapping[str, Contender],
    rounds: int,
    budget: float = math.inf,
    span: float = 0.02,
) -> dict[str, float]:
    """Seconds of one call of each, timed in turn so that a slower machine meets all of them.

    Short calls are repeated, so that a round takes about ``span`` for each. ``budget`` limits the
    seconds spent on one contender: a slow one takes part in fewer rounds, a very slow one in none.
    """
    times = {name: [seconds(work)] for name, work in contenders.items()}
    repeats = {name: max(1, int(span / max(first, 1e-6))) for name, (first,) in times.items()}
    for turn in range(rounds):
        for name, work in contenders.items():
            if (turn + 2) * times[name][-1] * repeats[name] <= budget:
                whole = seconds(lambda w=work, r=repeats[name]: repeated(w, r))
                times[name].append(whole / repeats[name])
    return {name: statistics.median(each[1:] or each) for name, each in times.items()}


def write_json(path: Path | None, rows: Any) -> None:
    if path:
        path.write_text(json.dumps(rows, indent=2) + "\n")
