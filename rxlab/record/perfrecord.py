"""perf around a workload: started disabled, enabled and disabled by acknowledged commands, its losses counted."""

from __future__ import annotations

import mmap
import os
import re
import select
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rxlab import stages
from rxlab.errors import CaptureError
from rxlab.host.tools import tool_environment
from rxlab.record.pcaprecord import last_message, tool_version, wait_ended

TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
ACK_TIMEOUT = 20.0
STOP_TIMEOUT = 60.0
DEFAULT_PAGES = 8192  # per CPU: 0 lost at 0.3 to 0.5 M events/s
MIN_PAGES = 64
COUNT_LOST_LIMIT = 1 << 29  # bytes; a larger file's losses are counted by the analysis alone

# include/uapi/linux/perf_event.h: struct perf_event_header {u32 type; u16 misc; u16 size;}; PERF_RECORD_LOST carries
# {u64 id; u64 lost;}, PERF_RECORD_LOST_SAMPLES {u64 lost;}. tools/perf/util/header.h: struct perf_file_header, whose data
# section {u64 offset; u64 size;} lies at byte 40.
RECORD_HEADER = struct.Struct("<IHH")
RECORD_LOST, RECORD_LOST_SAMPLES, RECORD_AUXTRACE, RECORD_COMPRESSED = 2, 13, 71, 81
DATA_SECTION = struct.Struct("<QQ")
DATA_SECTION_AT = 40
PERF_MAGIC = b"PERFILE2"


def tracing_folder() -> Path:
    """Return the tracefs folder, or say in one line why it cannot be read."""
    is_forbidden = False
    for folder in TRACEFS:
        # Not os.access(): it leaves out the capabilities of a user who is not root.
        try:
            os.listdir(folder / "events" / "sched")
        except PermissionError:
            is_forbidden = True
        except OSError:
            continue
        else:
            return folder
    if is_forbidden:
        raise CaptureError(
            "the kernel's tracepoints cannot be read",
            where=str(TRACEFS[0]),
            found="permission denied",
            expected="root, or CAP_PERFMON with CAP_DAC_READ_SEARCH",
            do="Use sudo, or run 'rxlab doctor' for the commands that help.",
        )
    # After a boot nothing has mounted it yet: perf does when it first needs it.
    raise CaptureError(
        "the kernel's tracepoints cannot be read",
        where=str(TRACEFS[0]),
        found="no tracefs mounted",
        do=f"As root: mount -t tracefs none {TRACEFS[0]}.",
    )


def split_events(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Sort event names into those this kernel has and those it lacks."""
    folder = tracing_folder() / "events"
    have: list[str] = []
    lack: list[str] = []
    for name in names:
        (have if (folder / name.replace(":", "/") / "format").exists() else lack).append(name)
    return have, lack


def filter_of(event: str) -> str | None:
    """Return the filter of an event, or None when it has none or this kernel's event lacks the field it names."""
    expression = stages.EVENT_FILTERS.get(event)
    if expression is None:
        return None
    text = (tracing_folder() / "events" / event.replace(":", "/") / "format").read_text()
    fields = set(re.findall(r"field:[^;]*?(\w+)(?:\[\w*\])?;", text))
    return expression if set(re.findall(r"[A-Za-z_]\w*", expression)) <= fields else None


def pages_within(pages: int, max_size: int | None) -> int:
    """Return how many ring buffer pages per CPU fit: all rings together take half of `max_size` at most."""
    while max_size is not None and pages > MIN_PAGES and ring_bytes(pages) > max_size // 2:
        pages //= 2
    return pages


def ring_bytes(pages: int) -> int:
    """Return what the rings of all CPUs hold."""
    return pages * mmap.PAGESIZE * (os.cpu_count() or 1)


@dataclass
class PerfRecorder:
    """One ``perf record`` process for the whole machine.

    Parameters
    ----------
    path : Path
        The perf.data to write; the control FIFOs are made beside it and removed.
    events : list of str
        Tracepoints wanted; those the kernel lacks end up in `missing_events`.
    pages : int
        Ring buffer pages per CPU.
    cpus : str or None
        CPU list to record on; None: all.
    extra_filters : mapping
        Filters beside those of :data:`rxlab.stages.EVENT_FILTERS`.
    clock : str
        What perf stamps events by (``-k``).
    start_process : callable
        ``subprocess.Popen`` or :meth:`rxlab.host.journal.Transaction.start_process`.
    """

    path: Path
    events: list[str]
    pages: int = DEFAULT_PAGES
    cpus: str | None = None
    start_process: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
    extra_filters: Mapping[str, str] = field(default_factory=dict)
    clock: str = "CLOCK_MONOTONIC"
    missing_events: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    filters: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.events, self.missing_events = split_events(self.events)
        others = [name for event in self.missing_events for name in stages.SUBSTITUTES.get(event, ())]
        self.events += split_events(name for name in others if name not in self.events)[0]
        if not self.events:
            raise CaptureError("none of the events asked for exists", found=", ".join(self.missing_events))
        self.filters = {event: expression for event in self.events if (expression := filter_of(event))}
        self.filters |= {event: text for event, text in self.extra_filters.items() if event in self.events}
        for event in stages.EVENT_FILTERS.keys() & set(self.events) - self.filters.keys():
            self.problems.append(f"filter of {event} not used: this kernel's event lacks the field")
        self._fifos = [self.path.with_name(f".perf.{name}") for name in ("ctl", "ack")]
        self._ends: list[int] = []
        self._stderr: IO[bytes] | None = None

    @property
    def ring_bytes(self) -> int:
        """What the rings of all CPUs can hold before perf writes it."""
        return ring_bytes(self.pages)

    def argv(self) -> list[str]:
        """Return the command line."""
        control, ack = self._fifos
        argv = ["perf", "record", "-a", "-k", self.clock, "-D", "-1", "--control", f"fifo:{control},{ack}"]
        argv += ["-m", str(self.pages), "-c", "1", "-B", "-N", "-o", str(self.path)]
        argv += ["-C", self.cpus] if self.cpus else []
        for event in self.events:
            argv += ["-e", event] + (["--filter", self.filters[event]] if event in self.filters else [])
        return argv

    def start(self) -> None:
        """Start perf and return when it records. Once without filters when the kernel refuses them."""
        self._launch()
        is_recording = self.command("enable")
        if not is_recording and self.filters and "filter" in self.stderr():
            self.problems.append(f"filters not used: {last_message(self.stderr())}")
            self.filters = {}
            self.kill()
            self._launch()
            is_recording = self.command("enable")
        # A perf that runs but has not answered would record nothing of the traffic, and the run would look complete.
        if not is_recording or not self.is_alive():
            message = self.stderr()
            self.kill()
            raise CaptureError(
                "perf did not start", found=perf_complaint(message), expected="an acknowledged 'enable'",
                do="Run 'rxlab doctor'.",
            )  # fmt: skip

    def _launch(self) -> None:
        for fifo in self._fifos:
            fifo.unlink(missing_ok=True)
            os.mkfifo(fifo, 0o600)
        # Read-write: neither side waits for the other in open(), and neither sees an end of file.
        self._ends = [os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) for fifo in self._fifos]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _release()
        self.process = self.start_process(
            self.argv(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env=tool_environment(PERF_CONFIG="/dev/null", LC_ALL="C"),
            umask=0o077,
            start_new_session=True,
        )

    def command(self, word: str) -> bool:
        """Send a control command; True when perf acknowledged it, False when it ended or did not answer in time."""
        os.write(self._ends[0], word.encode() + b"\n")
        deadline, answer = time.monotonic() + ACK_TIMEOUT, b""
        while b"ack" not in answer:
            if select.select([self._ends[1]], [], [], 0.05)[0]:
                answer += os.read(self._ends[1], 64)
            elif not self.is_alive() or time.monotonic() > deadline:
                return False
        return True

    def is_alive(self) -> bool:
        """Tell whether perf still runs."""
        return self.process is not None and self.process.poll() is None

    def stderr(self) -> str:
        """Return what perf has printed so far."""
        if self._stderr is None:
            return ""
        return os.pread(self._stderr.fileno(), 1 << 16, 0).decode(errors="replace")

    def stop(self) -> dict[str, Any]:
        """Disable the events, end perf, and return the ``perf`` object of run.json."""
        assert self.process is not None
        if self.is_alive():
            if not self.command("disable"):
                self.problems.append("perf did not acknowledge 'disable': the end of the recording is not certain")
            if self.is_alive():
                self.process.send_signal(signal.SIGINT)
        try:
            cpu_seconds = wait_ended(self.process, STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.problems.append("perf did not end and was killed")
            self.process.kill()
            cpu_seconds = wait_ended(self.process)
        message = self.stderr()
        self._release()
        if self.path.exists():
            self.path.chmod(0o600)
        # perf ends itself by the signal that stopped it, after writing everything.
        exit_code = 0 if self.process.returncode == -signal.SIGINT else self.process.returncode
        if exit_code != 0:
            self.problems.append(f"perf ended with status {exit_code}: {perf_complaint(message)}")
        return {
            "version": tool_version("perf"),
            "argv": self.argv(),
            "exit_code": exit_code,
            "cpu_seconds": cpu_seconds,
            "events": self.events,
            "missing_events": self.missing_events,
            "filters": self.filters,
            "pages": self.pages,
            "lost": count_lost(self.path),
            "stderr": last_message(message),
        }

    def kill(self) -> None:
        """End perf at once."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
        self._release()

    def _release(self) -> None:
        for end in self._ends:
            os.close(end)
        self._ends = []
        for fifo in self._fifos:
            fifo.unlink(missing_ok=True)
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None


def perf_complaint(message: str) -> str:
    """Return the line of perf's standard error that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = re.compile(r"error|fail|permission|denied|not permitted|no space|invalid", re.IGNORECASE)
    return next((line for line in lines if telling.search(line)), last_message(message))


def count_lost(path: Path) -> int | None:
    """Return how many events perf.data says were lost; None when the file is too large to walk here, or unreadable.

    The walk looks at record headers only; the reader of the analysis is another, complete one.
    """
    try:
        size = path.stat().st_size
        if not 104 <= size <= COUNT_LOST_LIMIT:
            return None
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:8] != PERF_MAGIC:
                return None
            offset, length = DATA_SECTION.unpack_from(content, DATA_SECTION_AT)
            return walk_lost(content, offset, min(offset + length, size) if length else size)
    except OSError:
        return None


def walk_lost(content: mmap.mmap, offset: int, end: int) -> int | None:
    """Sum the lost counts of the records between two file offsets; None when some are compressed."""
    lost, unpack = 0, RECORD_HEADER.unpack_from
    while offset + RECORD_HEADER.size <= end:
        kind, _, size = unpack(content, offset)
        if size < RECORD_HEADER.size or kind in (RECORD_AUXTRACE, RECORD_COMPRESSED):
            return None
        if kind == RECORD_LOST and offset + 24 <= end:
            lost += struct.unpack_from("<Q", content, offset + 16)[0]
        elif kind == RECORD_LOST_SAMPLES and offset + 16 <= end:
            lost += struct.unpack_from("<Q", content, offset + 8)[0]
        offset += size
    return lost
