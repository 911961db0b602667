"""Feature sections of perf.data: who recorded, where, when, with which clock and command."""

from __future__ import annotations

from typing import Any

from rxlab.read.perfattr import attr_size

# tools/perf/util/header.h: enum { HEADER_TRACING_DATA = 1, ... }
HEADER_TRACING_DATA, HEADER_BUILD_ID, HEADER_HOSTNAME, HEADER_OSRELEASE, HEADER_VERSION, HEADER_ARCH = range(1, 7)
HEADER_NRCPUS, HEADER_CPUDESC, HEADER_CPUID, HEADER_TOTAL_MEM, HEADER_CMDLINE, HEADER_EVENT_DESC = range(7, 13)
HEADER_SAMPLE_TIME, HEADER_CLOCKID, HEADER_COMPRESSED, HEADER_CLOCK_DATA = 21, 23, 27, 29
FEATURE_BITS = 256

# include/uapi/linux/time.h
CLOCK_NAMES = {
    0: "CLOCK_REALTIME",
    1: "CLOCK_MONOTONIC",
    4: "CLOCK_MONOTONIC_RAW",
    7: "CLOCK_BOOTTIME",
    11: "CLOCK_TAI",
}
PERF_CLOCK = "perf (sched_clock)"

_STRINGS = {
    HEADER_HOSTNAME: "hostname",
    HEADER_OSRELEASE: "osrelease",
    HEADER_VERSION: "perf_version",
    HEADER_ARCH: "arch",
    HEADER_CPUDESC: "cpudesc",
}


class Section:
    """A feature section read from front to back; reading beyond its end gives zeros and empty text."""

    def __init__(self, section: bytes, *, big: bool) -> None:
        self._section, self._at, self.big = section, 0, big

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return max(0, len(self._section) - self._at)

    def integer(self, size: int) -> int:
        """Read an unsigned integer."""
        return int.from_bytes(self.take(size), "big" if self.big else "little")

    def take(self, size: int) -> bytes:
        """Read bytes, fewer at the end."""
        self._at += size
        return self._section[self._at - size : self._at]

    def string(self) -> str:
        """Read a perf_header_string: u32 length with padding, then text ended by NUL."""
        return self.take(min(self.integer(4), self.left)).split(b"\0")[0].decode("utf-8", "replace")


def parse_event_desc(section: bytes, *, big: bool) -> list[tuple[str, list[int]]]:
    """Return (name, ids) of each event of HEADER_EVENT_DESC; attributes there have a size of their own."""
    cursor = Section(section, big=big)
    n_events, stride = cursor.integer(4), cursor.integer(4)
    events: list[tuple[str, list[int]]] = []
    while len(events) < n_events and stride and cursor.left >= stride + 8:
        attr = cursor.take(stride)
        if attr_size(attr, big=big) > stride:
            break
        n_ids = cursor.integer(4)
        name = cursor.string()
        if n_ids > cursor.left // 8:
            break
        events.append((name, [cursor.integer(8) for _ in range(n_ids)]))
    return events


def describe_features(features: dict[int, bytes], *, big: bool) -> dict[str, Any]:
    """Return what the feature sections say, under the names ``PerfData.meta`` uses; absent ones are absent."""
    facts: dict[str, Any] = {}
    for number, name in _STRINGS.items():
        if number in features:
            facts[name] = Section(features[number], big=big).string()
    if HEADER_NRCPUS in features:
        # write_nrcpus() in tools/perf/util/header.c writes present, then online; the format document has it reversed.
        cursor = Section(features[HEADER_NRCPUS], big=big)
        facts["nrcpus"], facts["nrcpus_online"] = cursor.integer(4), cursor.integer(4)
    if HEADER_CMDLINE in features:
        cursor = Section(features[HEADER_CMDLINE], big=big)
        n_words = min(cursor.integer(4), cursor.left // 4)
        facts["cmdline"] = [cursor.string() for _ in range(n_words)]
    if len(features.get(HEADER_CLOCKID, b"")) >= 8:
        facts["clock_resolution_ns"] = Section(features[HEADER_CLOCKID], big=big).integer(8)
    if len(features.get(HEADER_CLOCK_DATA, b"")) >= 24:
        # u32 version, u32 clockid, u64 wall clock ns, u64 ns of that clockid at the same instant
        cursor = Section(features[HEADER_CLOCK_DATA], big=big)
        version, clockid, wall, stamp = cursor.integer(4), cursor.integer(4), cursor.integer(8), cursor.integer(8)
        if version == 1:
            facts["clock_data"] = {"clockid": clockid, "wall_clock_ns": wall, "clockid_time_ns": stamp}
    return facts
