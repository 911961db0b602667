"""Packets that the host hands on to another of its devices: a bridge, routing, the veth of a container.

The skb stays the same, and so does its address: the way of a packet from the NIC to a container's socket is one life, in which it
enters the stack once per device. The address alone does not say so: a freed skb's address is soon another packet's. What does is
that forwarding happens at once, in the same run of the softirq (ip_forward, br_handle_frame -> dev_queue_xmit -> veth_xmit ->
netif_rx), on a device that is not the captured one, with the same length, before any socket was told of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.read.columns import Columns

MOST_DEVICES = 4
# An Ethernet header, VLAN tags, and what a tunnel without encapsulation may add.
_MOST_HEADER = 32
_NEVER = np.iinfo(np.int64).max
_POLL = "net:napi_gro_receive_entry"
_SETTLED = ("irq:softirq_entry", "sched:sched_switch", "tcp:tcp_probe", "sock:sk_data_ready")


class Forwarded(NamedTuple):
    """Where skbs went from the captured device; int64 arrays, dims (skb,).

    Attributes
    ----------
    rank, cpu : int64 arrays
        Of the last ``netif_receive_skb`` of each skb's life, at the device from which its socket got it.
    devices : int64 array
        How many of the host's other devices it came in by.
    is_out : bool array
        It left by another device (``net_dev_queue``) and was not seen to come in again.
    """

    rank: np.ndarray
    cpu: np.ndarray
    devices: np.ndarray
    is_out: np.ndarray


class _Index(NamedTuple):
    """An event's rows by skb address."""

    columns: Columns
    by_address: AsOf

    def next(self, rank: np.ndarray, address: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the next row of each address after a rank, and its rank."""
        row = self.by_address.first_after(rank, address)
        return row, self.by_address.rank_of(row, _NEVER)

    def of(self, row: np.ndarray, field: str, missing: int) -> np.ndarray:
        """Return a field of rows, `missing` where there is none (-1)."""
        return pick(self.columns[field].astype(np.int64), row, missing)


def follow_forwarding(
    receive: Columns, events: Mapping[str, Columns], is_captured: Callable[[Columns], np.ndarray]
) -> Forwarded:
    """Follow skbs of the captured device through the host's others.

    Parameters
    ----------
    receive : Columns, dims (skb,)
        ``net:netif_receive_skb`` of the captured device: ``rank``, ``cpu``, ``skbaddr``, ``len``.
    events : mapping of str to Columns
    is_captured : callable
        Tells for the rows of a ``net:*`` event whether their device has the captured one's name.
    """
    n = receive.n
    rank, cpu = receive["rank"].copy(), receive["cpu"].astype(np.int64)
    devices, is_out = np.zeros(n, np.int64), np.zeros(n, bool)
    entered = _index(events, "net:netif_receive_skb")
    if entered is None or "name" not in receive or not n:
        return Forwarded(rank, cpu, devices, is_out)
    # netif_rx_entry and netif_rx are of the same call.
    backlog = _index(events, "net:netif_rx_entry") or _index(events, "net:netif_rx")
    drivers = [index for index in (backlog, _index(events, _POLL)) if index is not None]
    sent = _index(events, "net:net_dev_queue")
    captured = [is_captured(index.columns) for index in (entered, *drivers)]
    stack = AsOf(entered.columns["rank"], entered.columns["cpu"])
    address, length = receive["skbaddr"].astype(np.uint64), receive["len"].astype(np.int64)
    going = np.arange(n)
    for _ in range(MOST_DEVICES):
        # The next to enter the stack on this CPU: until then the softirq has only this skb in hand.
        limit = stack.rank_of(stack.first_after(rank[going], cpu[going]), _NEVER)
        soon = np.zeros(len(going), bool)
        for births in (entered, *drivers, *([] if sent is None else [sent])):
            soon |= births.next(rank[going], address[going])[1] <= limit
        going, limit = going[soon], limit[soon]
        if not len(going):
            break
        at, here, skb, size = rank[going], cpu[going], address[going], length[going]
        settled = np.full(len(going), _NEVER)
        for name in _SETTLED:
            if name in events and events[name].n:
                told = AsOf(events[name]["rank"], events[name]["cpu"])
                np.minimum(settled, told.rank_of(told.first_after(at, here), _NEVER), out=settled)
        limit = np.minimum(limit, settled)
        again, again_rank = entered.next(at, skb)
        leaves = np.zeros(len(going), bool)
        if sent is not None:
            row, sent_rank = sent.next(at, skb)
            grown = sent.of(row, "len", -1) - size
            leaves = (sent_rank < limit) & (sent.of(row, "cpu", -1) == here) & (grown >= 0) & (grown <= _MOST_HEADER)
        # Bridge to its own host (br_pass_frame_up): in again at once, without a driver.
        inside = (again_rank <= limit) & (again_rank < settled) & (entered.of(again, "cpu", -1) == here)
        inside &= ~pick(captured[0], again, True)
        handed = np.full(len(going), _NEVER)
        by_driver = np.zeros(len(going), bool)
        for index, mine in zip(drivers, captured[1:], strict=True):
            row, came = index.next(at, skb)
            is_poll = index.columns is events.get(_POLL)
            # A veth with NAPI takes its queue in a softirq of its own.
            at_once = leaves if is_poll else (came < limit) & (index.of(row, "cpu", -1) == here)
            good = at_once & (index.of(row, "len", -1) == size) & (~pick(mine, row, True) | (leaves & (not is_poll)))
            by_driver |= good & (came < np.minimum(handed, again_rank))
            handed = np.minimum(handed, came)
        moves = (inside & (handed > again_rank)) | (by_driver & (again_rank < _NEVER))
        moves &= entered.of(again, "len", -1) == size
        is_out[going] = leaves & ~moves
        going, again = going[moves], again[moves]
        rank[going], cpu[going] = entered.columns["rank"][again], entered.columns["cpu"][again]
        devices[going] += 1
    return Forwarded(rank, cpu, devices, is_out)


def _index(events: Mapping[str, Columns], name: str) -> _Index | None:
    """Return an event by skb address, None where there are none."""
    columns = events.get(name)
    if columns is None or not columns.n or not {"skbaddr", "len"} <= set(columns):
        return None
    return _Index(columns, AsOf(columns["rank"], columns["skbaddr"].astype(np.uint64)))
