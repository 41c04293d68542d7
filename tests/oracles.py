"""Independent references: plain ``autograd.grad``, one row at a time, in float64.

Nothing here uses the library, forward mode, vmap or batched gradients, so that a mistake in one of
those cannot hide in both sides of a comparison. Everything is slow and obvious on purpose.

    loop_jacobian(f, x)                      out.shape + x.shape
    loop_dense(f, *args, argnums=0)          the same for pytrees, nested as by ``jacrev``
    loop_matrix(f, *args, argnums=0)         (m, n): the same, flattened
    finite_difference_jacobian(f, x)         out.shape + x.shape, error of fourth order
    reverse_over_reverse(functional, f, x)   gradients of functional(J(x)) in x and in parameters
    loop_hessian(f, x)                       x.shape + x.shape
    loop_laplacian(f, x)                     out.shape
    loop_divergence(f, x)                    ()
    dense_per_sample(f, x)                   (B, *out, *in): a loop over batches of one
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def leaves(tree: Any) -> list[Any]:
    """Leaves of a nest of dicts, tuples, lists, named tuples and dataclasses, as inserted."""
    if not _nested(tree):
        return [tree]
    return [leaf for child in _children(tree) for leaf in leaves(child)]


def rebuild(tree: Any, replacements: Iterator[Any]) -> Any:
    """The same nest with its leaves taken from an iterator."""
    if not _nested(tree):
        return next(replacements)
    children = [rebuild(child, replacements) for child in _children(tree)]
    if isinstance(tree, Mapping):
        return dict(zip(tree, children, strict=True))
    if dataclasses.is_dataclass(tree):
        names = [field.name for field in dataclasses.fields(tree)]
        return type(tree)(**dict(zip(names, children, strict=True)))
    return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)


def is_differentiated(leaf: Any) -> bool:
    """Whether a leaf takes part in a Jacobian: a tensor of real or complex floats."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def loop_jacobian(f: Map, x: Tensor, create_graph: bool = False) -> Tensor:
    """out.shape + x.shape, row by row; ``create_graph`` differentiates ``x`` itself, not a copy."""
    point = x if create_graph else _fresh(x)
    y = f(point.clone())
    rows = [_gradient(entry, point, create_graph) for entry in y.reshape(-1)]
    return _stack(rows, point).reshape((*y.shape, *point.shape))


def loop_dense(f: Callable, *args: Any, argnums: int | Sequence[int] = 0) -> Any:
    """Jacobian of a map between pytrees, nested as the output, then ``argnums``, then the input.

    None stands in the place of an integer leaf of the input.
    """
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    fresh = [_fresh_tree(arg) if i in numbers else arg for i, arg in enumerate(args)]
    y = f(*[_cloned_tree(arg) for arg in fresh])
    blocks = [tuple(_nested_rows(leaf, fresh[i]) for i in numbers) for leaf in leaves(y)]
    return rebuild(y, (block[0] if isinstance(argnums, int) else block for block in blocks))


def loop_matrix(f: Callable, *args: Any, argnums: int | Sequence[int] = 0) -> Tensor:
    """(m, n): ``loop_dense``, outputs below one another, differentiated inputs side by side."""
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    inputs = [leaf for i in numbers for leaf in leaves(args[i]) if is_differentiated(leaf)]
    outputs = leaves(f(*[_cloned_tree(_fresh_tree(arg)) for arg in args]))
    blocks = [leaf for leaf in leaves(loop_dense(f, *args, argnums=argnums)) if leaf is not None]
    width = len(inputs)
    rows = [
        torch.cat(
            [
                block.reshape(out.numel(), leaf.numel())
                for block, leaf in zip(blocks[k * width :], inputs, strict=False)
            ],
            dim=1,
        )
        for k, out in enumerate(outputs)
    ]
    return torch.cat(rows)


def finite_difference_jacobian(f: Map, x: Tensor, step: float = 1e-3) -> Tensor:
    """out.shape + x.shape: central differences at two steps, with an error of fourth order."""
    if x.dtype != torch.float64:
        raise TypeError(f"finite differences need float64, got {x.dtype}")
    coarse, fine = _central_differences(f, x, step), _central_differences(f, x, step / 2)
    return (4 * fine - coarse) / 3


def reverse_over_reverse(
    functional: Callable[[Tensor], Tensor], f: Map, x: Tensor, parameters: Iterable[Tensor] = ()
) -> tuple[Tensor, ...]:
    """Gradients of the scalar ``functional(J(x))`` in ``x``, then in each parameter."""
    point, wanted = _fresh(x), tuple(parameters)
    value = functional(loop_jacobian(f, point, create_graph=True))
    return tuple(_gradient(value, target) for target in (point, *wanted))


def loop_hessian(f: Map, x: Tensor) -> Tensor:
    """x.shape + x.shape for a scalar map, by a loop of backward passes over the gradient."""
    point = _fresh(x)
    gradient = _gradient(f(point.clone()).reshape(()), point, create_graph=True)
    rows = [_gradient(entry, point) for entry in gradient.reshape(-1)]
    return _stack(rows, point).reshape((*point.shape, *point.shape))


def loop_laplacian(f: Map, x: Tensor) -> Tensor:
    """out.shape: the trace of the Hessian of every output."""
    with torch.no_grad():
        shape = f(x.detach().clone()).shape
    hessians = [loop_hessian(lambda z, k=k: f(z).reshape(-1)[k], x) for k in range(shape.numel())]
    traces = [h.reshape(x.numel(), x.numel()).trace() for h in hessians]
    return torch.stack(traces).reshape(shape) if traces else x.new_zeros(shape)


def loop_divergence(f: Map, x: Tensor) -> Tensor:
    """(): the trace of the Jacobian."""
    return loop_jacobian(f, x).reshape(x.numel(), x.numel()).trace()


def dense_per_sample(f: Map, x: Tensor) -> Tensor:
    """(B, *out, *in): ``f`` on batches of one, one after the other."""
    return torch.stack([loop_jacobian(lambda z: f(z[None])[0], sample) for sample in x])


def as_real(f: Map) -> Map:
    """A map between complex tensors as one between real ones with a last axis (real, imaginary)."""

    def real(x: Tensor) -> Tensor:
        y = f(torch.view_as_complex(x))
        return torch.view_as_real(y) if y.is_complex() else y

    return real


def _nested(tree: Any) -> bool:
    return isinstance(tree, Mapping | tuple | list) or (
        dataclasses.is_dataclass(tree) and not isinstance(tree, type)
    )


def _children(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        return list(tree.values())
    if dataclasses.is_dataclass(tree):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    return list(tree)


def _fresh(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _fresh_tree(tree: Any) -> Any:
    return rebuild(tree, iter([_fresh(x) if is_differentiated(x) else x for x in leaves(tree)]))


def _cloned_tree(tree: Any) -> Any:
    """Clones inside the graph, so that a map may write into its own input."""
    return rebuild(tree, iter([x.clone() if isinstance(x, Tensor) else x for x in leaves(tree)]))


def _gradient(entry: Tensor, target: Tensor, create_graph: bool = False) -> Tensor:
    """d entry / d target, zeros where nothing connects the two."""
    if not entry.requires_grad:
        return torch.zeros_like(target)
    (gradient,) = torch.autograd.grad(
        entry, target, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(target) if gradient is None else gradient


def _stack(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like.new_zeros((0, *like.shape))


def _nested_rows(y: Tensor, inputs: Any) -> Any:
    """One output tensor against a pytree of inputs."""

    def block(x: Any) -> Tensor | None:
        if not is_differentiated(x):
            return None
        rows = [_gradient(entry, x) for entry in y.reshape(-1)]
        return _stack(rows, x).reshape((*y.shape, *x.shape))

    return rebuild(inputs, iter([block(x) for x in leaves(inputs)]))


def _central_differences(f: Map, x: Tensor, step: float) -> Tensor:
    base = x.detach()
    columns = []
    for i in range(base.numel()):
        offset = torch.zeros(base.numel(), dtype=base.dtype)
        offset[i] = step
        offset = offset.reshape(base.shape)
        columns.append((f(base + offset).detach() - f(base - offset).detach()) / (2 * step))
    if not columns:
        return torch.zeros((*f(base.clone()).shape, *base.shape), dtype=base.dtype)
    return torch.stack(columns, dim=-1).reshape((*columns[0].shape, *base.shape))
