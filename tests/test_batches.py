"""Datagrams that NAPI hands up as one list: whose sk_data_ready is whose, in worlds written down by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rxlab.follow.clockfit import NAT
from rxlab.follow.kernelpath import follow_kernel
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_INDEX

SOCKET, OTHER = 0xFFFF888000001000, 0xFFFF888000002000

# A packet of the driver, one entering the stack, the call of a socket: (what, skb or socket).
Line = tuple[str, int]


def recorded(lines: list[Line], cpu: int = 0) -> dict[str, Columns]:
    """Return the events of these lines, a microsecond apart."""
    rows: dict[str, list[dict[str, Any]]] = {"gro": [], "rx": [], "ready": [], "softirq": []}
    for number, (what, which) in enumerate(lines):
        row: dict[str, Any] = {"time": 10_000 + 1000 * number, "rank": number, "cpu": cpu, "tid": 0}
        if what in ("gro", "rx"):
            row |= {
                "name": b"eth0",
                "skbaddr": 0xFFFF888100000000 + 0x100 * which,
                "len": 92,
                "queue_mapping": 1,
                "hash": 7,
            }
        if what == "ready":
            row |= {"skaddr": which, "family": 2, "protocol": 17}
        if what == "softirq":
            row |= {"vec": 3}
        rows[what].append(row)
    names = {
        "gro": "net:napi_gro_receive_entry",
        "rx": "net:netif_receive_skb",
        "ready": "sock:sk_data_ready",
        "softirq": "irq:softirq_entry",
    }
    types = {"name": "S16", "skbaddr": np.uint64, "skaddr": np.uint64, "rank": np.int64, "time": np.int64}
    return {
        names[what]: Columns(
            {field: np.array([row[field] for row in told], types.get(field, np.int64)) for field in told[0]}
        )
        for what, told in rows.items()
        if told
    }


def ready_after(lines: list[Line]) -> list[int | None]:
    """Return for each packet which line its data_ready is."""
    path = follow_kernel(recorded([("softirq", 0), *lines]), "eth0")
    times = path.time[:, STAGE_INDEX["data_ready"]]
    return [None if time == NAT else (int(time) - 10_000) // 1000 - 1 for time in times.tolist()]


def listed(n: int, *after: Line) -> list[Line]:
    """Return n packets handed up as one list, and what follows."""
    return [("gro", k) for k in range(n)] + [("rx", k) for k in range(n)] + list(after)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # Since Linux 6.10 only the datagram that finds the queue empty calls: the first.
        (listed(3, ("ready", SOCKET)), [6, None, None]),
        # Before, each of them calls, in order; so do two of different sockets.
        (listed(3, ("ready", SOCKET), ("ready", SOCKET), ("ready", SOCKET)), [6, 7, 8]),
        (listed(2, ("ready", SOCKET), ("ready", OTHER)), [4, 5]),
        # The reader emptied the queue meanwhile: whose the second call is cannot be told.
        (listed(3, ("ready", SOCKET), ("ready", SOCKET)), [6, None, None]),
        # One after the other: each has its own, or none behind one that nobody read yet.
        ([*listed(1, ("ready", SOCKET)), ("gro", 5), ("rx", 5), ("ready", SOCKET)], [2, 5]),
        ([*listed(1), ("gro", 5), ("rx", 5), ("ready", SOCKET)], [None, 4]),
        # Two lists of one poll.
        ([*listed(2, ("ready", SOCKET)), ("gro", 5), ("gro", 6), ("rx", 5), ("rx", 6), ("ready", SOCKET)], [4, None, 9, None]),
        # Another softirq in between is another poll.
        ([("gro", 0), ("gro", 1), ("rx", 0), ("softirq", 0), ("rx", 1), ("ready", SOCKET)], [None, 5]),
    ],
)  # fmt: skip
def test_a_list_of_datagrams_shares_its_calls_in_order(lines: list[Line], expected: list[int | None]) -> None:
    assert ready_after(lines) == expected
