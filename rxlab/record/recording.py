"""How a run is to be recorded: arm, filter, limits, spinners; and whether the tools for it are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rxlab import stages
from rxlab.errors import CaptureError, UsageError
from rxlab.host.access import HostAccess
from rxlab.host.cpulist import format_cpus, online_cpus, parse_cpus
from rxlab.host.tools import find_tool
from rxlab.record.functionrecord import check_functions
from rxlab.record.perfrecord import DEFAULT_PAGES, tracing_folder
from rxlab.rundir import ARMS

# "none" is the recording side's other name of the untraced arm: no perf, no tcpdump, counters and logs only.
ARM_OF = {"none": "untraced", **{arm: arm for arm in ARMS}}
DEFAULT_SNAPLEN = 192
DEFAULT_MIN_FREE = 256 << 20
IDLE_CHOICES = ("auto", "spin", "off")
STAMPS = ("software", "nic")
# Only CLOCK_MONOTONIC needs no drift model; the other is converted by readings (clock.json).
PERF_CLOCKS = ("CLOCK_MONOTONIC", "CLOCK_MONOTONIC_RAW")


@dataclass(frozen=True)
class Recording:
    """How to record; :func:`capture` describes the fields."""

    arm: str = "std"
    capture_filter: str | None = None
    snaplen: int = DEFAULT_SNAPLEN
    cpus: str | None = None
    pages: int = DEFAULT_PAGES
    max_size: int | None = None
    min_free: int = DEFAULT_MIN_FREE
    idle: str = "auto"
    idle_task_is_blind: bool | None = None
    event_filters: Mapping[str, str] = field(default_factory=dict)
    stamps: str = "software"
    perf_clock: str = "CLOCK_MONOTONIC"
    functions: tuple[str, ...] = ()
    flow_sample: int = 1

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise UsageError(f"unknown event preset {self.arm!r}", expected=", ".join(ARM_OF))
        if self.idle not in IDLE_CHOICES:
            raise UsageError(f"unknown idle choice {self.idle!r}", expected=", ".join(IDLE_CHOICES))
        if self.stamps not in STAMPS:
            raise UsageError(f"unknown stamps {self.stamps!r}", expected=", ".join(STAMPS))
        if self.perf_clock not in PERF_CLOCKS:
            raise UsageError(f"not a clock for perf: {self.perf_clock!r}", expected=", ".join(PERF_CLOCKS))

    @property
    def has_pcap(self) -> bool:
        """Tell whether tcpdump runs."""
        return self.arm != "untraced"

    @property
    def has_nic_stamps(self) -> bool:
        """Tell whether tcpdump takes the NIC's stamps."""
        return self.has_pcap and self.stamps == "nic"

    @property
    def events(self) -> tuple[str, ...]:
        """Tracepoints of the arm; none for "untraced" and "pcap"."""
        return stages.EVENT_PRESETS.get(self.arm, ())

    @property
    def spins(self) -> bool:
        """Tell whether spinners run. Unknown counts as blind: a spinner costs less than events that are not there."""
        return self.idle == "spin" or (self.idle == "auto" and self.idle_task_is_blind is not False)


def check_cpus(cpus: str | None) -> None:
    """Raise the usage error for a CPU list that perf could not take."""
    if cpus is None:
        return
    try:
        chosen = parse_cpus(cpus) if "x" not in cpus else []
    except ValueError:
        chosen = []
    with HostAccess() as access:
        online = online_cpus(access)
    if not chosen or set(chosen) - set(online):
        raise UsageError(
            "not CPUs that perf can record",
            where="--cpus",
            found=repr(cpus),
            expected=f"a list of CPUs that are online, {format_cpus(online)}",
        )


def check_tools(recording: Recording) -> None:
    """Raise the one-line error for a tool or permission that is missing, before anything is made."""
    wanted = (["tcpdump"] if recording.has_pcap else []) + (["perf"] if recording.events else [])
    if missing := [tool for tool in wanted if find_tool(tool) is None]:
        raise CaptureError(f"not installed: {', '.join(missing)}", do="Run 'rxlab doctor' for the command that helps.")
    if recording.events:
        tracing_folder()
    if recording.functions:
        check_functions()


def parse_size(text: str | None) -> int | None:
    """Return bytes from text like ``500M`` or ``2G`` (powers of 1024)."""
    if text is None:
        return None
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError):
        raise UsageError("not a size", found=repr(text), expected="e.g. 500M or 2G") from None
