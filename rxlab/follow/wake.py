"""Why the reader ran when it did: the wake-up of each packet, and its attribution class (alignment.md 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.clockfit import NAT
from rxlab.follow.consumption import TASK_INTERRUPTIBLE, sleeps
from rxlab.follow.hidden import Hidden
from rxlab.follow.kernelpath import KernelPath, event_columns, task_ids
from rxlab.read.columns import Columns
from rxlab.stages import ATTRIBUTIONS, STAGE_INDEX

# common_flags of a sample: it was taken in a hardware interrupt (include/linux/trace_events.h).
TRACE_FLAG_HARDIRQ = 0x08

_NEVER = np.iinfo(np.int64).max


@dataclass
class Wake:
    """Why the reader ran: rows of the scheduler events of each packet, -1 where none, and the attribution class."""

    waking: np.ndarray
    wakeup: np.ndarray
    switch_in: np.ndarray
    attribution: np.ndarray


def first_wakes(
    events: Mapping[str, Columns], path: KernelPath, skb: np.ndarray, hidden: Hidden
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each skb the rank of the wake-up that its data_ready made, and the task it woke; -1 where it made none.

    The waker is what called data_ready: the same task, and not a hardware interrupt between, whose timers wake tasks that sleep
    for other reasons.
    """
    waking = event_columns(events, "sched:sched_waking")
    if "common_flags" in waking:
        waking = waking.take((waking["common_flags"] & TRACE_FLAG_HARDIRQ) == 0)
    at = STAGE_INDEX["data_ready"]
    rank, cpu = pick(path.rank[:, at], skb, -1), pick(path.cpu[:, at], skb, -1).astype(np.int64)
    by_cpu = AsOf(waking["rank"], waking["cpu"])
    row = by_cpu.first_after(rank, cpu)
    own = by_cpu.rank_of(row, _NEVER) < pick(path.columns["wake_limit"], skb, 0)
    own &= pick(waking["tid"], row, -1) == pick(path.columns["ready_tid"], skb, -2)
    own &= ~hidden.touch(pick(path.time[:, at], skb, NAT), pick(waking["time"], row, NAT), cpu)
    row = np.where(own, row, -1)
    return by_cpu.rank_of(row, -1), pick(task_ids(waking, "pid"), row, -1)


@dataclass(frozen=True)
class Since:
    """The event that made each packet readable: data_ready, else the last kernel stage seen; -1 (NaT) where none.

    Attributes
    ----------
    time, rank, cpu : int64 arrays, dims (packet,)
    limit : int64 array
        Rank up to which a wake-up on ``cpu`` was caused by this packet's data_ready.
    """

    time: np.ndarray
    rank: np.ndarray
    cpu: np.ndarray
    limit: np.ndarray


@dataclass(frozen=True)
class Consumed:
    """When each packet was read: its first copy, or the receive call's return where no copy was seen; dims (packet,).

    Attributes
    ----------
    tid : int64 array
        The task that read it, -1 where none.
    rank, time : int64 arrays
    is_copy : bool array
    """

    tid: np.ndarray
    rank: np.ndarray
    time: np.ndarray
    is_copy: np.ndarray


@dataclass(frozen=True)
class _Switches:
    """The switches of each task: rows of the event, those to it and those away from it."""

    events: Columns
    into: AsOf
    away: AsOf

    @classmethod
    def of(cls, switch: Columns) -> _Switches:
        return cls(
            switch,
            AsOf(switch["rank"], task_ids(switch, "next_pid")),
            AsOf(switch["rank"], task_ids(switch, "prev_pid")),
        )


def _arrivals(
    events: Mapping[str, Columns], switches: _Switches, ready: Since, read: Consumed, lossy: Hidden
) -> tuple[np.ndarray, np.ndarray]:
    """Return the switch by which each reader came to its packet (row of the event, -1: none seen), and whether that is known.

    The last one before the copy. Of a call that shows its return only it is not seen when it took the datagram, and a task may be
    preempted, or wait for memory or a lock, with that in hand. It had not taken it when its call before returned, nor when it
    last fell asleep for what a signal may end (the wait for data is such a sleep): the first time it ran since then, with the datagram there.
    """
    into, away, time = switches.into, switches.away, switches.events["time"]
    # Since when it was there is told by its own events only: a stamp may be long before that.
    known = (read.tid >= 0) & (read.rank >= 0) & (ready.rank >= 0)
    arrived = into.last_before(np.where(known, read.rank, -1), read.tid)
    # A reader that left after that had come back unseen.
    known &= ~read.is_copy | (away.rank_of(away.last_before(read.rank, read.tid), -1) <= into.rank_of(arrived, -1))
    rows = np.flatnonzero(known & ~read.is_copy)
    tid, rank = read.tid[rows], read.rank[rows]
    receive, switch = event_columns(events, "sock:sock_recv_length"), switches.events
    asleep = switch.take(sleeps(switch, TASK_INTERRUPTIBLE))
    begun, calls = ready.rank[rows], AsOf(receive["rank"], receive["tid"])
    # A call that returned shows its task running, whoever saw that come.
    ran = calls.rank_of(calls.last_before(begun, tid), -1)
    for index in (calls, AsOf(asleep["rank"], task_ids(asleep, "prev_pid"))):
        begun = np.maximum(begun, index.rank_of(index.last_before(rank, tid), -1))
    came, left = into.last_before(begun, tid), away.last_before(begun, tid, inclusive=True)
    is_away = away.rank_of(left, -1) > np.maximum(into.rank_of(came, -1), ran)
    first = np.where(is_away, into.first_after(begun, tid), came)
    first_rank = into.rank_of(first, -1)
    # Away, and gone once more before it is seen to come: it came unseen.
    gone = away.rank_of(away.last_before(first_rank, tid), -1) > begun
    known[rows] = ~is_away | ((first_rank >= 0) & (first_rank < rank) & ~gone)
    since = np.where(is_away, pick(time, left, NAT), pick(time, first, NAT))
    known[rows] &= ~lossy.touch(np.where(since == NAT, ready.time[rows], since), read.time[rows])
    arrived[rows] = first
    return arrived, known


def attribute(events: Mapping[str, Columns], ready: Since, read: Consumed, lossy: Hidden) -> Wake:
    """Tell for each consumed packet why its reader ran (alignment.md 2.2).

    Parameters
    ----------
    events : mapping of str to Columns
    ready : Since
    read : Consumed
    lossy : Hidden
        Where scheduler events may be missing: nothing is said of what reaches across.
    """
    waking, wakeup, switch = (event_columns(events, f"sched:sched_{name}") for name in ("waking", "wakeup", "switch"))
    switches, tid = _Switches.of(switch), read.tid
    by_task = AsOf(waking["rank"], task_ids(waking, "pid"))
    # A timer in a hard interrupt may wake the reader right after data_ready; that is not the packet's doing.
    is_timer = (
        (waking["common_flags"] & TRACE_FLAG_HARDIRQ) != 0 if "common_flags" in waking else np.zeros(waking.n, bool)
    )
    candidates = np.flatnonzero(~is_timer)
    by_cpu = AsOf(waking["rank"][candidates], waking["cpu"][candidates], task_ids(waking, "pid")[candidates])
    runnable = AsOf(wakeup["rank"], task_ids(wakeup, "pid"))
    arrived, known = _arrivals(events, switches, ready, read, lossy)
    arrived_time = pick(switch["time"], arrived, NAT)
    # The reader was switched in on the CPU it consumed on, with nothing hidden there since.
    known &= ~((arrived >= 0) & lossy.touch(arrived_time, read.time, pick(switch["cpu"], arrived, -1)))
    arrived = np.where(known, arrived, -1)
    arrived_rank = switches.into.rank_of(arrived, -1)
    slept = switches.away.rank_of(switches.away.last_before(arrived_rank, tid), -1)
    own = pick(candidates, by_cpu.first_after(np.where(known, ready.rank, -1), ready.cpu, tid), -1)
    own_rank, own_time = pick(waking["rank"], own, _NEVER), pick(waking["time"], own, NAT)
    # A wake-up that comes after the copy is spurious: the reader won the race.
    is_own = (own >= 0) & (own_rank < ready.limit) & (own_rank < arrived_rank)
    is_own &= ~lossy.touch(ready.time, own_time, ready.cpu) & ~lossy.touch(own_time, arrived_time)
    # A wake-up before the task's last switch-out belongs to an earlier sleep, except that a task may be woken on its way to
    # sleep: then its waking precedes the switch-out of a preemption, which does not end the wait.
    woken = by_task.last_before(arrived_rank, tid)
    woken_rank = by_task.rank_of(woken, -1)
    running = known & (arrived_rank < ready.rank)
    unclear = known & ~running & ~is_own & lossy.touch(ready.time, arrived_time)
    label = np.zeros(len(tid), np.int8)
    names = {name: ATTRIBUTIONS.index(name) for name in ATTRIBUTIONS}
    waiting = known & ~running & (arrived >= 0)
    label[known] = names["running"]
    label[waiting] = names["other_wake"]
    label[waiting & (woken_rank < ready.rank)] = names["coalesced"]
    label[waiting & (woken_rank < slept)] = names["preempted"]
    label[waiting & is_own] = names["own_wake"]
    label[unclear] = names["none"]
    woke = waiting & is_own
    own = np.where(woke, own, -1)
    # The wake-up ends where the reader first runs. Preempted after that, or asleep for a lock, it is on its way already.
    came = switches.into.first_after(pick(waking["rank"], own, -1), tid)
    arrived = np.where(woke, came, arrived)
    arrived_rank = switches.into.rank_of(arrived, -1)
    got_runnable = runnable.first_after(pick(waking["rank"], own, -1), tid)
    got_runnable = np.where(runnable.rank_of(got_runnable, _NEVER) < arrived_rank, got_runnable, -1)
    got_runnable = np.where(lossy.touch(own_time, pick(wakeup["time"], got_runnable, NAT)), -1, got_runnable)
    return Wake(own, got_runnable, np.where(waiting, arrived, -1), label)
