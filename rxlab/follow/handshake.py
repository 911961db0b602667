"""Connection set-up: SYN -> listener -> accept, as rows of a path of their own.

A SYN ends at the listener, which answers it without waking anybody. The ACK that completes the handshake makes the child
(``tcp_check_req`` -> ``tcp_v4_syn_recv_sock``), takes it to ESTABLISHED and calls the *listener's* ``sk_data_ready``
(``tcp_child_process``, net/ipv4/tcp_minisocks.c): that wakes the task whose ``accept()`` returns the connection. A SYN-ACK, on the
side that connects, takes its socket to ESTABLISHED and ends ``connect()``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.clockfit import NAT
from rxlab.follow.hidden import Hidden
from rxlab.follow.kernelpath import event_columns, task_ids
from rxlab.follow.stagetable import StageTable
from rxlab.follow.wake import TRACE_FLAG_HARDIRQ
from rxlab.read.columns import Columns
from rxlab.stages import ATTRIBUTIONS, HANDSHAKES, STAGE_INDEX

_FIN, _SYN, _RST, _ACK = 0x01, 0x02, 0x04, 0x10
_ESTABLISHED = 1  # enum in include/net/tcp_states.h
_TCP = 6
_NEVER = np.iinfo(np.int64).max
_RX, _READY = STAGE_INDEX["netif_receive_skb"], STAGE_INDEX["data_ready"]
SYN, SYN_ACK, COMPLETES = (HANDSHAKES.index(name) for name in ("syn", "syn_ack", "ack"))


def handshake_kinds(received: Columns, has_opened: np.ndarray | None = None) -> np.ndarray:
    """Tell which packets set a connection up, codes of :data:`rxlab.stages.HANDSHAKES`; dims (packet,).

    The ACK is the first packet of its direction after a SYN, if it carries nothing: with data it is a data packet like others.

    Parameters
    ----------
    received : Columns, dims (packet,), in the order of the capture
        ``tcp_flags``, ``payload_len``, ``directed_flow``, ``proto``.
    has_opened : bool array, dims (flow,), optional
        Flows whose last packet was a SYN, of a capture that comes in pieces: changed to how it is after this one.
    """
    kind = np.zeros(received.n, np.int8)
    if "tcp_flags" not in received:
        return kind
    flags = np.where(received["proto"] == _TCP, received["tcp_flags"].astype(np.int64), 0)
    opens = (flags & (_SYN | _ACK | _RST)) == _SYN
    kind[opens] = SYN
    kind[(flags & (_SYN | _ACK | _RST)) == _SYN | _ACK] = SYN_ACK
    flow = received["directed_flow"].astype(np.int64)
    order = np.argsort(flow, kind="stable")
    order = order[(flow[order] >= 0) & (received["proto"][order] == _TCP)]
    is_next = flow[order][1:] == flow[order][:-1]
    follows = np.concatenate(([False], is_next & opens[order][:-1]))[: len(order)]
    if has_opened is not None:
        heads = np.flatnonzero(~np.concatenate(([False], is_next))[: len(order)])
        follows[heads] = has_opened[flow[order[heads]]]
        has_opened[flow[order]] = opens[order]  # of equal flows the last counts
    bare = (flags[order] & (_SYN | _ACK | _RST | _FIN)) == _ACK
    kind[order[follows & bare & (received["payload_len"][order] <= 0)]] = COMPLETES
    return kind


def follow_handshakes(
    rows: StageTable, received: Columns, tid: np.ndarray, events: Mapping[str, Columns], hidden: Hidden
) -> Columns:
    """Fill the stages of handshake packets, from the listener's data_ready to the switch-in of the task it woke.

    Parameters
    ----------
    rows : StageTable, dims (packet, stage)
        Changed in place.
    received : Columns, dims (packet,)
        The captured packets, with their ``handshake`` (:func:`handshake_kinds`).
    tid : int64 array, dims (packet,)
        Readers of the other packets.
    events : mapping of str to Columns
    hidden : Hidden
        Where events may be missing; nothing is linked across.

    Returns
    -------
    Columns, dims (packet,)
        ``handshake``, ``established_time`` and ``accept_time`` (CLOCK_MONOTONIC ns, NaT: not seen), ``listener`` (0: none or not
        seen), and ``tid`` with the tasks that listeners woke.
    """
    kind = received["handshake"]
    established, accepted = np.full(received.n, NAT), np.full(received.n, NAT)
    listeners, tid = np.zeros(received.n, np.uint64), tid.copy()
    is_seen = rows.rank[:, _RX] >= 0
    moved = np.flatnonzero(np.isin(kind, (COMPLETES, SYN_ACK)) & is_seen)
    established[moved] = _established(rows.take(moved), received.take(moved), events, hidden)
    acks = np.flatnonzero((kind == COMPLETES) & is_seen)
    if len(acks):
        listeners[acks], tid[acks] = _wake_listener(rows, acks, events, hidden)
        accepted[acks] = accept_times(rows.rank[acks, _READY], listeners[acks], tid[acks], accept_returns(events))
        # A SYN's listener is the one that its connection's ACK woke: the next ACK of its flow.
        flow, syns = received["directed_flow"].astype(np.int64), np.flatnonzero(kind == SYN)
        listeners[syns] = pick(listeners[acks], AsOf(acks, flow[acks]).first_after(syns, flow[syns]), 0)
    return Columns(
        {
            "handshake": kind,
            "established_time": established,
            "accept_time": accepted,
            "listener": listeners,
            "tid": tid,
        }
    )


def with_handshakes(columns: Columns, found: Columns) -> Columns:
    """Add what :func:`follow_handshakes` found: a handshake's socket is its listener, its reader ran because the ACK woke it."""
    is_part = found["handshake"] > 0
    woke = (found["handshake"] == COMPLETES) & (found["tid"] >= 0)
    return columns.with_columns(
        handshake=found["handshake"],
        established_time=found["established_time"],
        accept_time=found["accept_time"],
        socket=np.where(is_part, found["listener"], columns["socket"]),
        attribution=np.where(woke, ATTRIBUTIONS.index("own_wake"), columns["attribution"]).astype(np.int8),
    )


def _until_next(rows: StageTable, events: Mapping[str, Columns]) -> np.ndarray:
    """Return the rank at which each packet's CPU begins with another one."""
    receive, probe = event_columns(events, "net:netif_receive_skb"), event_columns(events, "tcp:tcp_probe")
    index = AsOf(np.concatenate((receive["rank"], probe["rank"])), np.concatenate((receive["cpu"], probe["cpu"])))
    return index.rank_of(index.first_after(rows.rank[:, _RX], rows.cpu[:, _RX].astype(np.int64)), _NEVER)


def _established(rows: StageTable, packets: Columns, events: Mapping[str, Columns], hidden: Hidden) -> np.ndarray:
    """Return when the socket of each packet became ESTABLISHED while the packet was processed, NaT where that was not seen."""
    state = event_columns(events, "sock:inet_sock_set_state")
    if not state.n or not packets.n:
        return np.full(packets.n, NAT)
    state = state.take((state["newstate"] == _ESTABLISHED) & (state["protocol"] == _TCP))
    index = AsOf(state["rank"], state["cpu"], state["sport"].astype(np.int64), state["dport"].astype(np.int64))
    cpu = rows.cpu[:, _RX].astype(np.int64)
    # sport is the local socket's, where the packet goes.
    local, peer = packets["dport"].astype(np.int64), packets["sport"].astype(np.int64)
    row = index.first_after(rows.rank[:, _RX], cpu, local, peer)
    row = np.where(index.rank_of(row, _NEVER) < _until_next(rows, events), row, -1)
    time = pick(state["time"], row, NAT)
    return np.where(hidden.touch(rows.time[:, _RX], time, cpu), NAT, time)


def _wake_listener(
    rows: StageTable, acks: np.ndarray, events: Mapping[str, Columns], hidden: Hidden
) -> tuple[np.ndarray, np.ndarray]:
    """Link the listener's data_ready, the wake-up it made and the task's switch-in; return listener and task (0 and -1: none)."""
    ready, waking = event_columns(events, "sock:sk_data_ready"), event_columns(events, "sched:sched_waking")
    runnable, switch = event_columns(events, "sched:sched_wakeup"), event_columns(events, "sched:sched_switch")
    if "protocol" in ready:
        ready = ready.take(np.isin(ready["family"], (2, 10)) & (ready["protocol"] == _TCP))
    if "common_flags" in waking:
        waking = waking.take((waking["common_flags"] & TRACE_FLAG_HARDIRQ) == 0)
    mine = rows.take(acks)
    cpu, until = mine.cpu[:, _RX].astype(np.int64), _until_next(mine, events)
    by_ready = AsOf(ready["rank"], ready["cpu"])
    called = by_ready.first_after(mine.rank[:, _RX], cpu)
    called = np.where(by_ready.rank_of(called, _NEVER) < until, called, -1)
    called = np.where(hidden.touch(mine.time[:, _RX], pick(ready["time"], called, NAT), cpu), -1, called)
    by_waking = AsOf(waking["rank"], waking["cpu"])
    ready_rank, ready_time = by_ready.rank_of(called, -1), pick(ready["time"], called, NAT)
    woke = by_waking.first_after(ready_rank, cpu)
    following = by_ready.first_after(ready_rank, cpu)
    limit = np.minimum(until, by_ready.rank_of(following, _NEVER))
    own = (by_waking.rank_of(woke, _NEVER) < limit) & (pick(waking["tid"], woke, -1) == pick(ready["tid"], called, -2))
    own &= ~hidden.touch(ready_time, pick(waking["time"], woke, NAT), cpu)
    woke = np.where(own, woke, -1)
    task = pick(task_ids(waking, "pid"), woke, -1)
    came_by, ran_by = (
        AsOf(switch["rank"], task_ids(switch, "next_pid")),
        AsOf(runnable["rank"], task_ids(runnable, "pid")),
    )
    woke_rank, woke_time = by_waking.rank_of(woke, -1), pick(waking["time"], woke, NAT)
    came = came_by.first_after(woke_rank, task)
    came = np.where(hidden.touch(woke_time, pick(switch["time"], came, NAT)), -1, came)
    ran = ran_by.first_after(woke_rank, task)
    ran = np.where(ran_by.rank_of(ran, _NEVER) < came_by.rank_of(came, -1), ran, -1)
    links = (
        ("data_ready", ready, called),
        ("waking", waking, woke),
        ("wakeup", runnable, ran),
        ("switch_in", switch, came),
    )
    for stage, source, found in links:
        at = STAGE_INDEX[stage]
        rows.time[acks, at], rows.cpu[acks, at] = pick(source["time"], found, NAT), pick(source["cpu"], found, -1)
        rows.rank[acks, at] = pick(source["rank"], found, -1)
    listener = (
        pick(ready["skaddr"].astype(np.uint64), called, 0) if "skaddr" in ready else np.zeros(len(acks), np.uint64)
    )
    return listener, task


def accept_returns(events: Mapping[str, Columns]) -> Columns:
    """Return the calls of accept() that returned a connection: ``time``, ``rank``, ``tid``."""
    calls = [event_columns(events, f"syscalls:sys_exit_{name}") for name in ("accept4", "accept")]
    calls = [call.take(call["ret"].astype(np.int64) >= 0) for call in calls if "ret" in call]
    names = ("time", "rank", "tid")
    empty = np.empty(0, np.int64)
    return Columns({name: np.concatenate([empty, *(call[name].astype(np.int64) for call in calls)]) for name in names})


def accept_times(ready_rank: np.ndarray, listener: np.ndarray, woken: np.ndarray, calls: Columns) -> np.ndarray:
    """Return when accept() returned each connection, NaT where that cannot be told.

    A listener's queue is first in, first out (``reqsk_queue_remove``): its n-th completed handshake is what the n-th accept() of
    its tasks returns, if there are as many of the one as of the other and none returned before its handshake was complete.

    Parameters
    ----------
    ready_rank, listener, woken : arrays, dims (handshake,)
        Rank of the listener's data_ready, the listener, and the task it woke (-1: none).
    calls : Columns
        :func:`accept_returns` of the whole recording.
    """
    accepted = np.full(len(listener), NAT)
    for number in np.unique(listener[listener > 0]).tolist():
        mine = np.flatnonzero(listener == number)
        mine = mine[np.argsort(ready_rank[mine], kind="stable")]
        returns = np.flatnonzero(np.isin(calls["tid"], woken[mine][woken[mine] >= 0]))
        returns = returns[np.argsort(calls["rank"][returns], kind="stable")]
        if len(returns) == len(mine) and (calls["rank"][returns] > ready_rank[mine]).all():
            accepted[mine] = calls["time"][returns]
    return accepted
