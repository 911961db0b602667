"""Where each packet was to be steered, by the kernel's own rule, and whether it came to where its socket is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rxlab.follow.steering import rps_target
from rxlab.read.columns import Columns

UNKNOWN, ELSEWHERE, DELIVERED = -1, 0, 1


def rps_maps(host: Mapping[str, Any], iface: str) -> dict[int, list[int]]:
    """Return the CPUs that each receive queue's RPS may choose: its ``rps_cpus`` that are online, as the kernel's map has them.

    Parameters
    ----------
    host : dict
        host.json.
    iface : str
    """
    offline = {int(cpu["cpu"]) for cpu in host.get("cpus") or [] if cpu.get("online") is False}
    queues = ((host.get("ifaces") or {}).get(iface) or {}).get("queues") or []
    return {int(q["queue"]): [cpu for cpu in _cpus(q.get("rps_cpus")) if cpu not in offline] for q in queues}


def _cpus(text: str | None) -> list[int]:
    """Return the CPUs of a list as host.json has it: ``0,2-3``, ``off``."""
    if not text or text == "off":
        return []
    parts = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return [cpu for part in parts for cpu in range(part[0], part[-1] + 1)]


def predicted_cpus(columns: Columns, maps: Mapping[int, Sequence[int]]) -> np.ndarray:
    """Return the CPU that RPS by itself, without RFS, chooses for each packet; -1 where that cannot be said.

    A packet without a recorded queue is the first one's. One CPU in the map is chosen whatever the hash; of several it is known
    only where the driver's hash is the one RPS uses (``l4_hash``, else the kernel hashes again with a secret of its own).

    Returns
    -------
    int16 array, dims (packet,)
    """
    queue = np.maximum(np.asarray(columns["rx_queue"], np.int64), 0)
    has_hash = (np.asarray(columns["l4_hash"]) == 1) & (np.asarray(columns["skb_hash"]) > 0)
    is_known = np.asarray(columns["path_kind"]) > 0
    chosen = np.full(len(queue), UNKNOWN, np.int16)
    for number, cpus in maps.items():
        if cpus:
            rows = np.flatnonzero((queue == number) & is_known & (has_hash | (len(cpus) == 1)))
            chosen[rows] = rps_target(np.maximum(np.asarray(columns["skb_hash"])[rows], 0), cpus)
    return chosen


def delivered(stack_cpu: np.ndarray, last_read_cpu: np.ndarray) -> np.ndarray:
    """Tell whether the stack ran on the CPU where the packet's socket had been read last: -1 unknown, 0 elsewhere, 1 there."""
    stack, reader = np.asarray(stack_cpu), np.asarray(last_read_cpu)
    return np.where((stack < 0) | (reader < 0), UNKNOWN, stack == reader).astype(np.int8)
