"""The index of a recording: what each sample is and where it goes, before any field is read."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rxlab.errors import UsageError
from rxlab.read import perfgroups as groups
from rxlab.read import perfrecords as rec
from rxlab.read.perfattr import LAYOUT_COLUMNS, SAMPLE_READ
from rxlab.read.perffile import PerfFile, Segment

# Above this spread of CPU numbers they are damage, and a general sort orders the samples.
MAX_CPUS = 1 << 16
MAX_SAMPLES = (1 << 31) - 1


@dataclass
class Samples:
    """Samples in file order, over all segments.

    Attributes
    ----------
    time : int64 array, dims (sample,), ns of the recording's clock, -1 where not recorded
    cpu : int32 array, dims (sample,), -1 where not recorded
    event : int16 array, dims (sample,)
        Event number; -1: unknown id or too short; -2: dropped duplicate.
    start : int64 array, dims (sample,)
        First byte of the record in its segment.
    firsts : list of int
        First sample of each segment, and the total.
    """

    time: np.ndarray
    cpu: np.ndarray
    event: np.ndarray
    start: np.ndarray
    firsts: list[int]


@dataclass
class Index:
    """Where each sample is in the file and in the columns of its event.

    Attributes
    ----------
    start, event : arrays, dims (sample,)
        As in :class:`Samples`.
    place : int32 array, dims (sample,)
        Row within the event, in time order.
    segments : list of int
        First sample of each segment, and the total.
    rows : int64 array, dims (events + 1,)
        Where each event's part of `time`, `cpu` and `rank` begins.
    time, cpu, rank : arrays, dims (row,)
        The columns of all events, one event after the other.
    duplicates, unknown : int
        Samples dropped because their bytes repeat; because no event has their id or they are too short.
    """

    start: np.ndarray
    event: np.ndarray
    place: np.ndarray
    segments: list[int]
    rows: np.ndarray
    time: np.ndarray
    cpu: np.ndarray
    rank: np.ndarray
    duplicates: int
    unknown: int


class Tables:
    """The recording's events as the kernels take them: id table and layouts.

    Parameters
    ----------
    perf : PerfFile
    """

    def __init__(self, perf: PerfFile) -> None:
        attrs = perf.events.attrs
        self.layouts = np.array([attr.layout() for attr in attrs], np.int64).reshape(len(attrs), LAYOUT_COLUMNS)
        ids = {sample_id: number for sample_id, number in perf.events.ids.items() if sample_id}
        # The table is a quarter full at most. One event needs no id, as in perf.
        self.keys = np.zeros(1 << max(4, (4 * len(ids)).bit_length()), np.uint64)
        self.events = np.zeros(self.keys.size, np.int64)
        rec.fill_ids(self.keys, self.events, np.array(list(ids), np.uint64), np.array(list(ids.values()), np.int64))
        self.id_position = attrs[0].id_position() if len(attrs) > 1 else -1
        self.has_read = any(attr.sample_type & SAMPLE_READ for attr in attrs)


def block_counts(segment: Segment) -> np.ndarray:
    """Return the number of samples in each block of a segment."""
    counts = np.full(segment.block_starts.size, rec.BLOCK, np.int64)
    if counts.size:
        counts[-1] = segment.n_samples - (counts.size - 1) * rec.BLOCK
    return counts


def read_samples(
    perf: PerfFile, tables: Tables, blocks: list[np.ndarray] | None = None, *, threads: int = 2
) -> Samples:
    """Index the samples of some blocks.

    Parameters
    ----------
    perf, tables
        The recording.
    blocks : list of int arrays, optional
        Block numbers wanted of each segment, ascending; all by default.
    threads : int, optional
    """
    if tables.has_read:
        return read_groups(perf, tables)
    chosen = blocks if blocks is not None else [np.arange(segment.block_starts.size) for segment in perf.segments]
    counts = [block_counts(segment)[numbers] for segment, numbers in zip(perf.segments, chosen, strict=True)]
    firsts = [0, *np.cumsum([int(part.sum()) for part in counts]).tolist()]
    total = firsts[-1]
    if total > MAX_SAMPLES:
        raise UsageError("too many samples for one pass", where=str(perf.path), found=f"{total}", do="Give chunks=.")
    out = (np.empty(total, np.int64), np.empty(total, np.int32), np.empty(total, np.int16), np.empty(total, np.int64))
    jobs = []
    for segment, numbers, part, first in zip(perf.segments, chosen, counts, firsts, strict=False):
        for piece in np.array_split(np.arange(numbers.size), max(1, threads)):
            begin = first + int(part[: piece[0]].sum()) if piece.size else first
            views = tuple(column[begin : begin + int(part[piece].sum())] for column in out)
            jobs.append((segment, segment.block_starts[numbers[piece]], part[piece], views))

    def run(job: tuple) -> None:
        segment, starts, sizes, views = job
        ids = (tables.keys, tables.events)
        rec.index_blocks(
            segment.buffer, segment.end, perf.order, starts, sizes, ids, tables.id_position, tables.layouts, views
        )

    run_all(run, [job for job in jobs if job[1].size], threads)
    return Samples(*out, firsts)


def read_groups(perf: PerfFile, tables: Tables) -> Samples:
    """Index a recording whose samples have a READ part: a record can be several samples, or none."""
    # A value takes 8 bytes and its id 8 more, so this many rows are enough; pages never written cost nothing.
    room = sum((segment.end - segment.start) // 16 + 1 for segment in perf.segments)
    out = (np.empty(room, np.int64), np.empty(room, np.int32), np.empty(room, np.int16), np.empty(room, np.int64))
    previous = np.zeros(tables.keys.size, np.uint64)
    firsts = [0]
    for segment in perf.segments:
        row = firsts[-1]
        if segment.n_samples:
            first, ids = int(segment.block_starts[0]), (tables.keys, tables.events)
            where = (segment.buffer, segment.end, perf.order, first, segment.n_samples)
            row = groups.expand_samples(*where, ids, tables.id_position, tables.layouts, previous, out, row)
        firsts.append(int(row))
    time, cpu, event, start = (column[: firsts[-1]].copy() for column in out)
    return Samples(time, cpu, event, start, firsts)


def run_all(function, jobs: Iterable, threads: int) -> list:
    """Run a function that releases the interpreter's lock over jobs, on some threads; raise the first error."""
    jobs = list(jobs)
    if threads <= 1 or len(jobs) <= 1:
        return [function(job) for job in jobs]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, jobs))


def order_samples(samples: Samples, n_known: int, threads: int) -> np.ndarray:
    """Return the numbers of the known samples in the order (time, cpu, file position)."""
    if n_known == 0:
        return np.empty(0, np.int32)
    lowest, highest = int(samples.cpu.min()), int(samples.cpu.max())
    if highest - lowest >= MAX_CPUS:
        order = np.lexsort((samples.cpu, samples.time))
        return order[samples.event[order] >= 0].astype(np.int32)
    firsts = np.zeros(highest - lowest + 2, np.int64)
    rows = np.empty(n_known, np.int32)
    rec.split_by_cpu(samples.cpu, samples.event, lowest, firsts, rows)

    def sort_group(group: np.ndarray) -> None:
        # Ring buffers are in time order but for a few samples taken in interrupts; a per-thread recording is not.
        if not rec.sort_nearly_sorted(samples.time, group, 4 * group.size + 1024):
            group.sort()
            group[:] = group[np.argsort(samples.time[group], kind="stable")]

    groups_of_rows = (rows[first:last] for first, last in zip(firsts[:-1].tolist(), firsts[1:].tolist(), strict=True))
    run_all(sort_group, [group for group in groups_of_rows if group.size], threads)
    order = np.empty(n_known, np.int32)
    rec.merge_cpus(samples.time, rows, firsts, order)
    return order


def drop_duplicates(perf: PerfFile, samples: Samples, order: np.ndarray, threads: int) -> int:
    """Mark samples whose record repeats one just before it, see ``perfrecords.mark_duplicates``; return how many."""
    columns = (samples.time, samples.cpu, samples.event, samples.start)
    edges = [order.size * part // threads for part in range(threads + 1)]
    jobs = [
        (segment.buffer, perf.order, (low, high), span, order, columns)
        for segment, low, high in zip(perf.segments, samples.firsts[:-1], samples.firsts[1:], strict=True)
        for span in zip(edges[:-1], edges[1:], strict=True)
        if high > low
    ]
    return sum(run_all(lambda job: rec.mark_duplicates(*job), jobs, threads))


def build_index(perf: PerfFile, samples: Samples, *, first_rank: int = 0, threads: int = 2) -> Index:
    """Order samples, drop exact duplicates and give each its row."""
    n_events = len(perf.events.names)
    counts = np.zeros(n_events + 2, np.int64)
    rec.count_events(samples.event, counts)
    unknown = int(counts[1])
    order = order_samples(samples, samples.event.size - unknown, threads)
    duplicates = drop_duplicates(perf, samples, order, threads)
    if duplicates:
        counts[:] = 0
        rec.count_events(samples.event, counts)
    rows = np.concatenate([[0], np.cumsum(counts[2:])]).astype(np.int64)
    columns = (np.empty(rows[-1], np.int64), np.empty(rows[-1], np.int32), np.empty(rows[-1], np.int64))
    place = np.empty(samples.event.size, np.int32)
    rec.assign_rows(order, (samples.time, samples.cpu, samples.event), rows[:-1], first_rank, place, columns)
    return Index(samples.start, samples.event, place, samples.firsts, rows, *columns, duplicates, unknown)
