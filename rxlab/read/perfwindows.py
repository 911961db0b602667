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
from rxlab.read.perfindex import (
    Checkpoints,
    Index,
    Samples,
    Tables,
    block_counts,
    build_index,
    empty_samples,
    expand_block,
    read_groups,
    read_samples,
    room_of_blocks,
)
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
    sizes : list of int64 arrays, dims (block,)
        Samples in each block, per segment.
    checkpoints : Checkpoints or None
        Of a recording of groups.
    """

    first: list[np.ndarray]
    last: list[np.ndarray]
    counts: Counts
    sizes: list[np.ndarray]
    checkpoints: Checkpoints | None = None


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
    counts = sum_up(totals, firsts, lasts)
    return Summary(firsts, lasts, counts, [block_counts(segment) for segment in perf.segments])


def summarize_groups(perf: PerfFile, tables: Tables, totals: np.ndarray) -> Summary:
    """Summarize a recording of groups, noting the counters' values on the way: what a block holds depends on those before it."""
    checkpoints = Checkpoints.empty(perf, tables)
    previous = np.zeros(tables.keys.size, np.uint64)
    out = empty_samples(max((int(room_of_blocks(part).max()) for part in perf.segments if part.n_samples), default=0))
    spans = [np.zeros((2, segment.block_starts.size), np.int64) for segment in perf.segments]
    for number, span in enumerate(spans):
        for block in range(span.shape[1]):
            checkpoints.note(number, block, previous)
            n = expand_block(perf, tables, (number, block), previous, out, 0)
            checkpoints.sizes[number][block] = n
            rec.count_events(out[2][:n], totals)
            known = out[0][:n][out[2][:n] >= 0]
            span[:, block] = (known.min(), known.max()) if known.size else (FOREVER, -1)
    firsts, lasts = [span[0] for span in spans], [span[1] for span in spans]
    return Summary(firsts, lasts, sum_up(totals, firsts, lasts), checkpoints.sizes, checkpoints)


def sum_up(totals: np.ndarray, firsts: list[np.ndarray], lasts: list[np.ndarray]) -> Counts:
    """Return the counts of a recording whose duplicates were not looked for."""
    lowest = min((int(part.min()) for part in firsts if part.size), default=FOREVER)
    highest = max((int(part.max()) for part in lasts if part.size), default=-1)
    has_stamps = highest != -1 and lowest != FOREVER
    return Counts(totals[2:], lowest if has_stamps else None, highest if has_stamps else None, None, int(totals[1]))


def choose_edges(summary: Summary, n_samples: int) -> list[int]:
    """Return window edges between which about `n_samples` samples lie, as if each block's were spread evenly in it."""
    if summary.counts.first_ns is None or summary.counts.last_ns is None:
        return [-1, FOREVER]
    points, weights = [], []
    for first, last, sizes in zip(summary.first, summary.last, summary.sizes, strict=True):
        is_used = last >= first
        low, high, counts = first[is_used], last[is_used], sizes[is_used]
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
    if summary.checkpoints is not None:
        return cut_window(read_groups(perf, tables, chosen, summary.checkpoints), *span)
    return cut_window(read_samples(perf, tables, chosen, threads=threads), *span)


def iterate_windows(
    perf: PerfFile, tables: Tables, edges: list[int], summary: Summary, *, threads: int
) -> Iterator[Index]:
    """Yield the index of each window between consecutive edges; ranks go on from window to window."""
    rank = 0
    for span in zip(edges[:-1], edges[1:], strict=True):
        samples = read_window(perf, tables, summary, span, threads=threads)
        index = build_index(perf, samples, first_rank=rank, threads=threads)
        rank += index.time.size
        yield index
