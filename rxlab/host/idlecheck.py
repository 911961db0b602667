"""Does perf deliver events raised while a CPU's idle task is current? On some kernels it silently does not.

The check needs no reference: on one CPU each sched_switch must leave the task the one before it entered. A break in that chain
is a window in which events were raised and not delivered; when the chain breaks after entering the idle task, the idle task is
blind, and a SCHED_IDLE spinner per CPU (which keeps it from ever running) is the cure.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from rxlab.errors import CaptureError
from rxlab.host.tools import find_tool, tool_environment

# A share of breaks above this is the fault; single breaks happen when a CPU is stolen by the hypervisor.
FAULT_SHARE = 0.02
MIN_SWITCHES = 20

_LINE = re.compile(r"\[(\d+)\]\s+[\d.]+:\s+sched:sched_switch:\s+(.*)")
_PIDS = (
    re.compile(r"prev_pid=(\d+) prev_prio=.*==> .*next_pid=(\d+) next_prio="),
    # libtraceevent's plugin prints "comm:pid [prio] S ==> comm:pid [prio]"
    re.compile(r":(\d+) \[-?\d+\] \S+ ==> .*:(\d+) \[-?\d+\]"),
)


@dataclass
class IdleCheck:
    """What the chain of task switches says.

    Attributes
    ----------
    switches, breaks : dict
        CPU -> switches seen, and chain breaks among them.
    idle_entries, idle_breaks : dict
        CPU -> entries of the idle task, and how many of them break the chain.
    blind_tids : dict
        tid -> breaks after entering it, for other tasks than the idle task.
    """

    switches: Counter[int] = field(default_factory=Counter)
    breaks: Counter[int] = field(default_factory=Counter)
    idle_entries: Counter[int] = field(default_factory=Counter)
    idle_breaks: Counter[int] = field(default_factory=Counter)
    blind_tids: Counter[int] = field(default_factory=Counter)

    @property
    def blind_cpus(self) -> list[int]:
        """CPUs whose idle task hides events."""
        return sorted(cpu for cpu, n in self.idle_breaks.items() if n > FAULT_SHARE * self.idle_entries[cpu])

    @property
    def is_conclusive(self) -> bool:
        """Whether the idle task ran often enough for a verdict."""
        return sum(self.idle_entries.values()) >= MIN_SWITCHES

    @property
    def has_fault(self) -> bool:
        """Whether the spinners are needed."""
        return bool(self.blind_cpus)

    def to_dict(self) -> dict[str, object]:
        """Return the numbers for JSON."""
        return {
            "fault": self.has_fault,
            "conclusive": self.is_conclusive,
            "blind_cpus": self.blind_cpus,
            "switches": sum(self.switches.values()),
            "breaks": sum(self.breaks.values()),
            "idle_entries": dict(self.idle_entries),
            "idle_breaks": dict(self.idle_breaks),
        }


def check_chain(script: str) -> IdleCheck:
    """Follow the chain of task switches in the text of ``perf script -F cpu,time,event,trace``.

    Lines of one CPU must be in time order, as perf prints them.
    """
    check = IdleCheck()
    running: dict[int, int] = {}
    for line in script.splitlines():
        match = _LINE.search(line)
        pids = next(filter(None, (pattern.search(match[2]) for pattern in _PIDS)), None) if match else None
        if match is None or pids is None:
            continue
        cpu, prev_pid, next_pid = int(match[1]), int(pids[1]), int(pids[2])
        check.switches[cpu] += 1
        entered = running.get(cpu)
        if entered is not None and entered != prev_pid:
            check.breaks[cpu] += 1
            if entered == 0:
                check.idle_breaks[cpu] += 1
            else:
                check.blind_tids[entered] += 1
        if next_pid == 0:
            check.idle_entries[cpu] += 1
        running[cpu] = next_pid
    return check


def check_idle_task(seconds: float = 1.0, perf: str = "perf") -> IdleCheck:
    """Record task switches for a moment, with a few short sleeps on every CPU, and follow the chain.

    Raises
    ------
    CaptureError
        perf is missing or may not record.
    """
    if find_tool(perf) is None:
        raise CaptureError("perf is missing", do="apt install linux-perf (Fedora: dnf install perf).")
    # In memory, and gone with the last process that has it open: a check that is killed leaves nothing behind.
    memory = os.memfd_create("rxlab-idle", os.MFD_CLOEXEC)
    try:
        return check_chain(_record_switches(seconds, perf, memory))
    finally:
        os.close(memory)


def _record_switches(seconds: float, perf: str, memory: int) -> str:
    """Record into the file of a descriptor while every CPU naps, and return what perf prints of it."""
    recording = f"/proc/self/fd/{memory}"
    command = [perf, "record", "-q", "-a", "-k", "CLOCK_MONOTONIC", "-e", "sched:sched_switch", "-o", recording]
    stop = threading.Event()
    threads = [threading.Thread(target=_nap, args=(cpu, stop), daemon=True) for cpu in os.sched_getaffinity(0)]
    for thread in threads:
        thread.start()
    try:
        done = subprocess.run(
            [*command, "--", "sleep", str(seconds)],
            capture_output=True,
            text=True,
            check=False,
            pass_fds=[memory],
            env=tool_environment(),
        )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise CaptureError("perf cannot record", found=lines[0] if lines else f"exit {done.returncode}")
    script = [perf, "script", "-i", recording, "--ns", "-F", "cpu,time,event,trace"]
    printed = subprocess.run(
        script, capture_output=True, text=True, check=False, pass_fds=[memory], env=tool_environment()
    )
    return printed.stdout


def _nap(cpu: int, stop: threading.Event) -> None:
    """Wake up and sleep on one CPU, so that its idle task is entered and left. The affinity is this thread's own."""
    os.sched_setaffinity(0, {cpu})
    while not stop.is_set():
        time.sleep(0.005)


def idle_task_is_blind() -> bool | None:
    """Tell whether perf loses the events of idle tasks on this host; None where a second of looking could not tell."""
    try:
        check = check_idle_task(1.0)
    except CaptureError:
        return None
    return check.has_fault if check.has_fault or check.is_conclusive else None
