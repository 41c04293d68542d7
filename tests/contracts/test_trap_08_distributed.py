"""Trap 8: on a tensor-parallel model only a plain ``autograd.grad`` works.

On this build, on a gloo mesh of one process: a loop of plain gradients and a replicated batch are
right; ``is_grads_batched``, ``torch.func.vmap`` over a backward pass, jacrev, jacfwd and jvp fail.
The gradients come without a graph of their own, so that J v and training on a Jacobian are refused
rather than wrong.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("tensor_parallel.py")
REFUSED = ("is_grads_batched", "vmap", "jacrev", "jacfwd", "jvp", "second_derivative")
RIGHT = ("loop", "replicated", "pushforward", "pushforward_batch", "pushforward_loop")


def outcomes(processes: int, folder: Path) -> dict[str, str]:
    """What each way of differentiating did, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(processes), str(folder / "store")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, str]) -> None:
    for name in REFUSED:
        assert found[name] != "right", f"PyTorch changed: {name} works on a DTensor; use it"
    assert {name: found[name] for name in RIGHT} == dict.fromkeys(RIGHT, "right")
    assert found["pushforward_product"] in {"right", "DifferentiationError"}
    assert found["pushforward_training"] in {"right", "DifferentiationError"}


def test_a_mesh_of_one(tmp_path: Path):
    check(outcomes(1, tmp_path))


@pytest.mark.slow
def test_a_mesh_of_two(tmp_path: Path):
    check(outcomes(2, tmp_path))
