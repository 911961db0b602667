"""Why the reader ran when it did: the wake-up of each packet, and its attribution class (alignment.md 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.clockfit import NAT
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


def attribute(
    events: Mapping[str, Columns],
    tid: np.ndarray,
    ready: Since,
    consumed_rank: np.ndarray,
    consumed_time: np.ndarray,
    lossy: Hidden,
) -> Wake:
    """Tell for each consumed packet why its reader ran (alignment.md 2.2).

    Parameters
    ----------
    tid : int64 array, dims (packet,)
        The task that consumed it, -1 where none.
    ready : Since
    consumed_rank, consumed_time : int64 arrays, dims (packet,)
        First copy, or the receive call where there is no copy event.
    lossy : Hidden
        Where scheduler events may be missing: nothing is said of what reaches across.
    """
    waking, wakeup, switch = (event_columns(events, f"sched:sched_{name}") for name in ("waking", "wakeup", "switch"))
    switches_in = AsOf(switch["rank"], task_ids(switch, "next_pid"))
    switches_out = AsOf(switch["rank"], task_ids(switch, "prev_pid"))
    by_task = AsOf(waking["rank"], task_ids(waking, "pid"))
    # A timer in a hard interrupt may wake the reader right after data_ready; that is not the packet's doing.
    is_timer = (
        (waking["common_flags"] & TRACE_FLAG_HARDIRQ) != 0 if "common_flags" in waking else np.zeros(waking.n, bool)
    )
    candidates = np.flatnonzero(~is_timer)
    by_cpu = AsOf(waking["rank"][candidates], waking["cpu"][candidates], task_ids(waking, "pid")[candidates])
    runnable = AsOf(wakeup["rank"], task_ids(wakeup, "pid"))
    known = (tid >= 0) & (consumed_rank >= 0)
    arrived = switches_in.last_before(np.where(known, consumed_rank, -1), tid)
    arrived_time = pick(switch["time"], arrived, NAT)
    # The reader was switched in on the CPU it consumed on, with nothing hidden there since.
    known &= ~((arrived >= 0) & lossy.touch(arrived_time, consumed_time, pick(switch["cpu"], arrived, -1)))
    arrived = np.where(known, arrived, -1)
    arrived_rank = switches_in.rank_of(arrived, -1)
    slept = switches_out.rank_of(switches_out.last_before(arrived_rank, tid), -1)
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
    came = switches_in.first_after(pick(waking["rank"], own, -1), tid)
    arrived = np.where(woke, came, arrived)
    arrived_rank = switches_in.rank_of(arrived, -1)
    got_runnable = runnable.first_after(pick(waking["rank"], own, -1), tid)
    got_runnable = np.where(runnable.rank_of(got_runnable, _NEVER) < arrived_rank, got_runnable, -1)
    got_runnable = np.where(lossy.touch(own_time, pick(wakeup["time"], got_runnable, NAT)), -1, got_runnable)
    return Wake(own, got_runnable, np.where(waiting, arrived, -1), label)
