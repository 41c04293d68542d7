"""Which ops are piecewise linear, and on which piece each of their elements is.

A code is a tensor that is constant where the op is linear. It is found from the arguments of a
call, before the call may overwrite them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

Code = Callable[..., Tensor]


def between(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """0 up to ``low``, 1 up to ``high``, 2 from there on; a bound that is None is not there."""
    code = torch.ones_like(x, dtype=torch.int8) if low is None else (x > low).to(torch.int8)
    return code if high is None else code + (x >= high).to(torch.int8)


def positive(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x > 0


def larger(x: Tensor, bound: Any, *_: Any, **__: Any) -> Tensor:
    return x > bound


def hard_tanh(x: Tensor, min_val: Any = -1, max_val: Any = 1) -> Tensor:
    return between(x, min_val, max_val)


def clamped(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return between(x, min, max)


def shrunk(x: Tensor, lambd: Any = 0.5) -> Tensor:
    return between(x, -lambd, lambd)


def _with_in_place(table: dict[str, Code]) -> dict[Any, Code]:
    """By op, each with its in-place form where there is one."""
    named = {name + end: code for name, code in table.items() for end in ("", "_")}
    return {getattr(aten, name): code for name, code in named.items() if hasattr(aten, name)}


UNITS = _with_in_place(
    {
        "relu": positive,
        "leaky_relu": positive,
        "_prelu_kernel": positive,
        "rrelu_with_noise": positive,
        "abs": positive,
        "threshold": larger,
        "hardtanh": hard_tanh,
        "relu6": lambda x: between(x, 0, 6),
        "clamp": clamped,
        "clip": clamped,
        "clamp_min": larger,
        "clamp_max": lambda x, max: between(x, None, max),
        "hardsigmoid": lambda x: between(x, -3, 3),
        "hardshrink": shrunk,
        "softshrink": shrunk,
    }
)
# The larger or smaller of two, both of which may depend on the input.
UNITS_OF_TWO: dict[Any, Code] = {
    **dict.fromkeys((aten.maximum, aten.minimum, aten.fmax, aten.fmin), larger),
    **{op: UNITS[op] for op in (aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_max)},
}
COMPARISONS = frozenset({aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne})
# What turns logits into probabilities may come last, where it bends no region.
ENDS = frozenset({aten._softmax, aten._log_softmax, aten.sigmoid, aten.log_sigmoid_forward})
# They ask a tensor for its shape alone.
FILLS = frozenset(
    {
        *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like),
        *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided),
    }
)
# Affine in the first argument; what the structure engine knows to be affine is not repeated here.
AFFINE = frozenset(
    {
        *(aten.avg_pool1d, aten.adaptive_avg_pool1d, aten._adaptive_avg_pool3d, aten.col2im),
        *(aten.upsample_bicubic2d, aten.upsample_trilinear3d, aten.upsample_nearest3d),
        *(aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten.positive),
        *(aten._native_batch_norm_legit_no_training, aten.where, aten.nan_to_num),
    }
)
# Batch normalisation is affine where it takes its statistics from buffers: which argument says so.
BATCH_NORMS = {aten.native_batch_norm: 5, aten.cudnn_batch_norm: 5, aten.miopen_batch_norm: 5}

# Known to bend what they are given, and not marked by torch as elementwise.
BENT = frozenset(
    {
        *(aten.native_layer_norm, aten.native_group_norm, aten._softmax, aten._log_softmax),
        *(aten.glu, aten.mkldnn_rnn_layer, aten.softplus, aten.gelu, aten.hardswish),
        *(aten._scaled_dot_product_flash_attention_for_cpu, aten.linalg_vector_norm, aten.var),
        *(aten.std, aten.prod, aten.cumprod, aten.logsumexp, aten.mm, aten.bmm),
    }
)
# Several elements compete, and one of them wins.
POOLS = frozenset(
    {
        *(aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.adaptive_max_pool2d),
        *(aten.adaptive_max_pool3d, aten.max, aten.min, aten.amax, aten.amin),
    }
)
_OF_SMALLEST = frozenset({aten.min, aten.amin})


def winners(func: Any, args: Any, out: Any) -> Tensor:
    """Where the winners of a pool are: what the op returns beside them, or what is found again."""
    if isinstance(out, tuple):
        return out[1]
    x, op = args[0], func.overloadpacket
    chosen = args[1] if len(args) > 1 else []
    axes = [dim % x.dim() for dim in ([chosen] if isinstance(chosen, int) else chosen)]
    axes = axes or list(range(x.dim()))
    kept = [dim for dim in range(x.dim()) if dim not in axes]
    rivals = x.permute(*kept, *axes).reshape(*(x.shape[dim] for dim in kept), -1)
    return (rivals.argmin if op in _OF_SMALLEST else rivals.argmax)(-1)
