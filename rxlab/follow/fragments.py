"""UDP datagrams that came as IP fragments: the fragment that completes one brings all of its bytes to the socket.

Every fragment passes the driver and ``netif_receive_skb`` by itself and waits (net/ipv4/ip_fragment.c, net/ipv6/reassembly.c). When
the last of them is in, the datagram goes on from there, in the skb of the fragment that came last (``inet_frag_reasm_prepare`` moves
the first one's contents into it): what follows on that skb, from data_ready to the reader, is the datagram's.
"""

from __future__ import annotations

import numpy as np

from rxlab.follow.status import UDP
from rxlab.read.columns import Columns
from rxlab.read.compiler import njit

# net.ipv4.ipfrag_time, net.ipv6.ip6frag_time: then the kernel gives up a datagram.
WAITS_NS = 30_000_000_000
_KEY = ("src_hi", "src_lo", "dst_hi", "dst_lo", "ip_id")
_KEPT = (*_KEY, "fragment", "payload_len", "time", "frame", "flow", "flow_dir", "sport", "dport")
_HEADER = 8  # bytes of UDP's own


class Reassembly:
    """The datagrams that are not whole yet, from piece to piece of a capture."""

    def __init__(self) -> None:
        self._open: Columns | None = None

    def take(self, received: Columns) -> Columns:
        """Return received packets as sockets see them.

        Parameters
        ----------
        received : Columns, dims (packet,), in the order of the capture
            As :func:`rxlab.read_pcap` gives them.

        Returns
        -------
        Columns, dims (packet,)
            ``is_fragment``, and ``head_frame``, the frame in which the payload begins. A fragment that completes a UDP datagram has all
            bytes of its payload as ``payload_len``, the others 0; all have the flow and ports of the first, once that has come.
        """
        fragment = received["fragment"] if "fragment" in received else np.zeros(received.n, np.uint16)
        is_fragment = fragment > 0
        received = received.with_columns(is_fragment=is_fragment, head_frame=received["frame"].copy())
        if not is_fragment.any():
            return received
        changed = {
            name: received[name].copy() for name in ("payload_len", "head_frame", "flow", "flow_dir", "sport", "dport")
        }
        # Later fragments of other protocols bring no bytes that could be told apart from their headers.
        changed["payload_len"][fragment >= 2] = 0
        mine = np.flatnonzero(is_fragment & (received["proto"] == UDP))
        pieces = Columns({name: received[name][mine] for name in _KEPT})
        n_before = 0 if self._open is None else self._open.n
        pieces = pieces if self._open is None else self._open.followed_by(pieces)
        head, whole, is_open = self._put_together(pieces)
        self._open = pieces.take(np.flatnonzero(is_open))
        head, whole = head[n_before:], whole[n_before:]
        changed["payload_len"][mine] = whole
        told, head = mine[head >= 0], head[head >= 0]
        changed["head_frame"][told] = pieces["frame"][head]
        for name in ("flow", "flow_dir", "sport", "dport"):
            changed[name][told] = pieces[name][head]
        return received.with_columns(**changed)

    def _put_together(self, pieces: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for each fragment the row of its datagram's first, the bytes it completes, and whether it still waits."""
        order = np.lexsort((np.arange(pieces.n), *(pieces[name] for name in _KEY)))
        is_new = np.zeros(pieces.n, bool)
        for name in _KEY:
            is_new[1:] |= np.diff(pieces[name][order]) != 0
        head, whole = np.full(pieces.n, -1, np.int64), np.zeros(pieces.n, np.int64)
        is_open = np.zeros(pieces.n, bool)
        word, length = pieces["fragment"].astype(np.int64), pieces["payload_len"].astype(np.int64)
        _reassemble(order, is_new, word, length, pieces["time"], head, whole, is_open)
        last = pieces["time"].max(initial=0)
        return head, whole, is_open & (last - pieces["time"] < WAITS_NS)


@njit(cache=True, nogil=True)
def _reassemble(order, is_new, word, length, time, head, whole, is_open):
    """Walk the fragments of each (addresses, id) in the order they came."""
    first = got = begun = 0
    total, at = -1, -1
    for i in range(len(order)):
        row = order[i]
        is_first = word[row] == 1
        if is_new[i] or i == 0 or time[row] - begun > WAITS_NS or (is_first and at >= 0):
            for k in range(first, i):
                # What an earlier datagram of the same id left was given up.
                is_open[order[k]] = is_open[order[k]] and is_new[i]
            first, got, begun, total, at = i, 0, time[row], -1, -1
        got += length[row]
        if is_first:
            at = row
            got += _HEADER
        if word[row] & 1 == 0:
            total = (word[row] >> 1) * 8 + length[row]
        head[row] = at
        is_open[row] = True
        if at >= 0 and got == total:
            whole[row] = total - _HEADER
            for k in range(first, i + 1):
                is_open[order[k]] = False
            first, got, begun, total, at = i + 1, 0, time[row], -1, -1
