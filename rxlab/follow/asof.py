"""The one primitive of the join: for each row, the last row before it or the first row after it in the same group.

Ranks are positions in the recording's global order (time, CPU, file offset), so "before" is exact even where stamps tie.
"""

from __future__ import annotations

import math

import numpy as np

from rxlab.read.compiler import njit

_LEAST, _MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max
# Groups whose numbers lie so close together (CPUs, mostly) are counted in a table instead of a hash.
_CLOSE = 1_024
_NO_TABLE = np.empty(0, np.int64)


class AsOf:
    """Rows of one event type, indexed for as-of look-ups within groups.

    Parameters
    ----------
    rank : int64 array, dims (row,)
        Global order of the rows, none below 0 is ever found; of equal ones the order of the rows counts.
    *groups : integer arrays, dims (row,)
        What must be equal (CPU, tid, skb address, ...). Several are combined.

    Notes
    -----
    The rows of each group lie together, in order. Both sides of a look-up come nearly in order of rank, so each search begins
    where its group's last one ended: a merge, whose cost does not grow with the recording, and still right in any order.
    Rows of the look-up side whose group never occurs here find nothing (-1).
    """

    def __init__(self, rank: np.ndarray, *groups: np.ndarray) -> None:
        self._rank = np.ascontiguousarray(rank, np.int64)
        n = len(self._rank)
        self._tables = [_Table.of(group) for group in groups]
        self._pairs: _Table | None = None
        size = math.prod(table.size for table in self._tables)
        if len(groups) > 1 and size > max(_CLOSE, 2 * n):
            # Of all combinations few occur.
            self._pairs = _Table.of(self._combined(groups, n))
            size = self._pairs.size
        self._size, number = size, np.int32 if n <= np.iinfo(np.int32).max else np.int64
        if len(groups) == 1 and size == 1 and _is_in_order(self._rank):
            # One group, and its rows lie as they are to lie.
            self._start, self._order, self._key = np.array([0, n]), np.empty(0, number), self._rank
            return
        self._start, self._order, self._key = np.empty(size + 1, np.int64), np.empty(n, number), np.empty(n, np.int64)
        code, low = self._codes(groups, n)
        if not _lay_out(self._rank, code, low, _NO_TABLE, self._start, self._order, self._key):
            by_rank = np.argsort(self._rank, kind="stable")
            _lay_out(self._rank, code, low, by_rank, self._start, self._order, self._key)

    def _find(self, rank: np.ndarray, groups: tuple[np.ndarray, ...], add: int, back: int) -> np.ndarray:
        """Return the row at (`back` 1: before) each look-up row's first place not below ``rank + add`` in its group."""
        code, low = self._codes(groups, len(rank))
        found = np.empty(len(rank), np.int64)
        _search(np.ascontiguousarray(rank, np.int64), code, low, self._start, self._key, self._order, add, back, found)
        return found

    def _codes(self, groups: tuple[np.ndarray, ...], n: int) -> tuple[np.ndarray, int]:
        """Return numbers, and what to take from each for the code of the group of each of `n` rows; no code where it never occurs."""
        if len(groups) == 1 and self._tables[0].is_near:
            return _as_signed(groups[0]), self._tables[0].low
        code = self._combined(groups, n)
        if self._pairs is not None:
            code, combined = np.zeros(n, np.int64), code
            self._pairs.add_to(code, combined)
        return code, 0

    def _combined(self, groups: tuple[np.ndarray, ...], n: int) -> np.ndarray:
        """Return one number for the groups of each row, -1 where one of them never occurs."""
        code = np.zeros(n, np.int64)
        for table, group in zip(self._tables, groups, strict=True):
            table.add_to(code, group)
        return code

    def last_before(self, rank: np.ndarray, *groups: np.ndarray, inclusive: bool = False) -> np.ndarray:
        """Return for each look-up row the index of the last row of its group with a lower rank, or -1."""
        return self._find(rank, groups, int(inclusive), 1)

    def first_after(self, rank: np.ndarray, *groups: np.ndarray, inclusive: bool = False) -> np.ndarray:
        """Return for each look-up row the index of the first row of its group with a higher rank, or -1."""
        return self._find(rank, groups, int(not inclusive), 0)

    def rows_of(self, *group: np.ndarray) -> np.ndarray:
        """Return the rows of one group (each number in an array of one) in order of rank."""
        rows = self._of(group)
        return self._order[rows] if len(self._order) else np.arange(rows.start, rows.stop)

    def ranks_of(self, *group: np.ndarray) -> np.ndarray:
        """Return the ranks of one group's rows, in order."""
        return self._key[self._of(group)]

    def _of(self, group: tuple[np.ndarray, ...]) -> slice:
        number, low = self._codes(group, 1)
        code = int(number[0]) - low
        return slice(*self._start[code : code + 2].tolist()) if 0 <= code < self._size else slice(0, 0)

    def rank_of(self, row: np.ndarray, missing: int) -> np.ndarray:
        """Return the rank of each found row, `missing` where none was found."""
        return pick(self._rank, row, missing)


class _Table:
    """The numbers that occur, each with a code from 0 on: by their distance from the lowest, or hashed."""

    def __init__(self, low: int, size: int, keys: np.ndarray, slots: np.ndarray) -> None:
        self.low, self.size, self.keys, self.slots = low, size, keys, slots

    @property
    def is_near(self) -> bool:
        """Whether the code of a number is its distance from the lowest."""
        return not len(self.keys)

    @classmethod
    def of(cls, numbers: np.ndarray) -> _Table:
        """Return the table of some numbers."""
        numbers = _as_signed(numbers)
        if not len(numbers):
            return cls(0, 0, _NO_TABLE, _NO_TABLE)
        low, high = int(numbers.min()), int(numbers.max())
        if high - low < max(_CLOSE, 2 * len(numbers)):
            return cls(low, high - low + 1, _NO_TABLE, _NO_TABLE)
        keys, slots, size = _hashed(_as_int64(numbers))
        return cls(0, int(size), keys, slots)

    def add_to(self, code: np.ndarray, numbers: np.ndarray) -> None:
        """Make each code one of (code, number), -1 where the number does not occur."""
        _combine(code, _as_int64(numbers), self.low, self.size, self.keys, self.slots)


def _as_signed(numbers: np.ndarray) -> np.ndarray:
    """Return integers of 32 bits as they are, others as int64."""
    return np.ascontiguousarray(numbers) if numbers.dtype == np.int32 else _as_int64(numbers)


def _as_int64(numbers: np.ndarray) -> np.ndarray:
    """Return integers as int64; those of 64 bits without sign keep their bits."""
    numbers = np.asarray(numbers)
    numbers = numbers.view(np.int64) if numbers.dtype == np.uint64 else numbers
    return np.ascontiguousarray(numbers, np.int64)


def places(keys: np.ndarray, wanted: np.ndarray, *, inclusive: bool = False) -> np.ndarray:
    """Return how many of the ordered keys are below each wanted number (`inclusive`: or equal); int64, quick where those are nearly in order."""
    found = np.empty(len(wanted), np.int64)
    _places(np.ascontiguousarray(keys, np.int64), np.ascontiguousarray(wanted, np.int64), int(inclusive), found)
    return found


def pick(values: np.ndarray, row: np.ndarray, missing: int) -> np.ndarray:
    """Return ``values[row]`` with `missing` where ``row`` is -1."""
    values = np.asarray(values)
    if not len(values):
        return np.full(len(row), missing, values.dtype)
    picked = np.empty(len(row), values.dtype)
    # The kernel is compiled once for each width.
    width = np.dtype(f"i{values.itemsize}")
    none = np.asarray(missing).astype(values.dtype).view(width)[()]
    _pick(np.ascontiguousarray(values).view(width), np.ascontiguousarray(row, np.int64), none, picked.view(width))
    return picked


@njit(cache=True, nogil=True)
def _pick(values, row, missing, picked):
    """See :func:`pick`."""
    for i in range(len(row)):
        if row[i] >= len(values):
            raise IndexError("a row beyond the last")
        picked[i] = values[row[i]] if row[i] >= 0 else missing


@njit(cache=True, nogil=True)
def _place(number, mask):
    """Return where in a table a number is looked for first (Knuth's multiplicative hash, its high bits)."""
    return np.int64((np.uint64(number) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask


@njit(cache=True, nogil=True)
def _hashed(numbers):
    """Return a hash table of the numbers that occur and their codes, and how many there are."""
    capacity = 1 << 10
    keys, slots = np.empty(capacity, np.int64), np.full(capacity, -1, np.int64)
    size = 0
    for number in numbers:
        at = _place(number, capacity - 1)
        while slots[at] >= 0 and keys[at] != number:
            at = (at + 1) & (capacity - 1)
        if slots[at] >= 0:
            continue
        keys[at], slots[at] = number, size
        size += 1
        if 2 * size > capacity:
            old_keys, old_slots = keys, slots
            capacity *= 4
            keys, slots = np.empty(capacity, np.int64), np.full(capacity, -1, np.int64)
            for k in range(len(old_slots)):
                if old_slots[k] >= 0:
                    at = _place(old_keys[k], capacity - 1)
                    while slots[at] >= 0:
                        at = (at + 1) & (capacity - 1)
                    keys[at], slots[at] = old_keys[k], old_slots[k]
    return keys, slots, size


@njit(cache=True, nogil=True)
def _combine(code, numbers, low, size, keys, slots):
    """See :meth:`_Table.add_to`."""
    mask = len(keys) - 1
    for i in range(len(code)):
        number, mine = numbers[i], np.int64(-1)
        if mask < 0:
            if low <= number < low + size:
                mine = number - low
        else:
            at = _place(number, mask)
            while slots[at] >= 0 and keys[at] != number:
                at = (at + 1) & mask
            mine = slots[at]
        code[i] = code[i] * size + mine if code[i] >= 0 and mine >= 0 else -1


@njit(cache=True, nogil=True)
def _is_in_order(rank):
    """Tell whether no rank is below the one before it."""
    last = _LEAST
    for one in rank:
        if one < last:
            return False
        last = one
    return True


@njit(cache=True, nogil=True)
def _lay_out(rank, code, low, by_rank, start, order, key):
    """Lay the rows of each group together, in the order they come or `by_rank`; tell whether their ranks are in order then."""
    start[:] = 0
    for one in code:
        start[one - low + 1] += 1
    for group in range(1, len(start)):
        start[group] += start[group - 1]
    fill = start[:-1].copy()
    for i in range(len(rank)):
        row = by_rank[i] if len(by_rank) else i
        group = code[row] - low
        at = fill[group]
        if at > start[group] and key[at - 1] > rank[row]:
            return False
        order[at], key[at] = row, rank[row]
        fill[group] = at + 1
    return True


@njit(cache=True, nogil=True)
def outward(key, first, end, want, near):
    """Return the first place from `first` to `end` whose key is not below `want`: outward from one that is near, in steps
    that double, then by halves."""
    low = high = near
    step = 1
    if low < end and key[low] < want:
        while high < end and key[high] < want:
            low = high + 1
            high = min(low + step, end)
            step *= 2
    else:
        while low > first and key[low - 1] >= want:
            high = low - 1
            low = max(high - step, first)
            step *= 2
    while low < high:
        middle = (low + high) // 2
        if key[middle] < want:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _places(keys, wanted, add, found):
    """See :func:`places`."""
    at = 0
    for i in range(len(wanted)):
        at = outward(keys, 0, len(keys), min(wanted[i], _MOST - 1) + add, at)
        found[i] = at


@njit(cache=True, nogil=True)
def _search(rank, code, low, start, key, order, add, back, found):
    """See :meth:`AsOf._find`."""
    cursor = start.copy()
    high = low + len(start) - 1
    for i in range(len(rank)):
        found[i] = -1
        if code[i] < low or code[i] >= high or rank[i] < 0:
            continue
        group = code[i] - low
        first, end, want = start[group], start[group + 1], min(rank[i], _MOST - 1) + add
        cursor[group] = outward(key, first, end, want, cursor[group])
        at = cursor[group] - back
        if first <= at < end and key[at] >= 0:
            found[i] = order[at] if len(order) else at
