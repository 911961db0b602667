"""A recording in windows of time, so that memory stays bounded whatever the file's size.

The blocks of the record walk know their first and last stamp; a window indexes only the blocks that reach into it. Windows
do not overlap and cover all samples, so their columns one after the other are the whole recording's, ``rank`` included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rxlab.read import perfrecords as rec
from rxlab.read.perffile import PerfFile
from rxlab.read.perfindex import Index, Samples, Tables, block_counts, build_index, read_samples
from rxlab.read.perfmeta import Counts

# Blocks indexed at a time while summing up: 40 MB.
BLOCKS_AT_ONCE = 256

FOREVER = np.iinfo(np.int64).max


@dataclass
class Summary:
    """What the blocks of a recording span.

    Attributes
    ----------
    first, last : list of int64 arrays, dims (block,), ns
        Lowest and highest stamp in each block, per segment; ``FOREVER``, -1 for a block without known samples.
    counts : Counts
        Duplicates are not known before the windows are read.
    """

    first: list[np.ndarray]
    last: list[np.ndarray]
    counts: Counts


def summarize(perf: PerfFile, tables: Tables, *, threads: int) -> Summary:
    """Walk all samples once, keeping two stamps per block and the counts per event."""
    totals = np.zeros(len(perf.events.names) + 2, np.int64)
    if tables.has_read:
        return summarize_groups(perf, tables, totals)
    firsts, lasts = [], []
    for number, segment in enumerate(perf.segments):
        first = np.full(segment.block_starts.size, FOREVER, np.int64)
        last = np.full(segment.block_starts.size, -1, np.int64)
        sizes = block_counts(segment)
        for begin in range(0, sizes.size, BLOCKS_AT_ONCE):
            blocks = np.arange(begin, min(begin + BLOCKS_AT_ONCE, sizes.size))
            chosen = [blocks if i == number else blocks[:0] for i in range(len(perf.segments))]
            samples = read_samples(perf, tables, chosen, threads=threads)
            rec.count_events(samples.event, totals)
            edges = np.concatenate([[0], np.cumsum(sizes[blocks])[:-1]])
            is_known = samples.event >= 0
            first[blocks] = np.minimum.reduceat(np.where(is_known, samples.time, FOREVER), edges)
            last[blocks] = np.maximum.reduceat(np.where(is_known, samples.time, -1), edges)
        firsts.append(first)
        lasts.append(last)
    lowest = min((int(part.min()) for part in firsts if part.size), default=FOREVER)
    highest = max((int(part.max()) for part in lasts if part.size), default=-1)
    return Summary(firsts, lasts, sum_up(totals, lowest, highest))


def summarize_groups(perf: PerfFile, tables: Tables, totals: np.ndarray) -> Summary:
    """Summarize a recording of groups, whose samples only show when all of it is indexed: every block spans all of it."""
    samples = read_samples(perf, tables)
    rec.count_events(samples.event, totals)
    stamps = samples.time[samples.event >= 0]
    lowest, highest = (int(stamps.min()), int(stamps.max())) if stamps.size else (FOREVER, -1)
    firsts = [np.full(segment.block_starts.size, lowest, np.int64) for segment in perf.segments]
    lasts = [np.full(segment.block_starts.size, highest, np.int64) for segment in perf.segments]
    return Summary(firsts, lasts, sum_up(totals, lowest, highest))


def sum_up(totals: np.ndarray, lowest: int, highest: int) -> Counts:
    """Return the counts of a recording whose duplicates were not looked for."""
    has_stamps = highest != -1 and lowest != FOREVER
    return Counts(totals[2:], lowest if has_stamps else None, highest if has_stamps else None, None, int(totals[1]))


def choose_edges(perf: PerfFile, summary: Summary, n_samples: int) -> list[int]:
    """Return window edges between which about `n_samples` samples lie, as if each block's were spread evenly in it."""
    if summary.counts.first_ns is None or summary.counts.last_ns is None:
        return [-1, FOREVER]
    points, weights = [], []
    for segment, first, last in zip(perf.segments, summary.first, summary.last, strict=True):
        is_used = last >= first
        low, high, counts = first[is_used], last[is_used], block_counts(segment)[is_used]
        for quarter in range(4):
            points.append(low + (high - low) // 4 * quarter)
            weights.append(counts / 4)
    stamps, weight = np.concatenate(points), np.concatenate(weights)
    order = np.argsort(stamps, kind="stable")
    filled = np.cumsum(weight[order])
    n_windows = max(1, int(np.ceil(filled[-1] / n_samples)))
    at = np.searchsorted(filled, np.arange(1, n_windows) * (filled[-1] / n_windows))
    inner = np.unique(stamps[order][np.minimum(at, stamps.size - 1)])
    inner = inner[inner > summary.counts.first_ns]
    return [summary.counts.first_ns, *inner.tolist(), FOREVER]


def is_before(stamps: np.ndarray, end_ns: int) -> np.ndarray:
    """Tell which stamps lie before a window's end; the last window has none, so a damaged stamp of int64's maximum is in it."""
    return (stamps < end_ns) | (end_ns == FOREVER)


def cut_window(samples: Samples, start_ns: int, end_ns: int) -> Samples:
    """Return the samples with ``start_ns <= time < end_ns`` (unknown ones left out), segments kept apart."""
    is_inside = (samples.event >= 0) & (samples.time >= start_ns) & is_before(samples.time, end_ns)
    firsts = np.concatenate([[0], np.cumsum(is_inside)])[samples.firsts].tolist()
    return Samples(
        samples.time[is_inside], samples.cpu[is_inside], samples.event[is_inside], samples.start[is_inside], firsts
    )


def read_window(perf: PerfFile, tables: Tables, summary: Summary, span: tuple[int, int], *, threads: int) -> Samples:
    """Index the samples of one window ``span[0] <= time < span[1]``."""
    chosen = [
        np.flatnonzero(is_before(first, span[1]) & (last >= span[0]))
        for first, last in zip(summary.first, summary.last, strict=True)
    ]
    return cut_window(read_samples(perf, tables, chosen, threads=threads), *span)


def iterate_windows(
    perf: PerfFile, tables: Tables, edges: list[int], summary: Summary, *, threads: int
) -> Iterator[Index]:
    """Yield the index of each window between consecutive edges; ranks go on from window to window."""
    rank = 0
    # Groups expand only as a whole (a counter's last value decides), so such a recording is indexed once.
    whole = read_samples(perf, tables, threads=threads) if tables.has_read else None
    for start_ns, end_ns in zip(edges[:-1], edges[1:], strict=True):
        if whole is not None:
            samples = cut_window(whole, start_ns, end_ns)
        else:
            samples = read_window(perf, tables, summary, (start_ns, end_ns), threads=threads)
        index = build_index(perf, samples, first_rank=rank, threads=threads)
        rank += index.time.size
        yield index
