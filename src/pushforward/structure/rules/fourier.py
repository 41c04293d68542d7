"""Fourier transforms: each frequency depends on a whole axis, or on several."""

from __future__ import annotations

import numpy as np
import torch

from pushforward.structure.rules.registry import Call, Numbers, rule

aten = torch.ops.aten


@rule(aten._fft_r2c, aten._fft_c2c, aten._fft_c2r)
def transform(call: Call) -> list[Numbers]:
    numbers = call.unite_axes(call.numbers(call.args[0]), call.args[1], True)
    return [np.broadcast_to(numbers, call.shape)]
