"""Recordings of kernels before 6.6: what their events lack is made good from others, or left out whole.

``sock:sock_recv_length`` came with 6.3: without it the ends of the receive system calls tell when bytes were returned, of any file,
so only where copies from packets add up to a call is it believed (TCP; a UDP copy has no event). ``tcp:tcp_probe`` names the skb
since 6.8 only, and without it cannot be linked to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np

from rxlab.read.columns import Columns
from rxlab.stages import SUBSTITUTES

# The fields that the join looks at, of any event; what is taken of an event is taken of each of its columns.
FIELDS = frozenset(
    [
        "time",
        "rank",
        "cpu",
        "pid",
        "tid",
        "common_flags",
        "name",
        "skbaddr",
        "len",
        "protocol",
        "vlan_tagged",
        "queue_mapping",
        "hash",
        "l4_hash",
        "gso_size",
        "vec",
        "irq",
        "field_cpu",
        "func",
        "csd",
        "skaddr",
        "sport",
        "dport",
        "data_len",
        "snd_una",
        "family",
        "sk",
        "ret",
        "flags",
        "field_pid",
        "prev_pid",
        "prev_state",
        "next_pid",
        "next_comm",
        "reason",
        "newstate",
        "res",
    ]
)
RECEIVE = "sock:sock_recv_length"
PROBE = "tcp:tcp_probe"
_AF_INET, _TCP, _UDP = 2, 6, 17


def as_on_newer_kernels(events: Mapping[str, Columns], recorded: Set[str] | None = None) -> dict[str, Columns]:
    """Return the events with the receive calls of :data:`RECEIVE`, and without those that cannot be linked; :data:`FIELDS` only.

    `recorded` are the events that the whole recording has, where these are a part of it.
    """
    recorded = {name for name in events if events[name].n} if recorded is None else recorded
    completed = {name: _of_fields(columns) for name, columns in events.items()}
    if PROBE in events and events[PROBE].n and "skbaddr" not in events[PROBE]:
        del completed[PROBE]
    if RECEIVE not in recorded:
        calls = [events[name] for name in SUBSTITUTES[RECEIVE] if name in events and events[name].n]
        if calls:
            completed[RECEIVE] = _receive_calls(calls)
    return completed


def _of_fields(columns: Columns) -> Columns:
    return Columns({name: array for name, array in columns.items() if name in FIELDS}, columns.attrs)


def _receive_calls(calls: list[Columns]) -> Columns:
    """Return system calls that returned bytes as rows of :data:`RECEIVE`; their socket is not known (0)."""
    columns = {name: np.concatenate([call[name] for call in calls]) for name in ("time", "rank", "cpu", "pid", "tid")}
    columns["ret"] = np.concatenate([call["ret"].astype(np.int64) for call in calls])
    rows = np.flatnonzero(columns["ret"] > 0)
    rows = rows[np.argsort(columns["rank"][rows], kind="stable")]
    n = len(rows)
    constant = {"sk": 0, "family": _AF_INET, "protocol": _TCP, "flags": 0}
    made = Columns({name: column[rows] for name, column in columns.items()})
    made = made.with_columns(**{name: np.full(n, value, np.int64) for name, value in constant.items()})
    made.attrs["protocols"] = (_TCP,)
    return made


def readers_seen(events: Mapping[str, Columns]) -> tuple[int, ...]:
    """Return the IP protocols whose receive calls the events show."""
    return tuple(events[RECEIVE].attrs.get("protocols", (_TCP, _UDP))) if RECEIVE in events else ()
