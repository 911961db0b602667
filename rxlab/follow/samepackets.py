"""Captures of two hosts -> packets that are the same in both, by what no wire changes: their headers, payload, or gaps.

Each key counts where it occurs exactly once on either side; nothing here knows of clocks, but for datagrams that are all alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxlab.errors import ClockError
from rxlab.follow.clockmatch import match_sequences
from rxlab.follow.envelope import MIN_PACKETS
from rxlab.follow.status import TCP, UDP
from rxlab.read.columns import Columns
from rxlab.read.compiler import njit
from rxlab.read.pcapfile import NAT


@dataclass(frozen=True)
class Side:
    """One capture's packets that can be told apart.

    Attributes
    ----------
    rows : int64 array, dims (packet,)
        Rows of the capture.
    flow : int64 array, dims (packet,)
        Number of the directed flow: twice the connection's, plus one for its other direction; -1 none.
    packets : Columns
    """

    rows: np.ndarray
    flow: np.ndarray
    packets: Columns

    @property
    def n_flows(self) -> int:
        """Numbers of directed flows there may be."""
        return int(self.flow.max(initial=-1)) + 2 & ~1

    def of(self, name: str) -> np.ndarray:
        """Return a column."""
        return np.asarray(self.packets[name])


def keyed(packets: Columns) -> Side:
    """Return a capture's packets that can be told apart: whole TCP and UDP packets of a flow."""
    is_known = np.isin(packets["proto"], (TCP, UDP)) & (packets["flow"] >= 0) & (packets["fragment"] == 0)
    rows = np.flatnonzero(is_known & (packets["time"] != NAT) & (packets["payload_len"] >= 0))
    flow = packets["flow"][rows].astype(np.int64) * 2 + packets["flow_dir"][rows]
    return Side(rows, flow, packets.take(rows))


@njit(cache=True, nogil=True)
def _mixed(word, more):
    """Mix numbers into 64-bit words, element by element (the finalizer of MurmurHash3)."""
    for row in range(len(word)):
        mixed = (word[row] ^ np.uint64(more[row])) * np.uint64(0xFF51AFD7ED558CCD)
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        word[row] = mixed ^ (mixed >> np.uint64(29))


def hash_rows(*columns: np.ndarray) -> np.ndarray:
    """Return one 64-bit word per row of some integer columns."""
    word = np.full(len(columns[0]), 0x9E3779B97F4A7C15, np.uint64)
    for column in columns:
        _mixed(word, column.astype(np.uint64, copy=False))
    return word


def _flow_words(side: Side) -> np.ndarray:
    """Return a word per directed flow: its addresses, ports and protocol."""
    words = np.zeros(side.n_flows, np.uint64)
    first = np.unique(side.flow, return_index=True)[1]
    names = ("src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport", "proto")
    words[side.flow[first]] = hash_rows(*(side.of(name)[first] for name in names))
    return words


def same_packets(there: Side, here: Side) -> tuple[np.ndarray, np.ndarray]:
    """Return the packets whose header (TCP) or payload (UDP) occurs once on each side, without and then with the IP ID.

    A flow whose addresses occur on one side only was translated on its way: its packets are sought by the rest.
    """
    words = _flow_words(there), _flow_words(here)
    keys, ids = [], []
    for side, mine, other in ((there, words[0], words[1]), (here, words[1], words[0])):
        known = np.where(np.isin(mine, other), mine, np.uint64(0))
        is_tcp = side.of("proto") == TCP
        rest = [np.where(is_tcp, side.of(name), 0) for name in ("seq", "ack", "tcp_flags", "tsval", "tsecr")]
        digest = np.where(is_tcp, np.uint64(0), side.of("digest"))
        keys.append(hash_rows(known[side.flow], side.of("proto"), side.of("payload_len"), digest, *rest))
        ids.append(hash_rows(keys[-1], side.of("ip_id")))
    # A datagram without readable bytes has no key.
    usable = [(side.of("proto") == TCP) | (side.of("digest") != 0) for side in (there, here)]
    mine, other = _once_on_both(keys[0], keys[1], usable[0], usable[1])
    free = []
    for side, used, known in ((there, mine, usable[0]), (here, other, usable[1])):
        left = known & (side.of("ip_id") != 0) & (side.of("ip_version") == 4)
        left[used] = False
        free.append(left)
    again = _once_on_both(ids[0], ids[1], free[0], free[1])
    return np.concatenate((mine, again[0])), np.concatenate((other, again[1]))


def same_starts(there: Side, here: Side, mine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the other TCP packets that begin with the same byte on both sides: cut or merged, they still tell what is one flow."""
    words = _flow_words(there), _flow_words(here)
    keys, usable = [], []
    for side, used, one, two in ((there, mine, *words), (here, other, *words[::-1])):
        known = np.where(np.isin(one, two), one, np.uint64(0))
        keys.append(hash_rows(known[side.flow], *(side.of(name) for name in ("seq", "ack", "tsval", "tsecr"))))
        left = (side.of("proto") == TCP) & (side.of("payload_len") > 0)
        left[used] = False
        usable.append(left)
    return _once_on_both(keys[0], keys[1], usable[0], usable[1])


def alike_datagrams(there: Side, here: Side, mine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the packets of flows whose datagrams are all alike, by the gaps between them; without a flow where that would be a guess."""
    words, free = [_flow_words(there), _flow_words(here)], []
    for side, used in ((there, mine), (here, other)):
        left = side.of("proto") == UDP
        left[used] = False
        free.append(np.flatnonzero(left))
    parts = [_by_word(words[at][side.flow[free[at]]], free[at]) for at, side in enumerate((there, here))]
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for word in parts[0].keys() & parts[1].keys():
        rows = parts[0][word], parts[1][word]
        if min(map(len, rows)) < MIN_PACKETS:
            continue
        pairs = _pair_by_gaps(
            *(
                (side.of("time")[row], side.of("payload_len")[row])
                for side, row in zip((there, here), rows, strict=True)
            )
        )
        if pairs is not None:
            found.append((rows[0][pairs[0]], rows[1][pairs[1]]))
    nothing = np.empty(0, np.int64)
    left_rows, right_rows = (np.concatenate([nothing, *(pair[at] for pair in found)]) for at in (0, 1))
    return left_rows, right_rows


def _by_word(words: np.ndarray, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Return the rows of each word, in order."""
    order = np.argsort(words, kind="stable")
    cuts = np.flatnonzero(np.diff(words[order])) + 1
    return {int(words[part[0]]): rows[part] for part in np.split(order, cuts) if len(part)}


def _pair_by_gaps(
    one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return rows that belong together, None where the gaps do not tell. Which side comes first is not known: both are tried."""
    for first, second, is_turned in ((one, two, False), (two, one, True)):
        try:
            pairs = match_sequences(*first, *second)
        except ClockError:
            continue
        return (pairs.event, pairs.packet) if is_turned else (pairs.packet, pairs.event)
    return None


def _once_on_both(
    left: np.ndarray, right: np.ndarray, left_usable: np.ndarray, right_usable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of words that occur exactly once on the left and exactly once on the right."""
    at, to = np.flatnonzero(left_usable), np.flatnonzero(right_usable)
    words = np.concatenate((left[at], right[to]))
    order = np.argsort(words, kind="stable")
    words = words[order]
    # A pair is alone among the sorted words, and stable order puts the left one first.
    starts = np.flatnonzero(np.append(True, words[1:] != words[:-1])) if len(words) else np.empty(0, np.int64)
    starts = starts[np.diff(starts, append=len(words)) == 2]
    first, second = order[starts], order[starts + 1]
    is_both = (first < len(at)) & (second >= len(at))
    return at[first[is_both]], to[second[is_both] - len(at)]
