"""tcpdump around a workload: known to run before it, known to have written every packet after it."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rxlab.errors import CaptureError, UsageError
from rxlab.host.tools import tool_environment
from rxlab.record.testbed import in_netns

START_TIMEOUT = 10.0
STOP_TIMEOUT = 10.0
FENCE_TIMEOUT = 2.0
BUFFER_KIB = 16384

# What tcpdump prints on SIGUSR1 and at its end. 4.99 prints one line per number at the end, and commas on SIGUSR1.
CAPTURED = re.compile(r"(\d+) packets? captured")
RECEIVED = re.compile(r"(\d+) packets? received by filter")
# libpcap's compiler: "can't parse filter expression: syntax error"; 1.10.0 and older say "syntax error in filter expression"
NOT_A_FILTER = re.compile(
    r"filter expression|unknown (?:host|port|network|protocol|ether)|illegal (?:qualifier|token|port|char)"
)
NO_NIC_STAMPS = re.compile(r".*(?:time ?stamp type|type of time ?stamp).*", re.IGNORECASE)
SOFTWARE_STAMPS = "Record with software stamps (--stamps software); 'ethtool -T IFACE' says what the NIC stamps."
DROPPED = re.compile(r"(\d+) packets? dropped by (?:kernel|interface)")


@dataclass
class PcapRecorder:
    """One tcpdump process.

    Parameters
    ----------
    path : Path
        The file; its name must end in ``.pcap`` (Debian's AppArmor profile lets tcpdump write nothing else).
    iface : str
    netns : str or None
        Namespace the interface lives in.
    capture_filter : str or None
        BPF filter expression.
    snaplen : int
        Bytes kept of each packet.
    has_nic_stamps : bool
        Received packets are stamped by the NIC's clock; those sent still by CLOCK_REALTIME (libpcap issues 999 and 1701).
    start_process : callable
        ``subprocess.Popen`` or :meth:`rxlab.host.journal.Transaction.start_process`.
    """

    path: Path
    iface: str
    netns: str | None = None
    capture_filter: str | None = None
    snaplen: int = 192
    has_nic_stamps: bool = False
    start_process: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
    process: subprocess.Popen[bytes] | None = None
    output: str = ""
    fence: dict[str, int] = field(default_factory=dict)
    copies: int = 1

    @property
    def is_loopback(self) -> bool:
        """Tell whether each packet may be counted twice: on lo the kernel delivers it as sent and as received."""
        return self.iface == "lo"

    def argv(self) -> list[str]:
        """Return the command line."""
        argv = ["tcpdump", "-i", self.iface, "-n", "-s", str(self.snaplen), "-w", str(self.path), "-B", str(BUFFER_KIB)]
        # Without immediate mode packets wait in the ring's block: a SIGINT after a burst gave "0 captured, 200 received".
        argv += ["--immediate-mode", "--time-stamp-precision=nano"]
        argv += ["-j", "adapter_unsynced"] if self.has_nic_stamps else []
        # Root would become the user tcpdump, who cannot write into a directory of mode 0700.
        argv += ["-Z", "root"] if os.geteuid() == 0 else []
        return in_netns(self.netns, argv + ([self.capture_filter] if self.capture_filter else []))

    def start(self) -> None:
        """Start tcpdump and return when it captures."""
        self.process = self.start_process(
            self.argv(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=tool_environment(),
            umask=0o077,
            start_new_session=True,
        )
        if not self._read_until(re.compile(r"listening on .*\n"), START_TIMEOUT):
            self.kill()
            if NOT_A_FILTER.search(self.output):
                raise UsageError(
                    "not a capture filter",
                    where="--filter",
                    found=f"{self.capture_filter!r} ({last_message(self.output)})",
                    expected="e.g. 'tcp port 80'",
                    do="'man pcap-filter' has the words.",
                )
            raise CaptureError(
                "tcpdump did not start",
                where=self.iface,
                found=last_message(self.output),
                expected="'listening on ...'",
                do="Run 'rxlab doctor'.",
            )

        if self.has_nic_stamps and (refused := NO_NIC_STAMPS.search(self.output)):
            # libpcap then falls back to the system's stamps with no more than a warning.
            self.kill()
            raise CaptureError(
                "the NIC does not stamp every packet",
                where=self.iface,
                found=refused.group(0).strip(),
                do=SOFTWARE_STAMPS,
            )

    def _read_until(self, pattern: re.Pattern[str], timeout: float, since: int = 0) -> bool:
        """Read standard error until `pattern` appears behind position `since`; False when it ends or time is up."""
        assert self.process is not None
        assert self.process.stderr is not None
        deadline = time.monotonic() + timeout
        while pattern.search(self.output, since) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stderr], [], [], left)[0]:
                return False
            content = os.read(self.process.stderr.fileno(), 4096)
            if not content:
                return False
            self.output += content.decode(errors="replace")
        return True

    def is_alive(self) -> bool:
        """Tell whether tcpdump still runs."""
        return self.process is not None and self.process.poll() is None

    def drain(self) -> None:
        """Return when tcpdump has taken every packet the kernel received for it so far.

        Asks tcpdump for its own numbers (SIGUSR1) until captured equals received. On an interface where traffic goes on they
        may never be seen equal: then the numbers of a later question must have passed the first one's.
        """
        deadline = time.monotonic() + FENCE_TIMEOUT
        goal = captured_before = -1
        while (numbers := self._ask()) is not None:
            captured, received = numbers
            if self.is_loopback and captured == captured_before and received == 2 * captured:
                self.copies = 2
            goal = received if goal < 0 else goal
            self.fence = {"captured": captured, "received": goal // self.copies}
            if captured >= self.fence["received"] or time.monotonic() > deadline:
                return
            captured_before = captured
            time.sleep(0.005)

    def _ask(self) -> tuple[int, int] | None:
        """Return how many packets tcpdump has taken and how many the kernel received for it; None when it is gone."""
        since = len(self.output)
        if not self.is_alive():
            return None
        assert self.process is not None
        self.process.send_signal(signal.SIGUSR1)
        if not self._read_until(DROPPED, FENCE_TIMEOUT, since):
            return None
        captured, received = (int(pattern.findall(self.output[since:])[-1]) for pattern in (CAPTURED, RECEIVED))
        return captured, received

    def stop(self) -> dict[str, Any]:
        """End tcpdump and return the ``tcpdump`` object of run.json."""
        assert self.process is not None
        if self.is_alive():
            self.drain()
            self.process.send_signal(signal.SIGINT)
        self._read_until(re.compile("(?!)"), STOP_TIMEOUT)  # to the end of standard error
        cpu_seconds = self._reap()
        final = self.output
        numbers = {
            name: (int(found[-1]) if (found := pattern.findall(final)) else None)
            for name, pattern in (("captured", CAPTURED), ("received", RECEIVED), ("dropped", DROPPED))
        }
        if numbers["received"] is not None:
            numbers["received"] //= self.copies
        return {
            "version": tool_version("tcpdump"),
            "argv": self.argv(),
            "exit_code": self.process.returncode,
            "cpu_seconds": cpu_seconds,
            **numbers,
            "copies": self.copies,
            "fence": self.fence,
            "stderr": last_message(final),
        }

    def _reap(self) -> float | None:
        assert self.process is not None
        try:
            cpu_seconds = wait_ended(self.process, STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            cpu_seconds = wait_ended(self.process)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return cpu_seconds

    def kill(self) -> None:
        """End tcpdump at once."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self._reap()


def pcap_problems(result: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with what tcpdump reports."""
    problems = []
    if result["exit_code"] != 0:
        problems.append(f"tcpdump ended with status {result['exit_code']}: {result['stderr']}")
    if result["dropped"]:
        problems.append(f"tcpdump: {result['dropped']} packets dropped by the kernel")
    fence = result["fence"]
    # Live traffic goes on while tcpdump is stopped, so its last numbers may differ; what matters was taken at the fence.
    if not fence or fence["captured"] < fence["received"]:
        problems.append(f"tcpdump did not take every packet: {fence or 'it gave no numbers'}")
    return problems


def wait_ended(process: subprocess.Popen[bytes], timeout: float | None = None) -> float | None:
    """Wait for the end of a child and return the CPU time it used, user and system, in seconds; None where it had ended before.

    The kernel adds a child's time to its parent's ``RUSAGE_CHILDREN`` when the child is waited for.

    Raises
    ------
    subprocess.TimeoutExpired
        It still runs.
    """
    if process.returncode is not None:
        return None
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process.wait(timeout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def last_message(output: str) -> str:
    """Return the last line of a tool's output that is not empty."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def tool_version(tool: str) -> str:
    """Return the first line a tool prints for ``--version``."""
    try:
        finished = subprocess.run(
            [tool, "--version"], capture_output=True, text=True, check=False, timeout=10, env=tool_environment()
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (finished.stdout + finished.stderr).splitlines()
    return lines[0].strip() if lines else ""


def flow_filter(bpf: str | None, flow: str | None) -> str | None:
    """Return a BPF filter for one flow, given as ``PROTO:ADDRESS:PORT`` (``tcp:10.0.0.2:80``), added to another filter."""
    if not flow:
        return bpf
    proto, _, rest = flow.partition(":")
    address, _, port = rest.rpartition(":")
    if proto not in ("tcp", "udp") or not port.isdigit():
        raise UsageError(
            "flow is not PROTO:ADDRESS:PORT", where="--flow", found=repr(flow), expected="e.g. tcp:10.0.0.2:80"
        )
    parts = [proto, f"port {port}"] + ([f"host {address.strip('[]')}"] if address else [])
    return " and ".join(parts + ([f"({bpf})"] if bpf else []))
