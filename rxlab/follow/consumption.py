"""Packets as a socket sees them, and which copy and receive call took each one's bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.hidden import Hidden
from rxlab.follow.kernelpath import event_columns, only, task_ids
from rxlab.read.columns import Columns

MSG_PEEK = 0x2  # include/linux/socket.h
TASK_INTERRUPTIBLE = 0x1  # include/linux/sched.h: the state in which a task waits for data


@dataclass(frozen=True)
class Segments:
    """The captured packets, as far as consumption depends on them; dims (packet,).

    Attributes
    ----------
    skb : int64 array
        Row of the kernel path for each packet, -1 where unmatched.
    flow : int32 array
        Directed flow number, -1 where none.
    position : int64 array
        Unwrapped sequence number of the first payload byte (TCP).
    length : int64 array
        Payload bytes.
    is_tcp, is_udp : bool arrays
    arrival : int64 array, nanoseconds of CLOCK_MONOTONIC
        Before this nobody can have read the packet.
    is_repeat : bool array
        All of its bytes (TCP) had come before; it owns none.
    is_freed : bool array
        The kernel dropped it, and said why.
    call_rank : int64 array
        Rank of the receive call that an earlier part of the recording showed to have read it, -1: to be found.
    is_counted : bool array
        An earlier part of the recording has counted it.
    port : integer array
        The local port.
    row : int64 array
        Number in the capture.
    """

    skb: np.ndarray
    flow: np.ndarray
    position: np.ndarray
    length: np.ndarray
    is_tcp: np.ndarray
    is_udp: np.ndarray
    arrival: np.ndarray
    is_repeat: np.ndarray
    is_freed: np.ndarray
    call_rank: np.ndarray
    is_counted: np.ndarray
    port: np.ndarray
    row: np.ndarray


@dataclass
class Consumption:
    """Which copy and which receive call took each packet's bytes; arrays have dims (packet,).

    Attributes
    ----------
    first_copy, last_copy : int64 arrays
        Rows of :attr:`copies`; -1 where none.
    receive : int64 array
        Row of :attr:`receives`: the call that returned the last byte; -1 where none.
    anchors_disagree : bool array
        The stream or queue position is in doubt: the row must not be trusted.
    copies, receives : Columns
        The events themselves, without peeks among `copies`, which also have ``call`` (row of `receives`, -1: none) and
        ``doubtful``.
    is_behind : bool array
        A datagram queued behind another, on a kernel that calls data_ready only for the first.
    copied_from : int64 array, dims (copy,)
        The packet whose skb was copied from, -1 where that is not known or the copy was of another stream.
    socket : uint64 array
        The socket whose queue a datagram was in, 0: none.
    fed : uint64 array
        The socket that data_ready named, 0: none.
    is_silent : bool array
        A datagram that was surely queued, without data_ready.
    is_contested : bool array
        A datagram that either of several readers may have taken: their calls overlapped.
    """

    first_copy: np.ndarray
    last_copy: np.ndarray
    receive: np.ndarray
    anchors_disagree: np.ndarray
    copies: Columns
    receives: Columns
    is_behind: np.ndarray
    copied_from: np.ndarray
    socket: np.ndarray
    fed: np.ndarray
    is_silent: np.ndarray
    is_contested: np.ndarray

    @classmethod
    def blank(cls, n: int, copies: Columns, receives: Columns) -> Consumption:
        """Return a table of `n` packets of which none was consumed."""
        none = np.full(n, -1, np.int64)
        return cls(
            none, none.copy(), none.copy(), np.zeros(n, bool), copies, receives, np.zeros(n, bool),
            np.full(copies.n, -1, np.int64), np.zeros(n, np.uint64), np.zeros(n, np.uint64), np.zeros(n, bool),
            np.zeros(n, bool),
        )  # fmt: skip

    def keep_doubts(self, is_doubted: np.ndarray, is_contested: np.ndarray) -> None:
        """Leave in doubt what an earlier slab did not know the reader of, and this one does not either."""
        unread = self.receive < 0
        self.anchors_disagree |= is_doubted & unread
        self.is_contested |= is_contested & unread


def unwrap_sequence(seq: np.ndarray, before: int | None = None) -> np.ndarray:
    """Return 32-bit sequence numbers as int64 stream positions, in the order given (RFC 9293: modulo 2**32).

    `before` is the position of the number before the first, where that is known.
    """
    if not len(seq):
        return seq.astype(np.int64)
    start = int(seq[0]) if before is None else before
    step: np.ndarray = np.diff(seq.astype(np.int64), prepend=start % 2**32)
    step = np.mod(step + 2**31, 2**32) - 2**31
    return start + np.cumsum(step)


def receive_events(events: Mapping[str, Columns], hidden: Hidden) -> tuple[Columns, Columns]:
    """Return the copies (each with the call that follows it) and the receive calls on IPv4 and IPv6 sockets."""
    receives = event_columns(events, "sock:sock_recv_length")
    if "family" in receives:
        receives = only(receives, (receives["family"] == 2) | (receives["family"] == 10))
    copies = event_columns(events, "skb:skb_copy_datagram_iovec")
    calls = AsOf(receives["rank"], receives["tid"])
    call = calls.first_after(copies["rank"], copies["tid"])
    copies = copies.with_columns(call=call, doubtful=_doubtful_calls(events, copies, receives, call, hidden))
    if not receives.n:
        return copies, receives
    # A peek copies what a later call copies again. Where the return of a task's peek may be missing a copy may be one.
    is_peek = (receives["flags"].astype(np.int64) & MSG_PEEK) > 0
    calls_in_doubt = np.bincount(call[call >= 0], weights=copies["doubtful"][call >= 0], minlength=receives.n) > 0
    may_peek = calls_in_doubt & np.isin(receives["tid"], np.unique(receives["tid"][is_peek]))
    return copies.take(~pick(is_peek | may_peek, call, 0).astype(bool)), receives


def _doubtful_calls(
    events: Mapping[str, Columns], copies: Columns, receives: Columns, call: np.ndarray, hidden: Hidden
) -> np.ndarray:
    """Tell which copies cannot be told to belong to the receive call that follows them.

    A call returns what it copied. Where the sums differ an event is missing: either a copy, or the end of the call the copy
    really belonged to, which would hand its packets to a later one. A task that waited between the two was not in that call (in a
    call it may well have to wait for memory or a lock, which no signal interrupts), and where events may be missing between the two the copy may be an earlier call's.
    """
    if not copies.n or not receives.n:
        return call < 0
    sums = np.bincount(call[call >= 0], weights=copies["len"][call >= 0], minlength=receives.n).astype(np.int64)
    differs = sums != np.maximum(receives["ret"], 0)
    switch = event_columns(events, "sched:sched_switch")
    asleep = switch.take(sleeps(switch, TASK_INTERRUPTIBLE))
    slept = AsOf(asleep["rank"], task_ids(asleep, "prev_pid"))
    returned = pick(receives["rank"], call, -1)
    sleep_rank = slept.rank_of(slept.last_before(returned, copies["tid"].astype(np.int64)), -1)
    doubtful = (call < 0) | pick(differs, call, 0) | (sleep_rank > copies["rank"])
    end, cpu = pick(receives["time"], call, 0), pick(receives["cpu"], call, -1)
    return doubtful | hidden.touch(copies["time"], end, copies["cpu"]) | hidden.touch(copies["time"], end, cpu)


def sleeps(switch: Columns, states: int = 0xFF) -> np.ndarray:
    """Tell which task switches are sleeps: any state but running (0, with TASK_REPORT_MAX, 0x100, for a preemption), or `states`."""
    if "prev_state" not in switch:
        return np.ones(switch.n, bool)
    return (switch["prev_state"].astype(np.int64) & states) != 0
