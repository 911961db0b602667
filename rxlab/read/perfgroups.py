"""Samples with a READ part (``perf record -e '{a,b}:S'``): one record stands for a sample of each counter in it.

perf delivers a record once per counter whose value grew since its last sample (evlist__deliver_sample() in
tools/perf/util/session.c), so a record of a group of three can be one, two or three samples, and none when nothing grew.
"""

from __future__ import annotations

import numpy as np
from numba import int64, uint64

from rxlab.read.perfattr import L_CPU, L_MIN_SIZE, L_READ, L_TAIL, L_TIME
from rxlab.read.perfgather import read_part_length
from rxlab.read.perfrecords import (
    RECORD_SAMPLE,
    event_of,
    find_slot,
    inline,
    jit,
    read_u16,
    read_u32,
    read_u64,
    record_length,
)

# Bits of the read format, see FORMAT_* in perfattr.
TIMES, ID, GROUP, LOST = 3, 4, 8, 16


@inline
def values_of(buffer, position, read_format, big):
    """Return first value, bytes per value and number of values of a READ part that was found to fit."""
    times = int64(read_format & 1) + int64(read_format >> 1 & 1)
    if read_format & GROUP:
        stride = 1 + int64(read_format >> 2 & 1) + int64(read_format >> 4 & 1)
        return position + 8 + 8 * times, 8 * stride, int64(read_u64(buffer, position, big))
    return position, 8 * (1 + times), int64(1)


@jit
def expand_samples(buffer, end, big, first, n_records, ids, id_position, layouts, previous, out, row):
    """Write one row per delivered sample, in file order; return the next free row.

    Parameters
    ----------
    first, n_records : int
        First sample record of the segment and how many there are.
    previous : uint64 array, dims (slot of the id table,)
        The last value of each counter; kept from segment to segment.
    out : tuple of arrays, dims (sample,)
        As in ``perfrecords.index_blocks``; their size bounds the rows.
    """
    time, cpu, event, start = out
    at, left = first, n_records
    while left > 0:
        if read_u32(buffer, at, big) != RECORD_SAMPLE:
            at += record_length(buffer, at, end, big)
            continue
        size = int64(read_u16(buffer, at + 6, big))
        number = event_of(buffer, at, size, big, id_position, ids[0], ids[1])
        if number >= 0 and size < layouts[number, L_MIN_SIZE]:
            number = int64(-1)
        stamp, on_cpu, read_format, n_values, value_at, stride = (
            int64(-1),
            np.int32(-1),
            int64(0),
            int64(-1),
            at,
            int64(0),
        )
        if number >= 0:
            if layouts[number, L_TIME] >= 0:
                stamp = int64(read_u64(buffer, at + layouts[number, L_TIME], big))
            if layouts[number, L_CPU] >= 0:
                on_cpu = np.int32(read_u32(buffer, at + layouts[number, L_CPU], big))
            read_format = layouts[number, L_READ] - 1
            position = at + layouts[number, L_TAIL]
            # Without ids in the READ part nobody can tell whose values they are: the record is one sample.
            if read_format >= 0 and read_format & ID:
                if read_part_length(buffer, position, at + size - position, read_format, big) >= 0:
                    value_at, stride, n_values = values_of(buffer, position, read_format, big)
                else:
                    number = int64(-1)
        if n_values < 0:
            time[row], cpu[row], event[row], start[row] = stamp, on_cpu, number, at
            row += 1
        for k in range(n_values):
            id_at = value_at + k * stride + 8
            if not read_format & GROUP:
                id_at = value_at + stride
            key = read_u64(buffer, id_at, big)
            slot = find_slot(ids[0], key)
            if key == uint64(0) or ids[0][slot] != key:
                time[row], cpu[row], event[row], start[row] = stamp, on_cpu, -1, at
                row += 1
                continue
            value = read_u64(buffer, value_at + k * stride, big)
            if value != previous[slot]:
                time[row], cpu[row], event[row], start[row] = stamp, on_cpu, ids[1][slot], at
                row += 1
            previous[slot] = value
        left -= 1
        at += size
    return row
