"""perf, tcpdump, clocks and counters around a workload, or around live traffic: a run directory.

Order: ``run.json`` says "running" first. Then host, counters and clocks, tcpdump, perf; traffic only when both are known to
record. Afterwards tcpdump has taken every packet received for it and perf has acknowledged its end before either is stopped.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rxlab.errors import RxlabError, UsageError
from rxlab.host.clockread import ClockSampler
from rxlab.host.counters import difference, read_counters
from rxlab.host.hostdiff import settings_drift
from rxlab.host.journal import Transaction, apply
from rxlab.host.phc import PtpClock
from rxlab.host.topology import local_identity, snapshot_host
from rxlab.host.undo import noted_interrupts
from rxlab.record.estimate import estimate_run
from rxlab.record.flowsample import event_filters as sampled_events
from rxlab.record.flowsample import packet_filter
from rxlab.record.functionrecord import FunctionRecorder
from rxlab.record.nicstamps import nic_stamps
from rxlab.record.pcaprecord import PcapRecorder, pcap_problems
from rxlab.record.perfrecord import DEFAULT_PAGES, PerfRecorder, pages_within, ring_bytes
from rxlab.record.processes import last_line
from rxlab.record.recording import ARM_OF, DEFAULT_MIN_FREE, DEFAULT_SNAPLEN, Recording, check_cpus, check_tools
from rxlab.record.runfolder import (
    check_space,
    command_line,
    give_to_invoker,
    leave_nothing,
    make_folder,
    release_space,
    reserve_space,
    unused_removed,
)
from rxlab.record.spinner import all_cpus, start_spinners, stop_spinners
from rxlab.record.testbed import NETNS_FOLDER, Endpoint, Testbed, endpoint_of, sender_of
from rxlab.record.workload import COMMAND_LOG, Command, Traffic, Workload, open_traffic
from rxlab.rundir import (
    CLOCK_JSON,
    COUNTERS_JSON,
    FUNCTIONS_LOG,
    HOST_JSON,
    PCAP,
    PERF_DATA,
    RUN_JSON,
    RunDir,
    open_rundir,
    read_json,
    write_json,
)
from rxlab.stages import EVENT_PRESETS

POLL_SECONDS = 0.1


@dataclass
class Session:
    """What one capture holds while it runs."""

    out: Path
    run: dict[str, Any]
    recording: Recording
    dst: Endpoint
    transaction: Transaction
    pcap: PcapRecorder | None = None
    perf: PerfRecorder | None = None
    functions: FunctionRecorder | None = None
    traffic: Traffic | None = None
    has_begun: bool = False
    stopped_early: list[str] = field(default_factory=list)
    interrupts: list[int] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Note something that makes the run partial."""
        self.run["problems"].append(text)

    def save(self) -> None:
        """Write run.json as it stands."""
        write_json(self.out / RUN_JSON, self.run)


def capture(
    out: str | os.PathLike[str],
    *,
    iface: str | None = None,
    netns: str | None = None,
    testbed: Testbed | None = None,
    workload: Workload | Command | None = None,
    command: Sequence[str] | None = None,
    duration: float | None = None,
    attach: bool = False,
    events: str = "std",
    filter: str | None = None,
    snaplen: int = DEFAULT_SNAPLEN,
    cpus: str | None = None,
    pages: int = DEFAULT_PAGES,
    max_size: int | None = None,
    min_free: int = DEFAULT_MIN_FREE,
    idle: str = "auto",
    idle_task_is_blind: bool | None = None,
    stamps: str = "software",
    perf_clock: str = "CLOCK_MONOTONIC",
    functions: Sequence[str] = (),
    event_filters: Mapping[str, str] | None = None,
    flow_sample: int = 1,
    configuration: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Any] | None = None,
    transaction: Transaction | None = None,
    progress: Callable[[float], None] | None = None,
) -> RunDir:
    """Record one run.

    Parameters
    ----------
    out : path
        Directory to make; it must not hold a run yet, other than one that failed before it recorded anything.
    iface, netns : str, optional
        What to capture on; from `testbed` when that is given.
    testbed : Testbed, optional
        An open testbed.
    workload, command
        The traffic: built-in, or any command. Without either, live traffic is recorded for `duration` seconds.
    duration : float, optional
        Seconds to record at most; the built-in workload sends no longer than that.
    attach : bool
        Live traffic only; nothing is sent.
    events : {"std", "min", "full", "pcap", "none"}
        Tracepoint preset; "pcap" runs tcpdump alone, "none" neither (the untraced arm).
    filter : str, optional
        BPF filter for tcpdump.
    cpus : str, optional
        CPU list for perf.
    pages : int
        perf ring buffer pages per CPU.
    max_size, min_free : int
        Bytes: the capture ends early, as partial, when the run would grow above `max_size` or leave less than `min_free` on
        the disk, both with what perf's ring buffers can still hold. 0 for `min_free` does not look.
    idle : {"auto", "spin", "off"}
        Spinners (record/spinner.py); "auto" runs them unless `idle_task_is_blind` is False (what doctor's check found).
    stamps : {"software", "nic"}
        Which clock stamps received packets; "nic" has the NIC stamp them, takes cross-stamps of its clock, and puts its
        stamping back afterwards. Proved in parts in QEMU's emulated igb, never on metal, and tcpdump's ``-j adapter_unsynced`` has
        not recorded a run yet.
    perf_clock : {"CLOCK_MONOTONIC", "CLOCK_MONOTONIC_RAW"}
        What perf stamps events by.
    functions : sequence of str
        Patterns of kernel functions to log beside (record/functionrecord.py); it slows the path down, like any tracing.
    event_filters : mapping, optional
        Tracepoint filters beside those of :data:`rxlab.stages.EVENT_FILTERS`, by event name.
    flow_sample : int
        N: only one flow of TCP or UDP in N, a power of two, is captured (record/flowsample.py); events that do not know the flow
        are recorded of all.
    configuration : mapping, optional
        Settings in force, for the record.
    sweep : mapping, optional
        Which cell of a sweep this is, for the record.
    transaction : Transaction, optional
        Journal that helpers are registered with; one of its own when not given.
    progress : callable, optional
        Called with the seconds recorded so far.

    Returns
    -------
    RunDir
        Status "complete", or "partial" with the reasons in ``problems``.

    Raises
    ------
    CaptureError
        The capture could not start; it then leaves nothing behind. Where traffic had begun, the run directory says "failed".
    """
    if events not in ARM_OF:
        raise UsageError(f"unknown event preset {events!r}", expected=", ".join(ARM_OF))
    recording = Recording(
        ARM_OF[events],
        packet_filter(flow_sample, filter),
        snaplen,
        cpus,
        pages,
        max_size,
        min_free,
        idle,
        idle_task_is_blind,
        {**sampled_events(flow_sample, EVENT_PRESETS.get(ARM_OF[events], ())), **(event_filters or {})},
        stamps,
        perf_clock,
        tuple(functions),
        flow_sample,
    )
    if duration is not None and not 0 < duration < math.inf:
        raise UsageError("not a duration", found=f"{duration:g} s", expected="seconds above 0")
    load = Command(command) if command else workload
    if isinstance(load, Workload):
        load = replace(load, duration=load.duration or duration).pinned()
        duration = None
    if attach and load is not None:
        raise UsageError("--attach records what is there: it takes no workload and no command")
    if load is None and not duration:
        raise UsageError("nothing to record", expected="a workload, a command, or a duration")
    if isinstance(load, Command):
        load.check()
    check_cpus(recording.cpus)
    check_tools(recording)
    dst = testbed.dst if testbed is not None else endpoint_of(iface, netns)
    if min_free:
        expected = min(estimate_run(load, recording.arm, duration).bytes, max_size or sys.maxsize)
        rings = ring_bytes(pages_within(pages, max_size)) if recording.events else 0
        check_space(Path(out), expected + rings, min_free)
    run = first_record(recording, dst, testbed, load, duration)
    run |= {"configuration": dict(configuration or {}), "sweep": dict(sweep) if sweep else None}
    own = apply() if transaction is None else nullcontext(transaction)
    with unused_removed(Path(out)), own as journal, noted_interrupts() as interrupts:
        folder = make_folder(Path(out))
        session = Session(folder, run, recording, dst, journal, interrupts=interrupts)
        session.save()
        try:
            record(session, sender_of(testbed, dst), load, duration, progress)
        except BaseException as error:
            fail(session, error)
            raise
        finally:
            give_to_invoker(folder)
    return open_rundir(folder)


def first_record(
    recording: Recording,
    dst: Endpoint,
    testbed: Testbed | None,
    load: Workload | Command | None,
    duration: float | None,
) -> dict[str, Any]:
    """Return run.json as it is before anything has happened."""
    macs, addresses = local_identity(dst.iface, dst.netns)
    return {
        "status": "running",
        "problems": [],
        "command": command_line(),
        "testbed": testbed.describe() if testbed is not None else None,
        "iface": dst.iface,
        "netns": str(NETNS_FOLDER / dst.netns) if dst.netns else None,
        "local_macs": macs,
        "local_addresses": addresses,
        "arm": recording.arm,
        "stamps": recording.stamps,
        "workload": load.describe() if load is not None else None,
        "configuration": {},
        "start_ns": time.time_ns(),
        "stop_ns": None,
        "perf": None,
        "functions": None,
        "tcpdump": None,
        "idle": {"asked": recording.idle, "spinners": recording.spins},
        "asked": {
            "events": recording.arm,
            "filter": recording.capture_filter,
            "snaplen": recording.snaplen,
            "cpus": recording.cpus,
            "pages": recording.pages,
            "max_size": recording.max_size,
            "min_free": recording.min_free,
            "duration": duration,
            "functions": list(recording.functions),
            "flow_sample": recording.flow_sample,
        },
        "got": {},
    }


def record(
    session: Session,
    src: Endpoint | None,
    load: Workload | Command | None,
    duration: float | None,
    progress: Callable[[float], None] | None,
) -> None:
    """Run the capture from the snapshot of the host to the final run.json."""
    reserve_space(session.out)
    dst, out = session.dst, session.out
    write_json(out / HOST_JSON, snapshot_host(dst.iface, dst.netns))
    with ExitStack() as stack:
        if session.recording.spins:
            spinners = start_spinners(all_cpus(), session.transaction.start_process)
            stack.callback(stop_spinners, spinners)
        has_nic_stamps = session.recording.has_nic_stamps
        clock = stack.enter_context(nic_stamps(dst, session.transaction)) if has_nic_stamps else None
        with counted(session), clocked(session, clock):
            start_recorders(session)
            session.run["start_ns"] = time.time_ns()
            session.save()
            try:
                if load is not None:
                    session.traffic = open_traffic(load, src, dst, out, session.transaction.start_process)
                run_traffic(session, duration, progress)
            finally:
                session.run["stop_ns"] = time.time_ns()
                stop_recorders(session)
    conclude(session)


@contextmanager
def counted(session: Session) -> Iterator[None]:
    """Read the counters before and after."""
    dst = session.dst
    before = read_counters([dst.iface], dst.netns)
    try:
        yield
    finally:
        after = read_counters([dst.iface], dst.netns)
        content = {"before": before, "after": after, "difference": difference(before, after)}
        keep(session, COUNTERS_JSON, content)


@contextmanager
def clocked(session: Session, clock: PtpClock | None = None) -> Iterator[None]:
    """Read the clocks before, ten times a second during, and after."""
    sampler = ClockSampler(phc=clock)
    try:
        with sampler:
            yield
    finally:
        if sampler.failure is not None:
            session.problem(sampler.failure)
        keep(session, CLOCK_JSON, sampler.to_json())


def keep(session: Session, name: str, content: dict[str, Any]) -> None:
    """Write one JSON file at the end of a run, into the space reserved for it when the disk is full."""
    release_space(session.out)
    try:
        write_json(session.out / name, content)
    except OSError as error:
        session.problem(f"{name} not written: {error.strerror}")


def start_recorders(session: Session) -> None:
    """Start tcpdump, perf and the function log, and return when all record."""
    recording, start_process = session.recording, session.transaction.start_process
    if recording.has_pcap:
        session.pcap = PcapRecorder(
            session.out / PCAP,
            session.dst.iface,
            session.dst.netns,
            recording.capture_filter,
            recording.snaplen,
            recording.has_nic_stamps,
            start_process,
        )
        session.pcap.start()
    if recording.events:
        events = list(recording.events)
        session.perf = PerfRecorder(
            session.out / PERF_DATA,
            events,
            pages_within(recording.pages, recording.max_size),
            recording.cpus,
            start_process,
            extra_filters=recording.event_filters,
            clock=recording.perf_clock,
        )
        session.perf.start()
    if recording.functions:
        log, register = session.out / FUNCTIONS_LOG, session.transaction.register_instance
        session.functions = FunctionRecorder(log, recording.functions, register)
        session.functions.start()


def run_traffic(session: Session, duration: float | None, progress: Callable[[float], None] | None) -> None:
    """Let the traffic run until it ends, time is up, or a limit is reached."""
    traffic = session.traffic
    try:
        if traffic is not None:
            traffic.prepare()
        if session.functions is not None:
            session.functions.switch_on()
        if traffic is not None:
            traffic.go()
        session.has_begun = True
        start = time.monotonic()
        while True:
            passed = time.monotonic() - start
            if duration is not None and passed >= duration:
                return
            step = POLL_SECONDS if duration is None else min(POLL_SECONDS, duration - passed)
            if traffic is not None:
                if traffic.wait(step):
                    return
            else:
                time.sleep(step)
            if limit := "interrupted" if session.interrupts else limit_reached(session):
                session.stopped_early.append(limit)
                return
            if progress is not None:
                progress(time.monotonic() - start)
    finally:
        if traffic is not None:
            session.run["got"]["workload"] = traffic.finish()


def limit_reached(session: Session) -> str | None:
    """Return why the capture has to end now, or None."""
    recording = session.recording
    for name, recorder in (("tcpdump", session.pcap), ("perf", session.perf)):
        if recorder is not None and not recorder.is_alive():
            return f"{name} ended by itself"
    # perf writes a ring when it is half full: what the rings hold is on its way to the disk.
    pending = session.perf.ring_bytes if session.perf is not None else 0
    size = sum(entry.stat().st_size for entry in session.out.iterdir() if entry.is_file())
    if recording.max_size is not None and size + pending > recording.max_size:
        return f"the run reached {size} bytes and up to {pending} to come, --max-size is {recording.max_size}"
    free = shutil.disk_usage(session.out).free
    if recording.min_free and free - pending < recording.min_free:
        return f"the disk has {free} bytes left, up to {pending} are to come, the limit is {recording.min_free}"
    return None


def stop_recorders(session: Session) -> None:
    """Stop the function log, perf, then tcpdump, and note what each got."""
    if session.functions is not None and session.functions.is_on:
        session.run["functions"] = session.functions.stop()
        session.run["problems"] += session.functions.problems
    # tcpdump first takes what it has received: perf still records meanwhile, so no packet of the pcap lacks its events.
    if session.pcap is not None:
        session.pcap.drain()
    if session.perf is not None and session.perf.process is not None:
        session.run["perf"] = session.perf.stop()
        session.run["problems"] += session.perf.problems
    if session.pcap is not None and session.pcap.process is not None:
        result = session.run["tcpdump"] = session.pcap.stop()
        session.run["problems"] += pcap_problems(result)


def note_restored(run: RunDir, transaction: Transaction) -> RunDir:
    """Add to run.json whether the settings of the run were put back, once they were or were not."""
    if run.run.get("got", {}).get("settings"):
        report = transaction.report
        run.run["got"]["restored"] = not (report.failed or report.foreign or report.gone)
        write_json(run.file(RUN_JSON), run.run)
        give_to_invoker(run.path)
    return run


def conclude(session: Session) -> None:
    """Judge the run and write the final run.json."""
    got = session.run["got"]
    session.run["problems"][:0] = [f"ended early: {reason}" for reason in session.stopped_early]
    codes = got.get("workload", {})
    for who in ("client", "server"):
        if codes.get(f"{who}_exit_code") not in (0, None):
            session.problem(f"the workload's {who} ended with status {codes[f'{who}_exit_code']}" + said(session, who))
    got["settings"] = dict(session.transaction.got)
    drift = settings_drift(read_json(session.out / HOST_JSON), session.dst.iface, session.dst.netns)
    got["drift"] = {label: list(values) for label, values in drift.items()}
    for label, (then, now) in drift.items():
        session.problem(f"{label} was {then} at the start and is {now} at the end: somebody else changed it")
    got["seconds"] = (session.run["stop_ns"] - session.run["start_ns"]) / 1e9
    got["bytes"] = {entry.name: entry.stat().st_size for entry in sorted(session.out.iterdir()) if entry.is_file()}
    if session.run["perf"] and session.run["perf"]["lost"]:
        session.problem(f"perf lost {session.run['perf']['lost']} events")
    session.run["status"] = "partial" if session.run["problems"] else "complete"
    keep(session, RUN_JSON, session.run)


def said(session: Session, who: str) -> str:
    """Return the last line a side of the workload printed, for the list of problems."""
    line = last_line(session.out / COMMAND_LOG) if who == "client" else ""
    return f": {line}" if line else ""


def fail(session: Session, error: BaseException) -> None:
    """Stop what runs; mark the run as failed, or leave nothing of one that never had traffic."""
    for recorder in (session.perf, session.pcap):
        if recorder is not None:
            recorder.kill()
    if session.run["status"] in ("partial", "complete"):
        return
    if not session.has_begun:
        leave_nothing(session.out)
        return
    session.run["status"] = "failed"
    session.problem(error.line() if isinstance(error, RxlabError) else repr(error))
    keep(session, RUN_JSON, session.run)
