"""The same functions in jax, and what asdex, sparsejac and jax make of them.

Import this after `timing.pin_to_one_thread`. Networks are translated layer by layer from torch, so
that weights are the same; functions that are no networks have a twin in `TWINS`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
from jax import lax
from torch import Tensor, nn

Function = Callable[[Any], Any]


def array(tensor: Tensor) -> Any:
    return jnp.asarray(tensor.detach().numpy())


def burgers(u: Any) -> Any:
    points = u.shape[0] + 1
    padded = jnp.pad(u, 1)
    left, right = padded[:-2], padded[2:]
    return -u * (right - left) * (points / 2) + (left - 2 * u + right) * (points**2 / 100)


def laplacian(u: Any) -> Any:
    near = jnp.roll(u, 1, -1) + jnp.roll(u, -1, -1) + jnp.roll(u, 1, -2) + jnp.roll(u, -1, -2)
    return near - 4 * u


def brusselator(state: Any) -> Any:
    u, v = state
    change = u * u * v
    return jnp.stack((1 + change - 4.4 * u, 3.4 * u - change)) + 10 * laplacian(state)


def heat(u: Any) -> Any:
    flux = u + u * u
    return jnp.roll(flux, 1) - 2 * flux + jnp.roll(flux, -1)


def arrowhead(x: Any) -> Any:
    return jnp.concatenate(((x * x).sum()[None], jnp.sin(x[1:]) * x[0]))


TWINS: dict[Callable[..., Any], Function] = {
    models.burgers: burgers,
    models.brusselator: brusselator,
    models.heat: heat,
    models.arrowhead: arrowhead,
}


def sequential(module: nn.Sequential) -> Function:
    steps = [twin(layer) for layer in module]

    def run(x: Any) -> Any:
        for step in steps:
            x = step(x)
        return x

    return run


def linear(module: nn.Linear) -> Function:
    weight, bias = array(module.weight), array(module.bias)
    return lambda x: x @ weight.T + bias


def images(function: Function) -> Function:
    """Let a function of (N, C, H, W) take (C, H, W) too."""
    return lambda x: function(x) if x.ndim == 4 else function(x[None])[0]


def channels(bias: Tensor | None) -> Any:
    return 0.0 if bias is None else array(bias)[:, None, None]


def convolution(module: nn.Conv2d) -> Function:
    weight, bias = array(module.weight), channels(module.bias)
    around = [(pad, pad) for pad in module.padding]
    return images(lambda x: lax.conv_general_dilated(x, weight, module.stride, around) + bias)


def transposed(module: nn.ConvTranspose2d) -> Function:
    """A convolution of the input spread out by the stride, with the kernel turned round."""
    weight = array(module.weight.flip(-1, -2).transpose(0, 1))
    bias = channels(module.bias)
    around = [(k - 1 - p,) * 2 for k, p in zip(module.kernel_size, module.padding, strict=True)]
    return images(
        lambda x: (
            lax.conv_general_dilated(x, weight, (1, 1), around, lhs_dilation=module.stride) + bias
        )
    )


def batch_norm(module: nn.BatchNorm2d) -> Function:
    """In evaluation mode, as one scale and one shift per channel."""
    scale = module.weight / (module.running_var + module.eps).sqrt()
    shift = module.bias - module.running_mean * scale
    return lambda x: x * channels(scale) + channels(shift)


def max_pool(module: nn.MaxPool2d) -> Function:
    size, stride, pad = ((v,) * 2 for v in (module.kernel_size, module.stride, module.padding))
    window, strides = (1, 1, *size), (1, 1, *stride)
    around = ((0, 0), (0, 0), pad, pad)
    return images(lambda x: lax.reduce_window(x, -math.inf, lax.max, window, strides, around))


def flatten(module: nn.Flatten) -> Function:
    return lambda x: x.reshape(-1) if x.ndim == 3 else x.reshape(len(x), -1)


def unflatten(module: nn.Unflatten) -> Function:
    return lambda x: x.reshape(*x.shape[:-1], *module.unflattened_size)


def residual(module: models.Residual) -> Function:
    conv1, norm1 = twin(module.conv1), twin(module.norm1)
    conv2, norm2, shortcut = twin(module.conv2), twin(module.norm2), twin(module.shortcut)
    return lambda x: jax.nn.relu(norm2(conv2(jax.nn.relu(norm1(conv1(x))))) + shortcut(x))


def layer_norm(module: nn.LayerNorm) -> Function:
    weight, bias = array(module.weight), array(module.bias)

    def run(x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred / jnp.sqrt(variance + module.eps) * weight + bias

    return run


def attention(q: Any, k: Any, v: Any, causal: bool) -> Any:
    scores = q @ jnp.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    if causal:
        seen = np.tril(np.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores, -jnp.inf)
    return jax.nn.softmax(scores) @ v


def block(module: models.Block) -> Function:
    norm1, norm2, into = twin(module.norm1), twin(module.norm2), twin(module.into)
    out, up, down = twin(module.out), twin(module.up), twin(module.down)

    def run(x: Any) -> Any:
        steps, width = x.shape
        parts = into(norm1(x)).reshape(steps, 3, module.heads, width // module.heads)
        q, k, v = (jnp.swapaxes(parts[:, i], 0, 1) for i in range(3))
        mixed = jnp.swapaxes(attention(q, k, v, module.causal), 0, 1)
        x = x + out(mixed.reshape(steps, width))
        return x + down(jax.nn.gelu(up(norm2(x)), approximate=False))

    return run


LAYERS: dict[type[nn.Module], Callable[..., Function]] = {
    nn.Sequential: sequential,
    nn.Linear: linear,
    nn.Conv2d: convolution,
    nn.ConvTranspose2d: transposed,
    nn.BatchNorm2d: batch_norm,
    nn.MaxPool2d: max_pool,
    nn.AdaptiveAvgPool2d: lambda _: lambda x: x.mean((-1, -2), keepdims=True),
    nn.Flatten: flatten,
    nn.Unflatten: unflatten,
    nn.LayerNorm: layer_norm,
    nn.Tanh: lambda _: jnp.tanh,
    nn.ReLU: lambda _: jax.nn.relu,
    models.Residual: residual,
    models.Block: block,
}


def twin(function: Any) -> Function:
    """The function in jax."""
    if isinstance(function, nn.Module):
        return LAYERS[type(function)](function)
    return TWINS[function]


def ready(function: Function, x: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(x))


def dense(function: Any, point: Tensor) -> Callable[[], Any]:
    """jax.jacrev, jitted."""
    return ready(jax.jit(jax.jacrev(twin(function))), array(point))


def batched(function: Any, point: Tensor) -> Callable[[], Any]:
    """jax.vmap of jax.jacrev, jitted."""
    return ready(jax.jit(jax.vmap(jax.jacrev(twin(function)))), array(point))


def flat(function: Any, point: Tensor) -> Function:
    """Between vectors, as asdex and sparsejac like it best."""
    shape, same = point.shape, twin(function)
    return lambda x: same(x.reshape(shape)).reshape(-1)


def vector(point: Tensor) -> Any:
    return array(point).reshape(-1)


def detect(function: Any, point: Tensor) -> Any:
    """The pattern and colours that asdex finds; it warns where they save nothing."""
    import asdex

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", asdex.DenseColoringWarning)
        return asdex.jacobian_coloring(flat(function, point), vector(point))


def asdex(function: Any, point: Tensor) -> Callable[[], Any]:
    """asdex's planned Jacobian, jitted, in the sparse format that it returns by default."""
    from asdex import jacobian_from_coloring

    planned = jacobian_from_coloring(flat(function, point), detect(function, point))
    return ready(jax.jit(planned), vector(point))


def sparsejac(function: Any, point: Tensor) -> Callable[[], Any]:
    """sparsejac with the pattern that asdex found, since it finds none itself."""
    from sparsejac import jacfwd

    pattern = detect(function, point).sparsity.to_bcoo()
    return ready(jax.jit(jacfwd(flat(function, point), pattern)), vector(point))
