"""A recorded run: its files, its analysis, its verification. Needs no root, no perf and no NIC."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from rxlab import rundir
from rxlab.dataset import accessor as accessor  # gives trees and sweeps their .rx
from rxlab.dataset.blocks import save_in_blocks
from rxlab.dataset.largerun import (
    DEFAULT_CHUNKS,
    LARGE_BYTES,
    LEAST_CHUNKS,
    LargeRun,
    ToMonotonic,
    losses_on,
    slabs_around,
)
from rxlab.dataset.store import build, open_dataset, read_app_logs, save
from rxlab.dataset.twohosts import compare_with_sender
from rxlab.errors import ClockError, FormatError, RxlabError, TruncatedFileError, UsageError
from rxlab.follow.clockfit import ClockMap, fit_constant
from rxlab.follow.crossfit import RAW_CLOCK, fit_nic, fit_raw
from rxlab.follow.join import Joined, join
from rxlab.follow.received import Machine, is_received
from rxlab.follow.slabs import join_in_slabs
from rxlab.follow.verify import message_of_packets, read_app_log, verify_join
from rxlab.read.columns import Columns
from rxlab.read.pcap import read_pcap
from rxlab.read.perfdata import PerfData, read_perfdata
from rxlab.rundir import (
    APP_LOG,
    CLOCK_JSON,
    COUNTERS_JSON,
    DATASET,
    HOST_JSON,
    PERF_DATA,
    VERIFY_JSON,
    RunDir,
    open_rundir,
)
from rxlab.stages import stages_without

Taken = TypeVar("Taken")


class Run:
    """A recorded run: its files, its analysis and its verification.

    Parameters
    ----------
    path : path-like
        A run directory.
    chunks : int, optional
        Join in slabs of about so many samples, so that memory does not grow with the events; of itself for a recording of
        more than a gigabyte.
    """

    def __init__(self, path: str | os.PathLike[str], chunks: int | None = None) -> None:
        self.rundir: RunDir = open_rundir(path)
        if chunks is not None and chunks < LEAST_CHUNKS:
            raise UsageError(
                "slabs of so few events cost more than they save",
                where="chunks",
                found=f"{chunks:,}",
                expected=f"at least {LEAST_CHUNKS:,}",
                do=f"Usual are {DEFAULT_CHUNKS:,}.",
            )
        if chunks is None and self.is_traced and self.rundir.file(PERF_DATA).stat().st_size > LARGE_BYTES:
            chunks = DEFAULT_CHUNKS
        self.chunks = chunks

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.rundir.path

    @property
    def run(self) -> dict[str, Any]:
        """Contents of run.json."""
        return self.rundir.run

    @property
    def is_traced(self) -> bool:
        """Whether kernel events and packets were recorded: the explaining arms."""
        return self.rundir.has(PERF_DATA) and self.rundir.pcap is not None

    @cached_property
    def host(self) -> dict[str, Any]:
        """Contents of host.json, empty where the run has none."""
        return self.rundir.json(HOST_JSON) if self.rundir.has(HOST_JSON) else {}

    @cached_property
    def counters(self) -> dict[str, Any]:
        """Contents of counters.json, empty where the run has none."""
        return self.rundir.json(COUNTERS_JSON) if self.rundir.has(COUNTERS_JSON) else {}

    @cached_property
    def perf(self) -> PerfData:
        """The kernel events."""
        if not self.rundir.file(PERF_DATA).is_file():
            raise FormatError(
                "no kernel events",
                where=str(self.path),
                expected=PERF_DATA,
                do="This run was not traced; record one with --events min, std or full.",
            )
        return read_events(self.rundir.file(PERF_DATA))

    @property
    def events(self) -> Mapping[str, Columns]:
        """The kernel events with their times on CLOCK_MONOTONIC, as the join takes them."""
        return on_monotonic(self.perf, self.rundir)[0]

    def events_around(self, first_ns: int, last_ns: int) -> Mapping[str, Columns]:
        """Return the events around a span of CLOCK_MONOTONIC: all of them, of a large run only the slabs that reach into it.

        Text columns whose codes are a slab's own are left out of a large run's.
        """
        return self.events if self.chunks is None else slabs_around(*self._slabs(), first_ns, last_ns)

    def _slabs(self) -> tuple[PerfData, ToMonotonic | None]:
        perf = read_perfdata(self.rundir.file(PERF_DATA), chunks=self.chunks)
        return perf, clock_of_events(perf, self.rundir)[0]

    @cached_property
    def packets(self) -> Columns:
        """The captured packets, both directions."""
        if self.rundir.pcap is None:
            raise FormatError("no packet capture", where=str(self.path), expected=rundir.PCAP)
        packets = read_pcap(self.rundir.pcap)
        if not packets.n:
            raise empty_capture(self.rundir.pcap)
        return packets

    @cached_property
    def joined(self) -> Joined:
        """The packets joined to the kernel's events."""
        clock, machine = clock_of(self.rundir), machine_of(self.run, self.host)
        if self.chunks is not None:
            return self._joined_in_slabs(clock)
        events, lost_records, bound = on_monotonic(self.perf, self.rundir)
        clock = replace(clock, bound_ns=clock.bound_ns + bound, perf_clock=str(self.perf.meta.get("clock") or ""))
        damage = damage_of(self.perf.meta, self.packets.attrs, self.packets.n)
        return join(
            events, self.packets, clock, machine, lost=lost_of(self.perf), lost_records=lost_records, damage=damage
        )

    @cached_property
    def _large(self) -> LargeRun:
        """The recording in slabs."""
        pcap = self.rundir.pcap
        if pcap is None:
            raise FormatError("no packet capture", where=str(self.path), expected=rundir.PCAP)
        assert self.chunks is not None
        large = LargeRun(self.rundir.file(PERF_DATA), pcap, machine_of(self.run, self.host), self.chunks)
        refuse_nameless(large.perf, self.rundir.file(PERF_DATA))
        if not large.n_packets:
            raise empty_capture(pcap)
        return large

    def _joined_in_slabs(self, clock: ClockMap) -> Joined:
        large = self._large
        to_monotonic, bound = clock_of_events(large.perf, self.rundir)
        clock = replace(clock, bound_ns=clock.bound_ns + bound, perf_clock=str(large.perf.meta.get("clock") or ""))
        damage = damage_of(large.perf.meta, large.capture, large.n_packets)
        recording = large.recording(to_monotonic, lost_of(large.perf), damage)
        folder = self.path if os.access(self.path, os.W_OK) else tempfile.gettempdir()
        return join_in_slabs(recording, clock, machine_of(self.run, self.host), folder=folder)

    def missing_stages(self) -> list[str]:
        """Return the stages this recording cannot show, for want of their events."""
        perf = self.perf if self.chunks is None else self._large.perf
        return stages_without({name for name, count in perf.meta["samples_per_event"].items() if count})

    @cached_property
    def tree(self) -> xr.DataTree:
        """The dataset, opened from ``run.nc`` where that is newer than the recording, else computed."""
        saved = self.rundir.file(DATASET)
        return open_dataset(saved) if saved.is_file() and self._is_fresh(saved) else self.analyze()

    def analyze(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        sender_pcap: str | os.PathLike[str] | None = None,
        clock_error: int | None = None,
    ) -> xr.DataTree:
        """Join, and lay the result out as labelled data.

        Parameters
        ----------
        out : path-like, optional
            Also save it there as netCDF4.
        sender_pcap : path-like, optional
            A capture of the same traffic on the host that sent it: every packet gets the interval of its one-way latency
            (:func:`rxlab.follow.twohosts.align_two_hosts`).
        clock_error : int, optional
            Both captures' clocks agree to within so many nanoseconds.

        Returns
        -------
        xarray.DataTree
            Groups ``/packets /hops /flows /coverage /clocks /counters /app``, with a sender's capture ``/twohosts /crossings``
            (docs/schema.md). A run recorded without trace has only the last two of the first.

        Raises
        ------
        ClockError
            The captures have no packets in common, or the clocks do not agree as said.
        """
        joined = self.joined if self.is_traced else None
        facts: dict[str, Any] = {
            "run": self.run,
            "host": self.host,
            "counters": self.counters,
            "app_latency": read_app_logs(self.rundir),
        }
        if sender_pcap is not None:
            received = is_received(self.packets, machine_of(self.run, self.host))
            two = compare_with_sender(self.packets, received, sender_pcap, clock_error, self.run.get("stamps") == "nic")
            facts["beside"] = two.groups
            joined = two.joined(joined) if joined is not None else None
        if joined is not None and self.chunks is not None and out is not None:
            return open_dataset(save_in_blocks(joined, out, **facts))
        tree = build(joined, **facts)
        if out is not None:
            save(tree, out)
        return tree

    def verify(self) -> dict[str, Any]:
        """Compare the join with the workload's log and the counters (:func:`rxlab.follow.verify.verify_join`)."""
        log = read_app_log(self.rundir.file(APP_LOG)) if self.rundir.has(APP_LOG) else None
        difference = self.counters.get("difference") if self.counters else None
        joined = self.joined
        events = self.perf.events if self.chunks is None else self._large.counted
        return verify_join(joined, log, messages=self._messages(), counters=difference, events=events)

    @cached_property
    def verification(self) -> dict[str, Any] | None:
        """The verification saved by the last analysis, else a new one; None for a run recorded without trace."""
        saved = self.rundir.file(VERIFY_JSON)
        if saved.is_file() and self._is_fresh(saved):
            return self.rundir.json(VERIFY_JSON)
        return self.verify() if self.is_traced else None

    def _is_fresh(self, derived: Path) -> bool:
        """Tell whether a derived file is younger than what it was made from."""
        sources = [self.rundir.file(name) for name in (rundir.RUN_JSON, PERF_DATA, rundir.PCAP)]
        made = derived.stat().st_mtime_ns
        return all(not source.is_file() or made >= source.stat().st_mtime_ns for source in sources)

    def analyze_in_place(self) -> None:
        """Leave ``run.nc`` and ``verify.json`` in the run directory, and forget the columns they came from."""
        self.analyze(self.rundir.file(DATASET))
        if self.is_traced:
            rundir.write_json(self.rundir.file(VERIFY_JSON), self.verify())
        for name in ("perf", "packets", "joined", "_large"):
            self.__dict__.pop(name, None)

    def _messages(self) -> np.ndarray | None:
        """Return the workload's message number of each joined packet, None where the capture cannot tell."""
        frames, pcap = self.joined.packets["head_frame"], self.rundir.pcap
        # Rows keep the capture's order, so a frame number finds its packet.
        packets = (
            self.packets.take(frames - int(self.packets["frame"][0]))
            if self.chunks is None
            else self._large.places(frames)
        )
        if pcap is None or not packets.n or (packets["offset"] < 0).any():
            return None
        return message_of_packets(pcap, packets["offset"], packets["payload_offset"], packets["caplen"])


def clock_of(folder: RunDir) -> ClockMap:
    """Return the map from the capture's clock to CLOCK_MONOTONIC, by the readings in clock.json.

    Raises
    ------
    ClockError
        There are too few readings, or they contradict each other.
    """
    where, content = str(folder.file(CLOCK_JSON)), folder.json(CLOCK_JSON)
    if folder.run.get("stamps") == "nic":
        return fit_nic(content.get("phc") or [], content.get("readings") or [], where=where)
    return fit_constant(content.get("readings") or [], where=where)


def empty_capture(pcap: Path) -> FormatError:
    """Return the refusal of a capture without packets."""
    return FormatError(
        "packet capture is empty",
        where=str(pcap),
        found="0 packets",
        do="Nothing arrived on the interface, or the filter excluded it; record again.",
    )


def clock_of_events(perf: PerfData, folder: RunDir) -> tuple[ToMonotonic | None, int]:
    """Return what puts a recording's times on CLOCK_MONOTONIC, None where they are, and the bound of the conversion, ns.

    Raises
    ------
    ClockError
        The run has no readings of the clock perf recorded with.
    """
    name = perf.meta.get("clock")
    if name == RAW_CLOCK:
        content = folder.json(CLOCK_JSON)
        raw = fit_raw(content.get("readings") or [], where=str(folder.file(CLOCK_JSON)))
        return raw, int(raw.bound.max())
    if name not in (None, "CLOCK_MONOTONIC"):
        raise ClockError(
            "the recording's clock has no readings in this run",
            where=str(folder.file(PERF_DATA)),
            found=str(name),
            expected=f"CLOCK_MONOTONIC or {RAW_CLOCK} (perf record -k)",
            do="'rxlab analyze --perf FILE --pcap FILE' aligns it by its packets.",
        )
    return None, 0


def on_monotonic(perf: PerfData, folder: RunDir) -> tuple[Mapping[str, Columns], Columns, int]:
    """Return a recording's events and its records of losses on CLOCK_MONOTONIC, and the bound of the conversion, ns."""
    to_monotonic, bound = clock_of_events(perf, folder)
    if to_monotonic is None:
        return perf.events, perf.lost, bound
    events = {
        event: columns.with_columns(time=to_monotonic(columns["time"])) if columns.n else columns
        for event, columns in perf.events.items()
    }
    return events, losses_on(perf.lost, to_monotonic), bound


def lost_of(perf: PerfData) -> int:
    """Return how many events perf reported as lost."""
    return int(perf.meta.get("lost_total", sum(perf.lost["count"].tolist())))


def read_events(path: Path) -> PerfData:
    """Read a perf.data whose tracepoints can be decoded (:func:`refuse_nameless`)."""
    perf = read_perfdata(path)
    refuse_nameless(perf, path)
    return perf


def refuse_nameless(perf: PerfData, path: Path) -> None:
    """Refuse a recording whose tracepoints cannot be decoded.

    Raises
    ------
    TruncatedFileError
        The recording lost the formats of its events, which perf writes last.
    """
    nameless = [name for name in perf.meta["samples_per_event"] if name.startswith("tracepoint:")]
    if perf.meta.get("truncated") and nameless:
        raise TruncatedFileError(
            "the recording is cut before its event formats",
            where=str(path),
            found=(perf.meta.get("warnings") or ["it ends early"])[0],
            do="Record again, or read_perfdata(path, local_formats=True) where it was recorded.",
        )


def damage_of(recorded: Mapping[str, Any], captured: Mapping[str, Any], n_packets: int) -> tuple[str, ...]:
    """Return what is missing from the files themselves, one clause each: from the attributes of both."""
    told = []
    if recorded.get("truncated"):
        told.append("perf.data is damaged: " + ("; ".join(recorded.get("warnings") or []) or "it ends early"))
    if captured.get("truncated"):
        told.append(f"the capture is cut after packet {n_packets}")
    return tuple(told)


def open_run(path: str | os.PathLike[str], *, chunks: int | None = None) -> Run:
    """Open a run directory that ``rxlab capture`` wrote; `chunks` as :class:`Run` has it.

    Raises
    ------
    FormatError, SchemaError
        See :func:`rxlab.rundir.open_rundir`.
    """
    return Run(path, chunks)


def each_run(paths: Iterable[Path], take: Callable[[Run], Taken]) -> tuple[list[Taken], dict[Path, RxlabError]]:
    """Open runs and take what is wanted of each; one that cannot be read costs none of the others.

    Returns
    -------
    taken : list
    damaged : dict of Path to RxlabError
        The runs that are left out, and why.

    Raises
    ------
    RxlabError
        Of the first run, where none can be read.
    """
    taken: list[Taken] = []
    damaged: dict[Path, RxlabError] = {}
    for path in paths:
        try:
            taken.append(take(open_run(path)))
        except RxlabError as error:
            damaged[path] = error
        except OSError as error:
            where, found = str(error.filename or path), error.strerror or str(error)
            damaged[path] = FormatError("cannot be read", where=where, found=found)
    if damaged and not taken:
        raise next(iter(damaged.values()))
    return taken, damaged


def left_out_text(damaged: Mapping[Path, RxlabError]) -> str:
    """Return which runs are left out and why, by their own names."""
    told = {path: error.line().replace(f"{path.parent}/", "") for path, error in damaged.items()}
    return "; ".join(line if line.startswith(path.name) else f"{path.name}: {line}" for path, line in told.items())


def refuse_left_out(damaged: Mapping[Path, RxlabError], n_runs: int, written: str) -> None:
    """Say, once the result of the other runs is written, which ones it lacks.

    Raises
    ------
    FormatError
        Some run was left out.
    """
    if damaged:
        raise FormatError(
            f"{len(damaged)} of {n_runs} runs could not be read; this is of the others",
            where=written,
            found=left_out_text(damaged),
        )


def machine_of(run: dict[str, Any], host: dict[str, Any]) -> Machine:
    """Return what the join needs to know of the recording host."""
    iface = run.get("iface")
    if not iface:
        raise FormatError(
            "run.json names no interface", expected='"iface"', do="Record again with --iface or --testbed."
        )
    described = (host.get("ifaces") or {}).get(iface) or {}
    addresses = set()
    for text in run.get("local_addresses") or []:
        address = ipaddress.ip_address(str(text).split("/")[0].split("%")[0])
        number = int(address)
        addresses.add((number >> 64, number & (2**64 - 1)) if address.version == 6 else (0, number))
    macs = {int(str(mac).replace(":", ""), 16) for mac in run.get("local_macs") or []}
    queues = described.get("queues") or []
    irqs = {int(queue["queue"]): int(queue["irq"]) for queue in queues if queue.get("irq") is not None}
    return Machine(iface, frozenset(macs - {0}), frozenset(addresses), irqs)
