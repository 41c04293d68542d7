"""Gains logged while several processes train: those of one process, by the first one, no trace."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
WAYS = [
    "ddp",
    "ddp, many outputs",
    "compiled ddp",
    "ddp of compiled",
    "fsdp2",
    "fsdp2, many outputs",
    "fsdp2 at once",
    "fsdp2 not resharded",
    "fsdp2 in bfloat16",
    "compiled fsdp2",
    "fsdp",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="gloo goes over the loopback interface"),
]


def torchrun(script: str, *words: str) -> Any:
    """The object that a script prints, run on two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(HERE / script), *words],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(found)


def check(way: str, found: dict[str, Any]) -> None:
    slack = 0.05 if "bfloat16" in way else 1e-9
    steps = ("stem", "blocks.0", "blocks.1", "head.0", "head.1")
    names = {*(f"pushforward/gain/{step}" for step in steps), "pushforward/log_norm"}
    assert [step for step, _ in found["log"]] == [0, 2, 4], way
    for (_, logged), (_, goal) in zip(found["log"], found["goal"], strict=True):
        assert set(logged) == names, f"{way}: names of the plain network"
        assert logged == pytest.approx(goal, rel=slack, abs=slack), f"{way}: as on one process"
    assert found["logged"] == [3, 0], f"{way}: the first process alone logs"
    assert found["undisturbed"], f"{way}: parameters, buffers and random state, bit by bit"


def test_every_way_of_training_on_two_processes():
    """In one test, so that the processes are started once."""
    found = torchrun("watched_training.py")
    assert sorted(found) == sorted(WAYS)
    for way in WAYS:
        check(way, found[way])


def test_lightning_on_two_processes():
    pytest.importorskip("lightning_utilities", reason="needs lightning")
    found = torchrun("watched_lightning.py")
    (first, logged), (second, _) = found["log"]
    assert (first, second) == (0, 2)
    assert found["logged"] == [2, 0]
    logged.pop("pushforward/log_norm")
    assert logged == pytest.approx(found["goal"], rel=1e-4)
