"""The perf.data container: header, attributes, features, and the stretches of bytes that hold records.

Three forms exist (tools/perf/Documentation/perf.data-file-format.txt): a file with a header that says where things are, a
pipe whose header is a record like any other, and a directory with one more file per thread. Compressed records become a
stretch of their own. A file that was cut, or whose recorder was killed, is opened as far as it goes and marked `truncated`.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rxlab.errors import FormatError, TruncatedFileError
from rxlab.read import perfrecords as rec
from rxlab.read.perfattr import Attr, EventTable, attr_size, build_event_table, parse_attr
from rxlab.read.perffeatures import (
    FEATURE_BITS,
    HEADER_COMPRESSED,
    HEADER_EVENT_DESC,
    HEADER_TRACING_DATA,
    parse_event_desc,
)
from rxlab.read.perfunpack import Unpacker
from rxlab.read.tracefmt import EventFormat, TracingData, parse_tracing_data, read_local_formats

MAGIC = b"PERFILE2"
MAGIC_V1 = b"PERFFILE"
PIPE_HEADER_SIZE = 16

# tools/perf/util/header.h: struct perf_file_header; a perf_file_section is an offset and a size.
PERF_FILE_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("size", "<u8"),
        ("attr_size", "<u8"),
        ("attrs_offset", "<u8"),
        ("attrs_size", "<u8"),
        ("data_offset", "<u8"),
        ("data_size", "<u8"),
        ("event_types_offset", "<u8"),
        ("event_types_size", "<u8"),
        ("features", "<u8", (4,)),
    ]
)
assert PERF_FILE_HEADER.itemsize == 104

# More attributes than any machine has events times CPUs would be damage; event numbers are int16.
MAX_ATTRS = 30_000


@dataclass
class Segment:
    """A stretch of bytes that holds records one after the other.

    Attributes
    ----------
    buffer : uint8 array, dims (byte,)
        Read-only: the mapped file, or what its compressed records held.
    start, end : int
        First byte of the records and the byte after the last whole one.
    name : str
        For messages.
    n_samples : int
        SAMPLE records.
    block_starts : int64 array, dims (block,)
        Every ``BLOCK``-th sample record.
    other_starts : int64 array, dims (record,)
        Every record that is no sample.
    other_types : uint32 array, dims (record,)
        Their types.
    is_damaged : bool
        The walk stopped before the end: a record did not fit.
    """

    buffer: np.ndarray
    start: int
    end: int
    name: str
    n_samples: int = 0
    block_starts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    other_starts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    other_types: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    is_damaged: bool = False


@dataclass
class PerfFile:
    """An opened recording: what its header and its non-sample records say, and where its samples are.

    Attributes
    ----------
    path : Path
    mode : str
        ``file``, ``pipe`` or ``directory``.
    big : bool
        The recording machine was big-endian.
    attrs : list of Attr
    features : dict of int to bytes
        Feature sections by ``HEADER_*`` number.
    tracing : TracingData or None
    segments : list of Segment
    events : EventTable
    formats : dict of int to EventFormat
        Tracepoint formats by id, from the recording (or this kernel, when asked).
    warnings : list of str
        One line each.
    truncated : bool
        Something is missing at the end of the file, or a record did not fit.
    """

    path: Path
    mode: str
    big: bool
    attrs: list[Attr] = field(default_factory=list)
    features: dict[int, bytes] = field(default_factory=dict)
    tracing: TracingData | None = None
    segments: list[Segment] = field(default_factory=list)
    events: EventTable = field(default_factory=EventTable)
    formats: dict[int, EventFormat] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    truncated: bool = False

    @property
    def order(self) -> int | None:
        """Byte order as the kernels take it: None, or 1 for big-endian."""
        return byte_order(self.big)

    def integer(self, raw: bytes) -> int:
        """Return bytes as an unsigned integer in the file's byte order."""
        return int.from_bytes(raw, "big" if self.big else "little")

    def damaged(self, why: str) -> None:
        """Note that something is missing."""
        self.truncated = True
        self.warnings.append(why)


def map_file(path: Path) -> np.ndarray:
    """Map a file read-only as bytes; an empty file gives an empty array."""
    try:
        with open(path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                return np.frombuffer(b"", np.uint8)
            return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise FormatError("cannot be read", where=str(path), found=str(error)) from None


def open_perffile(path: str | os.PathLike[str], *, local_formats: bool = False) -> PerfFile:
    """Open a perf.data file, pipe recording or directory and find its records.

    Parameters
    ----------
    path : path
    local_formats : bool, optional
        Take the formats of tracepoints the recording says nothing about from the running kernel.

    Raises
    ------
    FormatError
        Not a perf.data file, or one whose attributes cannot be read.
    TruncatedFileError
        It ends inside its header.
    """
    top = Path(path)
    main = top / "data" if top.is_dir() else top
    buffer = map_file(main)
    magic = buffer[:8].tobytes()
    check_magic(magic, buffer.size, main)
    perf = PerfFile(top, "file", big=magic != MAGIC)
    if buffer.size < PIPE_HEADER_SIZE:
        raise TruncatedFileError("ends inside its header", where=str(main), found=f"{buffer.size} bytes")
    if perf.integer(buffer[8:16].tobytes()) == PIPE_HEADER_SIZE:
        perf.mode = "pipe"
        add_segment(perf, Segment(buffer, PIPE_HEADER_SIZE, buffer.size, main.name))
    else:
        read_file_header(perf, buffer, main)
    if top.is_dir():
        perf.mode = "directory"
        add_directory(perf, top)
    for segment in list(perf.segments):
        read_other_records(perf, segment)
    name_events(perf, local_formats)
    return perf


def check_magic(magic: bytes, size: int, path: Path) -> None:
    """Refuse what is not perf.data, with the reason."""
    if magic in (MAGIC, MAGIC[::-1]):
        return
    if size < 8:
        raise TruncatedFileError("too short for a perf.data file", where=str(path), found=f"{size} bytes")
    if magic in (MAGIC_V1, MAGIC_V1[::-1]):
        raise FormatError("perf.data of version 1 (perf before 2.6.38) is not read", where=str(path), found=repr(magic))
    raise FormatError("not a perf.data file", where=str(path), found=f"magic {magic!r}", expected=repr(MAGIC))


def read_file_header(perf: PerfFile, buffer: np.ndarray, path: Path) -> None:
    """Read header, attributes and features of file mode, and find the data section."""
    if buffer.size < PERF_FILE_HEADER.itemsize:
        raise TruncatedFileError(
            "ends inside its header", where=str(path), found=f"{buffer.size} bytes", expected="104 or more"
        )
    dtype = PERF_FILE_HEADER.newbyteorder(">") if perf.big else PERF_FILE_HEADER
    header = np.frombuffer(buffer[:104].tobytes(), dtype)[0]
    read_attrs(perf, buffer, header, path)
    start, size = int(header["data_offset"]), int(header["data_size"])
    if start > buffer.size:
        raise TruncatedFileError(
            "ends before its data", where=f"{path} byte {buffer.size}", expected=f"data from byte {start}"
        )
    numbers = feature_numbers(header["features"], perf.big)
    if start + size > buffer.size:
        perf.damaged(f"data section ends at byte {start + size}, the file at {buffer.size}")
        end = buffer.size
    elif not read_features(perf, buffer, start + size, numbers) and size == 0:
        # perf writes the size and the features when it ends: it was killed, and all that follows is data.
        perf.damaged("recorder was killed: the header gives no data size, features and formats were never written")
        end = buffer.size
    else:
        end = start + size
    add_segment(perf, Segment(buffer, start, end, path.name))


def read_attrs(perf: PerfFile, buffer: np.ndarray, header: np.void, path: Path) -> None:
    """Read the attribute table and each attribute's ids."""
    stride, offset, size = int(header["attr_size"]), int(header["attrs_offset"]), int(header["attrs_size"])
    if stride < 80 or stride > 4096 or size % stride or size // stride > MAX_ATTRS or size == 0:
        found = f"{size} bytes of attributes of {stride}"
        raise FormatError(
            "damaged attribute table",
            where=f"{path} byte {offset}",
            found=found,
            expected="a multiple, at least 80 each",
        )
    if offset + size > buffer.size:
        raise TruncatedFileError(
            "ends inside its attributes", where=f"{path} byte {buffer.size}", expected=f"{offset + size} bytes"
        )
    table = buffer[offset : offset + size].tobytes()
    for at in range(0, size, stride):
        attr = parse_attr(table[at : at + stride - 16], big=perf.big)
        ids_at, ids_size = (perf.integer(table[at + stride - back : at + stride - back + 8]) for back in (16, 8))
        if ids_at + ids_size > buffer.size or ids_size % 8:
            perf.damaged(f"ids of attribute {at // stride} lie outside the file")
            ids_size = 0
        ids = np.frombuffer(buffer[ids_at : ids_at + ids_size].tobytes(), ">u8" if perf.big else "<u8")
        perf.attrs.append(attr.with_ids(tuple(ids.tolist())))


def feature_numbers(words: np.ndarray, big: bool) -> list[int]:
    """Return the features whose bit is set; the bitmap is of C longs, so a 32-bit big-endian machine wrote other words.

    Every perf writes HOSTNAME (3): where its bit is not set, the words are taken for 32-bit ones, as perf does.
    """
    bits = sum(int(word) << 64 * i for i, word in enumerate(words))
    if big and not bits >> 3 & 1:
        halves = [half for word in words for half in (int(word) >> 32, int(word) & 0xFFFFFFFF)]
        bits = sum(half << 32 * i for i, half in enumerate(halves))
    return [number for number in range(FEATURE_BITS) if bits >> number & 1]


def read_features(perf: PerfFile, buffer: np.ndarray, at: int, numbers: list[int]) -> bool:
    """Read the feature table after the data; return False when there is none, or a damaged one."""
    if at + 16 * len(numbers) > buffer.size:
        perf.damaged("feature table is missing")
        return False
    table = buffer[at : at + 16 * len(numbers)].tobytes()
    spans = [(perf.integer(table[i : i + 8]), perf.integer(table[i + 8 : i + 16])) for i in range(0, len(table), 16)]
    whole = [offset + size <= buffer.size for offset, size in spans]
    if not all(whole):
        perf.damaged(f"{whole.count(False)} of {len(whole)} feature sections lie outside the file")
    for number, (offset, size), is_whole in zip(numbers, spans, whole, strict=True):
        if is_whole:
            perf.features[number] = buffer[offset : offset + size].tobytes()
    return all(whole)


def add_directory(perf: PerfFile, folder: Path) -> None:
    """Add ``data.0``, ``data.1``, ... of a directory recording: records without any header."""
    numbered = [entry for entry in folder.glob("data.*") if entry.suffix[1:].isdigit()]
    for entry in sorted(numbered, key=lambda entry: int(entry.suffix[1:])):
        part = map_file(entry)
        add_segment(perf, Segment(part, 0, part.size, entry.name))


def add_segment(perf: PerfFile, segment: Segment) -> None:
    """Walk a segment's records and add it."""
    scan_segment(segment, perf.big)
    if segment.is_damaged:
        perf.damaged(f"{segment.name}: no whole record from byte {segment.end} on")
    perf.segments.append(segment)


def byte_order(big: bool) -> int | None:
    """Return the kernels' argument for a byte order: by its type Numba compiles one kernel for each order."""
    return 1 if big else None


def scan_segment(segment: Segment, big: bool) -> None:
    """Find sample blocks and other records; shorten the segment to its whole records."""
    room = segment.end - segment.start
    # Virtual memory only: pages that are never written cost nothing. A SAMPLE record has at least 8 bytes.
    block_starts = np.empty(room // 8 // rec.BLOCK + 2, np.int64)
    other_starts, other_types = np.empty(4096, np.int64), np.empty(4096, np.uint32)
    state = np.zeros(5, np.int64)
    state[rec.S_AT] = segment.start
    while True:
        rec.scan_records(segment.buffer, segment.end, byte_order(big), state, block_starts, other_starts, other_types)
        if state[rec.S_STATUS] != rec.FULL:
            break
        other_starts = np.concatenate([other_starts, np.empty(3 * other_starts.size, np.int64)])
        other_types = np.concatenate([other_types, np.empty(3 * other_types.size, np.uint32)])
    segment.is_damaged = bool(state[rec.S_STATUS] == rec.DAMAGED)
    segment.end = int(state[rec.S_AT])
    segment.n_samples = int(state[rec.S_SAMPLES])
    segment.block_starts = block_starts[: state[rec.S_BLOCKS]].copy()
    segment.other_starts = other_starts[: state[rec.S_OTHERS]].copy()
    segment.other_types = other_types[: state[rec.S_OTHERS]].copy()


def read_other_records(perf: PerfFile, segment: Segment, *, unpack: bool = True) -> None:
    """Take attributes, features, formats, names and compressed bytes from the records that are no samples.

    Unpacked bytes are not unpacked again: perf compresses once, and a stream that holds itself would never end.
    """
    unpacker = Unpacker(perf.big)
    wanted = np.isin(segment.other_types, [rec.RECORD_COMPRESSED, rec.RECORD_COMPRESSED2, *HANDLERS])
    for at, kind in zip(segment.other_starts[wanted].tolist(), segment.other_types[wanted].tolist(), strict=True):
        size = perf.integer(segment.buffer[at + 6 : at + 8].tobytes())
        if kind in (rec.RECORD_COMPRESSED, rec.RECORD_COMPRESSED2):
            unpacker.add(segment.buffer, at, kind, size)
        else:
            HANDLERS[kind](perf, segment.buffer[at : at + size].tobytes(), segment, at)
    if unpacker.n_records and unpack:
        unpacked, problem = unpacker.unpack(perf.features.get(HEADER_COMPRESSED))
        if problem:
            perf.damaged(f"{segment.name}: {problem}")
        inner = Segment(unpacked, 0, unpacked.size, f"{segment.name} (unpacked)")
        add_segment(perf, inner)
        read_other_records(perf, inner, unpack=False)


def _on_attr(perf: PerfFile, record: bytes, segment: Segment, at: int) -> None:
    size = attr_size(record[8:], big=perf.big)
    if len(record) < 8 + size or len(perf.attrs) >= MAX_ATTRS:
        perf.damaged(f"{segment.name}: attribute record at byte {at} is too short")
        return
    ids = record[8 + size :]
    words = np.frombuffer(ids[: len(ids) // 8 * 8], ">u8" if perf.big else "<u8")
    perf.attrs.append(parse_attr(record[8 : 8 + size], big=perf.big).with_ids(tuple(words.tolist())))


def _on_event_type(perf: PerfFile, record: bytes, segment: Segment, at: int) -> None:
    # struct perf_trace_event_type { u64 event_id; char name[64]; }, written by perf before 3.11.
    config, name = perf.integer(record[8:16]), record[16:80].split(b"\0")[0].decode("utf-8", "replace")
    perf.attrs = [attr.named(name) if attr.config == config and name else attr for attr in perf.attrs]


def _on_tracing_data(perf: PerfFile, record: bytes, segment: Segment, at: int) -> None:
    length = perf.integer(record[8:12])
    payload = segment.buffer[at + len(record) : at + len(record) + length].tobytes()
    take_tracing(perf, payload, f"{segment.name} byte {at}")


def _on_feature(perf: PerfFile, record: bytes, segment: Segment, at: int) -> None:
    perf.features[perf.integer(record[8:16])] = record[16:]


def _on_event_update(perf: PerfFile, record: bytes, segment: Segment, at: int) -> None:
    # struct perf_record_event_update { header; u64 type; u64 id; ... }: type 2 is PERF_EVENT_UPDATE__NAME.
    if perf.integer(record[8:16]) != 2:
        return
    sample_id, name = perf.integer(record[16:24]), record[24:].split(b"\0")[0].decode("utf-8", "replace")
    perf.attrs = [attr.named(name) if sample_id in attr.ids and name else attr for attr in perf.attrs]


HANDLERS = {
    rec.RECORD_HEADER_ATTR: _on_attr,
    rec.RECORD_EVENT_TYPE: _on_event_type,
    rec.RECORD_TRACING_DATA: _on_tracing_data,
    rec.RECORD_FEATURE: _on_feature,
    rec.RECORD_EVENT_UPDATE: _on_event_update,
}


def take_tracing(perf: PerfFile, section: bytes, where: str) -> None:
    """Parse tracing data; damaged formats are a warning, the samples are still good."""
    try:
        perf.tracing = parse_tracing_data(section, where=where)
    except FormatError as error:
        perf.warnings.append(error.line())
        return
    if perf.tracing.truncated:
        perf.damaged(f"{where}: tracing data ends early")
    perf.formats.update(perf.tracing.formats)


def name_events(perf: PerfFile, local_formats: bool) -> None:
    """Give every attribute its name, tracepoints their formats, and number the events."""
    if not perf.attrs:
        raise FormatError(
            "no event attributes",
            where=str(perf.path),
            found="no record before the damage" if perf.truncated else "none",
        )
    if HEADER_TRACING_DATA in perf.features:
        take_tracing(perf, perf.features[HEADER_TRACING_DATA], f"{perf.path.name} tracing data")
    if HEADER_EVENT_DESC in perf.features:
        described = parse_event_desc(perf.features[HEADER_EVENT_DESC], big=perf.big)
        by_id = {sample_id: name for name, ids in described for sample_id in ids}
        is_parallel = len(described) == len(perf.attrs)
        for i, attr in enumerate(perf.attrs):
            name = next((by_id[sample_id] for sample_id in attr.ids if sample_id in by_id), "")
            perf.attrs[i] = attr.named(name or (described[i][0] if is_parallel else "") or attr.name)
    tracepoints = {attr.config for attr in perf.attrs if attr.is_tracepoint}
    missing = tracepoints - perf.formats.keys()
    if missing and local_formats:
        perf.formats.update(read_local_formats(missing))
        perf.warnings.append(
            f"formats of {len(missing)} tracepoints taken from the running kernel, not from the recording"
        )
    elif missing:
        perf.warnings.append(
            f"{len(missing)} tracepoints have no format in the recording; local_formats=True takes this kernel's"
        )
    perf.attrs = [attr if attr.name else attr.named(tracepoint_name(attr, perf.formats)) for attr in perf.attrs]
    perf.events = build_event_table(perf.attrs)


def tracepoint_name(attr: Attr, formats: dict[int, EventFormat]) -> str:
    """Return ``system:name`` of a tracepoint, or its number where no format is known."""
    return formats[attr.config].full_name if attr.config in formats else f"tracepoint:{attr.config}"
