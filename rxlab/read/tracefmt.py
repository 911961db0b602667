"""Tracepoint formats: the kernel's own ``format`` text -> fields by name, never a hard-coded layout.

Layouts differ between kernels (``kfree_skb`` gained ``rx_sk`` in the middle of the record), so every recording carries the
text of its kernel's ``/sys/kernel/tracing/events/SYS/NAME/format`` files and that text alone says where a field lies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rxlab.errors import FormatError

# What a field's bytes mean to a reader.
SCALAR, ARRAY, TEXT, LOC, REL_LOC, REST = "scalar", "array", "text", "loc", "rel_loc", "rest"

# Columns that belong to the sample, not to the tracepoint: a field of the same name is called field_NAME.
SAMPLE_COLUMNS = ("time", "cpu", "pid", "tid", "rank")

# A field larger than this is damage: the kernel's trace records are at most a page.
MAX_FIELD_BYTES = 1 << 16

_FIELD = re.compile(
    r"field:(?P<declaration>[^;]+);\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);(?:\s*signed:(?P<signed>\d+);)?"
)
_ARRAY = re.compile(r"^(?P<type>.*?)\s*\b(?P<name>\w+)\s*\[(?P<count>[^\]]*)\]$")
_DYNAMIC = re.compile(r"^(?P<kind>__data_loc|__rel_loc)\s+(?P<type>.*?)\s*\[[^\]]*\]\s*(?P<name>\w+)$")
_SCALAR = re.compile(r"^(?P<type>.*?)\s*\b(?P<name>\w+)(?:\s*:\s*\d+)?$")
_SYMBOLIC = re.compile(r"__print_symbolic\(\s*REC->(?P<field>\w+)\s*,(?P<pairs>(?:\s*\{[^{}]*\}\s*,?)+)\)")
# A C constant of 64 bits at most: hexadecimal, octal or decimal.
_PAIR = re.compile(
    r"\{\s*(?P<value>-?(?:0[xX][0-9a-fA-F]{1,16}|0[0-7]{0,22}|[1-9][0-9]{0,19}))[uUlL]*\s*,\s*\"(?P<name>[^\"]*)\"\s*\}"
)
_ONE_BYTE = re.compile(r"\b(?:char|u8|s8|__u8|__s8|uint8_t|int8_t|bool)\b")
_TWO_BYTES = re.compile(r"\b(?:short|u16|s16|__u16|__s16|__be16|__le16|uint16_t|int16_t)\b")
_LONG = re.compile(r"\blong\b|\*|\b(?:size_t|ssize_t|uintptr_t|cpumask_t)\b")
_EIGHT_BYTES = re.compile(r"\blong long\b|\b(?:u64|s64|__u64|__s64|__be64|__le64|uint64_t|int64_t)\b")


@dataclass(frozen=True)
class Field:
    """One field of a tracepoint record.

    Attributes
    ----------
    name : str
        Name in the kernel.
    type : str
        C type as the kernel wrote it.
    kind : str
        ``scalar``; ``array`` (fixed count); ``text`` (``char[n]``, ended by NUL); ``loc`` and ``rel_loc`` (a u32 that
        points to a variable part: low 16 bits offset, high 16 bits length); ``rest`` (``[]``: up to the end of the record).
    offset, size : int
        Bytes, from the start of the record.
    itemsize : int
        Bytes of one element.
    count : int
        Elements of an ``array``, else 1.
    signed : bool
    """

    name: str
    type: str
    kind: str
    offset: int
    size: int
    itemsize: int
    count: int
    signed: bool

    @property
    def column(self) -> str:
        """Name of the column: the field's own, or ``field_NAME`` where the sample has a column of that name."""
        return f"field_{self.name}" if self.name in SAMPLE_COLUMNS else self.name

    @property
    def is_text(self) -> bool:
        """Tell whether the elements are characters."""
        return self.itemsize == 1 and re.search(r"\bchar\b", self.type) is not None and "unsigned" not in self.type

    @property
    def dtype(self) -> np.dtype:
        """Native dtype of one row of the column; variable fields are int32 codes into ``attrs["categories"]``."""
        if self.kind in (LOC, REL_LOC, REST):
            return np.dtype(np.int32)
        if self.kind == TEXT:
            return np.dtype(f"S{self.size}")
        return np.dtype(f"{'i' if self.signed else 'u'}{self.itemsize}")


@dataclass(frozen=True)
class EventFormat:
    """The record layout of one tracepoint.

    Attributes
    ----------
    system, name : str
        ``net``, ``netif_rx``.
    id : int
        What ``common_type`` and the ``config`` of a perf attribute hold.
    fields : tuple of Field
        In record order, the ``common_`` fields first.
    symbols : dict
        Field name -> {value: name}, from ``__print_symbolic`` in the print format (drop reasons, states).
    """

    system: str
    name: str
    id: int
    fields: tuple[Field, ...]
    symbols: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """Return ``system:name``."""
        return f"{self.system}:{self.name}"


def parse_format(text: str, *, system: str = "", long_size: int = 8, where: str = "format") -> EventFormat:
    """Parse the text of one tracepoint's ``format`` file.

    Parameters
    ----------
    text : str
    system : str, optional
        Subsystem, which the text itself does not name.
    long_size : int, optional
        Bytes of a C ``long`` on the machine that recorded.
    where : str, optional
        Named in errors.

    Raises
    ------
    FormatError
        There is no name or no ID.
    """
    name = re.search(r"^\s*name:\s*(\S+)", text, re.MULTILINE)
    number = re.search(r"^\s*ID:\s*(\d{1,9})\s*$", text, re.MULTILINE)
    if name is None or number is None:
        raise FormatError(
            "not a tracepoint format", where=where, found=repr(text[:40]), expected="'name:' and 'ID:' lines"
        )
    layout, _, print_fmt = text.partition("print fmt:")
    fields = (_parse_field(match, long_size) for match in _FIELD.finditer(layout))
    usable = tuple(item for item in fields if item is not None)
    return EventFormat(system, name[1], int(number[1]), usable, _parse_symbols(print_fmt))


def _parse_field(match: re.Match[str], long_size: int) -> Field | None:
    declaration = " ".join(match["declaration"].split())
    if len(match["offset"]) > 6 or len(match["size"]) > 6:
        return None
    offset, size = int(match["offset"]), int(match["size"])
    if offset + size > MAX_FIELD_BYTES:
        return None
    dynamic = _DYNAMIC.match(declaration)
    if dynamic is not None:
        kind = LOC if dynamic["kind"] == "__data_loc" else REL_LOC
        return _variable(
            dynamic["name"], dynamic["type"], kind, (offset, size), _is_signed(match, dynamic["type"]), long_size
        )
    array = _ARRAY.match(declaration)
    if array is not None:
        return _array(array, (offset, size), _is_signed(match, array["type"]), long_size)
    scalar = _SCALAR.match(declaration)
    if scalar is None or size == 0:
        return None
    if size not in (1, 2, 4, 8):  # a struct or a 128-bit integer: its bytes
        return Field(scalar["name"], scalar["type"], ARRAY, offset, size, 1, size, False)
    return Field(scalar["name"], scalar["type"], SCALAR, offset, size, size, 1, _is_signed(match, scalar["type"]))


def _array(match: re.Match[str], span: tuple[int, int], signed: bool, long_size: int) -> Field | None:
    offset, size = span
    name, type_name = match["name"], match["type"]
    if size == 0:
        return _variable(name, type_name, REST, span, signed, long_size)
    # The count can be an expression of the kernel's source (sizeof(struct sockaddr_in6)); the type then tells the element.
    itemsize = (
        size // int(match["count"])
        if re.fullmatch(r"[1-9]\d{0,4}", match["count"])
        else item_size(type_name, long_size)
    )
    if itemsize not in (1, 2, 4, 8) or size % itemsize:
        itemsize = 1
    if itemsize == 1 and re.search(r"\bchar\b", type_name) and "unsigned" not in type_name:
        return Field(name, type_name, TEXT, offset, size, 1, size, False)
    return Field(name, type_name, ARRAY, offset, size, itemsize, size // itemsize, signed)


def _variable(
    name: str, type_name: str, kind: str, span: tuple[int, int], signed: bool, long_size: int
) -> Field | None:
    if kind != REST and span[1] != 4:
        return None
    return Field(name, type_name, kind, span[0], span[1], item_size(type_name, long_size), 1, signed)


def _is_signed(match: re.Match[str], type_name: str) -> bool:
    if match["signed"] is not None:
        return match["signed"] == "1"
    # Kernels before 2.6.32 wrote no "signed:".
    return re.search(r"\bunsigned\b|\b_{0,2}u(?:int)?\d+|\*|\bchar\b|\bsize_t\b", type_name) is None


def item_size(type_name: str, long_size: int) -> int:
    """Return the bytes of one element of a C type, 4 where the type is not known."""
    for size, pattern in ((8, _EIGHT_BYTES), (long_size, _LONG), (2, _TWO_BYTES), (1, _ONE_BYTE)):
        if pattern.search(type_name):
            return size
    return 4


def _parse_symbols(print_fmt: str) -> dict[str, dict[int, str]]:
    return {
        match["field"]: {
            int(pair["value"], 0) if not re.fullmatch(r"-?0[0-7]+", pair["value"]) else int(pair["value"], 8): pair[
                "name"
            ]
            for pair in _PAIR.finditer(match["pairs"])
        }
        for match in _SYMBOLIC.finditer(print_fmt)
    }


@dataclass(frozen=True)
class TracingData:
    """What perf stores of the recording kernel's tracing setup (HEADER_TRACING_DATA).

    Attributes
    ----------
    version : str
    byteorder : str
        ``<`` or ``>``: the recording machine's.
    long_size, page_size : int
    formats : dict of int to EventFormat
        By tracepoint id.
    truncated : bool
        The section ended early; the formats before that are here.
    """

    version: str
    byteorder: str
    long_size: int
    page_size: int
    formats: dict[int, EventFormat]
    truncated: bool = False


class _Cursor:
    """A position in the section; every read is checked against its end."""

    def __init__(self, section: bytes, where: str) -> None:
        self.section, self.where, self.at, self.byteorder = section, where, 0, "little"

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.section):
            raise _EndOfSection
        self.at += size
        return self.section[self.at - size : self.at]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little" if self.byteorder == "little" else "big")

    def string(self) -> str:
        end = self.section.find(b"\0", self.at)
        if end < 0:
            raise _EndOfSection
        text = self.section[self.at : end].decode("utf-8", "replace")
        self.at = end + 1
        return text

    def expect(self, magic: bytes) -> None:
        found = self.take(len(magic))
        if found != magic:
            raise FormatError(
                "damaged tracing data",
                where=f"{self.where} byte {self.at - len(magic)}",
                found=repr(found),
                expected=repr(magic),
            )


class _EndOfSection(Exception):
    pass


# tools/perf/util/trace-event-info.c writes it: 17 08 44 "tracing", version, u8 big-endian, u8 sizeof(long), u32 page size,
# "header_page\0" u64+text, "header_event\0" u64+text, u32 n x (u64+ftrace format), u32 systems x (name\0, u32 n x (u64+format)),
# then kallsyms, printk formats and saved command lines, which no column needs.
TRACING_MAGIC = b"\x17\x08\x44tracing"


def parse_tracing_data(section: bytes, *, where: str = "tracing data") -> TracingData:
    """Parse HEADER_TRACING_DATA of a perf.data file, or the payload of a TRACING_DATA record.

    Raises
    ------
    FormatError
        The section does not begin as one. A section that ends early is returned with `truncated` set.
    """
    cursor = _Cursor(section, where)
    formats: dict[int, EventFormat] = {}
    version, big, long_size, page_size = "", 0, 8, 4096
    try:
        cursor.expect(TRACING_MAGIC)
        version, big, long_size = cursor.string(), cursor.integer(1), cursor.integer(1)
        cursor.byteorder = "big" if big else "little"
        page_size = cursor.integer(4)
        for magic in (b"header_page\0", b"header_event\0"):
            cursor.expect(magic)
            cursor.take(cursor.integer(8))
        _read_formats(cursor, "ftrace", formats, long_size)
        for _ in range(cursor.integer(4)):
            _read_formats(cursor, cursor.string(), formats, long_size)
    except _EndOfSection:
        return TracingData(version, ">" if big else "<", long_size, page_size, formats, truncated=True)
    return TracingData(version, ">" if big else "<", long_size, page_size, formats)


def _read_formats(cursor: _Cursor, system: str, formats: dict[int, EventFormat], long_size: int) -> None:
    for _ in range(cursor.integer(4)):
        text = cursor.take(cursor.integer(8)).decode("utf-8", "replace")
        event = parse_format(text, system=system, long_size=long_size, where=cursor.where)
        formats[event.id] = event


def read_local_formats(ids: set[int], root: str | Path = "/sys/kernel/tracing/events") -> dict[int, EventFormat]:
    """Read formats from the running kernel: right only for a recording made on this kernel.

    Parameters
    ----------
    ids : set of int
        Tracepoint ids wanted.
    root : path, optional
        The events directory of tracefs.
    """
    formats: dict[int, EventFormat] = {}
    for id_file in Path(root).glob("*/*/id"):
        try:
            number = int(id_file.read_text())
            if number in ids:
                text = (id_file.parent / "format").read_text()
                formats[number] = parse_format(
                    text, system=id_file.parent.parent.name, where=str(id_file.parent / "format")
                )
        except (OSError, ValueError):
            continue
    return formats
