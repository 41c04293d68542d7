"""What is found along a network, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """One step of a network; tensors are ``(B,)``, or ``()`` without a batch, in nats.

    Attributes:
        name: of the module; of the innermost block, where a step holds several leaf modules.
        log_gain: log(||d out/d h_before|| / ||d out/d h_after||); log||d out/d h_before|| for the
            last step.
        log_fro: log ||J_l||_F of the step; None where no rung asked for it.
        log_spectral: log ||J_l||_2, or what bounds it; None where no rung asked for it.
        log_bound_so_far: the sum of ``log_fro`` from this step to the output.
        exact: whether ``log_fro`` is exact, not an estimate.
        spectral_label: of ``log_spectral``: "certified", "probable" or "estimate".
        alignment: ``log_gain`` less what it would be if d out/d h_after pointed anywhere, that is
            log(||J_l||_F / sqrt(width)): above 0 where its rows lie along directions that the step
            stretches. 0 for the last step.
        slack: ``log_fro - log_gain``, what the Frobenius rung loses where this step meets those
            after it.
        effective_rank: of d out/d h_before, exp of the entropy of its normalised singular values;
            None where outputs are too many for it.
        gain_interval: ends of a 95 % interval for ``log_gain``; None where that is exact.
    """

    name: str
    log_gain: Tensor
    log_fro: Tensor | None
    log_spectral: Tensor | None
    log_bound_so_far: Tensor | None
    exact: bool
    spectral_label: str | None = None
    alignment: Tensor | None = None
    slack: Tensor | None = None
    effective_rank: Tensor | None = None
    gain_interval: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, repr=False, eq=False)
class Findings:
    """The fields of `PathBound`, which adds the ways to look at them."""

    log_norm: Tensor
    rungs: dict[str, Tensor]
    layers: tuple[Layer, ...]
    certified: dict[str, bool]
    notes: tuple[str, ...]
    passes: int
    seed: int | None
    labels: dict[str, str] = field(default_factory=dict)
    log_spectral_norm: Tensor | None = None
    interval: tuple[Tensor, Tensor] | None = None
