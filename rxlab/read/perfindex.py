"""The index of a recording: what each sample is and where it goes, before any field is read."""

from __future__ import annotations

from bisect import bisect_left
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
# Fewer samples than this are merged by one thread.
PART = 1 << 16
# What the values of a grouped recording's counters, kept at some blocks, may take.
CHECKPOINT_BYTES = 16 << 20


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
    out = empty_samples(total)
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


@dataclass
class Checkpoints:
    """The last values of a recording's counters at some blocks, so that a walk over groups can begin there.

    Attributes
    ----------
    stride : int
        Every so many blocks there is one.
    slots : int array, dims (counter,)
        Where the id table keeps each counter.
    values : list of dict of int to uint64 array, dims (counter,)
        Per segment and block.
    sizes : list of int64 arrays, dims (block,)
        Samples in each block, per segment.
    """

    stride: int
    slots: np.ndarray
    values: list[dict[int, np.ndarray]]
    sizes: list[np.ndarray]

    @classmethod
    def empty(cls, perf: PerfFile, tables: Tables) -> Checkpoints:
        """Return none, to be noted so far apart that all of them take about `CHECKPOINT_BYTES` at most."""
        slots = np.flatnonzero(tables.keys)
        n_blocks = sum(segment.block_starts.size for segment in perf.segments)
        sizes = [np.zeros(segment.block_starts.size, np.int64) for segment in perf.segments]
        return cls(1 + 8 * slots.size * n_blocks // CHECKPOINT_BYTES, slots, [{} for _ in sizes], sizes)

    def note(self, segment: int, block: int, previous: np.ndarray) -> None:
        """Keep the counters' values at the start of a block, if it is one to keep."""
        if block % self.stride == 0:
            self.values[segment][block] = previous[self.slots]

    def restore(self, segment: int, block: int, previous: np.ndarray) -> int:
        """Set the counters' values to those of the last checkpoint up to a block, and return its block."""
        at = block // self.stride * self.stride
        previous[self.slots] = self.values[segment][at]
        return at


def expand_block(
    perf: PerfFile, tables: Tables, place: tuple[int, int], previous: np.ndarray, out: tuple[np.ndarray, ...], row: int
) -> int:
    """Write the samples of one block ``place`` (segment, block) of groups from `row` on; return the next free row."""
    segment = perf.segments[place[0]]
    start, n_records = int(segment.block_starts[place[1]]), int(block_counts(segment)[place[1]])
    where = (segment.buffer, segment.end, perf.order, start, n_records)
    ids = (tables.keys, tables.events)
    return int(groups.expand_samples(*where, ids, tables.id_position, tables.layouts, previous, out, row))


def room_of_blocks(segment: Segment) -> np.ndarray:
    """Return how many samples each block of groups can be at most: a record is one or none, or one for each 16 bytes."""
    ends = np.append(segment.block_starts[1:], segment.end)
    return (ends - segment.block_starts)[: segment.block_starts.size] // 16 + rec.BLOCK


def empty_samples(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return memory for the columns of `n` samples; pages never written cost nothing."""
    return (np.empty(n, np.int64), np.empty(n, np.int32), np.empty(n, np.int16), np.empty(n, np.int64))


def read_groups(
    perf: PerfFile, tables: Tables, blocks: list[np.ndarray] | None = None, checkpoints: Checkpoints | None = None
) -> Samples:
    """Index a recording whose samples have a READ part: a record can be several samples, or none.

    Some blocks alone need the `checkpoints` of a walk over all of them.
    """
    chosen = blocks if blocks is not None else [np.arange(segment.block_starts.size) for segment in perf.segments]
    rooms = checkpoints.sizes if checkpoints else [room_of_blocks(segment) for segment in perf.segments]
    # A block that is only walked through is written after the last wanted sample, and overwritten.
    spare = max((int(room.max()) for room in rooms if room.size), default=0)
    out = empty_samples(sum(int(room[some].sum()) for room, some in zip(rooms, chosen, strict=True)) + spare)
    previous = np.zeros(tables.keys.size, np.uint64)
    firsts = [0]
    for number, wanted in enumerate(chosen):
        row, is_wanted = firsts[-1], set(wanted.tolist())
        at = checkpoints.restore(number, int(wanted[0]), previous) if checkpoints and is_wanted else 0
        for block in range(at, int(wanted[-1]) + 1 if is_wanted else 0):
            end = expand_block(perf, tables, (number, block), previous, out, row)
            row = end if block in is_wanted else row
        firsts.append(row)
    time, cpu, event, start = (column[: firsts[-1]].copy() for column in out)
    return Samples(time, cpu, event, start, firsts)


def run_all(function, jobs: Iterable, threads: int) -> list:
    """Run a function that releases the interpreter's lock over jobs, on some threads; raise the first error."""
    jobs = list(jobs)
    if threads <= 1 or len(jobs) <= 1:
        return [function(job) for job in jobs]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, jobs))


def sort_by_cpu(samples: Samples, n_known: int, threads: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Group the known samples by CPU, each group in the order (time, file position).

    Returns
    -------
    rows : int32 array
        Sample numbers, one group after the other.
    firsts : int64 array, dims (group + 1,)
        Where each group begins.
    has_ties : bool
        Some samples may have the same time and CPU.
    """
    lowest, highest = int(samples.cpu.min()), int(samples.cpu.max())
    if highest - lowest >= MAX_CPUS:
        order = np.lexsort((samples.cpu, samples.time))
        return order[samples.event[order] >= 0].astype(np.int32), np.array([0, n_known]), True
    firsts, cursor = np.zeros((2, highest - lowest + 2), np.int64)
    rows = np.empty(n_known, np.int32)
    rec.split_by_cpu(samples.cpu, samples.event, lowest, firsts, cursor, rows)

    def sort_group(group: np.ndarray) -> int:
        # Ring buffers are in time order but for a few samples taken in interrupts; a per-thread recording is not.
        ties = rec.sort_nearly_sorted(samples.time, group, 4 * group.size + 1024)
        if ties < 0:
            group.sort()
            group[:] = group[np.argsort(samples.time[group], kind="stable")]
        return ties

    spans = zip(firsts[:-1].tolist(), firsts[1:].tolist(), strict=True)
    ties = run_all(sort_group, [rows[first:last] for first, last in spans if last > first], threads)
    return rows, firsts, any(ties)


def drop_duplicates(perf: PerfFile, samples: Samples, rows: np.ndarray, threads: int) -> int:
    """Mark samples whose record repeats one just before it, see ``perfrecords.mark_duplicates``; return how many."""
    columns = (samples.time, samples.cpu, samples.event, samples.start)
    edges = [rows.size * part // threads for part in range(threads + 1)]
    jobs = [
        (segment.buffer, perf.order, (low, high), span, rows, columns)
        for segment, low, high in zip(perf.segments, samples.firsts[:-1], samples.firsts[1:], strict=True)
        for span in zip(edges[:-1], edges[1:], strict=True)
        if high > low
    ]
    return sum(run_all(lambda job: rec.mark_duplicates(*job), jobs, threads))


def split_in_time(time: np.ndarray, rows: np.ndarray, firsts: np.ndarray, n_parts: int) -> np.ndarray:
    """Return where to cut each group of `rows` so that the parts follow each other in time: dims (part + 1, group)."""
    edges = np.repeat(firsts[None, :-1], n_parts + 1, axis=0)
    edges[-1] = firsts[1:]
    longest = int(np.argmax(np.diff(firsts)))
    for part in range(1, n_parts):
        stamp = time[rows[firsts[longest] + (firsts[longest + 1] - firsts[longest]) * part // n_parts]]
        for group in np.flatnonzero(firsts[1:] > firsts[:-1]).tolist():
            members = range(int(firsts[group]), int(firsts[group + 1]))
            edges[part, group] = members.start + bisect_left(members, stamp, key=lambda row: time[rows[row]])
    return edges


def merge_groups(
    samples: Samples, rows: np.ndarray, firsts: np.ndarray, index: Index, first_rank: int, threads: int
) -> None:
    """Fill the index's places and columns, each thread a part of the time."""
    # Cutting many CPUs' samples costs more than it saves.
    n_parts = threads if firsts.size <= 256 and rows.size > PART else 1
    edges = split_in_time(samples.time, rows, firsts, n_parts)
    counts = np.zeros((n_parts + 1, index.rows.size - 1), np.int64)
    run_all(
        lambda part: rec.count_rows(samples.event, rows, edges[part], edges[part + 1], counts[part + 1]),
        range(n_parts - 1),
        threads,
    )
    before = np.cumsum(counts[:n_parts], axis=0)
    columns = (samples.time, samples.cpu, samples.event)

    def merge(part: int) -> None:
        begins, next_rows = edges[part].copy(), index.rows[:-1] + before[part]
        heap = np.empty((2, begins.size), np.int64)
        rank = first_rank + int(before[part].sum())
        out = (index.time, index.cpu, index.rank)
        bounds = (begins, edges[part + 1])
        rec.merge_cpus(columns, rows, *bounds, heap, index.rows[:-1], next_rows, rank, index.place, out)

    run_all(merge, range(n_parts), threads)


def build_index(perf: PerfFile, samples: Samples, *, first_rank: int = 0, threads: int = 2) -> Index:
    """Order samples, drop exact duplicates and give each its row."""
    n_events, n_samples = len(perf.events.names), samples.event.size
    counts = np.zeros(n_events + 2, np.int64)
    rec.count_events(samples.event, counts)
    n_known, duplicates = n_samples - int(counts[1]), 0
    if n_known:
        order, firsts, has_ties = sort_by_cpu(samples, n_known, threads)
        duplicates = drop_duplicates(perf, samples, order, threads) if has_ties else 0
    if duplicates:
        counts[:] = 0
        rec.count_events(samples.event, counts)
    rows = np.concatenate([[0], np.cumsum(counts[2:])]).astype(np.int64)
    columns = (np.empty(rows[-1], np.int64), np.empty(rows[-1], np.int32), np.empty(rows[-1], np.int64))
    place = np.empty(n_samples, np.int32)
    index = Index(samples.start, samples.event, place, samples.firsts, rows, *columns, duplicates, n_samples - n_known)
    if n_known:
        merge_groups(samples, order, firsts, index, first_rank, threads)
    return index
