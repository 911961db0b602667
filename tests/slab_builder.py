"""Cut recordings into slabs, and compare what two joins say of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from rxlab.follow.hidden import lost_windows
from rxlab.follow.join import Joined
from rxlab.follow.received import Machine, received_packets
from rxlab.follow.slabs import Recording
from rxlab.read.columns import Columns


def slabs_of(
    events: Mapping[str, Columns],
    packets: Columns,
    machine: Machine,
    n: int,
    *,
    lost: int = 0,
    lost_records: Columns | None = None,
    piece: int = 50,
) -> Recording:
    """Cut a recording into `n` slabs of equally many events, its packets into pieces."""
    seen = {name: columns for name, columns in events.items() if columns.n}
    time = np.concatenate([columns["time"] for columns in seen.values()])
    order = np.argsort(time, kind="stable")
    cpu, time = np.concatenate([columns["cpu"] for columns in seen.values()])[order], time[order]
    edges = [int(time[0]), *(int(time[len(time) * k // n]) for k in range(1, n)), 2**62]

    def parts() -> Iterator[dict[str, Columns]]:
        cuts = {name: np.searchsorted(columns["time"], edges) for name, columns in seen.items()}
        for low, high in pairwise(range(n + 1)):
            part = {name: columns.take(slice(*cuts[name][[low, high]])) for name, columns in seen.items()}
            yield {name: columns for name, columns in part.items() if columns.n}

    received, flows = received_packets(packets, machine)
    pieces = (received.take(slice(at, at + piece)) for at in range(0, received.n, piece))
    windows = lost_windows(
        ((cpu[at : at + 999], time[at : at + 999]) for at in range(0, len(cpu), 999)), lost, lost_records
    )
    return Recording(
        parts(),
        pieces,
        received.n,
        flows,
        {name: events[name].n > 0 for name in events},
        (int(time[0]), int(time[-1])),
        lost,
        windows,
    )


def differences(one: Joined, other: Joined) -> dict[str, Any]:
    """Return what two joins say differently: every column of every row, all counts, gates, the clock and the verdict."""
    pairs: dict[str, tuple[Any, Any]] = {"time": (one.time, other.time), "cpu": (one.cpu, other.cpu)}
    for name in one.packets:
        pairs[name] = _words(one, name), _words(other, name)
    pairs |= {f"coverage {name}": (one.coverage[name], other.coverage[name]) for name in one.coverage}
    pairs |= {f"flow {name}": (one.flows[name], other.flows[name]) for name in one.flows}
    found: dict[str, Any] = {name: int((a != b).sum()) for name, (a, b) in pairs.items() if (a != b).any()}
    found |= {f"gate {name}": other.gates[name] for name in one.gates if one.gates[name] != other.gates[name]}
    told = [(j.verdict, j.reasons, j.clock.residual, j.clock.stamp_position) for j in (one, other)]
    return found | ({"verdict": told} if told[0] != told[1] else {})


def _words(joined: Joined, name: str) -> np.ndarray:
    """Return a column, codes of texts as the texts."""
    table = joined.packets.attrs["categories"].get(name)
    column = joined.packets[name]
    return column if table is None else np.array([*table, ""])[column]
