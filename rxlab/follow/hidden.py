"""Where events may be missing: per CPU, the windows in which perf lost events or delivered none.

A link "the first event after" or "the last before" is exact only where nothing can be missing between its two ends. These windows
say where that is; a link that reaches across one needs another witness or is not made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from rxlab.read.columns import Columns

# A LOST record is stamped when room was found again, just after the sample that found it and one that this sample may have
# interrupted: neither is before the loss (kernel/events/ring_buffer.c, __perf_output_begin).
LOST_STAMP_LAG_NS = 2_000
# Samples of a CPU remembered from piece to piece of a recording: more than fit into that lag.
MEMORY = 64
# A blind window hides events a little before its first and after its last visible switch (measured: -2 / +0.2 ms).
BLIND_BEFORE_NS, BLIND_AFTER_NS = 2_000_000, 200_000
_FIRST, _LAST = np.iinfo(np.int64).min // 4, np.iinfo(np.int64).max // 4


@dataclass(frozen=True)
class _Windows:
    """Disjoint windows in order, as arrays of first and last instants."""

    first: np.ndarray
    last: np.ndarray

    def touch(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Tell for each interval whether a window reaches into it."""
        at = np.searchsorted(self.first, end, side="left") - 1
        return (at >= 0) & (self.last[np.maximum(at, 0)] > start) if len(self.first) else np.zeros(len(start), bool)


def _merge(first: np.ndarray, last: np.ndarray) -> _Windows:
    """Return overlapping windows as disjoint ones."""
    order = np.argsort(first, kind="stable")
    first, last = first[order], np.maximum.accumulate(last[order]) if len(order) else last
    begins = np.concatenate(([True], first[1:] > last[:-1])) if len(first) else np.zeros(0, bool)
    ends = np.concatenate((begins[1:], [True])) if len(first) else begins
    return _Windows(first[begins], last[ends])


class Hidden:
    """The windows of one recording in which events may be missing.

    Parameters
    ----------
    cpu, first, last : integer arrays, dims (window,)
        CPU and the instants (nanoseconds of CLOCK_MONOTONIC) between which events may be missing, both exclusive.
    """

    def __init__(self, cpu: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
        self._all = _merge(first, last)
        self._of = {int(c): _merge(first[cpu == c], last[cpu == c]) for c in np.unique(cpu)}

    def of_cpus(self, cpus: np.ndarray) -> Hidden:
        """Return the windows on some CPUs."""
        mine = [(cpu, windows) for cpu, windows in self._of.items() if cpu in cpus]
        if not mine:
            return NOTHING_HIDDEN
        number = np.concatenate([np.full(len(windows.first), cpu) for cpu, windows in mine])
        return Hidden(number, *(np.concatenate([getattr(w, end) for _, w in mine]) for end in ("first", "last")))

    @property
    def any(self) -> bool:
        """Whether there is any window at all."""
        return bool(len(self._all.first))

    def touch(self, start: np.ndarray, end: np.ndarray, cpu: np.ndarray | None = None) -> np.ndarray:
        """Tell for each interval of time whether events may be missing in it: on one CPU each, or on any.

        Parameters
        ----------
        start, end : int64 arrays, nanoseconds of CLOCK_MONOTONIC
        cpu : integer array, optional
        """
        if not self.any:
            return np.zeros(len(start), bool)
        if cpu is None:
            return self._all.touch(start, end)
        touched = np.zeros(len(start), bool)
        for number, windows in self._of.items():
            rows = np.flatnonzero(cpu == number)
            touched[rows] = windows.touch(start[rows], end[rows])
        return touched


NOTHING_HIDDEN = Hidden(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))


def hidden_windows(
    events: Mapping[str, Columns], lost: int, records: Columns | None
) -> tuple[Hidden, Hidden, Hidden, np.ndarray]:
    """Find where events may be missing.

    Parameters
    ----------
    events : mapping of str to Columns
    lost : int
        Events the recording lost in all.
    records : Columns or None
        ``PerfData.lost``: ``time``, ``cpu``, ``count``, ``kind`` of the records that say so; None: it is not known where.

    Returns
    -------
    hidden : Hidden
        Lost and blind.
    lossy : Hidden
        Lost only.
    unseen : Hidden
        Lost, or between two switches of which the second is not from the task of the first, whatever explains that.
    blind : int64 array, dims (window, 4)
        The blind windows, as :func:`blind_windows` gives them.
    """
    return combine_windows(lost_windows((_samples(events) for _ in range(1)), lost, records), blind_windows(events))


def combine_windows(
    lost: tuple[np.ndarray, np.ndarray, np.ndarray], blind: np.ndarray
) -> tuple[Hidden, Hidden, Hidden, np.ndarray]:
    """Return :func:`hidden_windows` from the windows of loss (CPU, first and last instant) and the blind windows."""
    lossy = Hidden(*lost)
    unseen = Hidden(*(np.concatenate((one, blind[:, column])) for one, column in zip(lost, (0, 2, 3), strict=True)))
    # A break of the switch chain that a loss explains is no blindness.
    blind = blind[~lossy.touch(blind[:, 2], blind[:, 3], blind[:, 0])]
    cpu, first, last = lost
    hidden = Hidden(
        np.concatenate((cpu, blind[:, 0])),
        np.concatenate((first, blind[:, 2] - BLIND_BEFORE_NS)),
        np.concatenate((last, blind[:, 3] + BLIND_AFTER_NS)),
    )
    return hidden, lossy, unseen, blind


def lost_windows(
    samples: Iterable[tuple[np.ndarray, np.ndarray]], lost: int, records: Columns | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return CPU, first and last instant of each window of loss: from the last sample before a LOST record to that record.

    Parameters
    ----------
    samples : iterable of pairs of arrays
        CPU and time (nanoseconds of CLOCK_MONOTONIC) of all samples, piece by piece in order of time; not looked at where
        nothing was lost.
    lost, records
        As :func:`hidden_windows`.
    """
    none = np.empty(0, np.int64)
    if not lost:
        return none, none, none
    rows, found = _placed(records), []
    last: dict[int, np.ndarray] = {}
    for cpus, times in samples:
        for number in np.unique(cpus).tolist():
            stamps = times[cpus == number]
            before = last.get(number)
            if rows is not None:
                found.append(_windows_in(number, before, stamps, rows))
            last[number] = (stamps if before is None else np.concatenate((before, stamps)))[-MEMORY:]
    numbers = np.array(sorted(last), np.int64)
    if rows is None or not np.isin(rows["cpu"], numbers).all():
        # Lost, and nobody says where: anything may be missing anywhere.
        return numbers, np.full(len(numbers), _FIRST), np.full(len(numbers), _LAST)
    # A record after the last sample, and what was lost then, which has no record of its own.
    found += [_windows_in(number, stamps, None, rows) for number, stamps in sorted(last.items())]
    cpu, first, until = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return cpu, first, until


def _windows_in(
    number: int, before: np.ndarray | None, stamps: np.ndarray | None, rows: Columns
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the windows of the records told on one CPU since its `before` samples and not after its next `stamps` (None: the end)."""
    since = _FIRST if before is None else int(before[-1])
    until = _LAST if stamps is None else int(stamps[-1])
    told = rows["time"][rows["cpu"] == number]
    # A record of the instant of a piece's last sample has its samples in both.
    told = told[(told >= since) & (told < until)]
    known = np.concatenate([part for part in (before, stamps) if part is not None])
    finder = np.searchsorted(known, told, side="right") - 1
    at = np.minimum(finder - 1, np.searchsorted(known, told - LOST_STAMP_LAG_NS, side="right") - 1)
    first = np.where(at >= 0, known[np.maximum(at, 0)], _FIRST)
    # The sample that found room came after all that was lost.
    last = np.where(finder >= 0, known[np.maximum(finder, 0)], told)
    if stamps is None:
        first, last = np.append(first, known[-1]), np.append(last, _LAST)
    return np.full(len(first), number, np.int64), first, last


def _placed(records: Columns | None) -> Columns | None:
    """Return the records that say where events were lost; None where some loss has no place."""
    if records is None or not records.n:
        return None
    rows = records.take(records["kind"] == b"LOST")
    return rows if rows.n and (rows["time"] >= 0).all() and (rows["cpu"] >= 0).all() else None


def _samples(events: Mapping[str, Columns]) -> tuple[np.ndarray, np.ndarray]:
    """Return CPU and time of all samples, in order of time."""
    seen = [columns for columns in events.values() if columns.n]
    time = np.concatenate([columns["time"] for columns in seen])
    order = np.argsort(time, kind="stable")
    return np.concatenate([columns["cpu"] for columns in seen])[order], time[order]


def blind_windows(events: Mapping[str, Columns]) -> np.ndarray:
    """Find the windows in which perf delivered nothing on a CPU, without a LOST record.

    On each CPU the task a ``sched_switch`` switches away from must be the one the previous switch chose; each break brackets a
    window in which switches happened unseen. Seen on Linux 6.18: whole tasks are blind, every entry of them breaks the chain
    and none of any other task; the kernel keeps perf's recursion counters in the task (task_struct.perf_recursion, since
    6.11), where a count that leaked would do just that (not proven).

    Returns
    -------
    int64 array, dims (window, 4)
        CPU, tid of the task entered, first and last instant in nanoseconds of CLOCK_MONOTONIC.
    """
    switch = events.get("sched:sched_switch")
    if switch is None or not switch.n:
        return np.empty((0, 4), np.int64)
    order = np.lexsort((switch["rank"], switch["cpu"]))
    cpu, time = switch["cpu"][order], switch["time"][order]
    broken = (cpu[1:] == cpu[:-1]) & (switch["prev_pid"][order][1:] != switch["next_pid"][order][:-1])
    at = np.flatnonzero(broken)
    entered = switch["next_pid"][order][at].astype(np.int64)
    return np.stack([cpu[at].astype(np.int64), entered, time[at], time[at + 1]], axis=1)
