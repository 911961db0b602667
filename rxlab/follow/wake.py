"""Why the reader ran when it did: the wake-up of each packet, and its attribution class (alignment.md 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rxlab.follow.asof import AsOf
from rxlab.follow.kernelpath import event_columns, task_ids
from rxlab.read.columns import Columns
from rxlab.stages import ATTRIBUTIONS

_NEVER = np.iinfo(np.int64).max


@dataclass
class Wake:
    """Why the reader ran: rows of the scheduler events of each packet, -1 where none, and the attribution class."""

    waking: np.ndarray
    wakeup: np.ndarray
    switch_in: np.ndarray
    attribution: np.ndarray


def attribute(
    events: Mapping[str, Columns],
    tid: np.ndarray,
    ready_rank: np.ndarray,
    ready_cpu: np.ndarray,
    wake_limit: np.ndarray,
    consumed_rank: np.ndarray,
) -> Wake:
    """Tell for each consumed packet why its reader ran (alignment.md 2.2).

    Parameters
    ----------
    tid : int64 array, dims (packet,)
        The task that consumed it, -1 where none.
    ready_rank, ready_cpu : int64 arrays, dims (packet,)
        The event that made it readable: data_ready, else the last kernel stage seen; -1 where none.
    wake_limit : int64 array, dims (packet,)
        Rank up to which a wake-up on `ready_cpu` was caused by this packet's data_ready.
    consumed_rank : int64 array, dims (packet,)
        First copy, or the receive call where there is no copy event.
    """
    waking, wakeup, switch = (event_columns(events, f"sched:sched_{name}") for name in ("waking", "wakeup", "switch"))
    switches_in = AsOf(switch["rank"], task_ids(switch, "next_pid"))
    switches_out = AsOf(switch["rank"], task_ids(switch, "prev_pid"))
    by_task = AsOf(waking["rank"], task_ids(waking, "pid"))
    by_cpu = AsOf(waking["rank"], waking["cpu"], task_ids(waking, "pid"))
    runnable = AsOf(wakeup["rank"], task_ids(wakeup, "pid"))
    known = (tid >= 0) & (consumed_rank >= 0)
    arrived = switches_in.last_before(np.where(known, consumed_rank, -1), tid)
    arrived_rank = switches_in.rank_of(arrived, -1)
    slept = switches_out.rank_of(switches_out.last_before(arrived_rank, tid), -1)
    own = by_cpu.first_after(np.where(known, ready_rank, -1), ready_cpu, tid)
    own_rank = by_cpu.rank_of(own, _NEVER)
    # A wake-up that comes after the copy is spurious: the reader won the race.
    is_own = (own >= 0) & (own_rank < wake_limit) & (own_rank < arrived_rank)
    # A wake-up before the task's last switch-out belongs to an earlier sleep, except that a task may be woken on its way to
    # sleep: then its waking precedes the switch-out of a preemption, which does not end the wait.
    woken = by_task.last_before(arrived_rank, tid)
    woken_rank = by_task.rank_of(woken, -1)
    running = known & (arrived_rank < ready_rank)
    label = np.zeros(len(tid), np.int8)
    names = {name: ATTRIBUTIONS.index(name) for name in ATTRIBUTIONS}
    waiting = known & ~running & (arrived >= 0)
    label[known] = names["running"]
    label[waiting] = names["other_wake"]
    label[waiting & (woken_rank < ready_rank)] = names["coalesced"]
    label[waiting & (woken_rank < slept)] = names["preempted"]
    label[waiting & is_own] = names["own_wake"]
    woke = waiting & is_own
    own = np.where(woke, own, -1)
    got_runnable = runnable.first_after(by_cpu.rank_of(own, -1), tid)
    got_runnable = np.where(runnable.rank_of(got_runnable, _NEVER) < arrived_rank, got_runnable, -1)
    return Wake(own, got_runnable, np.where(waiting, arrived, -1), label)
