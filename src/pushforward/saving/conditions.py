"""What a plan relied on, as far as it can be recognised in another process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.circumstances import Circumstances, dense_parts
from pushforward.planning import Recipe
from pushforward.saving.archive import Header


@dataclass(frozen=True)
class Conditions:
    """What a plan that was loaded must find again.

    Attributes:
        steps: ops and the whole numbers among their arguments, by their numbers in a run.
        constants: of tensors that served as structure, where each is found from the function, and
            its digest.
        unplaced: how many more such tensors there were, which cannot be found again.
        arguments: digests of integer arguments, None in the place of others.
        at_point: whether the structure held at one point only.
    """

    steps: tuple[tuple[int, str], ...]
    constants: tuple[tuple[int, str], ...]
    unplaced: int
    arguments: tuple[str | None, ...]
    at_point: bool


def digest(tensor: Tensor) -> str:
    """What tells whether a tensor has the same shape, dtype and values."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    content = b"".join(map(_bytes_of, dense_parts(tensor.detach())))
    return hashlib.sha256(kind + content).hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    plain = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def conditions(recipe: Recipe) -> Conditions:
    """What a recipe relies on."""
    circumstances = recipe.circumstances
    # An op that writes in place, or is no plain op, may be named otherwise at another run.
    graph = recipe.structure.graph
    plain = [(step.number, step.call) for step in graph.steps if not step.mutates]
    steps = tuple(sorted([*plain, *graph.views]))
    if circumstances is None:
        return Conditions(steps, (), 0, (), False)
    placed, unplaced = _placed(circumstances)
    arguments = tuple(None if t is None else digest(t) for t in circumstances.arguments)
    return Conditions(steps, placed, unplaced, arguments, circumstances.at_point)


def _placed(circumstances: Circumstances) -> tuple[tuple[tuple[int, str], ...], int]:
    """Where the tensors that served as structure are found, and how many are found nowhere."""
    places = {place.number: k for k, place in enumerate(circumstances.state.places)}
    tensors = [constant.tensor() for constant in circumstances.constants]
    alive = [tensor for tensor in tensors if tensor is not None]
    known = tuple((places[id(t)], digest(t)) for t in alive if id(t) in places)
    return known, len(alive) - len(known)


def conditions_of(header: Header) -> Conditions:
    """Undo ``asdict``."""
    return Conditions(
        tuple((int(number), str(name)) for number, name in header["steps"]),
        tuple((int(place), str(code)) for place, code in header["constants"]),
        int(header["unplaced"]),
        tuple(code if code is None else str(code) for code in header["arguments"]),
        bool(header["at_point"]),
    )
