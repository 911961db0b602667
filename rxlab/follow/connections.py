"""TCP connections that follow each other on the same ports: each is a flow of its own, as Wireshark's tcp.stream has it.

The sockets differ, and the sequence numbers may lie over each other: a connection's first one is taken from a clock that counts
64 ns (net/core/secure_seq.c), while a sender may fill more than a byte of the stream in that time.
"""

from __future__ import annotations

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.status import TCP
from rxlab.read.columns import Columns

_SYN, _RST = 0x02, 0x04


class Connections:
    """How many connections each direction of a 5-tuple has had, from piece to piece of a capture."""

    def __init__(self) -> None:
        self._initial: dict[int, int] = {}
        self._ordinal: dict[int, int] = {}

    def ordinals(self, received: Columns, key: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Tell of which connection of its 5-tuple each packet is.

        Parameters
        ----------
        received : Columns, dims (packet,), in the order of the capture
            ``proto``, ``seq``, ``tcp_flags``.
        key : int64 array, dims (packet,)
            Direction of a 5-tuple, -1: none.
        seen : int64 array
            The keys of earlier pieces.

        Returns
        -------
        int64 array, dims (packet,)
            0 for the first, and for what is not TCP. The next begins with a SYN that asks for another first sequence number; a SYN
            that is sent again does not.
        """
        begins, ordinal = self._begins(received, key, seen)
        result = np.zeros(received.n, np.int64)
        if not self._ordinal:
            return result
        had = np.array(sorted(self._ordinal), np.int64)
        # Before a key's first SYN in this piece it is as the pieces before left it.
        before = {int(key[row]): number - 1 for row, number in zip(begins[::-1], ordinal[::-1], strict=True)}
        left = np.array([before.get(one, self._ordinal[one]) for one in had.tolist()], np.int64)
        at = np.minimum(np.searchsorted(had, key), len(had) - 1)
        result = np.where(had[at] == key, left[at], 0)
        if len(begins):
            rows = np.arange(received.n, dtype=np.int64)
            latest = AsOf(np.array(begins), key[begins]).last_before(rows, key, inclusive=True)
            result = np.where(latest >= 0, pick(np.array(ordinal), latest, 0), result)
        return result

    def _begins(self, received: Columns, key: np.ndarray, seen: np.ndarray) -> tuple[list[int], list[int]]:
        """Return the rows with which a further connection of their key begins, and which one it is."""
        if "tcp_flags" not in received:
            return [], []
        flags = received["tcp_flags"].astype(np.int64)
        syns = np.flatnonzero(((flags & (_SYN | _RST)) == _SYN) & (received["proto"] == TCP) & (key >= 0))
        if not len(syns):
            return [], []
        heads, first = np.unique(key, return_index=True)
        is_old = np.isin(key[syns], seen) | (first[np.searchsorted(heads, key[syns])] < syns)
        begins, ordinals = [], []
        for row, one, sequence, old in zip(
            syns.tolist(), key[syns].tolist(), received["seq"][syns].tolist(), is_old.tolist(), strict=True
        ):
            if old and self._initial.get(one) != sequence:
                self._ordinal[one] = self._ordinal.get(one, 0) + 1
                begins.append(row)
                ordinals.append(self._ordinal[one])
            self._initial[one] = sequence
        return begins, ordinals
