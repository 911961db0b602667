"""pcap and pcapng -> packet columns: `read_pcap`, and what a capture file is: `inspect_pcap`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, overload

import numpy as np

from rxlab.errors import FormatError, UsageError
from rxlab.read.columns import Columns
from rxlab.read.flows import FlowTable
from rxlab.read.headers import HEADER_FIELDS, HeaderColumns, decode_headers, empty_headers
from rxlab.read.pcapfile import ClassicReader, PacketIndex, classic_format, empty_index, open_capture
from rxlab.read.pcapng import PcapngReader

# Packets per step: small enough that the decoder finds in cache what the walk has just touched.
_BATCH = 16_384


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
    reader, compression = open_reader(path)
    pieces = _pieces(reader, os.fspath(path), compression, chunks)
    return pieces if chunks is not None else next(pieces)


def open_reader(path: str | os.PathLike[str]) -> tuple[ClassicReader | PcapngReader, str]:
    """Return the reader that a capture's first bytes ask for, and its compression ("", "gzip" or "zstd")."""
    buf, compression, warnings = open_capture(path)
    where, magic = os.fspath(path), bytes(buf[:4])
    reader: ClassicReader | PcapngReader
    if magic == b"\x0a\x0d\x0d\x0a":
        reader = PcapngReader(buf, where)
    elif classic_format(magic):
        reader = ClassicReader(buf, where)
    else:
        raise FormatError(
            "not a capture file", where=where, found=f"magic {magic.hex() or 'of no bytes'}", expected="pcap or pcapng"
        )
    if warnings:
        reader.truncated, reader.truncated_at = True, len(buf)
        reader.warnings.extend(warnings)
    return reader, compression


def _pieces(
    reader: ClassicReader | PcapngReader, where: str, compression: str, chunks: int | None
) -> Iterator[Columns]:
    flows, more = FlowTable(), True
    while more:
        # One row more than there are packets: the walk then ends by the file's end and not by a full batch.
        capacity = reader.count() + 1 if chunks is None else chunks
        index, headers = empty_index(capacity), empty_headers(capacity)
        headers = headers._replace(direction=index.direction)
        flow, flow_dir = np.zeros(capacity, np.int32), np.zeros(capacity, np.int8)
        row = 0
        while more and row < capacity:
            first, stop = row, min(row + _BATCH, capacity)
            row, more = reader.fill(index, row, stop)
            decode_headers(
                reader.buf, index.position, index.caplen, index.wire_len, index.linktype, first, row, headers
            )
            flows.assign(headers, first, row, flow, flow_dir)
        more = more and chunks is not None
        yield _columns(reader, where, compression, index, headers, flow, flow_dir, row, flows.n)


def _columns(
    reader, where, compression, index: PacketIndex, headers: HeaderColumns, flow, flow_dir, n, n_flows
) -> Columns:
    arrays = {
        "time": index.time,
        "frame": index.frame,
        "offset": index.position if not compression else np.full(n, -1, np.int64),
        "caplen": index.caplen,
        "wire_len": index.wire_len,
        "interface": index.interface,
        "linktype": index.linktype,
        **{name: getattr(headers, name) for name in HEADER_FIELDS},
        "flow": flow,
        "flow_dir": flow_dir,
    }
    attrs: dict[str, Any] = {
        "clock": reader.clock,
        "file": where,
        "kind": reader.kind,
        "compression": compression,
        "interfaces": reader.interfaces,
        "comments": reader.comments,
        "sections": reader.sections,
        "truncated": reader.truncated,
        "truncated_at": reader.truncated_at,
        "warnings": list(reader.warnings),
        "flows": n_flows,
    }
    return Columns({name: array[:n] for name, array in arrays.items()}, attrs)
