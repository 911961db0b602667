"""The one primitive of the join: for each row, the last row before it or the first row after it in the same group.

Ranks are positions in the recording's global order (time, CPU, file offset), so "before" is exact even where stamps tie.
"""

from __future__ import annotations

import numpy as np
import pandas as pd


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
    Groups become dense codes by hashing and the key ``code * span + rank`` is searched, as in pandas.merge_asof but for many
    groups in one vectorised call. Rows of the look-up side whose group never occurs here find nothing (-1).
    """

    def __init__(self, rank: np.ndarray, *groups: np.ndarray) -> None:
        self._rank = np.asarray(rank, np.int64)
        self._tables: list[pd.Index] = []
        code = np.zeros(len(rank), np.int64)
        for group in groups:
            codes, values = pd.factorize(group)
            self._tables.append(pd.Index(values))
            code = code * max(len(values), 1) + codes
        self._span = int(self._rank.max()) + 2 if len(rank) else 2
        self._order = self._sort(code)
        self._key = (code * self._span + self._rank)[self._order]

    def _sort(self, code: np.ndarray) -> np.ndarray:
        """Return the order of the keys. Rows of one event come in rank order: a stable sort by code is then enough."""
        is_ranked = bool((self._rank[1:] > self._rank[:-1]).all())
        if is_ranked and (not len(code) or code.max() < 1 << 16):
            return np.argsort(code.astype(np.uint16), kind="stable")  # a radix sort: linear
        return np.argsort(code * self._span + self._rank, kind="stable")

    def _locate(self, rank: np.ndarray, groups: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the key of each look-up row's group and whether the group exists."""
        code = np.zeros(len(rank), np.int64)
        known = np.ones(len(rank), bool)
        for table, group in zip(self._tables, groups, strict=True):
            at = table.get_indexer(pd.Index(group))
            known &= at >= 0
            code = code * max(len(table), 1) + at
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
