"""What counts as an activation: functions of torch, and modules of one's own made of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

_NAMES = (
    *("relu", "relu_", "relu6", "elu", "elu_", "selu", "selu_", "celu", "celu_", "gelu", "silu"),
    *("mish", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "softplus", "softsign"),
    *("sigmoid", "sigmoid_", "tanh", "tanh_", "hardtanh", "hardtanh_", "hardsigmoid", "hardswish"),
    *("logsigmoid", "tanhshrink", "softshrink", "hardshrink", "threshold", "threshold_", "glu"),
)
_LAYERS = (
    *(
        "linear",
        "bilinear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "mv",
        "dot",
        "vdot",
    ),
    *("inner", "addmm", "addmm_", "addbmm", "addbmm_", "baddbmm", "baddbmm_", "addmv", "addmv_"),
    *("einsum", "tensordot", "chain_matmul", "multi_head_attention_forward"),
    *("scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell"),
    *("gru_cell", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"),
    *("conv_transpose3d", "convolution"),
)


def _functions(names: tuple[str, ...]) -> frozenset[Callable]:
    homes = F, torch, Tensor, torch.special, torch.linalg
    return frozenset(getattr(home, n) for home in homes for n in names if hasattr(home, n))


_ACTIVATIONS = _functions((*_NAMES, "expit"))
_WEIGHTED = _functions((*_LAYERS, "multi_dot", "vecdot"))
_CLAMPS = _functions(("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_"))
_LARGEST = _functions(("maximum", "fmax", "max"))
# relu6 is a clamp between zero and this.
_SIX = 6


def is_activation(func: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call of a function of torch computes an activation."""
    if not args or not isinstance(args[0], Tensor):
        return False
    if func in _CLAMPS:
        return _is_relu(args[0], *_bounds(args[1:], kwargs))
    if func in _LARGEST:
        return _is_maximum_with_zero(args[0], kwargs.get("other", (*args, None)[1]))
    return func in _ACTIVATIONS


def _bounds(rest: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    low, high = (*rest, None, None)[:2]
    return kwargs.get("min", low), kwargs.get("max", high)


def _is_relu(x: Tensor, low: Any, high: Any) -> bool:
    above = high is None or (not isinstance(high, Tensor) and high == _SIX)
    return above and low is not None and x.is_floating_point() and _is_zero(low)


def _is_maximum_with_zero(one: Tensor, other: Any) -> bool:
    tensors = isinstance(other, Tensor) and one.is_floating_point()
    return tensors and (_is_zero(one) or _is_zero(other))


def _is_zero(value: Any) -> bool:
    """Whether a constant is zero everywhere."""
    if not isinstance(value, Tensor):
        return value == 0
    try:
        return not value.requires_grad and not bool(value.any())
    except RuntimeError:  # no numbers to look at: a meta tensor, or one under vmap
        return False


def is_weighted(func: Callable) -> bool:
    """Whether a function is a layer of its own: what goes into it is hidden."""
    return func in _WEIGHTED


def own_activations(model: nn.Module) -> Iterator[nn.Module]:
    """Modules without parameters that are none of torch's: activations, perhaps."""
    for module in model.modules():
        simple = not list(module.children()) and not list(module.parameters())
        if simple and module is not model and not type(module).__module__.startswith("torch."):
            yield module


class OwnModule:
    """A call of a module of the user's, which may be an activation made of those of torch.

    What follows from an activation inside is one function with it, and a place where the module
    returns it. Where a layer uses it, which has weights that came from elsewhere, it is a place
    there.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._pending: dict[int, weakref.ref] = {}
        self._visited: dict[int, tuple[weakref.ref, Tensor]] = {}

    def arguments(self, values: Any, func: Callable, visit: Callable[[Tensor], Tensor]) -> Any:
        """What a function is called with: with noise, where it is a layer or got some before."""
        weighted = is_weighted(func)

        def given(leaf: Any) -> Any:
            return self.visited(leaf, visit) if weighted else self._known(leaf)

        return pytree.tree_map(given, values)

    def depends(self, values: Any) -> bool:
        """Whether any of them was computed from an activation inside."""
        return bool(self._pending) and any(map(self._is_pending, pytree.tree_leaves(values)))

    def add(self, values: Any) -> None:
        """These were computed from an activation."""
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor):
                self._pending[id(leaf)] = weakref.ref(leaf)

    def visited(self, leaf: Any, visit: Callable[[Tensor], Tensor]) -> Any:
        """A tensor as the rest of the model gets it."""
        known = self._known(leaf)
        if known is not leaf or not self._is_pending(leaf) or not leaf.is_floating_point():
            return known
        noisy = visit(leaf)
        self._visited[id(leaf)] = (weakref.ref(leaf), noisy)
        return noisy

    def _is_pending(self, leaf: Any) -> bool:
        reference = self._pending.get(id(leaf))
        return reference is not None and reference() is leaf

    def _known(self, leaf: Any) -> Any:
        reference, noisy = self._visited.get(id(leaf), (None, None))
        return noisy if reference is not None and reference() is leaf else leaf
