"""Facts about a recording: clock, host, counts, what was lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from rxlab.read import perfrecords as rec
from rxlab.read.columns import Columns
from rxlab.read.perfattr import SAMPLE_ID_ALL, trailer_positions
from rxlab.read.perffeatures import CLOCK_NAMES, PERF_CLOCK, describe_features
from rxlab.read.perffile import PerfFile
from rxlab.read.perfindex import Index

# Record types perf 6.18 knows: kernel 1 to 22, user space 64 to 86. Others are skipped by size and counted.
KNOWN_RECORDS = frozenset({*range(1, 23), *range(64, 87)})

LOST_KIND = "S12"
LOST, LOST_SAMPLES = b"LOST", b"LOST_SAMPLES"


@dataclass
class Counts:
    """What the index pass found out about all samples.

    Attributes
    ----------
    per_event : int64 array, dims (event,)
    first_ns, last_ns : int or None
        None when no sample has a stamp.
    duplicates : int or None
        Samples left out because an equal one came just before; None: not looked for yet (``chunks=``).
    unknown : int
        Samples left out because no event has their id, or because they are too short.
    """

    per_event: np.ndarray
    first_ns: int | None
    last_ns: int | None
    duplicates: int | None
    unknown: int


def describe(perf: PerfFile, counts: Counts) -> dict[str, Any]:
    """Return ``PerfData.meta``.

    Keys: ``path, mode`` (file, pipe, directory), ``endian, samples, samples_per_event, first_ns, last_ns`` (None without
    samples or stamps), ``clockid`` (None: perf's own clock), ``clock``, ``duplicates, unknown_ids`` (samples left out),
    ``unknown_records`` {type: count}, ``truncated, warnings, missing_values`` (set to zero so far, because they lay beyond their
    sample's bytes or, in a group, the bytes are another tracepoint's), and where recorded ``hostname, osrelease, perf_version, arch,
    nrcpus, cmdline, clock_data``.
    """
    clockid = perf.attrs[0].clockid
    warnings = list(perf.warnings)
    if counts.unknown:
        warnings.append(f"{counts.unknown} samples left out: no event has their id, or they are too short")
    return {
        "path": str(perf.path),
        "mode": perf.mode,
        "endian": "big" if perf.big else "little",
        **describe_counts(perf, counts),
        "clockid": clockid,
        "clock": PERF_CLOCK if clockid is None else CLOCK_NAMES.get(clockid, f"clockid {clockid}"),
        "unknown_records": count_unknown_records(perf),
        "truncated": perf.truncated,
        "warnings": warnings,
        **describe_features(perf.features, big=perf.big),
    }


def describe_counts(perf: PerfFile, counts: Counts) -> dict[str, Any]:
    """Return the part of ``meta`` that differs between windows of a recording."""
    return {
        "samples": int(counts.per_event.sum()),
        "samples_per_event": dict(zip(perf.events.names, counts.per_event.tolist(), strict=True)),
        "first_ns": counts.first_ns,
        "last_ns": counts.last_ns,
        "duplicates": counts.duplicates,
        "unknown_ids": counts.unknown,
    }


def count_index(index: Index) -> Counts:
    """Return the counts of a whole index."""
    # Each event's samples are in time order.
    has_samples = np.diff(index.rows) > 0
    firsts, lasts = index.rows[:-1][has_samples], index.rows[1:][has_samples] - 1
    has_stamps = firsts.size > 0 and int(index.time[lasts].max()) != -1
    first, last = (int(index.time[firsts].min()), int(index.time[lasts].max())) if has_stamps else (None, None)
    return Counts(np.diff(index.rows), first, last, index.duplicates, index.unknown)


def count_unknown_records(perf: PerfFile) -> dict[int, int]:
    """Return the number of records of each type no perf known here writes."""
    unknown: Counter[int] = Counter()
    for segment in perf.segments:
        kinds, counts = np.unique(segment.other_types, return_counts=True)
        unknown.update(dict(zip(kinds.tolist(), counts.tolist(), strict=True)))
    return {kind: count for kind, count in sorted(unknown.items()) if kind not in KNOWN_RECORDS}


def read_lost(perf: PerfFile) -> Columns:
    """Return one row per LOST or LOST_SAMPLES record, in time order.

    Columns: ``time`` int64 ns (-1: not recorded), ``cpu`` int32 (-1), ``count`` int64, ``kind`` ``LOST`` (ring buffer full; the
    event named is the one that reported) or ``LOST_SAMPLES`` (counted per event), ``event``.
    """
    rows = []
    for segment in perf.segments:
        is_lost = np.isin(segment.other_types, [rec.RECORD_LOST, rec.RECORD_LOST_SAMPLES])
        for at in segment.other_starts[is_lost].tolist():
            rows.append(lost_row(perf, segment.buffer[at : at + 0xFFFF].tobytes()))
    rows.sort(key=lambda row: row[:2])
    names = [row[4].encode() for row in rows]
    arrays: dict[str, np.ndarray] = {
        "time": np.array([row[0] for row in rows], np.int64),
        "cpu": np.array([row[1] for row in rows], np.int32),
        "count": np.array([row[2] for row in rows], np.int64),
        "kind": np.array([row[3] for row in rows], LOST_KIND),
        "event": np.array(names, f"S{max(map(len, names), default=1) or 1}"),
    }
    return Columns(arrays)


def lost_row(perf: PerfFile, record: bytes) -> tuple[int, int, int, bytes, str]:
    """Return time, cpu, count, kind and event of one record."""
    record = record[: perf.integer(record[6:8])]
    is_lost = perf.integer(record[:4]) == rec.RECORD_LOST
    # struct { header; u64 id; u64 lost; sample_id } and struct { header; u64 lost; sample_id }
    count = perf.integer(record[16:24] if is_lost else record[8:16]) & (1 << 63) - 1
    sample_id = perf.integer(record[8:16]) if is_lost else 0
    time, cpu = -1, -1
    attr = perf.attrs[0]
    if attr.flags & SAMPLE_ID_ALL:
        at = trailer_positions(attr.sample_type)
        fixed = 24 if is_lost else 16

        def word(name: str, size: int) -> int | None:
            first = len(record) + at[name]
            return perf.integer(record[first : first + size]) if at[name] and first >= fixed else None

        stamp, on_cpu = word("time", 8), word("cpu", 4)
        time = -1 if stamp is None else stamp - (stamp >> 63 << 64)
        cpu = -1 if on_cpu is None else on_cpu - (on_cpu >> 31 << 32)
        sample_id = sample_id or word("identifier", 8) or word("id", 8) or 0
    number = perf.events.ids.get(sample_id)
    name = perf.events.names[number] if number is not None else ""
    return time, cpu, count, LOST if is_lost else LOST_SAMPLES, name
