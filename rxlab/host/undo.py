"""Putting a host back: settings to their snapshot, helper processes stopped, namespaces of a testbed removed.

Used at the end of a transaction, by its watchdog, and by ``rxlab restore``. Every function may be run again after having been
killed halfway.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rxlab.errors import HostSettingError, RxlabError
from rxlab.host.access import HostAccess, netns_path
from rxlab.host.functiontrace import remove_instance
from rxlab.host.kinds import IRQBALANCE
from rxlab.host.settings import Setting

# In the environment of every process a transaction starts, and so of what those start.
TAG = "RXLAB_TRANSACTION"

# How often what is not back is written again.
PASSES = 2

# How long a helper may take to write out what it has after SIGTERM before it is killed.
STOP_SECONDS = 1.5


@dataclass
class RestoreReport:
    """What a restore did.

    Attributes
    ----------
    restored : list of str
        Labels of settings that were written back.
    foreign : list of str
        Settings that somebody else changed meanwhile: left as they are.
    gone : list of str
        Settings whose interface or namespace no longer exists.
    failed : list of str
        Settings and resources that could not be put back; the journal is kept.
    processes, namespaces : list
        What was stopped and removed.
    messages : list of str
        One line each, for people.
    """

    restored: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)
    namespaces: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything that had to be put back is back."""
        return not self.failed

    def add(self, other: RestoreReport) -> None:
        """Take in what another restore did."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = list(self.messages)
        lines += [f"changed meanwhile by somebody else, left alone: {text}" for text in self.foreign]
        lines += [f"no longer there: {text}" for text in self.gone]
        lines += [f"could not be restored: {text}" for text in self.failed]
        if self.restored:
            lines.append("restored: " + ", ".join(self.restored))
        if self.processes:
            lines.append("stopped processes: " + ", ".join(map(str, self.processes)))
        if self.namespaces:
            lines.append("removed namespaces: " + ", ".join(self.namespaces))
        return lines


class AccessCache:
    """One :class:`HostAccess` per network namespace, opened when first asked for."""

    def __init__(self, open_access: Callable[[str | None], HostAccess] = HostAccess) -> None:
        self._open, self._opened = open_access, dict[str | None, HostAccess]()

    def __call__(self, netns: str | None) -> HostAccess:
        if netns not in self._opened:
            self._opened[netns] = self._open(netns)
        return self._opened[netns]

    def leave_namespaces(self) -> None:
        """Leave all namespaces, but stay on the host itself, where something may be held."""
        for netns in [name for name in self._opened if name is not None]:
            self._opened.pop(netns).close()

    def close(self) -> None:
        """Leave everything."""
        for access in self._opened.values():
            access.close()
        self._opened.clear()


def restore_change(
    change: Mapping[str, Any],
    got: Mapping[str, str] | None,
    access_of: AccessCache,
    report: RestoreReport,
    *,
    note: Callable[[dict[str, str]], None] = lambda foreign: None,
) -> None:
    """Put the settings of one change back to their snapshot and verify that they are.

    Parameters
    ----------
    change : mapping
        The journal's "change" record: each setting with its raw value ``before``, None where it did not exist.
    got : mapping or None
        Canonical values read back after the change, by id: another one than that is somebody else's. None when the change was
        still being written; then, as for a setting that is not in it, any value may be ours.
    note : callable
        Told, before the first write, the values of `got` that somebody else has changed: what `got` is from then on, because a
        driver resets other settings as a side effect of a write, to values that nobody had read back.
    """
    todo: list[tuple[Setting, str]] = []
    foreign: dict[str, str] = {}
    for fields in change["settings"]:
        setting, before = Setting.from_json(fields), fields["before"]
        if before is None:
            _reset_thread(setting, access_of)
            continue
        setting.release(access_of(setting.netns))
        last_seen = got.get(setting.id) if got is not None else None
        now = _value(setting, access_of)
        if last_seen is not None and now is not None and now not in (last_seen, setting.canonical(before)):
            foreign[setting.id] = last_seen
            report.foreign.append(f"{setting.label} is {now}, we had left it at {last_seen}")
        else:
            todo.append((setting, before))
    note(foreign)
    # First backwards, through states that the host has been in: veth cannot leave threaded NAPI when GRO, and with it NAPI, is off
    # already. Then forwards, because a write of low rank may have reset settings of higher rank or brought their queues back;
    # what a driver refuses because of another setting (fewer channels than the RSS table uses) is tried again after that.
    todo.sort(key=lambda item: (item[0].rank == IRQBALANCE, item[0].rank))
    written = [item for item in todo if item[0].wanted is not None and item[0].rank != IRQBALANCE]
    _write_back_all(reversed(written), access_of, report)
    for _ in range(PASSES):
        errors = _write_back_all(todo, access_of, report)
        values = {setting.id: _value(setting, access_of) for setting, _ in todo}
        if all(values[setting.id] in (None, setting.canonical(before)) for setting, before in todo):
            break
    for setting, before in todo:
        now = values[setting.id]
        if now is None:
            report.gone.append(setting.label)
        elif now != setting.canonical(before):
            report.failed.append(
                errors.get(setting.id, f"{setting.label} is {now} and not {setting.canonical(before)}")
            )


def _write_back_all(
    todo: Iterable[tuple[Setting, str]], access_of: AccessCache, report: RestoreReport
) -> dict[str, str]:
    """Write every setting that is not as before, and return what was refused, by id."""
    errors = {}
    for setting, before in todo:
        try:
            if _value(setting, access_of) is not None:
                _write_back(setting, before, access_of(setting.netns), report)
        except RxlabError as error:
            errors[setting.id] = str(error)
    return errors


def _reset_thread(setting: Setting, access_of: AccessCache) -> None:
    """Send a NAPI thread that the change made back to all CPUs: before Linux 6.17 it stays when ``threaded`` goes off."""
    if setting.place.startswith("napi:"):
        with suppress(RxlabError):
            setting.write(access_of(setting.netns), "")


def _value(setting: Setting, access_of: AccessCache) -> str | None:
    """Return the canonical value now, None where interface, queue or namespace are gone."""
    try:
        return setting.canonical(setting.read(access_of(setting.netns)))
    except RxlabError:
        return None


def _write_back(setting: Setting, before: str, access: HostAccess, report: RestoreReport) -> None:
    for attempt in range(4):
        if setting.read(access) == before:
            return
        try:
            setting.write(access, before)
        except HostSettingError as error:
            # A driver in the middle of a reset says so and is ready a moment later.
            if error.found != os.strerror(errno.EBUSY) or attempt == 3:
                raise
            time.sleep(0.05)
            continue
        if setting.label not in report.restored:
            report.restored.append(setting.label)
        return


def stop_processes(processes: Iterable[tuple[int, int]], tag: str | None, namespaces: Iterable[str]) -> list[int]:
    """Stop processes: SIGTERM so that perf and tcpdump write out what they have, SIGKILL after :data:`STOP_SECONDS`.

    Parameters
    ----------
    processes : iterable of (pid, start time)
        Those that were registered; a pid that now belongs to another process is left alone.
    tag : str or None
        Value of :data:`TAG` in the environment of others to stop.
    namespaces : iterable of str
        Network namespaces whose processes are to stop.

    Returns
    -------
    list of int
        Pids that were stopped.
    """
    registered, names = set(processes), list(namespaces)
    stopped: set[int] = set()
    deadline, clean = time.monotonic() + STOP_SECONDS, 0
    while True:
        found = _running(registered, tag, names)
        hard = time.monotonic() > deadline
        for pid, start in found:
            if pid not in stopped or hard:
                _signal(pid, start, signal.SIGKILL if hard else signal.SIGTERM)
            stopped.add(pid)
        # Twice, because a process that was between fork and exec showed no tag yet.
        clean = 0 if found else clean + 1
        if clean == 2 or time.monotonic() > deadline + STOP_SECONDS:
            return sorted(stopped)
        time.sleep(0.02)


def _running(registered: set[tuple[int, int]], tag: str | None, namespaces: list[str]) -> list[tuple[int, int]]:
    inodes = set()
    for name in namespaces:
        try:
            status = netns_path(name).stat()
            inodes.add((status.st_dev, status.st_ino))
        except OSError:
            continue
    needle = f"{TAG}={tag}".encode() if tag else None
    found = []
    candidates = [int(name) for name in os.listdir("/proc") if name.isdigit()] if needle or inodes else []
    for pid in {*candidates, *(pid for pid, _ in registered)} - {os.getpid()}:
        start = process_start(pid)
        if start is not None and ((pid, start) in registered or _belongs(pid, needle, inodes)):
            found.append((pid, start))
    return found


def _belongs(pid: int, needle: bytes | None, inodes: set[tuple[int, int]]) -> bool:
    try:
        if needle and needle in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return True
        if inodes:
            status = os.stat(f"/proc/{pid}/ns/net")
            return (status.st_dev, status.st_ino) in inodes
    except OSError:
        pass
    return False


def process_start(pid: int) -> int | None:
    """Return a running process's start time in clock ticks since boot; None for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _signal(pid: int, start: int, number: signal.Signals) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if process_start(pid) == start:
            if os.sched_getscheduler(pid) == os.SCHED_IDLE:
                # A spinner would die only when the CPU has nothing else to do.
                os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
            signal.pidfd_send_signal(descriptor, number)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def remove_namespaces(names: Iterable[str], links: Iterable[str], report: RestoreReport) -> None:
    """Delete network namespaces and links that a testbed made; those already gone are fine."""
    for name in names:
        if netns_path(name).exists():
            _ip(["netns", "delete", name], report)
            report.namespaces.append(name)
    for link in links:
        if Path("/sys/class/net", link).exists():
            _ip(["link", "delete", link], report)


def remove_instances(names: Iterable[str], root: Path, report: RestoreReport) -> None:
    """Remove tracefs instances in which functions were traced; those already gone are fine."""
    for name in names:
        try:
            remove_instance(name, root)
        except OSError as error:
            report.failed.append(f"tracefs instance {name}: {error.strerror}")


def _ip(arguments: list[str], report: RestoreReport) -> None:
    # A session of its own: Ctrl-C goes to the terminal's whole foreground group, and this has to run to its end.
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode != 0:
        report.failed.append(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def interrupt_later() -> Iterator[None]:
    """Let a Ctrl-C wait until the restore is done."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pending:
            before(*pending[0])


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Note Ctrl-C instead of raising it anywhere; raise it at the end of the block.

    A KeyboardInterrupt in the middle of starting or stopping perf and tcpdump would leave a run that cannot say what it is.
    """
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield noted
        return
    signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
        if noted:
            before(noted[0], None)
