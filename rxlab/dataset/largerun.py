"""A run whose recording does not fit in memory: read in slabs, as the join takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rxlab.follow.hidden import lost_windows
from rxlab.follow.older import FIELDS
from rxlab.follow.readerfacts import IO_URING
from rxlab.follow.received import FlowsSeen, Machine, StreamPositions
from rxlab.follow.slabs import Recording
from rxlab.read.columns import Columns
from rxlab.read.pcap import read_pcap
from rxlab.read.perfdata import PerfData, read_perfdata
from rxlab.stages import RECEIVE_ENTRIES, STAGES, SUBSTITUTES

ToMonotonic = Callable[[np.ndarray], np.ndarray]

# A perf.data above this size is joined in slabs of so many samples, unless told otherwise.
LARGE_BYTES = 1 << 30
DEFAULT_CHUNKS = 1_000_000
# A slab costs 0.7 ms, as joining ten thousand events does; and however small, it looks back over 200 ms of events.
LEAST_CHUNKS = 1_000
# So many events to a packet of the capture.
PACKET_EVENTS = 16
# What the join looks at beside the events of the stages themselves (kernelpath.py, queues.py, status.py, handshake.py, readerfacts.py).
BESIDES = (
    "net:net_dev_queue",
    "csd:csd_queue_cpu",
    "skb:kfree_skb",
    "sock:inet_sock_set_state",
    "syscalls:sys_exit_accept4",
    "syscalls:sys_exit_accept",
    IO_URING,
    *RECEIVE_ENTRIES,
    *(name for names in SUBSTITUTES.values() for name in names),
)
JOINED = frozenset({event for stage in STAGES for event in stage.events} | set(BESIDES))
# What the judges look at of all events (verify.py).
COUNTED = {"irq:softirq_entry": ("cpu", "vec"), "irq:irq_handler_entry": ("irq",)}
# What places a packet's payload in the capture, and what the join looks at.
PLACES = ("frame", "offset", "payload_offset", "caplen")
PACKET = (
    "time", "frame", "wire_len", "payload_len", "seq", "vlan", "proto", "flow", "row", "key", "directed_flow", "position", "handshake", "sport", "dport",
    "is_fragment", "head_frame",
)  # fmt: skip


class LargeRun:
    """A run's recording in slabs, and what is gathered of it on the way; nothing of its size is held.

    Parameters
    ----------
    perf_path, pcap_path : Path
    machine : Machine
    chunks : int
        About so many samples at a time.

    Attributes
    ----------
    perf : PerfData
        The recording, nothing of it decoded.
    n_packets : int
        Captured packets, both directions.
    capture : dict
        The capture's attributes.
    counted : dict of str to Columns
        What the judges look at of all events; whole once the slabs were read.
    """

    def __init__(self, perf_path: Path, pcap_path: Path, machine: Machine, chunks: int) -> None:
        self.perf = read_perfdata(perf_path, events=JOINED, chunks=chunks)
        self._pcap, self._machine = pcap_path, machine
        # A packet has columns of as many bytes as several events.
        self._pieces = max(chunks // PACKET_EVENTS, 1)
        self._flows, self.n_packets = FlowsSeen(), 0
        self.capture: dict[str, Any] = {}
        for piece in read_pcap(pcap_path, chunks=self._pieces):
            self._flows.take(piece, machine)
            self.n_packets, self.capture = self.n_packets + piece.n, piece.attrs
        self.counted: dict[str, Columns] = {}
        self._places: list[Columns] = []

    def recording(self, to_monotonic: ToMonotonic | None, lost: int, damage: tuple[str, ...]) -> Recording:
        """Return the recording as the join takes it.

        Parameters
        ----------
        to_monotonic : callable or None
            Puts times of perf's clock on CLOCK_MONOTONIC; None: they are.
        lost : int
            Events perf reported as lost.
        damage : tuple of str
        """
        counts, meta = self.perf.meta["samples_per_event"], self.perf.meta
        ends = np.array([meta["first_ns"] or 0, meta["last_ns"] or 0], np.int64)
        first, last = (ends if to_monotonic is None else to_monotonic(ends)).tolist()
        records = self.perf.lost if to_monotonic is None else losses_on(self.perf.lost, to_monotonic)
        return Recording(
            self._events(to_monotonic),
            self._packets(),
            self._flows.n_packets,
            self._flows.flows(),
            {name: bool(count) for name, count in counts.items()},
            (first, last),
            lost,
            lost_windows(self._samples(to_monotonic), lost, records),
            damage,
        )

    def places(self, frames: np.ndarray) -> Columns:
        """Return where the payload of received packets lies in the capture, by frame number; once the slabs were read."""
        places = self._places[0]
        for piece in self._places[1:]:
            places = places.followed_by(piece)
        return places.take(np.searchsorted(places["frame"], frames))

    def _samples(self, to_monotonic: ToMonotonic | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in self.perf.iter_chunks():
            cpu, time = part.samples()
            yield cpu, time if to_monotonic is None else to_monotonic(time)

    def _events(self, to_monotonic: ToMonotonic | None) -> Iterator[dict[str, Columns]]:
        """Yield the events of each slab."""
        for part in self.perf.iter_chunks():
            events = {name: columns for name, columns in part.load().events.items() if columns.n}
            del part  # its index would stay while its events are joined
            for name, wanted in COUNTED.items():
                if name in events:
                    found = Columns({field: events[name][field] for field in wanted})
                    self.counted[name] = self.counted[name].followed_by(found) if name in self.counted else found
            if to_monotonic is not None:
                events = {name: c.with_columns(time=to_monotonic(c["time"])) for name, c in events.items()}
            yield {name: _of_device(columns, self._machine.iface) for name, columns in events.items()}

    def _packets(self) -> Iterator[Columns]:
        """Yield the received packets, piece by piece."""
        numbers, positions = FlowsSeen(), StreamPositions(self._flows.n)
        for piece in read_pcap(self._pcap, chunks=self._pieces):
            received = positions.place(self._flows.number(numbers.take(piece, self._machine)))
            self._places.append(Columns({name: received[name] for name in PLACES}))
            yield Columns({name: received[name] for name in PACKET})


def slabs_around(perf: PerfData, to_monotonic: ToMonotonic | None, first_ns: int, last_ns: int) -> dict[str, Columns]:
    """Return the events of the slabs that reach into a span of CLOCK_MONOTONIC, one slab at a time decoded."""
    found: dict[str, Columns] = {}
    for part in perf.iter_chunks():
        _, time = part.samples()
        if not len(time):
            continue
        ends = np.array([time.min(), time.max()])
        low, high = (ends if to_monotonic is None else to_monotonic(ends)).tolist()
        if high < first_ns or low > last_ns:
            continue
        for name, columns in part.load().events.items():
            if columns.n:
                told = set(columns.attrs.get("categories", {}))
                kept = Columns({field: array for field, array in columns.items() if field not in told})
                kept = kept if to_monotonic is None else kept.with_columns(time=to_monotonic(kept["time"]))
                found[name] = found[name].followed_by(kept) if name in found else kept
    return found


def losses_on(lost: Columns, to_monotonic: ToMonotonic) -> Columns:
    """Return records of losses with their times on CLOCK_MONOTONIC; -1 stays -1."""
    told = lost["time"]
    return lost.with_columns(time=np.where(told >= 0, to_monotonic(np.maximum(told, 0)), -1)) if lost.n else lost


def _of_device(columns: Columns, iface: str) -> Columns:
    """Return events with what the join looks at: no text of a slab's own codes, but whether the device is the captured one."""
    categories = columns.attrs.get("categories", {})
    kept = {name: array for name, array in columns.items() if name in FIELDS and name not in categories}
    if "name" in categories:
        mine = [code for code, text in enumerate(categories["name"]) if text == iface]
        kept["name"] = np.where(np.isin(columns["name"], mine), 0, -1).astype(np.int32)
    return Columns(kept, {**columns.attrs, "categories": {"name": [iface]} if "name" in categories else {}})
