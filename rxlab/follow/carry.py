"""What one slab of a recording takes over from those before it: as few rows as can still matter.

A packet is open while its reader may still come. It keeps its place in its socket's queue, its skb as its own slab saw it, and the
scheduler's events that may have been its wake-up. Of what is over only neighbours stay: the packets of the last moments, what each
stream was last copied from, the last known call of each UDP socket with all that was queued since, and of events the last of
each task and CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.consumption import TASK_INTERRUPTIBLE, sleeps
from rxlab.follow.handshake import COMPLETES, SYN
from rxlab.follow.kernelpath import KernelPath, event_columns, task_ids
from rxlab.follow.parts import Followed, Known
from rxlab.follow.status import TCP
from rxlab.read.columns import Columns
from rxlab.stages import RECEIVE_ENTRIES, STAGE_INDEX

_RX, _READY = STAGE_INDEX["netif_receive_skb"], STAGE_INDEX["data_ready"]


@dataclass(frozen=True)
class Kept:
    """Which packets of a part stay for the next, and what of their own is not in the columns; dims (packet,).

    Attributes
    ----------
    stays, is_open : bool arrays
    call_rank : int64 array
        Rank of the receive call that read it, -1 where none.
    """

    stays: np.ndarray
    is_open: np.ndarray
    call_rank: np.ndarray


def open_packets(followed: Followed, told: np.ndarray, is_freed: np.ndarray) -> np.ndarray:
    """Tell which packets may still be read, or are SYNs whose connection may still name their listener."""
    columns, evidence = followed.columns, followed.evidence
    unread = columns["is_data"] & (evidence.taken.receive < 0) & ~is_freed & ~evidence.is_repeat
    syns, acks = (np.flatnonzero(told & (columns["handshake"] == kind)) for kind in (SYN, COMPLETES))
    flow = columns["flow"].astype(np.int64)
    # The next handshake of the flow that completes is its own, whether or not that shows the listener.
    unread[syns] = AsOf(acks, flow[acks]).first_after(syns, flow[syns]) < 0
    return unread


def keep_packets(
    followed: Followed, told: np.ndarray, is_open: np.ndarray, known_rank: np.ndarray, since: int, most: int
) -> Kept:
    """Choose the packets that stay, of those `told` of.

    Parameters
    ----------
    told : bool array, dims (packet,)
        Packets of this slab or of one before.
    is_open : bool array, dims (packet,)
    known_rank : int64 array, dims (packet,)
        Rank of the receive call that an earlier slab found, -1 where none.
    since : int, nanoseconds of CLOCK_MONOTONIC
        Packets stamped from here on stay.
    most : int
        Of the older ones only so many, the youngest.
    """
    taken, evidence = followed.evidence.taken, followed.evidence
    call_rank = pick(taken.receives["rank"], taken.receive, -1)
    call_rank = np.where(call_rank >= 0, call_rank, known_rank)
    recent = evidence.stamp >= since
    stays = recent | is_open | _stream_heads(followed, told, is_open)
    _keep_queues(stays, followed, told, recent, call_rank)
    old = np.flatnonzero(stays & told & ~recent)
    stays[old[: max(len(old) - most, 0)]] = False
    return Kept(stays & told, is_open, call_rank)


def _stream_heads(followed: Followed, told: np.ndarray, is_open: np.ndarray) -> np.ndarray:
    """Tell what each stream was last copied from, whose tcp_probe was its last, and into what skb open packets were merged."""
    columns, evidence = followed.columns, followed.evidence
    stays = np.zeros(columns.n, bool)
    source = evidence.taken.copied_from[evidence.taken.copied_from >= 0]
    source = source[told[source]]
    stays[source[last_of_group(columns["flow"][source])]] = True
    probe = pick(evidence.path.columns["probe_len"], evidence.matched.event, -1) >= 0
    rows = np.flatnonzero(told & (columns["proto"] == TCP) & (columns["flow"] >= 0))
    stays[rows[probe[rows]][last_of_group(columns["flow"][rows[probe[rows]]])]] = True
    rows = rows[np.argsort(columns["flow"][rows], kind="stable")]
    head = np.maximum.accumulate(np.where(probe[rows], np.arange(len(rows)), -1))
    waits = is_open[rows] & ~probe[rows] & (head >= 0)
    stays[rows[head[waits]]] = True
    return stays


def _keep_queues(
    stays: np.ndarray, followed: Followed, told: np.ndarray, recent: np.ndarray, call_rank: np.ndarray
) -> None:
    """Let stay what was queued on each UDP socket since its last datagram whose call is known, and that one."""
    socket, arrival = followed.evidence.taken.socket, followed.columns["arrival"]
    rows = np.flatnonzero((socket > 0) & told)
    rows = rows[np.lexsort((rows, arrival[rows], socket[rows]))]
    is_known = (call_rank[rows] >= 0) & ~recent[rows]
    place = np.arange(len(rows))
    last = pd.Series(np.where(is_known, place, -1)).groupby(socket[rows]).transform("max").to_numpy()
    stays[rows[place >= last]] = True


def carried_packets(followed: Followed, kept: Kept, is_freed: np.ndarray) -> Known:
    """Return what the next part is told of the packets that stay, by row."""
    rows, evidence = np.flatnonzero(kept.stays), followed.evidence
    event = evidence.matched.event[rows]
    skbs, inverse = np.unique(event, return_inverse=True)
    skip = int(len(skbs) > 0 and skbs[0] < 0)
    return Known(
        evidence.path.select(skbs[skip:]),
        inverse - skip,
        evidence.matched.ambiguous[rows],
        is_freed[rows],
        kept.call_rank[rows],
        np.ones(len(rows), bool),
        followed.is_merged[rows],
        followed.is_late[rows],
        followed.columns["last_read_cpu"][rows],
        evidence.taken.anchors_disagree[rows],
        evidence.taken.is_contested[rows],
    )


def carried_events(
    events: Mapping[str, Columns], followed: Followed, kept: Kept, cut: int, left: np.ndarray
) -> dict[str, Columns]:
    """Return the events before rank `cut` that can still matter; `left` are the UDP sockets of which datagrams have gone."""
    return {
        name: columns.take(np.flatnonzero(mask))
        for name, columns, mask in _masks(events, followed, kept, cut, left)
        if mask.any()
    }


def _masks(events: Mapping[str, Columns], followed: Followed, kept: Kept, cut: int, left: np.ndarray):
    """Yield name, columns and mask of each event of which some rows stay."""
    old = {name: columns.take(np.flatnonzero(columns["rank"] < cut)) for name, columns in events.items() if columns.n}
    switch, waking, wakeup = (event_columns(old, f"sched:sched_{name}") for name in ("switch", "waking", "wakeup"))
    if switch.n:
        asleep = sleeps(switch, TASK_INTERRUPTIBLE)
        mask = (
            last_of_group(task_ids(switch, "next_pid"))
            | last_of_group(task_ids(switch, "prev_pid"))
            | last_of_group(switch["cpu"])
        )
        mask[np.flatnonzero(asleep)[last_of_group(task_ids(switch, "prev_pid")[asleep])]] = True
        yield "sched:sched_switch", switch, mask
    possible = _possible_wakes(waking, followed.evidence.path, followed.evidence.matched.event[kept.is_open])
    if waking.n:
        yield "sched:sched_waking", waking, last_of_group(task_ids(waking, "pid")) | possible
    if wakeup.n:
        rows = AsOf(wakeup["rank"], task_ids(wakeup, "pid")).first_after(
            waking["rank"][possible], task_ids(waking, "pid")[possible]
        )
        mask = np.zeros(wakeup.n, bool)
        mask[rows[rows >= 0]] = True
        yield "sched:sched_wakeup", wakeup, mask
    entries = event_columns(old, "irq:softirq_entry")
    if entries.n:
        yield "irq:softirq_entry", entries, last_of_group(entries["cpu"].astype(np.int64) * 64 + entries["vec"])
    receives, copies = event_columns(old, "sock:sock_recv_length"), event_columns(old, "skb:skb_copy_datagram_iovec")
    calls, copied = _calls_of_kept(followed, kept)
    mask = np.zeros(receives.n, bool)
    if receives.n:
        mask = last_of_group(receives["tid"]) | last_of_group(receives["sk"]) | np.isin(receives["rank"], calls)
        mask |= _since_known(receives, followed, kept, left)
        yield "sock:sock_recv_length", receives, mask
    returned = AsOf(receives["rank"], receives["tid"])
    for name in RECEIVE_ENTRIES:
        entered = event_columns(old, name)
        call = returned.first_after(entered["rank"], entered["tid"])
        yield name, entered, last_of_group(entered["tid"]) | pick(mask, call, False)
    if copies.n:
        yield "skb:skb_copy_datagram_iovec", copies, np.isin(copies["rank"], copied)


def last_of_group(group: np.ndarray) -> np.ndarray:
    """Tell which rows are the last of their group."""
    last: np.ndarray = ~pd.Series(group).duplicated(keep="last").to_numpy()
    return last


def _possible_wakes(waking: Columns, path: KernelPath, skb: np.ndarray) -> np.ndarray:
    """Tell which wake-ups data_ready of these skbs may have made."""
    possible = np.zeros(waking.n, bool)
    skb = skb[skb >= 0]
    skb = skb[path.rank[skb, _READY] >= 0]
    if waking.n and len(skb):
        ready = AsOf(path.rank[skb, _READY], path.cpu[skb, _READY].astype(np.int64))
        row = ready.last_before(waking["rank"], waking["cpu"].astype(np.int64))
        possible = waking["rank"] < pick(path.columns["wake_limit"][skb], row, -1)
    return possible


def _calls_of_kept(followed: Followed, kept: Kept) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of the receive calls that took bytes from skbs of packets that stay, and of all copies of those calls."""
    taken = followed.evidence.taken
    mine = (taken.copied_from >= 0) & pick(kept.stays, taken.copied_from, False)
    call = np.unique(taken.copies["call"][mine]) if taken.copies.n else np.empty(0, np.int64)
    if not len(call):
        return call, call
    ranks = taken.receives["rank"][call[call >= 0]]
    return ranks, taken.copies["rank"][mine | (np.isin(taken.copies["call"], call[call >= 0]))]


def _since_known(receives: Columns, followed: Followed, kept: Kept, left: np.ndarray) -> np.ndarray:
    """Tell which calls came since the first known one of the datagrams that stay on the same socket, or since its first of all."""
    socket = followed.evidence.taken.socket
    rows = np.flatnonzero(kept.stays & (socket > 0) & ((kept.call_rank >= 0) | ~np.isin(socket, left)))
    since = np.where(np.isin(socket[rows], left), kept.call_rank[rows], 0)
    first = pd.Series(since).groupby(socket[rows]).min()
    at = pd.Index(first.index).get_indexer(pd.Index(receives["sk"].astype(np.uint64)))
    return (at >= 0) & (receives["rank"] >= pick(first.to_numpy(), at, 0))
