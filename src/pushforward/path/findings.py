"""What is found along a network, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """One step of a network; tensors are ``(B,)``, or ``()`` without a batch, in nats.

    Attributes:
        name: of the module; of the innermost block, where a step holds several leaf modules.
        log_gain: log(||d out/d h_before|| / ||d out/d h_after||); log||d out/d h_before|| for the
            last step.
        log_fro: log ||J_l||_F of the step; None where no rung asked for it.
        log_spectral: log ||J_l||_2; None where no rung asked for it.
        log_bound_so_far: the sum of ``log_fro`` from this step to the output.
        exact: whether ``log_fro`` is exact, not an estimate.
    """

    name: str
    log_gain: Tensor
    log_fro: Tensor | None
    log_spectral: Tensor | None
    log_bound_so_far: Tensor | None
    exact: bool


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
