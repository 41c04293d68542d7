"""The spectral radius of a Jacobian: whether the iteration z <- f(z) settles, and how fast."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.derivatives import jacobian
from pushforward.errors import DimensionError, InputError, PlanError
from pushforward.estimate import Estimate, student_quantile
from pushforward.implicit.maps import BatchDim, StateMap
from pushforward.linalg import upcast
from pushforward.operators import LinearOperator

CONFIDENCE = 0.95
_METHODS = ("auto", "exact", "growth")
# Up to here all eigenvalues cost less than the products would.
_EXACT_SIZE, _EXACT_SCALARS = 256, 2**24
_PROBES = 4
_FIRST_PRODUCTS = 64


def spectral_radius(
    f: Callable[..., Any] | LinearOperator | Tensor,
    z: Any = None,
    *,
    batch_dim: BatchDim = "auto",
    method: str = "auto",
    rtol: float = 0.01,
    max_products: int = 1024,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""The largest modulus of an eigenvalue of the Jacobian of f at z, per sample.

    .. math::
        \rho(J) = \lim_{k \to \infty} \|(J^\top)^k v\|^{1/k}

    Small Jacobians give all their eigenvalues, exactly. For others the logarithms of the growth of
    |v| under J^T are averaged over many products, with weights exp(-1 / (t (1 - t))) over the later
    part of them, that leave nothing of how a turning v begins and ends (Das, Saiki, Sander and
    Yorke, "Quantitative quasiperiodicity", 2017). A Rayleigh quotient would be wrong for complex
    eigenvalues: a rotation scaled by 0.9 has radius 0.9, but quotients up to 0.9 times a cosine.

    Args:
        f: a map from a state to a state laid out alike; or a square `LinearOperator`, a Jacobian
            among them; or a matrix ``(n, n)``, ``(B, n, n)``. Then without ``z``.
        z: the point, ``(B, *state)``, or ``state`` without a batch; a tensor or a pytree.
        batch_dim: 0, or None for one state; ``"auto"`` is 0 where every tensor of the state has two
            dimensions or more.
        method: ``"exact"``, ``"growth"``, or ``"auto"``: exact up to n = 256.
        rtol: relative half-width of the interval at which the growth has been seen long enough.
        max_products: after so many it ends, and ``converged`` is False.
        seed: of the four vectors that are multiplied; a fresh one, which is reported, if None.
        generator: instead of ``seed``; on the device of ``z``.

    Returns:
        `Estimate`, ``(B,)`` or ``()``, detached. ``method`` says whether it is exact ("eigvals") or
        an estimate ("growth"), whose interval allows for the spread between vectors and for the
        drift between windows; where eigenvalues of nearly the same modulus are many, it converges
        slowly, from below.

    Cost: n products with J^T and B n^3 for the eigenvalues, or four products per step.

    Raises:
        InputError: an argument out of range, no ``z`` for a map, or a Jacobian that is not finite.
        DimensionError: the operator is not square.
        ShapeError: f returns something laid out otherwise than ``z``.
        CouplingError: samples of a batch influence each other.

    >>> turn = 0.9 * torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    >>> round(spectral_radius(lambda z: z @ turn.T, torch.zeros(1, 2)).value.item(), 4)
    0.9
    """
    if method not in _METHODS:
        raise InputError(f'method expects "auto", "exact" or "growth", got {method!r}; choose one')
    rtol, steps = _checked_rtol(rtol), _checked_products(max_products)
    operator = _operator(f, z, batch_dim)
    n, samples = operator.shape[0], operator.batch or 1
    small = n <= _EXACT_SIZE and samples * n * n <= _EXACT_SCALARS
    if method == "exact" or (method == "auto" and small) or n == 0:
        return _exact(operator)
    source, seed = _source(seed, generator, operator.device)
    return _by_growth(operator, rtol, steps, source, seed)


def _operator(f: Any, z: Any, batch_dim: BatchDim) -> LinearOperator:
    if isinstance(f, LinearOperator | Tensor):
        if z is not None:
            raise InputError(
                f"expected spectral_radius(operator) or spectral_radius(f, z), got a "
                f"{type(f).__name__} and a point; leave the point out"
            )
        operator = f if isinstance(f, LinearOperator) else _Matrix(f)
        if operator.shape[0] != operator.shape[1]:
            raise DimensionError(
                f"spectral_radius expects a square operator, got {operator.shape[0]} x "
                f"{operator.shape[1]}; eigenvalues are those of maps of a space into itself"
            )
        return operator
    if z is None:
        raise InputError("expected spectral_radius(f, z) for a map f, got no point z; give one")
    return _jacobian(StateMap.of(f, z, batch_dim), z)


def _jacobian(f: StateMap, z: Any) -> LinearOperator:
    """J on flat states. Structure is not looked for: it is seldom there, and costs more."""
    point = f.flatten(z).to(f.layout.dtype)
    flat, batch_dim = (f, 0) if f.batched else (lambda each: f(each[None])[0], None)
    for plan in ("reverse", "loop"):
        try:
            return jacobian(flat, point if f.batched else point[0], batch_dim=batch_dim, plan=plan)
        except PlanError:  # cotangents cannot go together through every map
            continue
    raise AssertionError("loop always applies")  # pragma: no cover


class _Matrix(LinearOperator):
    """A matrix, or a batch of them."""

    def __init__(self, entries: Tensor) -> None:
        if entries.dim() not in (2, 3) or not entries.is_floating_point():
            raise InputError(
                "expected a real floating-point matrix (n, n) or (B, n, n), got "
                f"{entries.dtype} of shape {tuple(entries.shape)}"
            )
        m, n = entries.shape[-2:]
        super().__init__((m, n), dtype=entries.dtype, device=entries.device)
        self.batch = len(entries) if entries.dim() == 3 else None
        self.entries = entries

    def push(self, v: Tensor) -> Tensor:
        return self.entries @ v

    def pull(self, u: Tensor) -> Tensor:
        return self.entries.mT @ u

    def matrix(self) -> Tensor:
        return self.entries


def _exact(operator: LinearOperator) -> Estimate:
    with torch.no_grad():
        matrix = upcast(operator.matrix().detach())
        _require_finite(matrix)
        if operator.shape[0]:
            value = torch.linalg.eigvals(matrix).abs().amax(-1)
        else:
            value = matrix.new_zeros(matrix.shape[:-2])
    return Estimate(
        value=value,
        stderr=torch.zeros_like(value),
        interval=(value, value),
        passes=operator.shape[0],
        probes=0,
        method="eigvals",
        confidence=CONFIDENCE,
    )


def _by_growth(
    operator: LinearOperator,
    rtol: float,
    most: int,
    source: torch.Generator,
    seed: int | None,
) -> Estimate:
    """Multiply until the interval is narrow enough, looking again after each doubling."""
    growth, steps = _Growth.begin(operator, source), min(_FIRST_PRODUCTS, most)
    while True:
        growth.proceed(steps)
        reading = growth.read()
        if steps >= most or bool((reading.width <= rtol).all()):
            break
        steps = min(2 * steps, most)
    low, high = (reading.value * (sign * reading.width).exp() for sign in (-1, 1))
    return Estimate(
        value=reading.value,
        stderr=reading.value * reading.spread,
        interval=(low, high),
        passes=_PROBES * steps,
        probes=_PROBES,
        method="growth",
        unbiased=False,
        converged=bool((reading.width <= rtol).all()),
        seed=seed,
        confidence=CONFIDENCE,
    )


@dataclass(frozen=True)
class _Reading:
    """The radius, the standard error of its logarithm, and half the width of its interval."""

    value: Tensor
    spread: Tensor
    width: Tensor


@dataclass(eq=False)
class _Growth:
    """Vectors under repeated products, ``([B,] n, k)``, and the logarithms of their growth."""

    operator: LinearOperator
    vectors: Tensor
    logs: list[Tensor]

    @staticmethod
    def begin(operator: LinearOperator, source: torch.Generator) -> _Growth:
        lead = () if operator.batch is None else (operator.batch,)
        shape = (*lead, operator.shape[0], _PROBES)
        # Half precision has too few bits to draw from, not to multiply with.
        dtype = torch.float32 if operator.dtype.itemsize < 4 else operator.dtype
        drawn = torch.randn(shape, generator=source, dtype=dtype, device=operator.device)
        return _Growth(operator, drawn / drawn.norm(dim=-2, keepdim=True), [])

    def proceed(self, steps: int) -> None:
        """Multiply until so many products have been made."""
        with torch.no_grad():
            for _ in range(len(self.logs), steps):
                product = self.operator.pull(self.vectors.to(self.operator.dtype)).detach()
                product = product.to(self.vectors.dtype)
                _require_finite(product)
                lengths = product.norm(dim=-2, keepdim=True)
                self.logs.append(upcast(lengths[..., 0, :]).log())
                self.vectors = product / torch.where(lengths > 0, lengths, 1.0)

    def read(self) -> _Reading:
        """What the products so far say: all but the first quarter, and each half of these."""
        logs = torch.stack(self.logs)
        late = logs[len(logs) // 4 :]
        probes = _windowed(late)
        mean = probes.mean(-1)
        spread = probes.std(-1) / math.sqrt(_PROBES)
        middle = len(late) // 2
        drift = (_windowed(late[middle:]) - _windowed(late[:middle])).mean(-1).abs()
        reach = student_quantile((1 + CONFIDENCE) / 2, _PROBES - 1)
        rounding = 100 * torch.finfo(self.vectors.dtype).eps
        width = reach * spread + 2 * drift + rounding
        # A vector that became zero says that the Jacobian is nilpotent where it looked.
        gone = (~probes.isfinite()).all(-1)
        nothing = torch.zeros_like(mean)
        return _Reading(
            torch.where(gone, nothing, mean.exp()),
            torch.where(gone, nothing, spread),
            torch.where(gone, nothing, width.nan_to_num(nan=math.inf)),
        )


def _windowed(logs: Tensor) -> Tensor:
    """The mean over dimension 0 with weights that vanish smoothly at both ends."""
    times = (torch.arange(len(logs), device=logs.device, dtype=logs.dtype) + 1) / (len(logs) + 1)
    weights = (-1 / (times * (1 - times))).exp()
    weights = weights / weights.sum()
    return (weights.reshape(-1, *(1 for _ in logs.shape[1:])) * logs).sum(0)


def _require_finite(numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        raise InputError(
            "spectral_radius expects a finite Jacobian, got "
            f"{'NaN' if numbers.isnan().any() else 'infinite'} entries; look at f near z"
        )


def _checked_rtol(rtol: float) -> float:
    if not (isinstance(rtol, int | float) and 0 < rtol < math.inf):
        raise InputError(f"rtol expects a positive number, got {rtol!r}; 0.01 is one per cent")
    return float(rtol)


def _checked_products(count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 16:
        raise InputError(
            f"max_products expects a whole number of at least 16, got {count!r}; fewer show no "
            "growth rate"
        )
    return count


def _source(
    seed: int | None, generator: torch.Generator | None, device: torch.device
) -> tuple[torch.Generator, int | None]:
    """What to draw from, and the seed to report."""
    if seed is not None and generator is not None:
        raise InputError("expected seed= or generator=, got both; a generator holds its own seed")
    if generator is not None:
        return generator, None
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise InputError(f"seed expects a whole number, got {seed!r}; leave it out for a fresh one")
    chosen = secrets.randbits(32) if seed is None else seed
    return torch.Generator(device=device).manual_seed(chosen), chosen
