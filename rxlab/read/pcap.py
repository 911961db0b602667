"""pcap and pcapng -> packet columns: `read_pcap`, and what a capture file is: `inspect_pcap`."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np

from rxlab.errors import FormatError, TruncatedFileError, UsageError
from rxlab.read.columns import Columns
from rxlab.read.flows import FlowTable
from rxlab.read.headers import decode_headers, decode_inner, empty_headers
from rxlab.read.pcapfile import NAT, ClassicReader, classic_format, empty_index, open_capture
from rxlab.read.pcapng import MAX_INTERFACES, PcapngReader

# Packets per step: small enough that the decoder finds in cache what the walk has just touched, large enough that
# handing a batch to a thread costs nothing.
_BATCH = 65_536
_THREADS = 2
_INSPECT_ROWS = 1 << 18
# Counting all packets of a file takes a quarter of the time of reading them. So many bytes are counted, the rest is guessed:
# rows that are never filled cost no memory, and a piece that was guessed too short grows.
_COUNTED_BYTES = 32 << 20


@overload
def read_pcap(path: str | os.PathLike[str], *, chunks: None = None) -> Columns: ...
@overload
def read_pcap(path: str | os.PathLike[str], *, chunks: int) -> Iterator[Columns]: ...
def read_pcap(path: str | os.PathLike[str], *, chunks: int | None = None) -> Columns | Iterator[Columns]:
    """Read the packets of a pcap or pcapng file, plain or compressed, into columns.

    Parameters
    ----------
    path : path
        pcap (microseconds, nanoseconds, modified; both byte orders) or pcapng; gzip and zstd are unfolded.
    chunks : int, optional
        Rows per piece: an iterator of `Columns` comes back and memory stays bounded whatever the file's size. Flow ids
        run on through the pieces; the last piece's attributes are the file's.

    Returns
    -------
    Columns, dims (packet,), in file order (which need not be time order)
        `time` int64 ns of CLOCK_REALTIME (NAT, the int64 minimum, for a packet without a time), `frame` int64 (the
        number Wireshark shows), `offset` int64 (first packet byte in the file, -1 if compressed), `caplen`, `wire_len`,
        `interface`, `linktype`, `flow` int32 (dense id of the unordered 5-tuple of the outer headers, -1 none),
        `flow_dir` int8 (0 as first seen, 1 reverse, -1 none) and the header columns of
        `rxlab.read.headers.HEADER_FIELDS`. Addresses are two uint64 words in host order, IPv4 in the low one.
        attrs: clock, file, kind, interfaces, comments, truncated, truncated_at, warnings, flows.

    Raises
    ------
    FormatError, TruncatedFileError
        Not a capture, or cut before its first header ends. Later damage is salvaged: every whole packet before it is
        returned and `truncated` set.
    """
    if chunks is not None and chunks < 1:
        raise UsageError("chunks must be at least 1", found=str(chunks))
    _announce_compilation()
    reader, compression = open_reader(path)
    pieces = _pieces(reader, os.fspath(path), compression, chunks)
    return pieces if chunks is not None else next(pieces)


def open_reader(
    path: str | os.PathLike[str], expected: str = "pcap or pcapng"
) -> tuple[ClassicReader | PcapngReader, str]:
    """Return the reader that a capture's first bytes ask for, and its compression ("", "gzip" or "zstd").

    `expected` is what a refusal names as right.
    """
    buf, compression, warnings = open_capture(path)
    where, magic = os.fspath(path), bytes(buf[:4])
    reader: ClassicReader | PcapngReader
    if magic == b"\x0a\x0d\x0d\x0a":
        reader = PcapngReader(buf, where)
    elif classic_format(magic):
        reader = ClassicReader(buf, where)
    else:
        raise FormatError(
            "not a capture file", where=where, found=f"magic {magic.hex() or 'of no bytes'}", expected=expected
        )
    if warnings:
        reader.truncated, reader.truncated_at = True, len(buf)
        reader.warnings.extend(warnings)
    return reader, compression


def _announce_compilation() -> None:
    """Say on a terminal why the first call ever takes seconds: Numba compiles the kernels and keeps them on disk."""
    folder = Path(str(decode_headers.stats.cache_path))
    if sys.stderr.isatty() and not any(folder.glob("headers.decode_headers-*.nbi")):
        print("rxlab: compiling the pcap reader (once, a few seconds)", file=sys.stderr)


def inspect_pcap(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a capture file holds, without decoding packets and in bounded memory.

    Returns
    -------
    dict
        kind ("pcap" | "pcapng"), format (adds "pcap-modified"), packets, first_ns and last_ns (the first and last packet in file
        order that has a time), min_ns, max_ns, sum_caplen, sum_len, interfaces (list of dict, with their packet counts),
        compression, sections, truncated, truncated_at, warnings. Plain values, ready for JSON.
    """
    reader, compression = open_reader(path, "perf.data, pcap or pcapng")
    index, more = empty_index(_INSPECT_ROWS), True
    packets = sum_caplen = sum_len = 0
    counts = np.zeros(MAX_INTERFACES, np.int64)
    ends: list[int] = []
    low, high = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    while more:
        n, more = reader.fill(index, 0, _INSPECT_ROWS)
        times = index.time[:n]
        timed = times[times != NAT]
        if len(timed):
            ends = [ends[0] if ends else int(timed[0]), int(timed[-1])]
            low, high = min(low, int(timed.min())), max(high, int(timed.max()))
        packets += n
        sum_caplen += int(index.caplen[:n].sum(dtype=np.int64))
        sum_len += int(index.wire_len[:n].sum(dtype=np.int64))
        counts += np.bincount(index.interface[:n], minlength=MAX_INTERFACES)
    _refuse_empty_ruin(reader, os.fspath(path), packets)
    found = reader.attrs()
    first, last = ends or (None, None)
    return {
        "kind": reader.kind,
        "packets": packets,
        "first_ns": first,
        "last_ns": last,
        "min_ns": low if ends else None,
        "max_ns": high if ends else None,
        "sum_caplen": sum_caplen,
        "sum_len": sum_len,
        "interfaces": [{**link, "packets": int(n)} for link, n in zip(found["interfaces"], counts, strict=False)],
        "format": reader.format_name,
        "compression": compression,
        **{name: found[name] for name in ("sections", "truncated", "truncated_at", "warnings")},
    }


def _refuse_empty_ruin(reader: ClassicReader | PcapngReader, where: str, packets: int) -> None:
    if reader.truncated and packets == 0:
        raise TruncatedFileError("nothing can be salvaged from the capture", where=where, found=reader.warnings[-1])


class _Piece:
    """The columns of one piece of a capture while they are being filled."""

    def __init__(self, capacity: int) -> None:
        self.index = empty_index(capacity)
        self.headers = empty_headers(capacity)._replace(direction=self.index.direction)
        self.flow, self.flow_dir = np.zeros(capacity, np.int32), np.zeros(capacity, np.int8)
        self.n = 0

    def _arrays(self) -> list[np.ndarray]:
        return [*self.index, *self.headers, self.flow, self.flow_dir]

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` rows; the columns move one by one, so that never two copies of all of them exist."""
        old, longer = self._arrays(), _Piece(capacity)
        self.index, self.headers, self.flow, self.flow_dir = longer.index, longer.headers, longer.flow, longer.flow_dir
        for array in reversed(longer._arrays()):
            array[: self.n] = old.pop()[: self.n]

    def decode(self, buf: np.ndarray, first: int, last: int) -> tuple[int, int]:
        """Decode the headers of rows `first` to `last`, already indexed; runs without the interpreter's lock."""
        where = (buf, self.index.position, self.index.caplen, self.index.wire_len)
        if decode_headers(*where, self.index.linktype, first, last, self.headers):
            decode_inner(*where, first, last, self.headers)
        return first, last

    def columns(self, attrs: dict[str, Any]) -> Columns:
        """Return the filled rows."""
        index = self.index
        offset = np.full(self.n, -1, np.int64) if attrs["compression"] else index.position
        arrays = {"time": index.time, "frame": index.frame, "offset": offset, "caplen": index.caplen}
        arrays |= {"wire_len": index.wire_len, "interface": index.interface, "linktype": index.linktype}
        arrays |= self.headers._asdict() | {"flow": self.flow, "flow_dir": self.flow_dir}
        return Columns({name: array[: self.n] for name, array in arrays.items()}, attrs)


def _expected_rows(reader: ClassicReader | PcapngReader) -> int:
    """Return how many rows to make room for, one more than there are packets: the walk then ends by the file's end."""
    size = len(reader.buf)
    if size <= 2 * _COUNTED_BYTES:
        return reader.count(size) + 1
    return int(reader.count(_COUNTED_BYTES) * (size / _COUNTED_BYTES) * 1.05) + _BATCH


def _pieces(
    reader: ClassicReader | PcapngReader, where: str, compression: str, chunks: int | None
) -> Iterator[Columns]:
    flows, more, packets = FlowTable(), True, 0
    while more:
        piece = _Piece(_expected_rows(reader) if chunks is None else chunks)
        more = _fill(piece, reader, flows)
        if more and chunks is None:
            piece.grow(reader.count(len(reader.buf)) + 1)
            more = _fill(piece, reader, flows)
        packets += piece.n
        _refuse_empty_ruin(reader, where, packets)
        attrs = {"file": where, "compression": compression, **reader.attrs(), "flows": flows.n}
        yield piece.columns(attrs)


def _fill(piece: _Piece, reader: ClassicReader | PcapngReader, flows: FlowTable) -> bool:
    """Fill a piece: the walk runs ahead, threads decode behind it, flows follow in order. Return whether more may come."""
    capacity, more = len(piece.flow), True
    if capacity - piece.n <= _BATCH:  # threads would cost more than they save
        first = piece.n
        piece.n, more = reader.fill(piece.index, first, capacity)
        piece.decode(reader.buf, first, piece.n)
        flows.assign(piece.headers, first, piece.n, piece.flow, piece.flow_dir)
        return more
    with ThreadPoolExecutor(_THREADS) as pool:
        decoding: deque[Future[tuple[int, int]]] = deque()
        while decoding or (more and piece.n < capacity):
            if more and piece.n < capacity and len(decoding) <= _THREADS:
                first = piece.n
                piece.n, more = reader.fill(piece.index, first, min(first + _BATCH, capacity))
                decoding.append(pool.submit(piece.decode, reader.buf, first, piece.n))
            else:
                first, last = decoding.popleft().result()
                flows.assign(piece.headers, first, last, piece.flow, piece.flow_dir)
    return more
