"""The graph of a run: its ops in order, what each reads and writes, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

# The content of a storage between two writes: its number, and how often it was written.
Value = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """One op that something depends on.

    Attributes:
        op: its name; ``call`` has whole numbers, flags and words among its arguments too.
        number: which op of the run it was, those that nothing depends on counted.
        reads, writes: the values; ``sizes`` are the elements of each output.
        flops, moved: operations, and bytes of the outputs.
        mutates: whether it wrote into a storage that was there before, or is no plain op.
    """

    op: str
    call: str
    number: int
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    sizes: tuple[int, ...]
    flops: int
    moved: int
    mutates: bool


@dataclass
class Graph:
    """The steps of a run between its inputs and its outputs.

    ``affine`` says that no op multiplied, or bent, what depends on the inputs. ``views`` are calls
    that made views of it, by their numbers.
    """

    steps: list[Step] = field(default_factory=list)
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    affine: bool = True
    views: list[tuple[int, str]] = field(default_factory=list)


def call_of(func: Any, args: Any, kwargs: Any) -> str:
    """The name of an op, with whole numbers, flags and words among its arguments."""
    leaves = pytree.tree_leaves((args, kwargs))
    plain = [leaf for leaf in leaves if isinstance(leaf, (bool, int, str))]
    return f"{func.overloadpacket.__name__}{plain or ''}"


def is_counted(func: Any) -> bool:
    """Whether an op gets a number, by which it is found in another run.

    Functions that make tensors detach them only where somebody who looks on keeps them.
    """
    return func is not torch.ops.aten.detach.default
