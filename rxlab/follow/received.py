"""The packets that came in: which they are, their directed flows, and where their bytes lie in their streams."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from rxlab.follow.connections import Connections
from rxlab.follow.consumption import unwrap_sequence
from rxlab.follow.fragments import Reassembly
from rxlab.follow.handshake import handshake_kinds
from rxlab.follow.status import TCP, UDP
from rxlab.read.columns import Columns

# Of one 5-tuple; as many flows as a capture can hold fit beside it into 63 bits.
_MOST_CONNECTIONS = 1 << 30
_FLOW_NAMES = ("ip_version", "src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport", "proto")


@dataclass(frozen=True)
class Machine:
    """What the join needs to know of the recording host, from run.json and host.json."""

    iface: str
    macs: frozenset[int] = frozenset()
    addresses: frozenset[tuple[int, int]] = frozenset()
    irqs: Mapping[int, int] = field(default_factory=dict)


def received_packets(packets: Columns, machine: Machine) -> tuple[Columns, Columns]:
    """Return the packets that came in, with their directed flow, row and stream position, and the table of directed flows."""
    table = FlowsSeen()
    received = table.take(packets, machine)
    flows = table.flows()
    return StreamPositions(flows.n).place(table.number(received)), flows


class FlowsSeen:
    """The directed flows of the packets that came in, gathered from a capture in pieces; a flow is one TCP connection's.

    Their numbers follow the flow numbers of the capture, so they are known only when all of it was seen.
    """

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)
        self._connections = Connections()
        self._fragments = Reassembly()
        self._heads: list[Columns] = []
        self.n_packets = 0

    @property
    def n(self) -> int:
        """How many flows were seen."""
        return len(self._keys)

    def take(self, packets: Columns, machine: Machine) -> Columns:
        """Return the received packets of the next piece, each with its ``row`` among all of them and its flow's ``key``."""
        received = self._fragments.take(packets.take(np.flatnonzero(is_received(packets, machine))))
        tuples = np.where(received["flow"] >= 0, received["flow"].astype(np.int64) * 2 + received["flow_dir"], -1)
        ordinals = self._connections.ordinals(received, tuples, self._keys // _MOST_CONNECTIONS)
        key = np.where(tuples >= 0, tuples * _MOST_CONNECTIONS + np.minimum(ordinals, _MOST_CONNECTIONS - 1), -1)
        first = np.flatnonzero(~pd.Series(key).duplicated().to_numpy())
        numbers = key[first]
        new = (numbers >= 0) & ~np.isin(numbers, self._keys)
        self._keys = np.concatenate((self._keys, numbers[new]))
        heads = received.take(first[new])
        self._heads.append(Columns({name: heads[name] for name in _FLOW_NAMES}))
        row = self.n_packets + np.arange(received.n)
        self.n_packets += received.n
        return received.with_columns(key=key, row=row)

    def number(self, received: Columns) -> Columns:
        """Return packets with ``directed_flow``, the number of their flow among those seen, -1 where none."""
        number = np.searchsorted(np.sort(self._keys), received["key"])
        return received.with_columns(directed_flow=np.where(received["key"] >= 0, number, -1).astype(np.int32))

    def flows(self) -> Columns:
        """Return the table of the flows seen."""
        order = np.argsort(self._keys)
        flows = Columns({name: np.concatenate([heads[name] for heads in self._heads])[order] for name in _FLOW_NAMES})
        ordinals = (self._keys[order] % _MOST_CONNECTIONS).tolist()
        flows.attrs["labels"] = [
            flow_label(flows, row) + (f" #{ordinal + 1}" if ordinal else "") for row, ordinal in enumerate(ordinals)
        ]
        return flows


def flow_label(flows: Columns, row: int) -> str:
    """Return a directed flow as text: ``10.0.0.1:5000>10.0.0.2:80 tcp``."""

    def end(side: str, port: str) -> str:
        high, low = int(flows[f"{side}_hi"][row]), int(flows[f"{side}_lo"][row])
        if int(flows["ip_version"][row]) == 6:
            return f"[{ipaddress.IPv6Address(high << 64 | low)}]:{int(flows[port][row])}"
        return f"{ipaddress.IPv4Address(low & 0xFFFFFFFF)}:{int(flows[port][row])}"

    protocol = {TCP: "tcp", UDP: "udp"}.get(int(flows["proto"][row]), str(int(flows["proto"][row])))
    return f"{end('src', 'sport')}>{end('dst', 'dport')} {protocol}"


def is_received(packets: Columns, machine: Machine) -> np.ndarray:
    """Tell for each packet whether it came in: by MAC address, else by IP address; all when neither is known.

    A tap sees what the host sends as well; only received packets have a path to follow.
    """
    sent = np.zeros(packets.n, bool)
    if machine.macs:
        macs = np.array(sorted(machine.macs), np.uint64)
        sent = np.isin(packets["src_mac"], macs) & (packets["src_mac"] > 0) & ~np.isin(packets["dst_mac"], macs)
    elif machine.addresses:
        hi = np.array([pair[0] for pair in machine.addresses], np.uint64)
        lo = np.array([pair[1] for pair in machine.addresses], np.uint64)
        local_src = ((packets["src_hi"][:, None] == hi) & (packets["src_lo"][:, None] == lo)).any(axis=1)
        local_dst = ((packets["dst_hi"][:, None] == hi) & (packets["dst_lo"][:, None] == lo)).any(axis=1)
        sent = local_src & ~local_dst
    return ~sent


class StreamPositions:
    """Where packets lie in their flows, from piece to piece of a capture: sequence numbers unwrapped, and handshakes."""

    def __init__(self, n_flows: int) -> None:
        self._last, self._has_opened = np.full(n_flows, -1, np.int64), np.zeros(n_flows, bool)

    def place(self, received: Columns) -> Columns:
        """Return the next packets with the stream ``position`` of each one's first payload byte (TCP, else 0) and ``handshake``."""
        position = np.zeros(received.n, np.int64)
        flow = received["directed_flow"]
        order = np.flatnonzero((received["proto"] == TCP) & (flow >= 0))
        order = order[np.argsort(flow[order], kind="stable")]
        edges = np.flatnonzero(np.diff(flow[order], prepend=-2, append=-2))
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            rows = order[low:high]
            # A SYN takes one sequence number before the first byte; resets and probes of an idle connection are old or zero-length, and harmless.
            before = self._last[flow[rows[0]]]
            position[rows] = unwrap_sequence(received["seq"][rows], None if before < 0 else int(before))
            self._last[flow[rows[0]]] = position[rows[-1]]
        return received.with_columns(position=position, handshake=handshake_kinds(received, self._has_opened))
