"""A table of unique sets of variables: elements of tensors hold numbers of sets, not sets.

Number 0 is the empty set, held by an element whose value is constant. Number 1 is the empty set
too, held by an element whose value varies without a derivative (a parameter, an index, a random
number). From 2 on come sets of variables, each entered once.

Small sets are kept as sorted lists; from where lists grow long, new sets are kept as rows of bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pushforward.errors import PushforwardError

EMPTY, VARIES, FIRST = 0, 1, 2

# Unions of more than this many members are made of bits: sorting them would take longer.
_LIST_MEMBERS = 96
# Sets are merged this many words at a time, which bounds what a merge allocates.
_MERGE_WORDS = 1 << 21
# Lists are worked on this many members at a time.
_BLOCK = 1 << 16
# So many sets are merged at once; more go in rounds, which share their halves.
_AT_ONCE = 64
# Up to this many new sets are looked up among the old ones; more are rarely there.
_LOOKED_UP = 1 << 14


class TooManySets(PushforwardError):
    """The table has outgrown its budget: the structure is too fine to be worth following."""


class Sets:
    """Sets of the variables 0 to ``count`` - 1, by number.

    Args:
        count: how many variables there are.
        budget: the most bytes that the table may take.
    """

    def __init__(self, count: int, budget: int = 1 << 29) -> None:
        self.count, self.budget = count, budget
        draws = np.random.default_rng(0).integers(1, 1 << 63, count + 1, dtype=np.uint64)
        self._weights = draws * np.uint64(2) + np.uint64(1)
        self._known: dict[int, int] = {}
        self._lists = _Lists.singles(count)
        self._bits: _Bits | None = None
        self.lengths = np.ones(count, np.int64)
        self._remember(np.arange(count), self._lists.hashes(self._weights))

    def __len__(self) -> int:
        return len(self.lengths) + FIRST

    def single(self, variables: np.ndarray) -> np.ndarray:
        """The numbers of the sets that hold one variable each."""
        return (variables + FIRST).astype(np.int32)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """How many variables each set holds."""
        real = numbers >= FIRST
        sizes = np.zeros(numbers.shape, np.int64)
        sizes[real] = self.lengths[numbers[real] - FIRST]
        return sizes

    def members(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All members of some sets (N,): where those of each begin, (N + 1,), and the members."""
        starts = np.concatenate([[0], np.cumsum(self.sizes(numbers))])
        unique, inverse = _unique(numbers[numbers >= FIRST].astype(np.int64) - FIRST)
        listed = unique < len(self._lists)
        entries = [self._lists.gather(unique[listed])]
        if not listed.all() and self._bits is not None:
            entries.append(self._bits.members(unique[~listed] - len(self._lists)))
        flat = np.concatenate(entries)
        if len(unique) == len(inverse) and (inverse[1:] > inverse[:-1]).all():
            return starts, flat
        begins = np.concatenate([[0], np.cumsum(self.lengths[unique])])
        return starts, _Lists(begins, flat, self.count).gather(inverse)

    def unite(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The unions of two arrays of sets, element by element, broadcast."""
        one, other = np.broadcast_arrays(one, other)
        low, high = np.minimum(one, other), np.maximum(one, other)
        mixed = (low != high) & (low >= FIRST)
        if not mixed.any():
            return np.asarray(high)
        low, united = low[mixed].astype(np.int64), np.array(high)
        size = len(self) + 1
        keys, inverse = _unique(low * size + high[mixed])
        pairs = np.stack(np.divmod(keys, size), 1) - FIRST
        united[mixed] = self._merge(pairs)[inverse]
        return united

    def unite_all(self, arrays: list[np.ndarray]) -> np.ndarray:
        """The union of several arrays of sets, element by element, broadcast."""
        if len(arrays) <= 2:
            return np.asarray(arrays[0]) if len(arrays) == 1 else self.unite(*arrays)
        return self.unite_axis(np.stack(np.broadcast_arrays(*arrays)), 0)

    def unite_axis(self, numbers: np.ndarray, axis: int = -1) -> np.ndarray:
        """The unions along one axis, which goes away."""
        rows = np.moveaxis(numbers, axis, 0)
        if len(rows) == 0:
            return np.zeros(rows.shape[1:], np.int32)
        if len(rows) == 1 or (rows[1:] == rows[0]).all():
            return np.asarray(rows[0])
        if len(rows) == 2:
            return self.unite(rows[0], rows[1])
        return self._unite_columns(rows.reshape(len(rows), -1)).reshape(rows.shape[1:])

    def unite_groups(self, starts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The unions of ragged groups: group g holds ``numbers[starts[g]:starts[g + 1]]``."""
        lengths = np.diff(starts)
        united, width = np.zeros(len(lengths), np.int32), 1
        while width // 2 < lengths.max(initial=0):
            chosen = np.flatnonzero((lengths > width // 2) & (lengths <= width))
            if len(chosen):
                places = starts[chosen, None] + np.arange(width)
                inside = np.arange(width) < lengths[chosen, None]
                padded = np.where(inside, numbers[np.where(inside, places, 0)], 0)
                united[chosen] = self.unite_axis(padded)
            width *= 2
        return united

    def _unite_columns(self, rows: np.ndarray) -> np.ndarray:
        """The union of each column of (K, N): columns alike are merged once."""
        while len(rows) > _AT_ONCE:
            whole = len(rows) // _AT_ONCE * _AT_ONCE
            parts = [self._unite_columns(rows[i : i + _AT_ONCE]) for i in range(0, whole, _AT_ONCE)]
            rows = np.concatenate([np.stack(parts), rows[whole:]])
        if len(rows) == 1:
            return rows[0]
        rows = np.sort(rows, axis=0)[::-1]
        same = rows[1:] == rows[:-1]
        repeated = np.concatenate([np.zeros_like(same[:1]), same]) | (rows < FIRST)
        repeated[0] = False
        top = rows[0]
        distinct = np.where(repeated, 0, rows).astype(np.int64)
        mixed = distinct[1:].any(0)
        if not mixed.any():
            return top
        chosen = distinct[:, mixed]
        index, inverse = _unique_columns(chosen)
        united = top.copy()
        united[mixed] = self._merge(chosen[:, index].T - FIRST)[inverse]
        return united

    def _merge(self, rows: np.ndarray) -> np.ndarray:
        """Enter the unions of rows (P, K), negative where there is none, and give their numbers."""
        widths = self.lengths[np.maximum(rows, 0)] * (rows >= 0)
        total = int(widths.sum(1).max())
        if self._bits is None and (total > _LIST_MEMBERS and total * 8 > self.count):
            self._bits = _Bits(self.count)
        width = total if self._bits is None else self._bits.words
        step = max(1, _MERGE_WORDS // max(width, 1))
        parts = [self._merge_some(rows[i : i + step]) for i in range(0, len(rows), step)]
        return np.concatenate(parts).astype(np.int32)

    def _merge_some(self, rows: np.ndarray) -> np.ndarray:
        merged: _Lists | np.ndarray
        if self._bits is None:
            lists = self._lists.merged(rows)
            merged, lengths = lists, lists.lengths
        else:
            bits = self._as_bits(rows[:, 0])
            for column in rows.T[1:]:
                bits |= self._as_bits(column)
            merged, lengths = bits, np.bitwise_count(bits).sum(1, dtype=np.int64)
        numbers = np.full(len(rows), -1)
        for column in rows.T:
            whole = (column >= 0) & (self.lengths[np.maximum(column, 0)] == lengths)
            numbers[whole] = column[whole] + FIRST
        fresh = np.flatnonzero(numbers < 0)
        if len(fresh):
            numbers[fresh] = self._enter(merged, fresh, lengths)
        return numbers

    def _as_bits(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the table as bits, whatever they are kept as; none is empty."""
        assert self._bits is not None
        bits = np.zeros((len(rows), self._bits.words), np.uint64)
        later = rows >= len(self._lists)
        if later.any():
            bits[later] = self._bits.rows[rows[later] - len(self._lists)]
        listed = np.flatnonzero((rows >= 0) & ~later)
        if len(listed):
            _set_bits(bits, listed, *self._lists.flat(rows[listed]))
        return bits

    def _enter(
        self, merged: _Lists | np.ndarray, chosen: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """Numbers of sets that are no row yet that they were made of."""
        rows = merged.take(chosen) if isinstance(merged, _Lists) else merged[chosen]
        hashes = rows.hashes(self._weights) if isinstance(rows, _Lists) else self._hashed(rows)
        unique, index, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        numbers = np.full(len(unique), -1)
        if len(unique) <= _LOOKED_UP:
            numbers[:] = [self._known.get(each, -1) for each in unique.tolist()]
        new = index[numbers < 0]
        if len(new):
            fresh = np.arange(len(new)) + len(self)
            numbers[numbers < 0] = fresh
            self._append(rows.take(new) if isinstance(rows, _Lists) else rows[new])
            self.lengths = np.concatenate([self.lengths, lengths[chosen][new]])
            self._remember(fresh - FIRST, hashes[new])
        return numbers[inverse]

    def _hashed(self, bits: np.ndarray) -> np.ndarray:
        # Hashes of lists and of bits never meet: the known lists are those from before the bits.
        weights = self._weights[: bits.shape[1]]
        mixed = bits * weights
        mixed ^= mixed >> np.uint64(32)
        mixed *= weights
        return mixed.sum(1)

    def _append(self, rows: _Lists | np.ndarray) -> None:
        if isinstance(rows, _Lists):
            self._lists.extend(rows)
        elif self._bits is not None:
            self._bits.extend(rows)
        taken = self._lists.nbytes + (0 if self._bits is None else self._bits.nbytes)
        if taken > self.budget:
            raise TooManySets(f"expected sets that fit in {self.budget} bytes, got {taken}")

    def _remember(self, rows: np.ndarray, hashes: np.ndarray) -> None:
        if len(rows) <= _LOOKED_UP:
            self._known.update(zip(hashes.tolist(), (rows + FIRST).tolist(), strict=True))


def _unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unique keys and where each key is among them; quick where keys already ascend."""
    if len(keys) < 2 or bool((keys[1:] > keys[:-1]).all()):
        return keys, np.arange(len(keys))
    return np.unique(keys, return_inverse=True)


def _unique_columns(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which columns of (K, N) are unique, and which of those each column is."""
    mixed = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    _, index, inverse = np.unique(mixed.sum(0), return_index=True, return_inverse=True)
    return index, inverse


def _set_bits(bits: np.ndarray, rows: np.ndarray, lengths: np.ndarray, entries: np.ndarray) -> None:
    owners = np.repeat(rows, lengths)
    words, places = entries // 64, (entries % 64).astype(np.uint64)
    flat = bits.reshape(-1)
    np.bitwise_or.at(flat, owners * bits.shape[1] + words, np.uint64(1) << places)


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Cut rows into blocks that stay in the cache, and in memory that is used again."""
    step = max(1, _BLOCK // max(width, 1))
    return (slice(first, first + step) for first in range(0, rows, step))


class _Lists:
    """Sets as sorted lists, one after the other."""

    def __init__(self, starts: np.ndarray, entries: np.ndarray, count: int) -> None:
        self._starts, self._entries, self._count = starts, entries, count
        self.lengths = np.diff(starts)

    @staticmethod
    def singles(count: int) -> _Lists:
        return _Lists(np.arange(count + 1), np.arange(count, dtype=np.int32), count)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return self._entries.nbytes + self._starts.nbytes

    def flat(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How long some rows are, and their entries."""
        return self.lengths[rows], self.gather(rows)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The entries of some rows, one after the other."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        found = np.empty(int(ends[-1]) if len(ends) else 0, self._entries.dtype)
        for part in _blocks(len(rows), int(lengths.max(initial=0))):
            mine, stop = lengths[part], ends[part]
            first = stop[0] - mine[0]
            shift = np.repeat(self._starts[rows[part]] - (stop - mine), mine)
            found[first : stop[-1]] = self._entries[shift + np.arange(first, stop[-1])]
        return found

    def merged(self, rows: np.ndarray) -> _Lists:
        """The unions of rows (P, K), negative where there is none."""
        width = int(self.lengths[np.maximum(rows, 0)].max(initial=0)) * rows.shape[1]
        parts = [self._merged(rows[part]) for part in _blocks(len(rows), width)]
        sizes = np.concatenate([np.zeros(1, np.int64), *(size for size, _ in parts)])
        entries = [entries for _, entries in parts] or [self._entries[:0]]
        return _Lists(np.cumsum(sizes), np.concatenate(entries), self._count)

    def _merged(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.concatenate([self._padded(column) for column in rows.T], axis=1)
        padded.sort(axis=1)
        kept = padded < self._count
        kept[:, 1:] &= padded[:, 1:] != padded[:, :-1]
        return kept.sum(1), padded[kept]

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        """The entries of rows side by side, filled up with a number past all variables."""
        there = rows >= 0
        rows = np.where(there, rows, 0)
        lengths = self.lengths[rows] * there
        width = int(lengths.max(initial=0))
        places = self._starts[rows, None] + np.arange(width)
        if (lengths == width).all():
            return self._entries[places]
        inside = np.arange(width) < lengths[:, None]
        return np.where(inside, self._entries[np.where(inside, places, 0)], self._count)

    def take(self, rows: np.ndarray) -> _Lists:
        starts = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        return _Lists(starts, self.gather(rows), self._count)

    def hashes(self, weights: np.ndarray) -> np.ndarray:
        if not len(self):
            return np.zeros(0, np.uint64)
        return np.add.reduceat(weights[self._entries], self._starts[:-1])

    def extend(self, rows: _Lists) -> None:
        self._starts = np.concatenate([self._starts, self._starts[-1] + rows._starts[1:]])
        self._entries = np.concatenate([self._entries, rows._entries])
        self.lengths = np.concatenate([self.lengths, rows.lengths])


class _Bits:
    """Sets as rows of bits."""

    def __init__(self, count: int) -> None:
        self.words = max(1, (count + 63) // 64)
        self._room, self._used = np.empty((0, self.words), np.uint64), 0

    @property
    def rows(self) -> np.ndarray:
        return self._room[: self._used]

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def extend(self, rows: np.ndarray) -> None:
        used = self._used + len(rows)
        if used > len(self._room):
            room = np.empty((max(used, 2 * self._used), self.words), np.uint64)
            room[: self._used] = self.rows
            self._room = room
        self._room[self._used : used] = rows
        self._used = used

    def members(self, rows: np.ndarray) -> np.ndarray:
        """The members of some rows, one after the other."""
        step = max(1, _MERGE_WORDS // (self.words * 8))
        parts = [
            np.nonzero(_unpacked(self.rows[rows[i : i + step]]))[1]
            for i in range(0, len(rows), step)
        ]
        return np.concatenate(parts).astype(np.int32)


def _unpacked(words: np.ndarray) -> np.ndarray:
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").view(bool)
