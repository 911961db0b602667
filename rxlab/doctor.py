"""Can this host capture, what would be missing from the result, and the command that mends it."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rxlab import stages
from rxlab.errors import CaptureError, RxlabError
from rxlab.host.access import HostAccess
from rxlab.host.functiontrace import function_tracing_lack
from rxlab.host.idlecheck import check_idle_task
from rxlab.host.journalfile import default_journal_dir
from rxlab.host.recovery import journal_owners
from rxlab.host.tools import find_tool
from rxlab.host.topology import is_running, read_queues
from rxlab.host.tracepoints import check_tracepoints, tracefs_dir

# Tool -> (option that prints the version, Debian package, Fedora package, whether capture needs it)
TOOLS: dict[str, tuple[str, str, str, bool]] = {
    "perf": ("--version", "linux-perf", "perf", True),
    "tcpdump": ("--version", "tcpdump", "tcpdump", True),
    "ip": ("-V", "iproute2", "iproute", True),
    "ethtool": ("--version", "ethtool", "ethtool", False),
    "tshark": ("--version", "tshark", "wireshark-cli", False),
    "chromium": ("--version", "chromium", "chromium", False),
}
# What goes when a tool that capture can do without is missing.
_WITHOUT = {
    "ethtool": "RSS tables cannot be set",
    "tshark": "no dissection of chosen packets",
    "chromium": "the report's browser test is skipped",
}

# include/uapi/linux/capability.h
CAPABILITIES = {
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
}
# struct vfs_cap_data of revision 2 and 3: magic, then (permitted, inheritable) of the low and the high 32 bits
_VFS_CAP = struct.Struct("<5I")
_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
_FREE_BYTES = 2 * 10**9


@dataclass
class Check:
    """One thing looked at.

    Attributes
    ----------
    name : str
    status : {"ok", "warn", "fail"}
        "fail" means that a capture cannot run; "warn" that something would be missing from it.
    found : str
        What is there, in one line.
    do : str or None
        The command that mends it.
    facts : dict
        Numbers and names for scripts.
    """

    name: str
    status: str
    found: str
    do: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Doctor:
    """All checks of one host.

    Attributes
    ----------
    checks : list of Check
    ok : bool
        Whether this user can capture on this host.
    """

    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(check.status != "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def check(self, name: str) -> Check:
        """Return one check by name."""
        return next(check for check in self.checks if check.name == name)

    def print(self) -> None:
        """Print the checks and what to do, for a person."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for check in self.checks:
            found = Text(check.found)
            if check.do:
                found.append("\n-> " + check.do, style="cyan")
            table.add_row(Text(check.status, style=colours[check.status]), Text(check.name), found)
        console = Console(highlight=False)
        console.print(table)
        console.print("This host can capture." if self.ok else "This host cannot capture yet: see 'fail' above.")


def examine(iface: str | None = None, netns: str | None = None, *, idle_seconds: float = 1.0) -> Doctor:
    """Look at everything a capture needs.

    Parameters
    ----------
    iface, netns : str, optional
        Interface to look at in detail, and its network namespace.
    idle_seconds : float
        Length of the recording that shows whether the idle task hides events; 0 leaves the check out.
    """
    steps: list[Callable[[], list[Check]]] = [
        _check_tools,
        _check_permissions,
        _check_events,
        _check_functions,
        _check_host,
        lambda: _check_settings(netns),
    ]
    if idle_seconds > 0:
        steps.insert(3, lambda: [_check_idle(idle_seconds)])
    if iface is not None:
        steps.append(lambda: _check_iface(iface, netns))
    return Doctor([check for step in steps for check in step()])


def install_command(debian: str, fedora: str) -> str:
    """Return the line that installs a package, for both families of systems."""
    return f"sudo apt install {debian}   (Fedora: sudo dnf install {fedora})"


def _check_tools() -> list[Check]:
    checks = []
    for tool, (option, debian, fedora, is_needed) in TOOLS.items():
        path = find_tool(tool)
        if path is None:
            found = "not installed" + (f": {_WITHOUT[tool]}" if tool in _WITHOUT else "")
            status = "fail" if is_needed else "warn"
            checks.append(Check(tool, status, found, install_command(debian, fedora), {"path": None}))
            continue
        version = _version(path, option)
        # Debian has had a /usr/bin/perf that only looks for the perf of the running kernel.
        broken = version is None and is_needed
        do = install_command(debian, fedora) if broken else None
        found = version or f"{path} does not run"
        checks.append(Check(tool, "fail" if broken else "ok", found, do, {"path": path, "version": version}))
    return checks


def _version(path: str, option: str) -> str | None:
    try:
        done = subprocess.run([path, option], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def own_capabilities(status: str | None = None) -> set[str]:
    """Return which of the capabilities that matter this process has (text of /proc/self/status)."""
    text = status if status is not None else Path("/proc/self/status").read_text()
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", text, re.MULTILINE)
    bits = int(match[1], 16) if match else 0
    return {name for name, bit in CAPABILITIES.items() if bits >> bit & 1}


def file_capabilities(path: str | None) -> set[str]:
    """Return which of the capabilities that matter a program gets when started (``setcap``)."""
    try:
        raw = os.getxattr(os.path.realpath(path or ""), "security.capability")
    except OSError:
        return set()
    if len(raw) < _VFS_CAP.size:
        return set()
    magic, low, _, high, _ = _VFS_CAP.unpack_from(raw)
    bits = low | high << 32
    is_effective = bool(magic & 1)
    return {name for name, bit in CAPABILITIES.items() if is_effective and bits >> bit & 1}


def _lacking_rights(for_perf: set[str], paranoid: int) -> list[str]:
    """Return what perf would need to record tracepoints and does not have."""
    may_trace = bool(for_perf & {"CAP_PERFMON", "CAP_SYS_ADMIN"}) or paranoid <= -1
    may_read = tracefs_dir() is not None or "CAP_DAC_READ_SEARCH" in for_perf
    return [word for word, has in (("CAP_PERFMON", may_trace), ("CAP_DAC_READ_SEARCH (tracefs)", may_read)) if not has]


def _check_permissions() -> list[Check]:
    perf, tcpdump = find_tool("perf"), find_tool("tcpdump")
    own = own_capabilities()
    for_perf, for_tcpdump = own | file_capabilities(perf), own | file_capabilities(tcpdump)
    paranoid = int(_PARANOID.read_text())
    lacks = _lacking_rights(for_perf, paranoid)
    real = os.path.realpath(perf) if perf else "$(realpath $(which perf))"
    checks = [
        Check(
            "may trace",
            "fail" if lacks else "ok",
            f"perf lacks {' and '.join(lacks)}; perf_event_paranoid {paranoid}" if lacks else f"paranoid {paranoid}",
            f"Run with sudo, or: sudo setcap cap_perfmon,cap_dac_read_search+ep {real}" if lacks else None,
            {"uid": os.geteuid(), "own": sorted(own), "perf": sorted(for_perf), "paranoid": paranoid},
        ),
        Check(
            "may sniff",
            "ok" if "CAP_NET_RAW" in for_tcpdump else "fail",
            "tcpdump has CAP_NET_RAW" if "CAP_NET_RAW" in for_tcpdump else "tcpdump lacks CAP_NET_RAW",
            None
            if "CAP_NET_RAW" in for_tcpdump
            else f"Run with sudo, or: sudo setcap cap_net_raw+ep {os.path.realpath(tcpdump or '/usr/bin/tcpdump')}",
            {"tcpdump": sorted(for_tcpdump)},
        ),
    ]
    if os.geteuid() != 0:
        checks.append(
            Check(
                "testbed",
                "warn",
                "making namespaces and changing settings needs root",
                "From a notebook: sudo -n rxlab capture ... (the kernel itself need not be root)",
            )
        )
    return checks


def _check_events() -> list[Check]:
    report = check_tracepoints()
    if not report.readable:
        do = "Run with sudo, or give perf CAP_DAC_READ_SEARCH as above; if tracefs is absent: mount -t tracefs none /sys/kernel/tracing"
        return [Check("tracepoints", "warn", "tracefs cannot be read, events not checked", do)]
    wanted, lacking = len(stages.EVENT_PRESETS["full"]), len(report.missing) + len(report.missing_fields)
    parts = [f"{wanted - lacking} of {wanted} events usable"]
    if report.missing:
        parts.append("not in this kernel: " + ", ".join(report.missing))
    parts += [f"{event} without {', '.join(names)}" for event, names in report.missing_fields.items()]
    if report.lost_stages:
        parts.append("stages that cannot be seen: " + ", ".join(report.lost_stages))
    return [
        Check(
            "tracepoints",
            "warn" if report.lost_stages else "ok",
            "; ".join(parts),
            "A newer kernel has them; captures work without." if report.lost_stages else None,
            asdict(report),
        )
    ]


def _check_functions() -> list[Check]:
    lack = function_tracing_lack()
    if lack is None:
        return [Check("function log", "ok", "capture --functions works")]
    do = "Only capture --functions needs it"
    return [Check("function log", "warn", f"cannot be recorded: {lack}", do)]


def _check_idle(seconds: float) -> Check:
    perf = find_tool("perf")
    if perf is None:
        return Check("idle task", "warn", "not checked: needs perf")
    if _lacking_rights(own_capabilities() | file_capabilities(perf), int(_PARANOID.read_text())):
        return Check("idle task", "warn", "not checked: needs the rights above")
    try:
        check = check_idle_task(seconds)
    except CaptureError as error:
        return Check(
            "idle task", "fail", f"not checked, perf cannot record here: {error.found or error.what}", error.do
        )
    if check.has_fault:
        cpus = ", ".join(map(str, check.blind_cpus))
        found, status = f"perf misses events while CPU {cpus} is idle", "warn"
        do = "--idle auto (the default) runs a SCHED_IDLE spinner per CPU while capturing"
    elif not check.is_conclusive:
        found, status = "the idle task never ran here just now, so nothing can be said", "warn"
        do = "Repeat when the machine is less busy; --idle spin is always safe"
    else:
        return Check("idle task", "ok", "events are delivered while CPUs are idle", None, check.to_dict())
    return Check("idle task", status, found, do, check.to_dict())


def _check_host() -> list[Check]:
    checks = []
    with HostAccess() as access:
        if is_running(access, "irqbalance"):
            do = "sudo systemctl stop irqbalance   (start it again afterwards)"
            checks.append(Check("irqbalance", "warn", "running: it moves interrupts during a capture", do))
        else:
            checks.append(Check("irqbalance", "ok", "not running"))
        source = access.try_read("sys/devices/system/clocksource/clocksource0/current_clocksource") or "unknown"
    is_slow = source in ("hpet", "acpi_pm", "jiffies")
    checks.append(
        Check(
            "clock source",
            "warn" if is_slow else "ok",
            source + (": every time stamp costs microseconds" if is_slow else ""),
            "Boot with tsc=reliable if the TSC is stable" if is_slow else None,
        )
    )
    for name, folder in (("disk", Path.cwd()), ("temporary disk", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        facts = {"free_bytes": free}
        if free > _FREE_BYTES:
            checks.append(Check(name, "ok", f"{free / 1e9:.1f} GB free at {folder}", None, facts))
        else:
            do = "Free some, or bound the capture with --max-size"
            checks.append(Check(name, "warn", f"only {free / 1e9:.1f} GB free at {folder}", do, facts))
    return checks


def _check_settings(netns: str | None) -> list[Check]:
    """Tell whether settings could be changed and put back; nothing is written."""
    with HostAccess(netns) as access, HostAccess() as host:
        rps = [
            f"sys/class/net/{iface}/queues/{queue}/rps_cpus"
            for iface in access.list("sys/class/net")
            for queue in access.list(f"sys/class/net/{iface}/queues")
            if queue.startswith("rx-") and access.exists(f"sys/class/net/{iface}/queues/{queue}/rps_cpus")
        ]
        rps_ok = bool(rps) and access.call(os.access, access.path(rps[0]), os.W_OK)
        rfs = host.path("proc/sys/net/core/rps_sock_flow_entries")
        rfs_ok = rfs.exists() and os.access(rfs, os.W_OK)
    journal = default_journal_dir()
    existing = next(folder for folder in (journal, *journal.parents) if os.path.exists(folder))
    journal_ok = os.access(existing, os.W_OK)
    do = None if rps_ok and rfs_ok else "Changing settings needs root, and a kernel with CONFIG_RPS"
    checks = [
        Check("RPS", "ok" if rps_ok else "warn", "rps_cpus is writable" if rps_ok else "rps_cpus is not writable", do),
        Check(
            "RFS", "ok" if rfs_ok else "warn", "rps_sock_flow_entries is " + ("" if rfs_ok else "not ") + "writable", do
        ),
        Check(
            "journal",
            "ok" if journal_ok else "warn",
            f"{journal} " + ("is writable" if journal_ok else "is not writable: settings cannot be changed safely"),
            None if journal_ok else "Run with sudo",
        ),
    ]
    return checks + (_check_journals(journal) if os.path.isdir(journal) and journal_ok else [])


def _check_journals(folder: Path) -> list[Check]:
    """Tell whose the journals are: a run that is alive puts its settings back itself, a dead one has left them."""
    owners = journal_owners(folder)
    alive = sorted({pid for pid in owners.values() if pid is not None})
    dead = [name for name, pid in owners.items() if pid is None]
    checks = []
    if alive:
        pids = ", ".join(map(str, alive))
        checks.append(Check("in use", "ok", f"by pid {pids}: a run with settings or helpers of its own"))
    if dead:
        found = f"{len(dead)} journal{'s' if len(dead) > 1 else ''} of runs that died: {', '.join(dead[:3])}"
        checks.append(Check("left over", "warn", found, "rxlab restore"))
    return checks


def _check_iface(iface: str, netns: str | None) -> list[Check]:
    with HostAccess(netns) as access:
        if not access.exists(f"sys/class/net/{iface}"):
            names = ", ".join(access.list("sys/class/net"))
            return [Check(iface, "fail", f"no such interface; there are {names}", "Choose one with --iface")]
        queues = read_queues(access, iface)
        state = access.try_read(f"sys/class/net/{iface}/operstate") or "unknown"
        try:
            driver = access.call(access.ethtool.driver, iface)["driver"]
            stamping: dict[str, Any] = access.call(access.ethtool.timestamping, iface)
        except (OSError, RxlabError):
            driver, stamping = "unknown", {}
    mapped = [
        f"queue {q['queue']} -> IRQ {q['irq']} -> CPU {q['irq_effective'] or q['irq_cpus']}" for q in queues if q["irq"]
    ]
    checks = [Check(iface, "ok" if state in ("up", "unknown") else "warn", f"{driver}, {state}, {len(queues)} queues")]
    if mapped:
        checks.append(Check("queues", "ok", "; ".join(mapped), None, {"queues": queues}))
    else:
        found = "no interrupts of its own (veth, lo), or the driver names them in an unknown way: no stage 'hardirq'"
        checks.append(Check("queues", "warn", found, None, {"queues": queues}))
    hardware = "hardware-receive" in stamping.get("capabilities", ())
    filters = ", ".join(stamping.get("rx_filters", ())) or "none"
    found = (
        f"/dev/ptp{stamping['phc']}, receive filters: {filters}"
        if hardware
        else "none: no stage 'nic', stamps are software's"
    )
    checks.append(Check("hardware stamps", "ok" if hardware else "warn", found, None, {"timestamping": stamping}))
    return checks
