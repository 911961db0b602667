"""The one primitive of the join: for each row, the last row before it or the first row after it in the same group.

Ranks are positions in the recording's global order (time, CPU, file offset), so "before" is exact even where stamps tie.
"""

from __future__ import annotations

import numpy as np


class AsOf:
    """Rows of one event type, indexed for as-of look-ups within groups.

    Parameters
    ----------
    rank : int64 array, dims (row,)
        Global order of the rows; unique.
    *groups : integer arrays, dims (row,)
        What must be equal (CPU, tid, skb address, ...). Several are combined.

    Notes
    -----
    Groups become dense codes and the key ``code * span + rank`` is searched, as in pandas.merge_asof but for many groups in
    one vectorised call. Rows of the look-up side whose group never occurs here find nothing (-1).
    """

    def __init__(self, rank: np.ndarray, *groups: np.ndarray) -> None:
        self._tables: list[np.ndarray] = []
        self._sizes: list[int] = []
        code = np.zeros(len(rank), np.int64)
        for group in groups:
            table, inverse = np.unique(group, return_inverse=True)
            self._tables.append(table)
            code = code * (len(table) + 1) + inverse
        self._span = int(rank.max()) + 2 if len(rank) else 2
        key = code * self._span + rank
        self._order = np.argsort(key, kind="stable")
        self._key = key[self._order]
        self._rank = np.asarray(rank, np.int64)

    def _locate(self, rank: np.ndarray, groups: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the key of each look-up row's group and whether the group exists."""
        code = np.zeros(len(rank), np.int64)
        known = np.ones(len(rank), bool)
        for table, group in zip(self._tables, groups, strict=True):
            if not len(table):
                return code, np.zeros(len(rank), bool)
            at = np.minimum(np.searchsorted(table, group), len(table) - 1)
            known &= table[at] == group
            code = code * (len(table) + 1) + at
        return code * self._span, known

    def last_before(self, rank: np.ndarray, *groups: np.ndarray, inclusive: bool = False) -> np.ndarray:
        """Return for each look-up row the index of the last row of its group with a lower rank, or -1."""
        base, known = self._locate(rank, groups)
        wanted = np.clip(rank, -1, self._span - 1)
        at = np.searchsorted(self._key, base + wanted, side="right" if inclusive else "left") - 1
        return self._checked(at, base, known & (rank >= 0))

    def first_after(self, rank: np.ndarray, *groups: np.ndarray, inclusive: bool = False) -> np.ndarray:
        """Return for each look-up row the index of the first row of its group with a higher rank, or -1."""
        base, known = self._locate(rank, groups)
        wanted = np.clip(rank, -1, self._span - 1)
        at = np.searchsorted(self._key, base + wanted, side="left" if inclusive else "right")
        return self._checked(at, base, known & (rank >= 0))

    def _checked(self, at: np.ndarray, base: np.ndarray, known: np.ndarray) -> np.ndarray:
        if not len(self._key):
            return np.full(len(at), -1, np.int64)
        inside = known & (at >= 0) & (at < len(self._key))
        safe = np.where(inside, at, 0)
        key = self._key[safe]
        inside &= (key >= base) & (key < base + self._span)
        return np.where(inside, self._order[safe], -1)

    def rank_of(self, row: np.ndarray, missing: int) -> np.ndarray:
        """Return the rank of each found row, `missing` where none was found."""
        return pick(self._rank, row, missing)


def pick(values: np.ndarray, row: np.ndarray, missing: int) -> np.ndarray:
    """Return ``values[row]`` with `missing` where ``row`` is -1."""
    if not len(values):
        return np.full(len(row), missing, values.dtype)
    return np.where(row >= 0, values[np.maximum(row, 0)], np.asarray(missing).astype(values.dtype))
