"""What ``struct perf_event_attr`` says about an event: its name, its ids and where a sample keeps each value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

# include/uapi/linux/perf_event.h: struct perf_event_attr up to VER8 (136 bytes). Shorter ones (64, 72, 80, ...) are padded
# with zeros, longer ones cut: what is known is taken, the rest skipped.
PERF_EVENT_ATTR = np.dtype(
    [
        ("type", "<u4"),
        ("size", "<u4"),
        ("config", "<u8"),
        ("sample_period", "<u8"),
        ("sample_type", "<u8"),
        ("read_format", "<u8"),
        ("flags", "<u8"),
        ("wakeup_events", "<u4"),
        ("bp_type", "<u4"),
        ("config1", "<u8"),
        ("config2", "<u8"),
        ("branch_sample_type", "<u8"),
        ("sample_regs_user", "<u8"),
        ("sample_stack_user", "<u4"),
        ("clockid", "<i4"),
        ("sample_regs_intr", "<u8"),
        ("aux_watermark", "<u4"),
        ("sample_max_stack", "<u2"),
        ("__reserved_2", "<u2"),
        ("aux_sample_size", "<u4"),
        ("__reserved_3", "<u4"),
        ("sig_data", "<u8"),
        ("config3", "<u8"),
    ]
)
assert PERF_EVENT_ATTR.itemsize == 136

ATTR_SIZE_VER0 = 64

# enum perf_event_sample_format
SAMPLE_IP, SAMPLE_TID, SAMPLE_TIME, SAMPLE_ADDR, SAMPLE_READ, SAMPLE_CALLCHAIN = (1 << bit for bit in range(6))
SAMPLE_ID, SAMPLE_CPU, SAMPLE_PERIOD, SAMPLE_STREAM_ID, SAMPLE_RAW = (1 << bit for bit in range(6, 11))
SAMPLE_IDENTIFIER = 1 << 16

# enum perf_event_read_format
FORMAT_TOTAL_TIME_ENABLED, FORMAT_TOTAL_TIME_RUNNING, FORMAT_ID, FORMAT_GROUP, FORMAT_LOST = (
    1 << bit for bit in range(5)
)

# Bits of perf_event_attr's flag word.
EXCLUDE_USER, EXCLUDE_KERNEL, EXCLUDE_HV = 1 << 4, 1 << 5, 1 << 6
PRECISE_IP_SHIFT = 15
SAMPLE_ID_ALL = 1 << 18
EXCLUDE_HOST, EXCLUDE_GUEST = 1 << 19, 1 << 20
USE_CLOCKID = 1 << 25

TYPE_HARDWARE, TYPE_SOFTWARE, TYPE_TRACEPOINT, TYPE_HW_CACHE, TYPE_RAW, TYPE_BREAKPOINT = range(6)

# The words of a sample that come first and in this order; each is 8 bytes.
_FIXED = (
    ("identifier", SAMPLE_IDENTIFIER),
    ("ip", SAMPLE_IP),
    ("tid", SAMPLE_TID),
    ("time", SAMPLE_TIME),
    ("addr", SAMPLE_ADDR),
    ("id", SAMPLE_ID),
    ("stream_id", SAMPLE_STREAM_ID),
    ("cpu", SAMPLE_CPU),
    ("period", SAMPLE_PERIOD),
)
# The trailer of other records under sample_id_all.
_TRAILER = (
    ("tid", SAMPLE_TID),
    ("time", SAMPLE_TIME),
    ("id", SAMPLE_ID),
    ("stream_id", SAMPLE_STREAM_ID),
    ("cpu", SAMPLE_CPU),
    ("identifier", SAMPLE_IDENTIFIER),
)

# Columns of the table that tells the kernels in perfrecords where a sample keeps what: byte offsets from the record's
# start (-1: not recorded), then how the variable parts before the raw bytes look.
L_MIN_SIZE, L_TID, L_TIME, L_CPU, L_IP, L_ADDR, L_PERIOD, L_TAIL, L_READ, L_CALLCHAIN, L_RAW, L_TYPE = range(12)
LAYOUT_COLUMNS = 12

_HARDWARE = (
    "cycles",
    "instructions",
    "cache-references",
    "cache-misses",
    "branches",
    "branch-misses",
    "bus-cycles",
    "stalled-cycles-frontend",
    "stalled-cycles-backend",
    "ref-cycles",
)
_SOFTWARE = (
    "cpu-clock",
    "task-clock",
    "page-faults",
    "context-switches",
    "cpu-migrations",
    "minor-faults",
    "major-faults",
    "alignment-faults",
    "emulation-faults",
    "dummy",
    "bpf-output",
    "cgroup-switches",
)


@dataclass(frozen=True)
class Attr:
    """One recorded event as its attribute describes it.

    Attributes
    ----------
    type, config : int
        ``PERF_TYPE_*``; for a tracepoint `config` is its id.
    sample_type, read_format, flags : int
        Bit sets of the kernel header; `flags` with bit 0 = ``disabled`` whatever the byte order of the file.
    clockid : int or None
        The clock of the stamps when ``use_clockid`` is set.
    ids : tuple of int
        Values of a sample's id that mean this event.
    name : str
        As recorded, or as perf would print it; empty for a tracepoint without a name.
    """

    type: int
    config: int
    sample_type: int
    read_format: int
    flags: int
    clockid: int | None
    ids: tuple[int, ...] = ()
    name: str = ""

    def named(self, name: str) -> Attr:
        """Return the attribute with another name."""
        return replace(self, name=name)

    def with_ids(self, ids: tuple[int, ...]) -> Attr:
        """Return the attribute with the given ids."""
        return replace(self, ids=ids)

    @property
    def is_tracepoint(self) -> bool:
        """Tell whether the event is a kernel tracepoint."""
        return self.type == TYPE_TRACEPOINT

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What two attributes must share to be one event with one layout."""
        return (self.type, self.config, self.sample_type, self.read_format)

    def id_position(self) -> int:
        """Return the byte offset of the id in a sample record, -1 when samples carry none."""
        if self.sample_type & SAMPLE_IDENTIFIER:
            return 8
        if not self.sample_type & SAMPLE_ID:
            return -1
        return positions(self.sample_type)["id"]

    def layout(self) -> list[int]:
        """Return the row of the layout table, see ``L_*``."""
        at = positions(self.sample_type)
        tail = at["end"]
        is_read = bool(self.sample_type & SAMPLE_READ)
        # 0: no READ part; else 1 + read_format, whose low five bits say which words it has.
        read = 1 + (self.read_format & 31) if is_read else 0
        row = [tail, at["tid"], at["time"], at["cpu"], at["ip"], at["addr"], at["period"], tail, read]
        has_callchain, has_raw = (int(bool(self.sample_type & bit)) for bit in (SAMPLE_CALLCHAIN, SAMPLE_RAW))
        # common_type of the raw bytes: in a group, a member's sample carries the leader's raw bytes, which are not its own.
        return [*row, has_callchain, has_raw, self.config & 0xFFFF if self.is_tracepoint else -1]


def positions(sample_type: int) -> dict[str, int]:
    """Return the byte offset from the record's start of each fixed word of a sample (-1: absent) and their ``end``."""
    at, found = 8, {}
    for name, bit in _FIXED:
        found[name] = at if sample_type & bit else -1
        at += 8 if sample_type & bit else 0
    return {**found, "end": at}


def trailer_positions(sample_type: int) -> dict[str, int]:
    """Return the byte offset from the record's end (negative) of each word of the sample_id_all trailer; 0: absent."""
    present = [name for name, bit in _TRAILER if sample_type & bit]
    return {name: (present.index(name) - len(present)) * 8 if name in present else 0 for name, _ in _TRAILER}


def parse_attr(raw: bytes, *, big: bool) -> Attr:
    """Parse the bytes of one ``perf_event_attr`` of any size."""
    padded = raw[: PERF_EVENT_ATTR.itemsize].ljust(PERF_EVENT_ATTR.itemsize, b"\0")
    dtype = PERF_EVENT_ATTR.newbyteorder(">") if big else PERF_EVENT_ATTR
    attr = np.frombuffer(padded, dtype)[0]
    flags = int(attr["flags"])
    if big:  # C bit fields start at the most significant bit there
        flags = int(f"{flags:064b}"[::-1], 2)
    parsed = Attr(
        type=int(attr["type"]),
        config=int(attr["config"]),
        sample_type=int(attr["sample_type"]),
        read_format=int(attr["read_format"]),
        flags=flags,
        clockid=int(attr["clockid"]) if flags & USE_CLOCKID else None,
    )
    return parsed.named(default_name(parsed))


def attr_size(raw: bytes, *, big: bool) -> int:
    """Return the size an attribute states for itself; 0 means the first version's 64."""
    return int.from_bytes(raw[4:8], "big" if big else "little") or ATTR_SIZE_VER0


def default_name(attr: Attr) -> str:
    """Return the name perf gives an event whose name was not recorded; empty for a tracepoint."""
    if attr.is_tracepoint:
        return ""
    tables = {TYPE_HARDWARE: _HARDWARE, TYPE_SOFTWARE: _SOFTWARE}
    table = tables.get(attr.type, ())
    if attr.config < len(table):
        name = table[attr.config]
    elif attr.type == TYPE_RAW:
        name = f"raw 0x{attr.config:x}"
    else:
        name = f"type {attr.type} config 0x{attr.config:x}"
    return name + _modifiers(attr.flags)


def _modifiers(flags: int) -> str:
    # As evsel__add_modifiers() in tools/perf/util/evsel.c prints them.
    levels = ((EXCLUDE_KERNEL, "k"), (EXCLUDE_USER, "u"), (EXCLUDE_HV, "h"))
    is_excluding = any(flags & bit for bit, _ in levels)
    letters = "".join(letter for bit, letter in levels if not flags & bit) if is_excluding else ""
    precise = flags >> PRECISE_IP_SHIFT & 3
    letters += "p" * precise
    if flags & EXCLUDE_HOST or bool(flags & EXCLUDE_GUEST) == (is_excluding or precise > 0):
        letters += ("" if flags & EXCLUDE_HOST else "H") + ("" if flags & EXCLUDE_GUEST else "G")
    return f":{letters}" if letters else ""


@dataclass
class EventTable:
    """Events by dense number: attributes that share name and layout are one event.

    Attributes
    ----------
    names : list of str
        Unique; a second event of the same name but another layout gets ``#2``.
    attrs : list of Attr
        One per event.
    ids : dict of int to int
        Sample id -> event number.
    """

    names: list[str] = field(default_factory=list)
    attrs: list[Attr] = field(default_factory=list)
    ids: dict[int, int] = field(default_factory=dict)


def build_event_table(attrs: list[Attr]) -> EventTable:
    """Number the events of a recording; attributes must have their names."""
    table = EventTable()
    known: dict[tuple[str, tuple[int, int, int, int]], int] = {}
    for attr in attrs:
        number = known.get((attr.name, attr.key))
        if number is None:
            number = known[(attr.name, attr.key)] = len(table.names)
            twins = sum(name == attr.name for name, _ in known) if attr.name in table.names else 1
            table.names.append(attr.name if twins == 1 else f"{attr.name}#{twins}")
            table.attrs.append(attr)
        for sample_id in attr.ids:
            table.ids.setdefault(sample_id, number)
    return table
