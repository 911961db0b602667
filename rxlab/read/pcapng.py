"""pcapng blocks -> packet index; https://www.ietf.org/archive/id/draft-ietf-opsawg-pcapng-03.html.

Packet blocks are walked by a compiled kernel; section headers, interface descriptions and statistics, which are few,
come back to Python. Each section has its own byte order and interfaces.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from rxlab.errors import FormatError
from rxlab.read.compiler import njit
from rxlab.read.pcapfile import BLOCK, CUT, DAMAGED, END, FULL, MAX_CAPLEN, NAT, PacketIndex
from rxlab.read.words import load32

SHB, IDB, PB, SPB, NRB, ISB, EPB = 0x0A0D0D0A, 1, 2, 3, 4, 5, 6
# Blocks Wireshark shows as frames although they hold no packet; they count in frame numbers.
JOURNAL, CUSTOM, CUSTOM_NO_COPY = 9, 0xBAD, 0x40000BAD
BYTE_ORDER_MAGIC = 0x1A2B3C4D
MAX_INTERFACES = 32_767  # the interface column is int16
MAX_COMMENTS = 65_536

OPT_COMMENT, OPT_IF_NAME, OPT_IF_DESCRIPTION, OPT_TSRESOL, OPT_TSOFFSET, OPT_EPB_FLAGS = 1, 2, 3, 9, 14, 2
OPT_ISB_IFRECV, OPT_ISB_IFDROP = 4, 5

# Interface table handed to the kernel: one row per interface of the section.
_LINKTYPE, _SNAPLEN, _TSRESOL, _TSOFFSET, _GLOBAL = range(5)


@njit(cache=True, nogil=True, forceinline=True)
def _binary_ticks_to_ns(ticks, bits):
    """Return floor(ticks * 1e9 / 2**bits) for a fraction of a second (ticks < 2**bits) without 128-bit integers.

    1e9 = 5**9 * 2**9, so this is ticks * 5**9 >> (bits - 9), taken in two 32-bit halves.
    """
    fives = np.uint64(1953125)
    low = (ticks & np.uint64(0xFFFFFFFF)) * fives
    high = (ticks >> np.uint64(32)) * fives + (low >> np.uint64(32))
    if bits >= 41:
        shift = bits - 41
        return high >> np.uint64(shift) if shift < 64 else np.uint64(0)
    low &= np.uint64(0xFFFFFFFF)
    if bits >= 9:
        return ((high << np.uint64(32)) | low) >> np.uint64(bits - 9)
    return ((high << np.uint64(32)) | low) << np.uint64(9 - bits)


@njit(cache=True, nogil=True)
def ticks_to_ns(ticks, tsresol, tsoffset):
    """Return ns since 1970 of a 64-bit timestamp, NAT where int64 ns cannot hold it; rounds down.

    Parameters
    ----------
    ticks : uint64
    tsresol : int
        if_tsresol byte: power of 10, or of 2 with the top bit set.
    tsoffset : int
        if_tsoffset, seconds.
    """
    power = tsresol & 0x7F
    if tsresol & 0x80:
        seconds = ticks >> np.uint64(power) if power < 64 else np.uint64(0)
        fraction = ticks - (seconds << np.uint64(power)) if power < 64 else ticks
        ns = _binary_ticks_to_ns(fraction, power)
    else:
        per_second = np.uint64(1)
        for _ in range(int(min(power, 19))):
            per_second *= np.uint64(10)
        seconds, fraction = ticks // per_second, ticks % per_second
        if power > 19:  # a tick is below 1e-19 s: the whole 64 bits are a part of a second
            seconds, fraction = np.uint64(0), ticks
        ns = fraction
        for _ in range(power, 9):
            ns *= np.uint64(10)
        for _ in range(9, power):
            ns //= np.uint64(10)
    if seconds > np.uint64(9_223_372_035):
        return NAT
    total = np.int64(seconds) + tsoffset
    if total > 9_223_372_035 or total < -9_223_372_035:
        return NAT
    return total * 1_000_000_000 + np.int64(ns)


@njit(cache=True, nogil=True)
def _scan_options(buf, pos, stop, swap):
    """Return (direction, position of a comment option or -1) from the packet options in [pos, stop)."""
    direction, comment = np.int64(-1), np.int64(-1)
    while pos + 4 <= stop:
        word = load32(buf, pos, swap)
        code, size = (word >> 16, word & 0xFFFF) if swap else (word & 0xFFFF, word >> 16)
        if code == 0 or pos + 4 + size > stop:
            break
        if code == OPT_COMMENT and comment < 0:
            comment = pos
        elif code == OPT_EPB_FLAGS and size >= 4:
            way = load32(buf, pos + 4, swap) & 3  # 1 inbound, 2 outbound
            direction = way - 1 if way in (1, 2) else direction
        pos += 4 + ((size + 3) & ~3)
    return direction, comment


@njit(cache=True, nogil=True)
def count_blocks(buf, pos, swap):
    """Return an upper bound of the packet blocks from `pos` on, all sections."""
    n, end = 0, len(buf)
    while pos + 12 <= end:
        kind = load32(buf, pos, swap)
        if kind == SHB:  # reads the same in both byte orders; its own follows the length
            swap = buf[pos + 8] == 0x1A
        elif kind in (EPB, PB, SPB):
            n += 1
        size = load32(buf, pos + 4, swap)
        if size < 12 or size & 3:
            break
        pos += size
    return n


@njit(cache=True, nogil=True)
def _walk_blocks(buf, pos, swap, interfaces, index, row, stop, frame, comments, n_comments):
    """Index packet blocks from `pos`; stops at blocks Python must read.

    Returns
    -------
    (position, next row, frames so far, number of comments, FULL | END | CUT | DAMAGED | BLOCK)
    """
    end = len(buf)
    # Unpacked once: read as index.name in the loop, each access would count references.
    times, positions, caplens, wire_lens = index.time, index.position, index.caplen, index.wire_len
    numbers, linktypes, frames, directions = index.interface, index.linktype, index.frame, index.direction
    while pos + 12 <= end:
        kind = load32(buf, pos, swap)
        if kind in (SHB, IDB, ISB):
            return pos, row, frame, n_comments, BLOCK
        size = load32(buf, pos + 4, swap)
        if size < 12 or size & 3:
            return pos, row, frame, n_comments, DAMAGED
        if pos + size > end:
            return pos, row, frame, n_comments, CUT
        if load32(buf, pos + size - 4, swap) != size:
            return pos, row, frame, n_comments, DAMAGED
        if kind in (JOURNAL, CUSTOM, CUSTOM_NO_COPY):
            frame += 1
        if kind not in (EPB, PB, SPB):
            pos += size
            continue
        if row >= stop:
            return pos, row, frame, n_comments, FULL
        time, direction, comment = NAT, np.int64(-1), np.int64(-1)
        if kind == SPB:
            if size < 16 or len(interfaces) == 0:
                return pos, row, frame, n_comments, DAMAGED
            interface, start, wire_len = np.int64(0), pos + 12, load32(buf, pos + 8, swap)
            snaplen = interfaces[0, _SNAPLEN]
            caplen = min(wire_len, snaplen) if snaplen > 0 else wire_len
            if caplen > size - 16:
                return pos, row, frame, n_comments, DAMAGED
        else:
            if size < 32:
                return pos, row, frame, n_comments, DAMAGED
            interface, start = load32(buf, pos + 8, swap), pos + 28
            if kind == PB:  # interface and drop count share the word
                interface = interface >> 16 if swap else interface & 0xFFFF
            caplen, wire_len = load32(buf, pos + 20, swap), load32(buf, pos + 24, swap)
            if interface >= len(interfaces) or caplen > size - 32:
                return pos, row, frame, n_comments, DAMAGED
            if caplen > max(MAX_CAPLEN, interfaces[interface, _SNAPLEN]):
                return pos, row, frame, n_comments, DAMAGED
            ticks = np.uint64(load32(buf, pos + 12, swap) << 32 | load32(buf, pos + 16, swap))
            time = ticks_to_ns(ticks, interfaces[interface, _TSRESOL], interfaces[interface, _TSOFFSET])
            options = start + ((caplen + 3) & ~3)
            if options + 4 <= pos + size - 4:
                direction, comment = _scan_options(buf, options, pos + size - 4, swap)
        times[row], positions[row], directions[row] = time, start, direction
        caplens[row], wire_lens[row] = caplen, wire_len
        numbers[row], linktypes[row] = interfaces[interface, _GLOBAL], interfaces[interface, _LINKTYPE]
        frame += 1
        frames[row] = frame
        if comment >= 0 and n_comments < len(comments):
            comments[n_comments, 0], comments[n_comments, 1] = frame, comment
            n_comments += 1
        row += 1
        pos += size
    return pos, row, frame, n_comments, END if pos == end else CUT


def _options(body: bytes, endian: str) -> list[tuple[int, bytes]]:
    """Return (code, value) of a block's options; stops at the end mark or where an option does not fit."""
    found, pos = [], 0
    while pos + 4 <= len(body):
        code, size = struct.unpack_from(endian + "HH", body, pos)
        if code == 0 or pos + 4 + size > len(body):
            break
        found.append((code, body[pos + 4 : pos + 4 + size]))
        pos += 4 + (size + 3 & ~3)
    return found


class PcapngReader:
    """A pcapng file: fills a `PacketIndex` batch by batch, with the attributes of `ClassicReader`."""

    kind = format_name = "pcapng"
    clock = "CLOCK_REALTIME"

    def __init__(self, buf: np.ndarray, where: str) -> None:
        self.buf, self._where, self._pos = buf, where, 0
        self._endian, self._frame = "<", 0
        self._table = np.zeros((0, 5), np.int64)
        self._section: list[dict[str, Any]] = []
        self._comment_at = np.zeros((MAX_COMMENTS, 2), np.int64)
        self._untimed = 0
        self.comments: list[tuple[int, str]] = []
        self.interfaces: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.truncated, self.truncated_at = False, -1
        self.sections = 0
        self._read_block()
        if self.sections == 0:
            raise FormatError(
                "pcapng section header is damaged", where=where, found=self.warnings[-1], expected="version 1"
            )

    def count(self, end: int) -> int:
        """Return how many packets the file's first `end` bytes hold, at most."""
        return count_blocks(self.buf[:end], 0, False)

    def attrs(self) -> dict[str, Any]:
        """Return what is known of the file so far."""
        names = ("kind", "clock", "interfaces", "comments", "sections", "truncated", "truncated_at")
        warnings = list(self.warnings)
        if self._untimed:
            warnings.append(f"{self._untimed} packets have no time that int64 nanoseconds can hold")
        return {**{name: getattr(self, name) for name in names}, "warnings": warnings}

    def fill(self, index: PacketIndex, row: int, stop: int) -> tuple[int, bool]:
        """Write the next packets to rows `row` to `stop` of `index`; return the next row and whether more may come."""
        first = row
        while not self.truncated:
            swap = self._endian == ">"
            self._pos, row, self._frame, n_comments, status = _walk_blocks(
                self.buf, self._pos, swap, self._table, index, row, stop, self._frame, self._comment_at, 0
            )
            self._read_comments(n_comments)
            self._untimed += int(np.count_nonzero(index.time[first:row] == NAT))
            first = row
            if status == FULL:
                return row, True
            if status == END:
                break
            if status == BLOCK:
                self._read_block()
            else:
                self._stop("the block passes the end of the file" if status == CUT else "the block is damaged")
        return row, False

    def _stop(self, why: str) -> None:
        self.truncated, self.truncated_at = True, int(self._pos)
        left = len(self.buf) - self._pos
        self.warnings.append(f"stopped at byte {self._pos}, {left} bytes before the end: {why}")

    def _read_comments(self, n: int) -> None:
        for frame, pos in self._comment_at[:n]:
            if len(self.comments) == MAX_COMMENTS:
                self.warnings.append(f"only the first {MAX_COMMENTS} packet comments were read")
                break
            size = int.from_bytes(self.buf[pos + 2 : pos + 4], "big" if self._endian == ">" else "little")
            text = bytes(self.buf[pos + 4 : pos + 4 + size]).decode("utf-8", "replace")
            self.comments.append((int(frame), text))

    def _read_block(self) -> None:
        """Read the section header, interface description or statistics block at the position and step over it."""
        head = bytes(self.buf[self._pos : self._pos + 12])
        if head[:4] == b"\x0a\x0d\x0d\x0a":
            marks = {b"\x1a\x2b\x3c\x4d": ">", b"\x4d\x3c\x2b\x1a": "<"}
            if head[8:12] not in marks:
                return self._stop("the section header has no byte order mark")
            self._endian = marks[head[8:12]]
        kind, size = struct.unpack_from(self._endian + "II", head)
        if size & 3:
            return self._stop("the block's length is not a multiple of 4")
        if size < {SHB: 28, IDB: 20}.get(kind, 24):
            return self._stop("the block is shorter than its fixed part")
        if self._pos + size > len(self.buf):
            return self._stop("the block passes the end of the file")
        if bytes(self.buf[self._pos + size - 4 : self._pos + size]) != head[4:8]:
            return self._stop("the block's two lengths differ")
        body = bytes(self.buf[self._pos + 8 : self._pos + size - 4])
        {SHB: self._read_section, IDB: self._read_interface, ISB: self._read_statistics}[kind](body)
        if not self.truncated:
            self._pos += size
        return None

    def _read_section(self, body: bytes) -> None:
        major = struct.unpack_from(self._endian + "H", body, 4)[0]
        if major != 1:
            return self._stop(f"the section is of pcapng version {major}")
        self.sections += 1
        self._section, self._table = [], np.zeros((0, 5), np.int64)
        return None

    def _read_interface(self, body: bytes) -> None:
        if len(self.interfaces) >= MAX_INTERFACES:
            return self._stop(f"more than {MAX_INTERFACES} interfaces")
        linktype, _, snaplen = struct.unpack_from(self._endian + "HHI", body)
        described: dict[str, Any] = {
            "id": len(self._section),
            "section": self.sections - 1,
            "linktype": linktype,
            "snaplen": snaplen,
            "tsresol": 6,
            "tsoffset": 0,
        }
        for code, value in _options(body[8:], self._endian):
            if code in (OPT_IF_NAME, OPT_IF_DESCRIPTION):
                key = "name" if code == OPT_IF_NAME else "description"
                described[key] = value.decode("utf-8", "replace")
            elif code == OPT_TSRESOL and value:
                described["tsresol"] = value[0]
            elif code == OPT_TSOFFSET and len(value) == 8:
                described["tsoffset"] = struct.unpack(self._endian + "q", value)[0]
        row = [linktype, snaplen, described["tsresol"], described["tsoffset"], len(self.interfaces)]
        self._table = np.vstack((self._table, np.array([row], np.int64)))
        self._section.append(described)
        self.interfaces.append(described)
        return None

    def _read_statistics(self, body: bytes) -> None:
        number = struct.unpack_from(self._endian + "I", body)[0]
        if number >= len(self._section):
            return
        for code, value in _options(body[12:], self._endian):
            if code in (OPT_ISB_IFRECV, OPT_ISB_IFDROP) and len(value) == 8:
                key = "received" if code == OPT_ISB_IFRECV else "dropped"
                self._section[number][key] = struct.unpack(self._endian + "Q", value)[0]
