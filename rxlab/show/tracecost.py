"""What recording costs inside a hop: the events that perf recorded there, times what one of them costs on this machine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rxlab.read.columns import Columns

# The closest pairs of a recording: a quantile, so that one odd stamp does not decide.
CLOSEST = 0.001
MIN_PAIRS = 1000
MAX_EVENTS = 2_000_000  # of each kind, enough for the quantile of any recording


def event_cost(events: Mapping[str, Columns]) -> float:
    """Return what recording one event costs on this machine, ns: how far apart the closest events of one CPU are.

    perf stamps an event before it writes it, so the next stamp on that CPU cannot come before the writing is done. What the kernel
    does between the two is in it as well; of the closest pairs that is next to nothing.

    Returns
    -------
    float
        NaN for a recording of fewer than `MIN_PAIRS` pairs.
    """
    kinds = [columns for columns in events.values() if columns.n]
    if not kinds:
        return float("nan")
    time = np.concatenate([columns["time"][:MAX_EVENTS] for columns in kinds])
    cpu = np.concatenate([columns["cpu"][:MAX_EVENTS] for columns in kinds])
    order = np.lexsort((time, cpu))
    gaps = np.diff(time[order])[np.diff(cpu[order]) == 0]
    # Equal stamps on one CPU are one event recorded twice, or a clock too coarse to tell.
    gaps = gaps[gaps > 0]
    return float(np.quantile(gaps, CLOSEST)) if len(gaps) >= MIN_PAIRS else float("nan")


def events_between(events: Mapping[str, Columns], start: int, end: int, cpus: set[int]) -> int:
    """Return how many events were recorded on the given CPUs from `start` on and before `end` (CLOCK_MONOTONIC ns).

    An event is written after its stamp: the one that begins a hop costs that hop, the one that ends it the next.
    """
    found = 0
    for columns in events.values():
        if columns.n:
            inside = (columns["time"] >= start) & (columns["time"] < end)
            found += int(np.isin(columns["cpu"][inside], sorted(cpus)).sum())
    return found
