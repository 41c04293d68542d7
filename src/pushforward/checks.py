"""A plan is verified where it is made: what is assumed of a map is tried on random vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pushforward.errors import CouplingError, DifferentiationError
from pushforward.passes import random_vectors
from pushforward.problems import Problem
from pushforward.tape import Tape, coupling_op, op_name

# How many samples are tried one at a time when the op that couples them is looked for.
_SINGLES = 64


def check_samples(problem: Problem) -> tuple[str, ...]:
    """Refuse a batch whose samples influence each other.

    Scaling the cotangent of each sample by its own power of two scales the gradient of that sample
    by exactly the same, unless another sample's cotangent reaches it.
    """
    batch = problem.linear.tape.domain.batch
    if batch is None:
        return ()
    if batch > 1 and problem.entries > 0 and not samples_independent(problem):
        raise CouplingError(coupling_message(problem.linear.tape))
    return ("samples are independent: checked",)


def check_batching(problem: Problem) -> tuple[str, ...]:
    """Go one by one where several cotangents at once give other numbers than each alone."""
    linear = problem.linear
    if not linear.batched or problem.m < 2 or problem.entries == 0:
        return ()
    cotangents = problem.random(linear.tape.codomain, 2)
    with torch.no_grad():
        together = linear.pull(torch.cat(cotangents))
        apart = torch.cat([linear.pull(u) for u in cotangents])
    scale = apart.abs().nan_to_num(posinf=0.0, neginf=0.0).amax()
    if not linear.batched or agree(together, apart, scale):
        return ()
    linear.batched = False
    return ("vmap of the backward gives wrong numbers here: cotangents go one by one",)


def samples_independent(problem: Problem) -> bool:
    """Compare the gradients of random cotangents with those of the same ones scaled."""
    linear = problem.linear
    (u,) = problem.random(linear.tape.codomain, 1)
    with torch.no_grad():
        plain = linear.pull(u)
        for scale in sample_scales(problem.samples):
            factor = scale.to(u.device, u.dtype).reshape(1, -1, 1)
            if not scaled_alike(plain * factor.to(plain.dtype), linear.pull(u * factor)):
                if linear.tape.census.custom:
                    return False
                return apart_by_zeros(u, linear.pull, problem.samples)
    return True


def apart_by_zeros(u: Tensor, pull: Callable[[Tensor], Tensor], samples: int) -> bool:
    """Whether no gradient arrives at samples whose own cotangents are zero.

    A second opinion: numbers too small for the dtype, as a saturated softmax makes them on the way,
    or of a coarser one, do not scale exactly, but what is zero stays zero.

    Args:
        u: cotangents, (1, B, size).
        pull: to gradients whose entries are those of the samples, one after the other.
        samples: B.
    """
    numbers = torch.arange(samples, device=u.device)
    for place in range((samples - 1).bit_length()):
        for digit in (0, 1):
            chosen = (numbers >> place & 1) == digit
            reached = pull(u * chosen.reshape(1, -1, 1)).reshape(samples, -1)
            if bool((reached[~chosen].nan_to_num() != 0).any()):
                return False
    return True


def sample_scales(samples: int) -> Iterator[Tensor]:
    """Signed powers of two, (B,), in as few rounds as tell every two samples apart in one.

    A pair with the same scale in all rounds could hide its coupling: samples get the digits of
    their number.
    """
    digits = torch.tensor([sign * 2.0**k for k in range(-3, 4) for sign in (1, -1)])
    left = torch.arange(samples)
    while True:
        yield digits[left % len(digits)]
        left = left // len(digits)
        if not left.any():
            return


def scaled_alike(expected: Tensor, came: Tensor) -> bool:
    """Whether gradients (..., B, n) are what scaling each sample makes of them, up to rounding."""
    limits = torch.finfo(expected.dtype)
    # Powers of two are exact, but for what falls below the smallest normal number.
    least = 64 * limits.tiny * limits.eps
    tolerance = 64 * limits.eps * expected.abs().amax(-1, keepdim=True) + least
    close = (came - expected).abs() <= tolerance
    return bool((close | ~torch.isfinite(expected)).all())


def coupling_message(tape: Tape) -> str:
    """Say which op lets the samples of a batch influence each other, and what to do."""
    op = _op_that_couples(tape)
    if op is None and tape.census.custom:
        names = ", ".join(sorted(op_name(name) for name in tape.census.custom))
        return (
            "batch_dim=0 expects gradients that scale with their cotangents, sample by sample, "
            f"but those through {names} do not: its backward is not linear, or samples meet in "
            "it; use batch_dim=None for one map of the whole batch"
        )
    trains = "norm" in (op or "") and any(tape.mode)
    advice = "call .eval() on the model first, or " if trains else ""
    return (
        "batch_dim=0 expects independent samples, but they influence each other through "
        f"{op or 'an op'}; {advice}use batch_dim=None for one map of the whole batch"
    )


def _op_that_couples(tape: Tape) -> str | None:
    """Look for it with cotangents of half of the samples, of the others, then of each."""
    (u,) = random_vectors(tape.codomain, 1)
    numbers = torch.arange(u.shape[1])
    halves = [numbers < len(numbers) // 2, numbers >= len(numbers) // 2]
    for chosen in (*halves, *(numbers == i for i in numbers[:_SINGLES])):
        kept = u * chosen.to(u.device, u.dtype).reshape(1, -1, 1)
        op = coupling_op(tape, [part[0] for part in tape.codomain.split(kept)], ~chosen)
        if op is not None:
            return op
    return None


def why_not_forward(problem: Problem) -> str | None:
    """Try <u, J v> = <J^T u, v>, which fails where a second derivative is missing or wrong."""
    linear = problem.linear
    v = torch.cat(problem.random(linear.tape.domain, 2))
    (u,) = problem.random(linear.tape.codomain, 1)
    try:
        with torch.no_grad():
            pushed = linear.push_at_once(v)
            pulled = linear.pull(u)
    except (RuntimeError, DifferentiationError) as error:
        return f"no second derivative ({str(error).splitlines()[0][:80]})"
    if pushed is None:
        return "no second derivative, so that J v is made of rows"
    scale = _inner(u.abs(), pushed.nan_to_num().abs())
    if not agree(_inner(u, pushed), _inner(pulled, v), scale):
        ops = ", ".join(op_name(name) for name in sorted(linear.tape.census.custom))
        return f"J v and J^T u disagree; the backward of {ops or 'an op'} is not a linear graph"
    return None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(-1)


def agree(one: Tensor, other: Tensor, scale: Tensor, double: float = 1e-3) -> bool:
    """Whether two ways to the same numbers differ by no more than rounding does.

    ``double`` is the tolerance for double precision.
    """
    tolerance = {8: double, 4: 1e-3}.get(one.dtype.itemsize, 1e-2)
    return bool(((one - other).abs() <= tolerance * scale)[torch.isfinite(other)].all())


def refuse_asymmetric(matrix: Tensor) -> None:
    """A Hessian that is far from symmetric holds a wrong second derivative."""
    entries = matrix.nan_to_num(posinf=0.0, neginf=0.0)
    gap, size = (entries - entries.mT).abs(), entries.abs()
    if gap.numel() and matrix.dtype.itemsize >= 4 and bool(gap.max() > 1e-2 * size.max()):
        raise DifferentiationError(
            f"expected a symmetric Hessian, got entries that differ by {float(gap.max()):.2g}; the "
            "backward of some op is not the derivative of its forward, or its second derivative is "
            "wrong: take pf.jacobian of a gradient that you trust"
        )
