"""Which CPU RPS chooses, and how far RFS lags behind a reader that changes its CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rxlab.follow.clockfit import NAT
from rxlab.follow.join import Joined
from rxlab.follow.kernelpath import event_columns, task_ids
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_INDEX


def rps_target(skb_hash: np.ndarray, cpus: Sequence[int]) -> np.ndarray:
    """Return the CPU that RPS sends packets to.

    ``get_rps_cpu()`` (net/core/dev.c): ``map->cpus[reciprocal_scale(skb_get_hash(skb), map->len)]``, with
    ``reciprocal_scale(hash, n) = (u64)hash * n >> 32`` and the map's CPUs in ascending order.

    Parameters
    ----------
    skb_hash : integer array, dims (packet,)
        skb->hash as the kernel had it *there*. The driver's (``skb_hash`` of the dataset) is it only where the driver said that
        it covers the ports (``l4_hash``); else the kernel hashes again, with a secret of its own.
    cpus : sequence of int
        ``rps_cpus`` of the queue.

    Returns
    -------
    int16 array, dims (packet,)
    """
    wanted = np.asarray(sorted(cpus), np.int16)
    return wanted[(np.asarray(skb_hash).astype(np.uint64) * np.uint64(len(wanted)) >> np.uint64(32)).astype(np.int64)]


def reader_moves(events: Mapping[str, Columns], joined: Joined) -> Columns:
    """Return each time a reader began to run on another CPU while packets came for it.

    Returns
    -------
    Columns, dims (move,)
        ``time`` (CLOCK_MONOTONIC ns, the switch-in on the new CPU), ``tid``, ``from_cpu``, ``to_cpu``, ``flow``; ``lag_packets``
        of the flow entered the stack elsewhere after it before the first on the new CPU did, `lag_ns` later (-1: none did
        before the next move, all of them are counted).
    """
    packets, rx = joined.packets, STAGE_INDEX["netif_receive_skb"]
    switch = event_columns(events, "sched:sched_switch")
    next_tid = task_ids(switch, "next_pid")
    moves: list[tuple[int, ...]] = []
    is_read = packets["is_data"].astype(bool) & (packets["tid"] >= 0) & (joined.time[:, rx] != NAT)
    for tid in np.unique(packets["tid"][is_read]).tolist():
        runs = np.flatnonzero(next_tid == tid)
        cpu, time = switch["cpu"][runs].astype(np.int64), switch["time"][runs]
        change = np.flatnonzero(np.diff(cpu)) + 1
        until = np.append(time, np.iinfo(np.int64).max)[np.append(change[1:], len(time))[: len(change)]]
        mine = np.flatnonzero(is_read & (packets["tid"] == tid))
        for flow in np.unique(packets["flow"][mine]).tolist():
            rows = mine[packets["flow"][mine] == flow]
            rows = rows[np.argsort(joined.time[rows, rx], kind="stable")]
            entered, on = joined.time[rows, rx], joined.cpu[rows, rx]
            for at, end in zip(change.tolist(), until.tolist(), strict=True):
                low, high = np.searchsorted(entered, [time[at], end])
                if low == high:
                    continue
                arrived = np.flatnonzero(on[low:high] == cpu[at])
                lag = int(arrived[0]) if len(arrived) else int(high - low)
                lag_ns = int(entered[low + lag] - time[at]) if len(arrived) else -1
                moves.append((int(time[at]), tid, int(cpu[at - 1]), int(cpu[at]), flow, lag, lag_ns))
    table = np.array(sorted(moves), np.int64).reshape(len(moves), 7)
    names = ("time", "tid", "from_cpu", "to_cpu", "flow", "lag_packets", "lag_ns")
    return Columns({name: table[:, column] for column, name in enumerate(names)})
