"""Numba kernels that walk perf.data records: where the records are, what each sample is, and their order in time.

All kernels read bytes one by one and put integers together by arithmetic: alignment and the byte order of the host do not
matter, ``NUMBA_BOUNDSCHECK=1`` checks each access, and LLVM makes one load of it. Sizes found in the file are compared with
the end of the buffer before use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64, uint64

from rxlab.read.compiler import njit
from rxlab.read.perfattr import L_CPU, L_MIN_SIZE, L_TIME

# Samples per block: the unit of splitting between threads, of windows and of the gather.
BLOCK = 8192

# include/uapi/linux/perf_event.h and tools/lib/perf/include/perf/event.h: enum perf_event_type, perf_user_event_type
RECORD_LOST, RECORD_SAMPLE, RECORD_LOST_SAMPLES = 2, 9, 13
RECORD_HEADER_ATTR, RECORD_EVENT_TYPE, RECORD_TRACING_DATA, RECORD_AUXTRACE = 64, 65, 66, 71
RECORD_EVENT_UPDATE, RECORD_FEATURE, RECORD_COMPRESSED, RECORD_COMPRESSED2 = 78, 80, 81, 83

# Where a walk stands, so that it can be resumed when an array was too small.
S_AT, S_SAMPLES, S_BLOCKS, S_OTHERS, S_STATUS = range(5)
DONE, FULL, DAMAGED = 0, 1, 2

ONE, TWO, THREE = uint64(1), uint64(2), uint64(3)
LAST_STAMP = int64(np.iinfo(np.int64).max)
HASH_FACTOR = uint64(0x9E3779B97F4A7C15)

jit = njit(cache=True, nogil=True)
# Called by other kernels alone: without the wrappers for Python it compiles faster.
_INNER: dict[str, Any] = {"cache": True, "nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner = njit(**_INNER)
# Called per sample: LLVM leaves a call with array arguments alone otherwise, at 20 ns each.
inline = njit(**_INNER, forceinline=True)


# Spelled out, not looped: Numba compiles these an order of magnitude faster, and LLVM still makes one load of each.
@inline
def read_u16(buffer, at, big):
    """Return the u16 at byte `at`; `big` is None for little-endian."""
    i = uint64(at)
    if big is not None:
        return uint64(buffer[i]) << uint64(8) | uint64(buffer[i + ONE])
    return uint64(buffer[i]) | uint64(buffer[i + ONE]) << uint64(8)


@inline
def read_u32(buffer, at, big):
    """Return the u32 at byte `at`; `big` is None for little-endian."""
    i = uint64(at)
    b0, b1, b2, b3 = uint64(buffer[i]), uint64(buffer[i + ONE]), uint64(buffer[i + TWO]), uint64(buffer[i + THREE])
    if big is not None:
        return b0 << uint64(24) | b1 << uint64(16) | b2 << uint64(8) | b3
    return b0 | b1 << uint64(8) | b2 << uint64(16) | b3 << uint64(24)


@inline
def read_u64(buffer, at, big):
    """Return the u64 at byte `at`; `big` is None for little-endian."""
    low, high = read_u32(buffer, at, big), read_u32(buffer, uint64(at) + uint64(4), big)
    if big is not None:
        return low << uint64(32) | high
    return low | high << uint64(32)


@inner
def record_length(buffer, at, end, big):
    """Return the bytes a record takes with what follows it outside its size, or -1 when it does not fit before `end`."""
    if at + 8 > end:
        return -1
    kind = read_u32(buffer, at, big)
    size = np.int64(read_u16(buffer, at + 6, big))
    room = end - at
    if kind == RECORD_COMPRESSED2:
        # Its u16 size overflows for more than 65,519 bytes: data_size rules.
        if room < 16:
            return -1
        stated = read_u64(buffer, at + 8, big)
        if stated > uint64(room - 16):
            return -1
        length = (16 + np.int64(stated) + 7) // 8 * 8
        return length if length <= room else room
    if size < 8 or size > room:
        return -1
    if kind == RECORD_TRACING_DATA and size >= 12:
        follows = (np.int64(read_u32(buffer, at + 8, big)) + 7) // 8 * 8
        return size + follows if follows <= room - size else -1
    if kind == RECORD_AUXTRACE and size >= 16:
        stated = read_u64(buffer, at + 8, big)
        return size + np.int64(stated) if stated <= uint64(room - size) else -1
    return size


@jit
def scan_records(buffer, end, big, state, block_starts, other_starts, other_types):
    """Walk all records: note the start of every BLOCK-th sample and of each record that is no sample.

    Resumable: returns with ``state[S_STATUS] == FULL`` when an array is full.
    """
    at, n_samples, n_blocks, n_others = state[S_AT], state[S_SAMPLES], state[S_BLOCKS], state[S_OTHERS]
    status = DONE
    while at < end:
        if at + 8 <= end and read_u32(buffer, at, big) == RECORD_SAMPLE:
            length = np.int64(read_u16(buffer, at + 6, big))
            if length < 8 or length > end - at:
                status = DAMAGED
                break
            if n_samples % BLOCK == 0:
                if n_blocks == block_starts.size:
                    status = FULL
                    break
                block_starts[n_blocks] = at
                n_blocks += 1
            n_samples += 1
        else:
            length = record_length(buffer, at, end, big)
            if length < 0:
                status = DAMAGED
                break
            if n_others == other_starts.size:
                status = FULL
                break
            other_starts[n_others], other_types[n_others] = at, read_u32(buffer, at, big)
            n_others += 1
        at += length
    state[S_AT], state[S_SAMPLES], state[S_BLOCKS], state[S_OTHERS] = at, n_samples, n_blocks, n_others
    state[S_STATUS] = status


@inline
def find_slot(keys, key):
    """Return the slot of `key` in an open-addressing table of a power of two of non-zero keys, or of the hole it would take."""
    mask = uint64(keys.size - 1)
    slot = (key * HASH_FACTOR >> uint64(32)) & mask
    while keys[slot] != key and keys[slot] != uint64(0):
        slot = (slot + uint64(1)) & mask
    return slot


@jit
def fill_ids(keys, events, ids, numbers):
    """Enter sample ids (not 0) and their event numbers into an open-addressing table of zeros."""
    for i in range(ids.size):
        slot = find_slot(keys, ids[i])
        keys[slot], events[slot] = ids[i], numbers[i]


@inline
def event_of(buffer, at, size, big, id_position, id_keys, id_events):
    """Return the event number of the sample at `at`, -1 when its id is unknown."""
    if id_position < 0:
        return 0
    if id_position + 8 > size:
        return -1
    key = read_u64(buffer, at + id_position, big)
    if key == uint64(0):
        return 0
    slot = find_slot(id_keys, key)
    return id_events[slot] if id_keys[slot] == key else -1


@jit
def index_blocks(buffer, end, big, starts, counts, ids, id_position, layouts, out):
    """Fill time, cpu, event and record start of the samples of some blocks, in file order.

    Parameters
    ----------
    starts, counts : int64 arrays, dims (block,)
        First sample record and number of samples of each block.
    ids : tuple of (uint64 array, int64 array)
        Open-addressing table of sample ids and their events.
    out : tuple of arrays, dims (sample,)
        time int64 (-1: none), cpu int32 (-1: none), event int16 (-1: unknown id or too short), start int64.
    """
    time, cpu, event, start = out
    row = 0
    for block in range(starts.size):
        at, left = starts[block], counts[block]
        while left > 0:
            if read_u32(buffer, at, big) != RECORD_SAMPLE:
                at += record_length(buffer, at, end, big)
                continue
            size = np.int64(read_u16(buffer, at + 6, big))
            number = event_of(buffer, at, size, big, id_position, ids[0], ids[1])
            if number >= 0 and size < layouts[number, L_MIN_SIZE]:
                number = -1
            stamp, on_cpu = np.int64(-1), np.int32(-1)
            if number >= 0:
                if layouts[number, L_TIME] >= 0:
                    stamp = np.int64(read_u64(buffer, at + layouts[number, L_TIME], big))
                if layouts[number, L_CPU] >= 0:
                    on_cpu = np.int32(read_u32(buffer, at + layouts[number, L_CPU], big))
            time[row], cpu[row], event[row], start[row] = stamp, on_cpu, number, at
            row += 1
            left -= 1
            at += size


@jit
def count_events(event, counts):
    """Add the number of samples of each event to ``counts[2 + event]``; its first two are duplicates and unknown."""
    for i in range(event.size):
        counts[event[i] + 2] += 1


@jit
def split_by_cpu(cpu, event, lowest, firsts, cursor, rows):
    """Put the row numbers of known samples into `rows`, grouped by CPU, in file order within each.

    `firsts` and `cursor` (CPUs + 1) must hold zeros; `firsts` returns where each CPU's group begins.
    """
    for i in range(cpu.size):
        if event[i] >= 0:
            firsts[cpu[i] - lowest + 1] += 1
    for group in range(firsts.size - 1):
        firsts[group + 1] += firsts[group]
        cursor[group] = firsts[group]
    for i in range(cpu.size):
        if event[i] >= 0:
            group = cpu[i] - lowest
            rows[cursor[group]] = i
            cursor[group] += 1


@jit
def sort_nearly_sorted(time, rows, budget):
    """Insertion-sort `rows` by time, stable; return how many have the stamp of the one before.

    Or -1 when it takes more than `budget` moves: then they are unsorted.
    """
    ties = 0
    for i in range(1, rows.size):
        row = rows[i]
        stamp = time[row]
        j = i - 1
        while j >= 0 and time[rows[j]] > stamp:
            rows[j + 1] = rows[j]
            j -= 1
            budget -= 1
            if budget < 0:
                rows[j + 1] = row
                return -1
        rows[j + 1] = row
        if j >= 0 and time[rows[j]] == stamp:
            ties += 1
    return ties


@inline
def sift_down(heap_times, heap_groups, n, i):
    """Restore the heap order (time, group) from node `i` on."""
    stamp, group = heap_times[i], heap_groups[i]
    while True:
        child = 2 * i + 1
        if child >= n:
            break
        right = child + 1
        if right < n and (
            heap_times[right] < heap_times[child]
            or (heap_times[right] == heap_times[child] and heap_groups[right] < heap_groups[child])
        ):
            child = right
        if heap_times[child] > stamp or (heap_times[child] == stamp and heap_groups[child] > group):
            break
        heap_times[i], heap_groups[i] = heap_times[child], heap_groups[child]
        i = child
    heap_times[i], heap_groups[i] = stamp, group


@jit
def count_rows(event, rows, begins, ends, counts):
    """Add the number of samples of each event among ``rows[begins[i]:ends[i]]`` of all i to `counts`."""
    for group in range(begins.size):
        for i in range(begins[group], ends[group]):
            number = event[rows[i]]
            if number >= 0:
                counts[number] += 1


@jit
def merge_cpus(samples, rows, begins, ends, heap, firsts, next_rows, rank, places, columns):
    """Take samples in the order (time, CPU, file position) and give each its row within its event and its rank.

    Parameters
    ----------
    samples : tuple of arrays, dims (sample,)
        time, cpu, event; an event below 0 is left out and takes no rank.
    rows : int32 array
        Sample numbers, those of each CPU together and sorted by time.
    begins, ends : int64 arrays, dims (CPU,)
        The part of each CPU's samples to take; `begins` moves to `ends`.
    heap : int64 array, dims (2, CPU)
        Room to work.
    firsts, next_rows : int64 arrays, dims (event,)
        Where each event's part of the columns begins, and the row of its next sample in them, which moves.
    rank : int
        Of the first sample.
    places : int32 array, dims (sample,)
        Filled: row within the event.
    columns : tuple of arrays
        Filled: time, cpu, rank, the events one after the other.
    """
    time, cpu, event = samples
    out_time, out_cpu, out_rank = columns
    heap_times, heap_groups = heap[0], heap[1]
    n = int64(0)
    for group in range(begins.size):
        if begins[group] < ends[group]:
            heap_times[n], heap_groups[n] = time[rows[begins[group]]], group
            n += 1
    for i in range(n // 2 - 1, -1, -1):
        sift_down(heap_times, heap_groups, n, i)
    while n > 0:
        group = heap_groups[0]
        # The next group's stamp: up to there this group's run goes out without touching the heap.
        limit, limit_group = LAST_STAMP, begins.size
        for child in range(1, 3):
            if child < n and (
                heap_times[child] < limit or (heap_times[child] == limit and heap_groups[child] < limit_group)
            ):
                limit, limit_group = heap_times[child], heap_groups[child]
        i, last = begins[group], ends[group]
        while i < last:
            row = rows[i]
            stamp = time[row]
            if stamp > limit or (stamp == limit and group > limit_group):
                break
            i += 1
            number = event[row]
            if number >= 0:
                at = next_rows[number]
                next_rows[number] = at + 1
                places[row] = at - firsts[number]
                out_time[at], out_cpu[at], out_rank[at] = stamp, cpu[row], rank
                rank += 1
        begins[group] = i
        if i == last:
            n -= 1
            heap_times[0], heap_groups[0] = heap_times[n], heap_groups[n]
        else:
            heap_times[0] = time[rows[i]]
        if n > 1:
            sift_down(heap_times, heap_groups, n, int64(0))


@jit
def mark_duplicates(buffer, big, segment, span, rows, samples):
    """Set ``event`` to -2 for each sample whose record repeats, byte for byte, one just before it in time; count them.

    Only neighbours of equal time and CPU are compared, at most 16 of them: a run of ties longer than that is no recording.
    Threads may work on parts of `rows`: whichever of three equal records is marked first, one remains.

    Parameters
    ----------
    segment : tuple of int
        First sample in `buffer` and the one after its last.
    span : tuple of int
        Part of `rows` to look at.
    rows : int32 array
        Sample numbers, those of each CPU together and sorted by time.
    samples : tuple of arrays, dims (sample,)
        time, cpu, event, start.
    """
    time, cpu, event, start = samples
    found = 0
    for i in range(span[0], span[1]):
        row = rows[i]
        if row < segment[0] or row >= segment[1] or time[row] == -1:
            continue
        for back in range(1, 17):
            if back > i:
                break
            other = rows[i - back]
            if time[other] != time[row] or cpu[other] != cpu[row]:
                break
            if other < segment[0] or other >= segment[1] or event[other] != event[row] or start[other] == start[row]:
                continue
            if same_bytes(buffer, start[row], start[other], big):
                event[row] = -2
                found += 1
                break
    return found


@inner
def same_bytes(buffer, one, other, big):
    """Tell whether two records are equal."""
    size = np.int64(read_u16(buffer, one + 6, big))
    if size != np.int64(read_u16(buffer, other + 6, big)):
        return False
    for k in range(size):  # noqa: SIM110 -- numba compiles no all()
        if buffer[uint64(one + k)] != buffer[uint64(other + k)]:
            return False
    return True
