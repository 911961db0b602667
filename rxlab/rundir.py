"""The run directory: file names, JSON schemas and versions, log layouts; open, check, list.

A run directory is what capture leaves and analysis reads; nothing else passes between the two.

``run.json``
    ``{"schema_version", "status": "running"|"complete"|"partial"|"failed", "problems": [str], "command": [str],
    "testbed": {...}|null, "iface", "netns": path|null, "local_macs": [str], "local_addresses": [str],
    "arm": "untraced"|"pcap"|"min"|"std"|"full", "stamps": "software"|"nic", "workload": {"name", "proto", ...}|null, "configuration": {setting: value},
    "start_ns", "stop_ns" (CLOCK_REALTIME), "perf": {"version", "argv", "exit_code", "events": [str], "missing_events": [str],
    "filters": {event: expression}, "pages", "stderr", "cpu_seconds": float|null, "lost": int|null}|null,
    "functions": {"patterns", "missing_patterns": [str], "clock", "calls", "lost": int}|null, "tcpdump": {"version", "argv", "exit_code",
    "captured", "received", "dropped", "cpu_seconds", "fence": {"captured", "received"}, "copies", "stderr"}|null, "idle": {"asked",
    "spinners": bool}, "sweep": {"cell", "repetition", "labels"}|null, "asked": {...}, "got": {"settings", "drift": {label: [at the start, at the end]}, "restored": bool, ...}}``.
    ``fence`` are tcpdump's counts when every packet of the traffic was written; on live traffic more may come until it
    ends. ``copies`` is how often the kernel shows a packet to a tap (2 on lo, of which libpcap hides one).
``host.json``
    ``{"schema_version", "kernel", "hostname", "cpus": [{"cpu", "core", "package", "llc", "node", "online"}], "ifaces": {name:
    {"mac", "addresses", "driver", "bus", "queues": [{"queue", "irq", "irq_cpus", "irq_effective", "rps_cpus", "rps_flow_cnt",
    "xps_cpus"}], "features", "coalesce", "rings", "channels", "rss": {"table": [queue], "key"}|null, "irqs": {name: irq}, "flags",
    "tx_queue_len", "timestamping", "settings"}}, "settings": {label: value}, "sysctls": {name: value}, "governor",
    "irqbalance": bool, "tcp_early_demux"}``; ``rxlab host export`` adds "irqs", "network" and "tracing" of the whole host
``clock.json``
    ``{"schema_version", "readings": [{"when": "before"|"during"|"after", "mono_before", "real", "mono_after", "raw_before", "raw",
    "raw_after"}]}``: CLOCK_REALTIME, and CLOCK_MONOTONIC_RAW, each between two readings of CLOCK_MONOTONIC, the narrowest of
    16, int ns (the oldest runs have ``raw`` alone, read right after ``mono_after``). With hardware stamps also ``"phc": [{"when",
    "phc", "index", "method": "precise"|"extended"|"plain", "clock": "raw"|"real", "before", "after"}]``: the NIC's clock
    between two readings of `clock`.
``counters.json``
    ``{"schema_version", "before": {...}, "after": {...}, "difference": {...}}`` with keys ``interrupts`` {irq: {"label", "cpus": [n]}},
    ``softirqs`` {name: [n]}, ``softnet_stat`` [{"cpu", "processed", "dropped", "time_squeeze", "received_rps", ...}],
    ``cpu_time_ns`` [{"cpu", "user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"}], ``nstat`` {name: n}, ``ethtool`` {iface: {name: n}}.
``functions.log``
    text of the kernel's function tracer, where ``--functions`` asked for it: CLOCK_MONOTONIC, to the microsecond.
``perf.data``, ``rx.pcap`` (or ``rx.pcapng``)
    as written by perf and tcpdump.
``run.nc``, ``verify.json``
    left by analysis: the dataset (docs/schema.md) and the verification of its join.
``command.log``
    what a command given as workload printed.
``pyperf.json``
    what a pyperf script given as workload measured, in pyperf's own format.
``app.log``, ``client.log``
    the workload's own logs, :data:`APP_LOG_FIELDS` and :data:`CLIENT_LOG_FIELDS`: the ground truth.
``moves.log``
    where its readers were moved from CPU to CPU, :data:`MOVE_FIELDS`; only with the workload's ``migrate``.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rxlab.errors import FormatError, SchemaError, UsageError

SCHEMA_VERSION = 1

RUN_JSON = "run.json"
HOST_JSON = "host.json"
CLOCK_JSON = "clock.json"
COUNTERS_JSON = "counters.json"
PERF_DATA = "perf.data"
PCAP = "rx.pcap"
FUNCTIONS_LOG = "functions.log"
APP_LOG = "app.log"
CLIENT_LOG = "client.log"
PYPERF_JSON = "pyperf.json"
MOVES_LOG = "moves.log"
DATASET = "run.nc"
VERIFY_JSON = "verify.json"
# What only recording again would bring back.
RECORDED = {
    *(RUN_JSON, HOST_JSON, CLOCK_JSON, COUNTERS_JSON, PERF_DATA, PCAP, "rx.pcapng", FUNCTIONS_LOG),
    *(APP_LOG, CLIENT_LOG, PYPERF_JSON, MOVES_LOG, "command.log"),
}
# Of the folder that holds a sweep's runs: its plan, and the dataset made of them.
SWEEP_JSON = "sweep.json"
SWEEP_STORE = "sweep.zarr"

ARMS = ("untraced", "pcap", "min", "std", "full")

# One record per receive call of the server, little-endian, packed; written by record/workload.py with the standard library
# alone. t0 and t1 are CLOCK_MONOTONIC ns read just before and just after the call; seq is the sequence number of the first
# message that begins in the bytes returned (-1: none), sent its sender's intended send time (CLOCK_MONOTONIC of the sending
# host; 0: none), scm_time SCM_TIMESTAMPNS (CLOCK_REALTIME ns; 0: none), ret the call's result, flow the number the client gave the connection.
APP_LOG_FIELDS: tuple[tuple[str, str], ...] = (
    ("t0", "<i8"),
    ("t1", "<i8"),
    ("seq", "<i8"),
    ("sent", "<i8"),
    ("scm_time", "<i8"),
    ("tid", "<i4"),
    ("ret", "<i4"),
    ("flow", "<i4"),
    ("peer_port", "<u2"),
    ("local_port", "<u2"),
    ("proto", "u1"),
    ("family", "u1"),
    ("flags", "<u2"),
)
APP_LOG_STRUCT = struct.Struct("<qqqqqiiiHHBBH")
assert APP_LOG_STRUCT.size == 60

# One record per message the client sent: intended and actual send time, arrival of its reply (0: none was asked for), all
# CLOCK_MONOTONIC ns of the client's host.
CLIENT_LOG_FIELDS: tuple[tuple[str, str], ...] = (
    ("intended", "<i8"),
    ("sent", "<i8"),
    ("replied", "<i8"),
    ("seq", "<i8"),
    ("flow", "<i4"),
    ("size", "<i4"),
)
CLIENT_LOG_STRUCT = struct.Struct("<qqqqii")
assert CLIENT_LOG_STRUCT.size == 40

# One record per move of a reader: CLOCK_MONOTONIC ns just before and just after sched_setaffinity(), the reader, and the one
# CPU it may run on from then.
MOVE_FIELDS: tuple[tuple[str, str], ...] = (("t0", "<i8"), ("t1", "<i8"), ("tid", "<i4"), ("cpu", "<i4"))
MOVE_STRUCT = struct.Struct("<qqii")
assert MOVE_STRUCT.size == 24

# What begins every message of the built-in workload: magic, flow, sequence number, intended send time.
MESSAGE_MAGIC = 0x52584C42  # "RXLB"
MESSAGE_HEADER = struct.Struct("<Iiqq")
assert MESSAGE_HEADER.size == 24


@dataclass(frozen=True)
class RunDir:
    """A run directory that exists and whose ``run.json`` was read.

    Attributes
    ----------
    path : Path
    run : dict
        Contents of ``run.json``.
    """

    path: Path
    run: dict[str, Any]

    def file(self, name: str) -> Path:
        """Return the path of one of the run's files, whether or not it exists."""
        return self.path / name

    def has(self, name: str) -> bool:
        """Tell whether the run has this file with at least one byte."""
        path = self.path / name
        return path.is_file() and path.stat().st_size > 0

    def json(self, name: str) -> dict[str, Any]:
        """Read one of the run's JSON files, checking its schema version."""
        return read_json(self.path / name)

    @property
    def pcap(self) -> Path | None:
        """Path of the packet capture, pcap or pcapng, or None."""
        for name in (PCAP, PCAP + "ng"):
            if (self.path / name).is_file():
                return self.path / name
        return None


def open_rundir(path: str | os.PathLike[str]) -> RunDir:
    """Open a run directory.

    Raises
    ------
    FormatError
        The path is not a directory or has no ``run.json``.
    SchemaError
        ``run.json`` was written by a newer rxlab.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(
            "not a run directory",
            where=str(folder),
            found="a file" if folder.exists() else "nothing there",
            expected=f"a directory with {RUN_JSON}",
            do="Give a directory that 'rxlab capture' wrote, or use 'rxlab analyze --perf FILE --pcap FILE'.",
        )
    if not (folder / RUN_JSON).is_file():
        raise FormatError(
            "not a run directory",
            where=str(folder),
            found=", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "an empty directory",
            expected=RUN_JSON,
            do="Give a directory that 'rxlab capture' wrote, or use 'rxlab analyze --perf FILE --pcap FILE'.",
        )
    return RunDir(folder, read_json(folder / RUN_JSON))


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON file of a run directory and check its schema version."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FormatError("file is missing", where=str(path), do="The run is incomplete; record it again.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError("not valid JSON", where=str(path), found=str(error)) from None
    if not isinstance(content, dict):
        raise FormatError("not a JSON object", where=str(path), found=type(content).__name__)
    version = content.get("schema_version")
    if not isinstance(version, int):
        raise SchemaError("no schema version", where=str(path), found=repr(version), expected="an integer")
    if version > SCHEMA_VERSION:
        raise SchemaError(
            "written by a newer rxlab",
            where=str(path),
            found=f"schema_version {version}",
            expected=f"at most {SCHEMA_VERSION}",
            do="Upgrade rxlab: pip install --upgrade rxlab.",
        )
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON file of a run directory, mode 0600, whole or not at all (temporary file, fsync, rename)."""
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump({"schema_version": SCHEMA_VERSION, **content}, stream, indent=1, sort_keys=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def check_out(path: Path, is_ours: Callable[[bytes], bool]) -> None:
    """Refuse an output of the user's choice that cannot be written, or would replace what is not made anew at will.

    Parameters
    ----------
    is_ours : callable
        Whether a file that begins so is an older result of the same kind: that may be replaced, as in every run of a command.

    Raises
    ------
    UsageError
        A folder, or another kind of file: a recording, somebody's notes.
    """
    if path.is_dir():
        raise UsageError("a folder is here", where=str(path), expected="the name of a file", do="Choose another -o.")
    if not path.exists():
        return
    with path.open("rb") as stream:
        begin = stream.read(64)
    if begin and not is_ours(begin):
        raise UsageError(
            "another kind of file is here",
            where=str(path),
            found=f"one that begins {begin[:8]!r}",
            do="Nothing was replaced. Choose another -o.",
        )


def in_folder(path: Path) -> Path:
    """Return an output of the user's choice; refuse it where its folder is not there, before the work and not after it."""
    if not path.parent.is_dir():
        raise UsageError("no folder for this file", where=str(path), found=f"no {path.parent}", do="Make it first.")
    return path


def check_free(path: Path, force: bool = False) -> None:
    """Refuse a file of the user's choice that is there already, unless it may be replaced; what was recorded never may."""
    if in_folder(path).name in RECORDED and (path.parent / RUN_JSON).exists() and path.exists():
        raise UsageError("a file of a recording", where=str(path), do="Nothing was replaced. Choose another -o.")
    if path.exists() and not force:
        raise UsageError(
            "there is a file here already", where=str(path), do="Choose another -o, or give --force to replace it."
        )


def list_runs(path: str | os.PathLike[str]) -> Iterator[RunDir]:
    """Yield every run directory at or below `path`, in name order; raises at the first that is damaged."""
    return map(open_rundir, find_runs(path))


def find_runs(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the folder of every run at or below `path`, readable or not, in name order."""
    folder = Path(path)
    if (folder / RUN_JSON).is_file():
        yield folder
        return
    for entry in sorted(folder.rglob(RUN_JSON)):
        yield entry.parent
