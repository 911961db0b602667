"""Gates that need no oracle: what a join must satisfy whatever the truth is, computed for every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rxlab.follow.clockfit import NAT
from rxlab.follow.kernelpath import event_columns
from rxlab.read.columns import Columns
from rxlab.stages import ORDER, PATH_KINDS, STAGE_INDEX


def blind_tasks(events: Mapping[str, Columns], windows: np.ndarray) -> dict[str, int]:
    """Return the names of the tasks whose running hid events, with the number of windows each opened."""
    switch = event_columns(events, "sched:sched_switch")
    tids, counts = np.unique(windows[:, 1], return_counts=True)
    tasks: dict[str, int] = {}
    for tid, count in zip(tids.tolist(), counts.tolist(), strict=True):
        row = int(np.argmax(switch["next_pid"] == tid))
        comm = bytes(switch["next_comm"][row]).split(b"\0")[0].decode("utf-8", "replace")
        tasks[comm] = tasks.get(comm, 0) + count
    return tasks


def inside_windows(
    time: np.ndarray, windows: np.ndarray, before_ns: int, after_ns: int, until: np.ndarray | None = None
) -> np.ndarray:
    """Tell for each instant whether it, or any up to `until`, lies in one of the windows, widened by `before_ns` and `after_ns`."""
    if not len(windows):
        return np.zeros(len(time), bool)
    until = time if until is None else np.maximum(time, until)
    low, high = windows[:, -2] - before_ns, windows[:, -1] + after_ns
    order = np.argsort(low)
    low, high = low[order], np.maximum.accumulate(high[order])
    at = np.searchsorted(low, until, side="right") - 1
    return (at >= 0) & (high[np.maximum(at, 0)] >= time) & (time != NAT)


def order_violations(time: np.ndarray, path_kind: np.ndarray) -> np.ndarray:
    """Tell for each row whether one of its seen stages comes before an earlier one of its path kind's order.

    Parameters
    ----------
    time : int64 array, dims (packet, stage), NaT where not seen
    path_kind : int8 array, dims (packet,)
    """
    violated = np.zeros(len(time), bool)
    for code, kind in enumerate(PATH_KINDS):
        rows = np.flatnonzero(path_kind == code)
        if not len(rows):
            continue
        latest = np.full(len(rows), NAT, np.int64)
        # The hardware stamp has its own clock and bound; the gate "causal" judges it.
        for name in ORDER[kind][1:]:
            stamp = time[rows, STAGE_INDEX[name]]
            violated[rows] |= (stamp != NAT) & (stamp < latest)
            latest = np.maximum(latest, stamp)
    return violated


def distinct_bytes(flow: np.ndarray, position: np.ndarray, length: np.ndarray, n_flows: int) -> np.ndarray:
    """Return how many bytes of each stream its segments cover, each counted once whatever was sent twice or overlaps.

    Parameters
    ----------
    flow, position, length : integer arrays, dims (segment,)
        Flow number, stream position of the first byte, bytes.
    n_flows : int

    Returns
    -------
    int64 array, dims (flow,)
    """
    order = np.lexsort((position, flow))
    flow, start, length = flow[order].astype(np.int64), position[order], length[order].astype(np.int64)
    heads = np.flatnonzero(np.diff(flow, prepend=-1))
    # Streams laid out one behind the other, so that one running maximum serves them all.
    sizes = np.diff(np.append(heads, len(flow)))
    span = np.maximum.reduceat(start + length, heads) - start[heads] if len(heads) else np.empty(0, np.int64)
    shift = np.repeat(np.cumsum(span) - span - start[heads], sizes)
    start = start + shift
    reached = np.maximum.accumulate(start + length)
    before = np.concatenate((start[:1], reached[:-1]))
    fresh = np.maximum(start + length - np.maximum(start, before), 0)
    # Exact: sums of integers below 2**53.
    return np.bincount(flow, weights=fresh, minlength=n_flows).astype(np.int64)


def byte_sums(on_wire: np.ndarray, copied: np.ndarray, is_tcp: np.ndarray) -> dict[str, Any]:
    """Compare per TCP flow the stream bytes of packets called consumed with the bytes the copy events moved."""
    rows = [
        {
            "flow": number,
            "pcap": int(on_wire[number]),
            "copied": int(copied[number]),
            "equal": bool(on_wire[number] == copied[number]),
        }
        for number in np.flatnonzero(is_tcp & ((on_wire > 0) | (copied > 0))).tolist()
    ]
    return {"ok": all(row["equal"] for row in rows), "violations": sum(not row["equal"] for row in rows), "flows": rows}
