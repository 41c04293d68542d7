"""Patterns, colourings and cuts as arrays and plain values, and back."""

from __future__ import annotations

import dataclasses

import numpy as np

from pushforward.boundary import Layout
from pushforward.coloring import Coloring
from pushforward.coloring.scheme import Step as Substitution
from pushforward.compressed import Compressed
from pushforward.errors import InputError
from pushforward.factors import Split
from pushforward.pattern import Pattern
from pushforward.saving.archive import Arrays, Header
from pushforward.strategies import Candidate
from pushforward.structure.cuts import Cut, Tensors, Way


def put_pattern(name: str, pattern: Pattern, arrays: Arrays) -> None:
    """Three arrays for a pattern."""
    arrays[f"{name}.shape"] = np.array(pattern.shape)
    arrays[f"{name}.indptr"], arrays[f"{name}.indices"] = pattern.indptr, pattern.indices


def pattern_of(name: str, arrays: Arrays) -> Pattern:
    """Undo `put_pattern`; a pattern checks its arrays."""
    shape = tuple(map(int, arrays[f"{name}.shape"]))
    return Pattern(shape, arrays[f"{name}.indptr"], arrays[f"{name}.indices"])  # type: ignore[arg-type]


def packed_scheme(candidate: Candidate, pattern: Pattern | None, arrays: Arrays) -> Header | None:
    """How entries are found; its arrays go into ``arrays``."""
    if candidate.split is not None:
        split = candidate.split
        return {
            "kind": "split",
            "cuts": [dataclasses.asdict(cut) for cut in split.cuts],
            "way": dataclasses.asdict(split.way),
            "lead": split.lead,
        }
    if candidate.compressed is None:
        return None
    compressed = candidate.compressed
    own = pattern is None or compressed.pattern is not pattern
    if own:
        put_pattern("scheme", compressed.pattern, arrays)
    _put_coloring(compressed.coloring, arrays)
    return {
        "kind": "colouring",
        "own": own,
        "by": compressed.coloring.kind,
        "lower_bound": compressed.coloring.lower_bound,
        "steps": None if compressed.coloring.steps is None else len(compressed.coloring.steps),
    }


def _put_coloring(coloring: Coloring, arrays: Arrays) -> None:
    arrays["coloring.source"] = coloring.source
    for name in ("column_colors", "row_colors"):
        if getattr(coloring, name) is not None:
            arrays[f"coloring.{name}"] = getattr(coloring, name)
    for place, (targets, operands) in enumerate(coloring.steps or ()):
        arrays[f"coloring.targets{place}"], arrays[f"coloring.operands{place}"] = targets, operands


def scheme_of(
    header: Header | None, pattern: Pattern | None, arrays: Arrays, domain: Layout
) -> Compressed | Split | None:
    """Undo `packed_scheme`, and refuse what does not fit the pattern."""
    if header is None:
        return None
    if header["kind"] == "split":
        cuts = tuple(_cut(cut) for cut in header["cuts"])
        split = Split(cuts, _way(header["way"]), tuple(header["lead"]))
        if not split.used or max(split.used) > len(cuts):
            raise InputError("factors that end at no cut")
        return split
    chosen = pattern_of("scheme", arrays) if header["own"] else pattern
    if chosen is None:
        raise InputError("a colouring without a pattern")
    coloring = _coloring(header, arrays)
    _check_coloring(coloring, chosen)
    return Compressed(chosen, coloring, domain.dtype, domain.device)


def _coloring(header: Header, arrays: Arrays) -> Coloring:
    steps = header["steps"]
    return Coloring(
        header["by"],
        _integers(arrays.get("coloring.column_colors")),
        _integers(arrays.get("coloring.row_colors")),
        np.asarray(arrays["coloring.source"], np.int64),
        int(header["lower_bound"]),
        None if steps is None else tuple(_substitution(place, arrays) for place in range(steps)),
    )


def _substitution(place: int, arrays: Arrays) -> Substitution:
    names = (f"coloring.targets{place}", f"coloring.operands{place}")
    return Substitution(*(np.asarray(arrays[name], np.int64) for name in names))


def _integers(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else np.asarray(values, np.int64)


def _check_coloring(coloring: Coloring, pattern: Pattern) -> None:
    """Refuse colours and places that are not those of the pattern."""
    m, n = pattern.shape
    sides = ((coloring.column_colors, n), (coloring.row_colors, m))
    if any(colors is not None and len(colors) != size for colors, size in sides):
        raise InputError("as many colours as rows and columns are expected")
    _check_places(coloring.source, coloring.jvps * m + coloring.vjps * n)
    if len(coloring.source) != pattern.nnz:
        raise InputError("one place for each entry is expected")
    for step in coloring.steps or ():
        for places in step:
            _check_places(places, pattern.nnz)


def _check_places(places: np.ndarray, count: int) -> None:
    if len(places) and not (places.min() >= 0 and places.max() < count):
        raise InputError("a place out of range")


def _cut(header: Header) -> Cut:
    made = tuple((int(number), int(output)) for number, output in header["tensors"]["made"])
    tensors = Tensors(made, tuple(map(int, header["tensors"]["sizes"])))
    return Cut(tensors, int(header["after"]), str(header["name"]))


def _way(header: Header) -> Way:
    parts = tuple(_way(part) for part in header["parts"])
    work = float(header["work"])
    return Way(int(header["start"]), int(header["stop"]), str(header["kind"]), work, parts)
