"""Recordings made elsewhere: a perf.data and a capture that came without clock readings and without a description of their host."""

from __future__ import annotations

import os
from pathlib import Path

import xarray as xr

from rxlab.dataset.run import damage_of, read_events
from rxlab.dataset.store import build, save
from rxlab.errors import ClockError, UsageError
from rxlab.follow.align import align_recordings
from rxlab.follow.clockfit import ClockMap
from rxlab.follow.join import Joined, join
from rxlab.follow.received import Machine
from rxlab.follow.sametime import refuse_other_times
from rxlab.read.columns import Columns
from rxlab.read.pcap import read_pcap
from rxlab.read.perfdata import PerfData


def align_files(
    perf: str | os.PathLike[str], pcap: str | os.PathLike[str], iface: str | None = None
) -> tuple[PerfData, Columns, ClockMap, Machine]:
    """Read a perf.data and a capture, and find the map between their clocks from the packets alone, with its bound.

    Raises
    ------
    ClockError
        Packets and events cannot be matched without guessing, or are known to be of different times.
    UsageError
        It cannot be told which device was captured.
    """
    events, packets = read_events(Path(perf)), read_pcap(Path(pcap))
    clock_name = str(events.meta.get("clock") or "")
    try:
        clock, device, macs = align_recordings(events.events, packets, iface=iface, perf_clock=clock_name)
    except (ClockError, UsageError) as error:
        # A device that was asked for and is not there is wrong at any time.
        if iface is None or isinstance(error, ClockError):
            refuse_other_times(events.meta, os.stat(perf).st_mtime_ns, packets, f"{perf} and {pcap}")
        raise
    return events, packets, clock, Machine(device, macs)


def join_recordings(perf: str | os.PathLike[str], pcap: str | os.PathLike[str], iface: str | None = None) -> Joined:
    """Join a perf.data and a capture made elsewhere; raises as :func:`align_files`."""
    return _join(*align_files(perf, pcap, iface))


def _join(events: PerfData, packets: Columns, clock: ClockMap, machine: Machine) -> Joined:
    lost = sum(events.lost["count"].tolist())
    damage = damage_of(events.meta, packets.attrs, packets.n)
    return join(events.events, packets, clock, machine, lost=lost, lost_records=events.lost, damage=damage)


def analyze_recordings(
    perf: str | os.PathLike[str],
    pcap: str | os.PathLike[str],
    iface: str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> tuple[xr.DataTree, Joined]:
    """Join recordings made elsewhere and lay the result out as labelled data; what their host was like is not known."""
    events, packets, clock, machine = align_files(perf, pcap, iface)
    joined = _join(events, packets, clock, machine)
    run = {"arm": "elsewhere", "iface": machine.iface, "command": [], "status": "complete"}
    tree = build(joined, run=run, host={})
    if out is not None:
        save(tree, out)
    return tree, joined
