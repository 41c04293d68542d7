"""Newton's method on a reaction-diffusion equation, with sparse and with dense Jacobians.

Run it with ``python docs/tutorial/newton.py [FOLDER]``: it prints what the tutorial shows and the
time that both kinds took, and writes the tutorial's picture to FOLDER (default: beside this file).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from scipy.sparse.linalg import spsolve
from torch import Tensor

import pushforward as pf

SIZE = 32  # points along each side of the unit square
SPACING = 1 / (SIZE - 1)
WIDTH = 0.05  # of the layer between the two phases
STEP = 0.5  # in time
STEPS = 10


def laplacian(u: Tensor) -> Tensor:
    """Differences to the neighbours that exist: nothing flows through the boundary."""
    across, down = u.diff(dim=0), u.diff(dim=1)
    out = torch.zeros_like(u)
    out[:-1] += across
    out[1:] -= across
    out[:, :-1] += down
    out[:, 1:] -= down
    return out / SPACING**2


def residual(u: Tensor, before: Tensor, step: Tensor) -> Tensor:
    """What is left of one implicit Euler step of the Allen-Cahn equation."""
    return u - before - step * (WIDTH**2 * laplacian(u) + u - u**3)


def newton(
    solve: Callable[[Tensor], tuple[Tensor, Tensor]], u: Tensor, tolerance: float = 1e-10
) -> tuple[Tensor, list[float]]:
    """The root near ``u`` and the residual at each iterate. ``solve(u)`` returns F(u), J^-1 F."""
    residuals: list[float] = []
    while len(residuals) < 20:
        value, change = solve(u)
        residuals.append(value.abs().max().item())
        if residuals[-1] < tolerance:
            break
        u = u - change
    return u, residuals


def solve_sparse(plan: pf.Plan, before: Tensor, step: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    J = plan(u, before, step)
    change = spsolve(J.sparse("scipy").tocsc(), J.value.flatten().numpy())
    return J.value, torch.from_numpy(change).reshape(u.shape)


def solve_dense(before: Tensor, step: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    value = residual(u, before, step)
    J = torch.func.jacrev(residual)(u, before, step).reshape(u.numel(), u.numel())
    return value, torch.linalg.solve(J, value.flatten()).reshape(u.shape)


def start() -> Tensor:
    """Random numbers: both phases, finely mixed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)


def order(residuals: list[float]) -> list[float]:
    """Each residual over the square of the one before it; the last one is rounding."""
    return [after / before**2 for before, after in pairwise(residuals[:-1])]


def show(sparse: list[float], dense: list[float]) -> None:
    quotients = ["", *(f"{quotient:.3f}" for quotient in order(sparse)), "rounding"]
    print("iteration   sparse    dense     sparse / previous^2")
    for k, row in enumerate(zip(sparse, dense, quotients, strict=True)):
        print(f"{k}           {row[0]:.1e}   {row[1]:.1e}   {row[2]}")


def march(plan: pf.Plan, u: Tensor) -> tuple[list[Tensor], list[int]]:
    """The solution after each step in time, and the Newton iterations that each step took."""
    history, iterations = [u], []
    step = torch.tensor(STEP, dtype=u.dtype)
    for _ in range(STEPS):
        u, residuals = newton(partial(solve_sparse, plan, u, step), u)
        history.append(u)
        iterations.append(len(residuals) - 1)
    return history, iterations


def draw(history: list[Tensor], J: pf.Jacobian, path: Path) -> None:
    """The start, the end, and the entries of the Jacobian's upper left corner."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained")
    times = (0.0, STEP * STEPS)
    for ax, u, t in zip(axes, (history[0], history[-1]), times, strict=False):
        image = ax.imshow(u.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, extent=(0, 1, 0, 1))
        ax.set_title(f"u at t = {t:g}", fontsize=10)
        ax.set_xticks([0, 0.5, 1])
        ax.set_yticks([0, 0.5, 1])
    figure.colorbar(image, ax=axes[1], shrink=0.8, ticks=[-1, 0, 1])
    corner = J.sparse("scipy")[: 4 * SIZE, : 4 * SIZE]
    axes[2].spy(corner, markersize=1.1, color="#3d6fb4", marker="s")
    axes[2].xaxis.tick_bottom()
    axes[2].set_xticks(range(0, 4 * SIZE + 1, SIZE))
    axes[2].set_yticks(range(0, 4 * SIZE + 1, SIZE))
    axes[2].set_title(f"the first {4 * SIZE} of {J.shape[0]} rows and columns", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folder: Path) -> dict[str, object]:
    u = start()
    step = torch.tensor(STEP, dtype=u.dtype)

    print("== one plan")
    plan = pf.plan(residual, u, u, step)
    J = plan(u, u, step)
    print(f"J is {J.shape[0]} x {J.shape[1]}, with {J.sparse('scipy').nnz} entries")

    print("== one step in time")
    began = time.perf_counter()
    sparse, residuals = newton(partial(solve_sparse, plan, u, step), u)
    middle = time.perf_counter()
    dense, residuals_dense = newton(partial(solve_dense, u, step), u)
    ended = time.perf_counter()
    show(residuals, residuals_dense)
    print(f"same solution: {torch.allclose(sparse, dense, rtol=0, atol=1e-10)}")

    print("== all steps in time")
    history, iterations = march(plan, u)
    print("t     iterations   mean |u|")
    for k, (count, state) in enumerate(zip(iterations, history[1:], strict=True)):
        print(f"{STEP * (k + 1):3.1f}   {count}            {state.abs().mean():.2f}")

    draw(history, J, folder / "newton.png")
    return {
        "plan": plan,
        "entries": J.sparse("scipy").nnz,
        "residuals": residuals,
        "quotients": order(residuals),
        "difference": (sparse - dense).abs().max().item(),
        "ratio": (ended - middle) / (middle - began),
    }


if __name__ == "__main__":
    found = main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
    print(f"sparse was {found['ratio']:.1f} times as fast, with {found['plan'].passes} passes")
