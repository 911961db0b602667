"""Capture files -> packet index: opening (plain, gzip, zstd), the classic pcap format, and what both formats share.

https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-05.html; pcapng is in `rxlab.read.pcapng`.
"""

from __future__ import annotations

import gzip
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from rxlab.errors import FormatError, TruncatedFileError
from rxlab.read.compiler import njit
from rxlab.read.words import load32
from rxlab.read.zstream import ZstdDamage, unpack_zstd

NAT = np.iinfo(np.int64).min  # a packet without a time (pcapng simple packet block)
# libpcap's MAXIMUM_SNAPLEN and wiretap's WTAP_MAX_PACKET_SIZE_STANDARD; a header that states more snap length raises it.
MAX_CAPLEN = 262_144
# A compressed capture may unfold to this many times its size, and always to FREE_BYTES. More is a bomb.
MAX_RATIO, FREE_BYTES = 250, 256 << 20

# What a walk over records ended with.
FULL, END, CUT, DAMAGED, BLOCK = range(5)


class PacketIndex(NamedTuple):
    """Where the packets of a batch are and what the file says of each; dims (packet,)."""

    time: np.ndarray  # int64 ns since 1970, NAT without a time
    position: np.ndarray  # int64, first packet byte in the buffer
    caplen: np.ndarray  # uint32 bytes
    wire_len: np.ndarray  # uint32 bytes
    interface: np.ndarray  # int16 index into the reader's interfaces
    linktype: np.ndarray  # uint16
    frame: np.ndarray  # int64, the 1-based number Wireshark shows
    direction: np.ndarray  # int8: 0 received, 1 sent, -1 not said


def empty_index(n: int) -> PacketIndex:
    """Return an index of `n` rows, zeroed (rows never written cost no memory)."""
    dtypes = (np.int64, np.int64, np.uint32, np.uint32, np.int16, np.uint16, np.int64, np.int8)
    return PacketIndex(*(np.zeros(n, dtype) for dtype in dtypes))


# --------------------------------------------------------------------------------------------------- opening


class CaptureBytes(NamedTuple):
    """A capture's bytes: `buf` uint8 (byte,) read-only, `compression` ("", "gzip", "zstd"), `warnings`."""

    buf: np.ndarray
    compression: str
    warnings: list[str]


def open_capture(path: str | os.PathLike[str]) -> CaptureBytes:
    """Map a capture file read-only, unfolding gzip or zstd into an unnamed temporary file first."""
    where = os.fspath(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic[:2] == b"\x1f\x8b":
                return _unfolded(file, "gzip", _gunzip(file), where)
            if magic == b"\x28\xb5\x2f\xfd":
                return _unfolded(file, "zstd", unpack_zstd(iter(lambda: file.read(1 << 16), b""), must_end=True), where)
            return CaptureBytes(_map(file, where), "", [])
    except OSError as error:
        raise FormatError("cannot read capture", where=where, found=error.strerror or str(error)) from None


def _map(file: IO[bytes], where: str) -> np.ndarray:
    if os.fstat(file.fileno()).st_size == 0:
        raise TruncatedFileError("capture is empty", where=where, expected="a pcap or pcapng header")
    # Read-only in every case: the compiled kernels are cached by type, and writable would be a second type.
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _unfolded(file: IO[bytes], kind: str, pieces: Iterator[bytes], where: str) -> CaptureBytes:
    limit = max(FREE_BYTES, MAX_RATIO * os.fstat(file.fileno()).st_size)
    warnings: list[str] = []
    with tempfile.TemporaryFile() as unfolded:
        try:
            for piece in pieces:
                unfolded.write(piece)
                if unfolded.tell() > limit:
                    raise FormatError(
                        f"{kind} capture unfolds to more than {MAX_RATIO} times its size",
                        where=where,
                        found=f"over {limit} bytes",
                        do="If it is what you want, decompress it yourself and read the result.",
                    )
        except (EOFError, zlib.error, gzip.BadGzipFile, ZstdDamage) as error:
            warnings.append(f"{kind} stream is cut or damaged after {unfolded.tell()} bytes: {error}")
        unfolded.flush()
        if warnings and not unfolded.tell():
            raise TruncatedFileError("nothing can be salvaged from the capture", where=where, found=warnings[-1])
        return CaptureBytes(_map(unfolded, where), kind, warnings)


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:
        while piece := stream.read1(1 << 20):
            yield piece


# --------------------------------------------------------------------------------------------------- classic pcap


class ClassicFormat(NamedTuple):
    """What a classic magic number says: byte order, nanoseconds per tick and the record header's size."""

    endian: str
    ns_per_tick: int
    record_size: int
    flavour: str


# Magic as the first four bytes read big-endian; the little-endian spelling is added below.
_MAGIC = {
    0xA1B2C3D4: (1000, 16, "pcap"),
    0xA1B23C4D: (1, 16, "pcap"),
    0xA1B2CD34: (1000, 24, "pcap-modified"),  # Kuznetzov: interface, protocol and packet type follow each header
}
FILE_HEADER_SIZE = 24  # struct pcap_file_header: magic, version, thiszone, sigfigs, snaplen, linktype


def classic_format(magic: bytes) -> ClassicFormat | None:
    """Return the classic pcap format of a file's first four bytes, None if it is none."""
    for endian in ("big", "little"):
        found = _MAGIC.get(int.from_bytes(magic, endian))
        if found:
            return ClassicFormat(endian, *found)
    return None


@njit(cache=True, nogil=True)
def count_classic(buf, pos, swap, record_size, max_caplen):
    """Return how many whole records follow `pos`."""
    n, end = 0, len(buf)
    while pos + record_size <= end:
        caplen = load32(buf, pos + 8, swap)
        pos += record_size + caplen
        if caplen > max_caplen or pos > end:
            break
        n += 1
    return n


@njit(cache=True, nogil=True)
def walk_classic(buf, pos, swap, ns_per_tick, record_size, max_caplen, linktype, index, row, stop, frame):
    """Index records from `pos` into rows `row` to `stop` (excluded) of `index`; `frame` is the number of the first.

    Returns
    -------
    (position after the last whole record, next row, FULL | END | CUT | DAMAGED)
    """
    end = len(buf)
    # Unpacked once: read as index.name in the loop, each access would count references.
    times, positions, caplens, wire_lens = index.time, index.position, index.caplen, index.wire_len
    linktypes, frames, directions = index.linktype, index.frame, index.direction
    while pos + record_size <= end:
        if row >= stop:
            return pos, row, FULL
        caplen = load32(buf, pos + 8, swap)
        if caplen > max_caplen:
            return pos, row, DAMAGED
        if pos + record_size + caplen > end:
            return pos, row, CUT
        times[row] = load32(buf, pos, swap) * 1_000_000_000 + load32(buf, pos + 4, swap) * ns_per_tick
        positions[row] = pos + record_size
        caplens[row] = caplen
        wire_lens[row] = load32(buf, pos + 12, swap)
        linktypes[row], frames[row] = linktype, frame
        # struct pcap_sf_patched_pkthdr: ifindex, protocol, pkt_type; 4 is PACKET_OUTGOING (if_packet.h)
        sent = record_size == 24 and buf[pos + 22] == 4
        directions[row] = np.int64(sent) if record_size == 24 else -1
        row += 1
        frame += 1
        pos += record_size + caplen
    return pos, row, END if pos == end else CUT


class ClassicReader:
    """A classic pcap file: fills a `PacketIndex` batch by batch.

    Attributes
    ----------
    interfaces : list of dict
        The file's one link: id, linktype, snaplen.
    truncated, truncated_at, warnings
        Where reading stopped before the end of the file, and why.
    """

    kind = "pcap"
    clock = "CLOCK_REALTIME"

    def __init__(self, buf: np.ndarray, where: str) -> None:
        found = classic_format(bytes(buf[:4]))
        assert found is not None  # the caller chose this reader by the magic
        self.format, self.format_name = found, found.flavour
        if len(buf) < FILE_HEADER_SIZE:
            raise TruncatedFileError("pcap header is cut", where=where, found=f"{len(buf)} bytes", expected="24")
        header = buf[:FILE_HEADER_SIZE].view(">u4" if found.endian == "big" else "<u4")
        self.buf, self._where = buf, where
        self._pos, self._row = FILE_HEADER_SIZE, 0
        self._swap = found.endian == "big"
        # The upper bits of the last word are the frame check sequence's length, not the link type.
        self._linktype, snaplen = int(header[5]) & 0xFFFF, int(header[4])
        self._max_caplen = max(MAX_CAPLEN, snaplen)
        self.interfaces: list[dict[str, Any]] = [{"id": 0, "linktype": self._linktype, "snaplen": snaplen}]
        self.comments: list[tuple[int, str]] = []
        self.warnings: list[str] = []
        self.truncated, self.truncated_at = False, -1
        self.sections = 1

    def count(self, end: int) -> int:
        """Return how many packets the file's first `end` bytes hold, at most."""
        buf, start = self.buf[:end], FILE_HEADER_SIZE
        return count_classic(buf, start, self._swap, self.format.record_size, self._max_caplen)

    def attrs(self) -> dict[str, Any]:
        """Return what is known of the file so far."""
        names = ("kind", "clock", "interfaces", "comments", "sections", "truncated", "truncated_at")
        return {**{name: getattr(self, name) for name in names}, "warnings": list(self.warnings)}

    def fill(self, index: PacketIndex, row: int, stop: int) -> tuple[int, bool]:
        """Write the next packets to rows `row` to `stop` of `index`; return the next row and whether more may come."""
        first = row
        self._pos, row, status = walk_classic(
            self.buf,
            self._pos,
            self._swap,
            self.format.ns_per_tick,
            self.format.record_size,
            self._max_caplen,
            self._linktype,
            index,
            row,
            stop,
            self._row + 1,
        )
        self._row += row - first
        if status in (CUT, DAMAGED):
            self.truncated, self.truncated_at = True, int(self._pos)
            left = len(self.buf) - self._pos
            why = "the record passes the end of the file" if status == CUT else "the record's length is impossible"
            self.warnings.append(f"stopped at byte {self._pos}, {left} bytes before the end: {why}")
        return row, status == FULL
