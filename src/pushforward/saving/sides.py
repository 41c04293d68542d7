"""The sides of a map as plain values, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pushforward.boundary import Layout, Leaf, Structure
from pushforward.errors import InputError
from pushforward.saving.archive import Header


def packed_side(layout: Layout) -> Header:
    """One side of a map: its tree as a signature, and its leaves."""
    leaves = [
        [list(leaf.shape), _dtype_name(leaf.dtype), leaf.device and str(leaf.device)]
        for leaf in layout.leaves
    ]
    return {"tree": layout.structure.signature, "leaves": leaves, "batch": layout.batch}


def layout_of(side: Header) -> Layout:
    """Undo `packed_side`; of a tree of several leaves only the signature comes back."""
    leaves = tuple(
        Leaf(tuple(map(int, shape)), dtype and _dtype(dtype), device and torch.device(device))
        for shape, dtype, device in side["leaves"]
    )
    single = Structure.of(torch.empty(0))[1]
    structure = single if side["tree"] == single.signature else _Recalled.by(side["tree"])
    layout = Layout(structure, leaves, side["batch"])
    if not layout.active:
        raise InputError("a side without anything to differentiate")
    return layout


@dataclass(frozen=True)
class _Recalled(Structure):
    """A tree of which only the signature is known."""

    text: str = ""

    @staticmethod
    def by(signature: str) -> _Recalled:
        made = _Recalled(None, (), signature)
        made.__dict__["signature"] = str(signature)
        return made


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise InputError(f"{name} is no dtype")
    return found
