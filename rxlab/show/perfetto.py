"""A run as a trace that ui.perfetto.dev opens: tracks per CPU and per task, a slice per hop, an arrow per complete packet.

The kernel's part of a packet's way (up to the stage ``waking``) lies on the CPUs, the reader's part (``wakeup``, ``switch_in``,
``copy``, ``recvmsg``) on its task. A slice bears the name of the stage it ends at; slices that overlap get rows of their own
under the same name, which the UI merges. Times are CLOCK_MONOTONIC, as recorded. There are no addresses in it.

The messages are written here byte by byte, compiled: a Python object per event takes minutes for a million packets. Field
numbers: https://github.com/google/perfetto/tree/main/protos/perfetto/trace (trace_packet.proto, track_event.proto,
track_descriptor.proto, debug_annotation.proto, clock_snapshot.proto).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from rxlab.dataset import schema
from rxlab.errors import RxlabError
from rxlab.read.compiler import njit
from rxlab.show.blocks import Words, put_word
from rxlab.stages import ORDER, PATH_KINDS, STAGE_INDEX, STAGE_NAMES, STATUSES

NAT = np.iinfo(np.int64).min
REALTIME, MONOTONIC = 1, 3  # builtin_clock.proto
SEQUENCE = 1
READER_STAGES = ("wakeup", "switch_in", "copy", "recvmsg")
BATCH = 8192
CPUS, TASKS, FIRST_TRACK = 1, 2, 16  # track uuids: two groups, then one per row


class Segments(NamedTuple):
    """The slices of one packet on one CPU or task; dims (segment,), ordered by start."""

    packet: np.ndarray
    owner: np.ndarray  # int64: CPU number, or -1 - tid
    start: np.ndarray  # int64 ns
    stop: np.ndarray


def to_perfetto(tree: xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write the packets of a run as a Perfetto trace.

    Every complete packet has one flow: from its first stage seen to its recvmsg. The id of the flow is the packet's row in
    /packets plus one.

    Parameters
    ----------
    tree : xarray.DataTree
        A traced run.
    """
    if "packets" not in tree.children:
        raise RxlabError("nothing to export", found="a run without trace", expected="a traced run")
    packets = tree["packets"].to_dataset()
    offset = int(tree["clocks"]["axis_offset"])
    time = packets["time"].values.view(np.int64)
    time = np.where(time == NAT, NAT, time - offset)
    order = np.array([[STAGE_INDEX[stage] for stage in ORDER[kind]] for kind in PATH_KINDS], np.int64)[
        packets["path_kind"].values
    ]
    owner = _owners(packets)
    segments = _segments(time, order, owner)
    lane = assign_lanes(segments.owner, segments.start, segments.stop)
    track, names = _tracks(segments.owner, lane, packets)
    is_complete = packets["status"].values == STATUSES.index("complete")
    # The flow starts on the first stage seen and ends on recvmsg: a packet without both has none.
    has_flow = is_complete & (time[:, STAGE_INDEX["recvmsg"]] != NAT) & ((time != NAT).sum(axis=1) > 1)
    words = Words.of([*STAGE_NAMES, "frame", "cpu"])
    columns = (time, order, owner, packets["cpu"].values.astype(np.int64), packets["pcap_frame"].values, has_flow)
    with open(path, "wb") as stream:
        stream.write(_clock_snapshot(time, offset))
        stream.writelines(_descriptors(names))
        for first in range(0, len(track), BATCH):
            some = slice(first, first + BATCH)
            # A slice is at most two messages of less than 160 bytes, and a packet has no more slices than stages.
            out = np.empty(len(track[some]) * len(STAGE_NAMES) * 320, np.uint8)
            size = write_events(segments.packet[some], segments.owner[some], track[some], *columns, words, out)
            stream.write(out[:size].tobytes())
    return Path(path)


def _owners(packets: xr.Dataset) -> np.ndarray:
    """Return whose track each stage is drawn on: int64, dims (packet, stage), the CPU or -1 - tid of the reader."""
    owner = packets["cpu"].values.astype(np.int64)
    tid = packets["tid"].values.astype(np.int64)
    for name in READER_STAGES:
        column = owner[:, STAGE_INDEX[name]]
        owner[:, STAGE_INDEX[name]] = np.where(tid >= 0, -1 - tid, column)
    return owner


def _segments(time: np.ndarray, order: np.ndarray, owner: np.ndarray) -> Segments:
    columns = find_segments(time, order, owner)
    by_start = np.argsort(columns[2], kind="stable")
    return Segments(*(column[by_start] for column in columns))


@njit(cache=True, nogil=True)
def find_segments(time, order, owner):
    """Return (packet, owner, start, stop) of the stages of each packet on each owner, packet by packet."""
    n, n_stages = order.shape
    packets, owners = np.empty(n * n_stages, np.int64), np.empty(n * n_stages, np.int64)
    starts, stops = np.empty(n * n_stages, np.int64), np.empty(n * n_stages, np.int64)
    found = 0
    for packet in range(n):
        before, first = NAT, found
        for k in range(n_stages):
            stage = order[packet, k]
            at = time[packet, stage]
            if at == NAT:
                continue
            begin = at if before == NAT else min(before, at)
            one = first
            while one < found and owners[one] != owner[packet, stage]:
                one += 1
            if one == found:
                packets[one], owners[one], starts[one], stops[one] = packet, owner[packet, stage], begin, at
                found += 1
            starts[one], stops[one] = min(starts[one], begin), max(stops[one], at)
            before = at
    return packets[:found], owners[:found], starts[:found], stops[:found]


def assign_lanes(owner: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return a row for each segment, ordered by start, such that segments of one owner and row do not overlap."""
    lane = np.zeros(len(owner), np.int64)
    for one in np.unique(owner):
        rows = np.flatnonzero(owner == one)
        lane[rows] = first_free_lane(start[rows], stop[rows])
    return lane


@njit(cache=True, nogil=True)
def first_free_lane(start, stop):
    """Return the first lane free at each segment's start; segments are ordered by start."""
    lanes, busy_until, n = np.zeros(len(start), np.int64), np.zeros(16, np.int64), 0
    for row in range(len(start)):
        lane = 0
        while lane < n and busy_until[lane] > start[row]:
            lane += 1
        if lane == n:
            n += 1
            if n > len(busy_until):
                busy_until = np.concatenate((busy_until, np.zeros(len(busy_until), np.int64)))
        busy_until[lane] = stop[row]
        lanes[row] = lane
    return lanes


def _tracks(owner: np.ndarray, lane: np.ndarray, packets: xr.Dataset) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
    """Return each segment's track uuid, and (uuid, uuid of its group, name) of every track."""
    rows, track = np.unique(np.stack([owner, lane], axis=1), axis=0, return_inverse=True)
    comms = schema.meanings(packets["comm"]) if "flag_values" in packets["comm"].attrs else {}
    comm_of = dict(zip(packets["tid"].values.tolist(), packets["comm"].values.tolist(), strict=True))
    names = []
    for number, (one, _) in enumerate(rows.tolist()):
        if one >= 0:
            names.append((FIRST_TRACK + number, CPUS, f"CPU {one}"))
        else:
            tid = -1 - one
            names.append((FIRST_TRACK + number, TASKS, f"{comms.get(comm_of[tid], 'task')} {tid}"))
    return track.reshape(-1) + FIRST_TRACK, names


@njit(cache=True, nogil=True)
def put_varint(out, pos, value):
    """Write an unsigned varint; return the position after it."""
    rest = np.uint64(value)
    while rest > np.uint64(127):
        out[pos] = np.uint8(rest & np.uint64(127)) | np.uint8(128)
        rest >>= np.uint64(7)
        pos += 1
    out[pos] = np.uint8(rest)
    return pos + 1


@njit(cache=True, nogil=True)
def _put_annotation(out, pos, words, name, value):
    """Write TrackEvent.debug_annotations (4): DebugAnnotation.name (10), int_value (4)."""
    size_at = pos + 1
    out[pos] = 4 << 3 | 2
    pos = size_at + 1
    out[pos], out[pos + 1] = 10 << 3 | 2, words.start[name + 1] - words.start[name]
    pos = put_word(out, pos + 2, words, name)
    out[pos] = 4 << 3
    pos = put_varint(out, pos + 1, value)
    out[size_at] = pos - size_at - 1
    return pos


@njit(cache=True, nogil=True)
def _put_event(out, pos, kind, time, track, words, name, frame, cpu, flow, flow_field):
    """Write one TracePacket with a TrackEvent; `name` -1 none, `flow` 0 none. Return the position after it."""
    # Trace.packet (1) and its length: always less than 160, so two bytes of varint, filled in at the end.
    begin = pos + 3
    out[pos] = 1 << 3 | 2
    out[begin] = 8 << 3  # timestamp
    pos = put_varint(out, begin + 1, time)
    out[pos], out[pos + 1] = 10 << 3, SEQUENCE  # trusted_packet_sequence_id
    pos = put_varint(out, pos + 2, 58 << 3)  # timestamp_clock_id
    out[pos], out[pos + 1] = MONOTONIC, 11 << 3 | 2  # track_event
    event = pos + 4
    out[event], out[event + 1], out[event + 2] = 9 << 3, kind, 11 << 3  # type, track_uuid
    pos = put_varint(out, event + 3, track)
    if name >= 0:
        pos = put_varint(out, pos, 23 << 3 | 2)  # name
        out[pos] = words.start[name + 1] - words.start[name]
        pos = put_word(out, pos + 1, words, name)
        pos = _put_annotation(out, pos, words, len(words.start) - 3, frame)
        pos = _put_annotation(out, pos, words, len(words.start) - 2, cpu)
    if flow:
        pos = put_varint(out, pos, flow_field << 3 | 1)
        for k in range(8):
            out[pos + k] = (flow >> (8 * k)) & 0xFF
        pos += 8
    out[event - 2], out[event - 1] = (pos - event) & 127 | 128, (pos - event) >> 7
    out[begin - 2], out[begin - 1] = (pos - begin) & 127 | 128, (pos - begin) >> 7
    return pos


@njit(cache=True, nogil=True)
def write_events(packets, owners, tracks, time, order, owner, cpu, frame, has_flow, words, out):
    """Write the slices of segments: the stages of `packets[i]` on `owners[i]`; return how many bytes.

    The first stage of a packet ends no hop: it is an instant. Types: 1 slice begins, 2 ends, 3 instant; flow_ids (47),
    terminating_flow_ids (48).
    """
    pos = 0
    recvmsg = len(words.start) - 4  # the last stage, before the names of the two annotations
    for row in range(len(packets)):
        packet, track = packets[row], tracks[row]
        flow = np.int64(packet + 1) if has_flow[packet] else np.int64(0)
        before = NAT
        for k in range(order.shape[1]):
            stage = order[packet, k]
            at = time[packet, stage]
            if at == NAT:
                continue
            if owner[packet, stage] == owners[row]:
                if before == NAT:
                    pos = _put_event(out, pos, 3, at, track, words, stage, frame[packet], cpu[packet, stage], flow, 47)
                else:
                    ends = flow if stage == recvmsg else np.int64(0)
                    start = min(before, at)
                    pos = _put_event(
                        out, pos, 1, start, track, words, stage, frame[packet], cpu[packet, stage], ends, 48
                    )
                    pos = _put_event(out, pos, 2, at, track, words, -1, 0, 0, np.int64(0), 0)
            before = at
    return pos


def _varint(value: int) -> bytes:
    out = np.empty(10, np.uint8)
    return out[: put_varint(out, 0, value)].tobytes()


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _packet(*fields: bytes) -> bytes:
    return _field(1, b"".join((*fields, _field(10, SEQUENCE))))


def _clock_snapshot(time: np.ndarray, offset: int) -> bytes:
    seen = time[time != NAT]
    start = int(seen.min()) if len(seen) else 0
    clocks = [
        _field(1, _field(1, clock) + _field(2, at)) for clock, at in ((MONOTONIC, start), (REALTIME, start + offset))
    ]
    return _packet(_field(6, b"".join(clocks) + _field(2, MONOTONIC)))


def _descriptors(names: list[tuple[int, int, str]]) -> Any:
    for uuid, text in ((CPUS, "CPUs"), (TASKS, "Tasks")):
        yield _packet(_field(60, _field(1, uuid) + _field(2, text.encode())))
    for uuid, group, text in names:
        yield _packet(_field(60, _field(1, uuid) + _field(2, text.encode()) + _field(5, group)))
