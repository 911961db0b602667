"""Were a recording and a capture made at the same time? Asked when they cannot be aligned, for then it is the likeliest reason."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rxlab.errors import ClockError
from rxlab.read.columns import Columns

# A wall clock may be set while it runs: less than this apart is not another time.
SLACK_NS = 10**9


def refuse_other_times(recorded: Mapping[str, Any], written_ns: int, packets: Columns, where: str) -> None:
    """Refuse two files whose times are known not to overlap; say nothing where that is not known.

    When the events happened is known by CLOCK_REALTIME where perf recorded with it, or noted how it stood to the clock it used
    (header feature CLOCK_DATA, written for ``perf record -k``). Else the file tells at least when it was written last, and no event
    is later than that; a copy is written later, which proves nothing.

    Parameters
    ----------
    recorded : mapping
        ``PerfData.meta``.
    written_ns : int
        When perf.data was written last (its mtime), ns of CLOCK_REALTIME.
    packets : Columns
        As :func:`rxlab.read_pcap` gives them: ``time`` int64 ns of CLOCK_REALTIME.

    Raises
    ------
    ClockError
    """
    if not packets.n:
        return
    first, last = int(packets["time"].min()), int(packets["time"].max())
    events = wall_times(recorded)
    if events is not None and (events[1] + SLACK_NS < first or last + SLACK_NS < events[0]):
        found = f"events {span_text(*events)}, packets {span_text(first, last)} UTC"
    elif events is None and written_ns + SLACK_NS < first:
        found = f"perf.data written {instant_text(written_ns)}, packets from {instant_text(first)} UTC on"
    else:
        return
    raise ClockError(
        "the two files are of different times",
        where=where,
        found=found,
        expected="times that overlap",
        do="Give files recorded together.",
    )


def wall_times(recorded: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the first and the last event of a recording by CLOCK_REALTIME, ns; None where the recording does not tell."""
    first, last = recorded.get("first_ns"), recorded.get("last_ns")
    if first is None or last is None:
        return None
    if recorded.get("clock") == "CLOCK_REALTIME":
        return int(first), int(last)
    stood = recorded.get("clock_data")
    if not stood or stood["clockid"] != recorded.get("clockid"):
        return None
    offset = int(stood["wall_clock_ns"]) - int(stood["clockid_time_ns"])
    return int(first) + offset, int(last) + offset


def instant_text(ns: int) -> str:
    """Return an instant as ``2026-11-23 04:05:36``, UTC."""
    return datetime.fromtimestamp(ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S")


def span_text(first_ns: int, last_ns: int) -> str:
    """Return a span of time, its date once: ``2026-11-23 04:05:36-04:05:37``."""
    first, last = instant_text(first_ns), instant_text(last_ns)
    return f"{first}-{last[11:] if first[:10] == last[:10] else last}"
