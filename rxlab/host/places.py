"""Where settings live, one pair of functions per kind of place: read its raw text, write it.

A place is text so that a journal can name it: ``file:PATH``, ``ethtool:GROUP:NAME``, ``ethtool:features:NAME``, ``rss:table``,
``rss:key``, ``irq:queue:N``, ``irq:action:NAME``, ``napi:N`` and ``napi:all``, ``process:NAME``, ``hold:PATH``. Interrupts and threads are named by
what they serve: their numbers change when a driver recreates its queues. Everything here raises OSError with the kernel's
answer, or KeyError for what the host does not have.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import time
from collections.abc import Callable

from rxlab.host.access import HostAccess
from rxlab.host.cpulist import CPU_DIR, parse_cpus
from rxlab.host.interrupts import device_irqs, queue_irqs
from rxlab.host.kinds import parse_pattern
from rxlab.host.napi import allowed_cpus, napi_threads

# Raw text of an interrupt's place: the mask, then where the kernel had put the interrupt within it.
EFFECTIVE = "|"
MOVE_SECONDS, STOP_SECONDS = 0.01, 1.0


def read_place(place: str, iface: str | None, access: HostAccess) -> str:
    """Return the raw text of a place."""
    scheme, rest = place.split(":", 1)
    return _READ[scheme](rest, iface or "", access)


def write_place(place: str, iface: str | None, access: HostAccess, raw: str) -> None:
    """Write a raw text, as :func:`read_place` returned it or a setting encoded it."""
    scheme, rest = place.split(":", 1)
    _WRITE[scheme](rest, iface or "", access, raw)


def release_place(place: str, access: HostAccess) -> None:
    """Let go of a place that is only held; nothing for the others."""
    scheme, rest = place.split(":", 1)
    if scheme == "hold":
        access.let_go(rest)


# -- files


def _read_file(rest: str, iface: str, access: HostAccess) -> str:
    return access.read(rest)


def _write_file(rest: str, iface: str, access: HostAccess, raw: str) -> None:
    access.write(rest, raw)


# -- ethtool


def _read_ethtool(rest: str, iface: str, access: HostAccess) -> str:
    group, name = rest.split(":")
    if group == "features":
        return str(int(access.call(access.ethtool.features, iface)[name]["requested"]))
    if group == "hwtstamp":
        return access.call(access.ethtool.stamping, iface)
    return str(access.call(access.ethtool.get, iface, group)[name])


def _write_ethtool(rest: str, iface: str, access: HostAccess, raw: str) -> None:
    group, name = rest.split(":")
    if group == "features":
        state = access.call(access.ethtool.features, iface)[name]
        if state["fixed"] and state["requested"] != (raw == "1"):
            # The kernel takes such a wish without a word and does nothing (__ethtool_set_features, net/ethtool/ioctl.c).
            raise OSError(errno.EOPNOTSUPP, "the driver does not let it be switched")
        access.call(access.ethtool.set_feature, iface, name, raw == "1")
    elif group == "hwtstamp":
        access.call(access.ethtool.set_stamping, iface, raw)
    else:
        access.call(access.ethtool.set, iface, group, name, int(raw))


def _read_rss(rest: str, iface: str, access: HostAccess) -> str:
    table, key = access.call(access.ethtool.rss, iface)
    if not (table if rest == "table" else key):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return ",".join(map(str, table)) if rest == "table" else key.hex(":")


def _write_rss(rest: str, iface: str, access: HostAccess, raw: str) -> None:
    if rest == "key":
        access.call(access.ethtool.set_rss, iface, key=bytes.fromhex(raw.replace(":", "")))
        return
    size, pattern = len(access.call(access.ethtool.rss, iface)[0]), parse_pattern(raw)
    table = [pattern[entry % len(pattern)] for entry in range(size)]
    n_rings = access.call(access.ethtool.rings_of_rss, iface)
    # The driver's own table (ethtool_rxfh_indir_default) is asked for by name: written out it would count as configured by
    # somebody, and the kernel would refuse fewer channels from then on.
    is_default = table == [entry % n_rings for entry in range(size)]
    access.call(access.ethtool.set_rss, iface, table=[] if is_default else table)


# -- interrupts


def _irq(rest: str, iface: str, access: HostAccess) -> int:
    what, _, name = rest.partition(":")
    found = queue_irqs(access, iface).get(int(name)) if what == "queue" else device_irqs(access, iface).get(name)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return found


def _read_irq(rest: str, iface: str, access: HostAccess) -> str:
    irq = _irq(rest, iface, access)
    effective = access.try_read(f"proc/irq/{irq}/effective_affinity_list")
    return access.read(f"proc/irq/{irq}/smp_affinity_list") + (EFFECTIVE + effective if effective else "")


def _write_irq(rest: str, iface: str, access: HostAccess, raw: str) -> None:
    mask, _, effective = raw.partition(EFFECTIVE)
    file = f"proc/irq/{_irq(rest, iface, access)}/smp_affinity_list"
    if effective:
        # An interrupt stays on its CPU as long as the mask allows (assign_vector_locked, arch/x86/kernel/apic/vector.c): first
        # the CPU it was on, then the mask it had. Without interrupt remapping it moves when it next comes: a quiet one is left
        # to the kernel.
        access.write(file, effective)
        _wait_for(lambda: _read_irq(rest, iface, access).partition(EFFECTIVE)[2] == effective, MOVE_SECONDS)
    access.write(file, mask)


# -- threads and processes


def _threads(rest: str, iface: str, access: HostAccess) -> list[int]:
    threads = napi_threads(access, iface)
    chosen = threads if rest == "all" else threads[int(rest) : int(rest) + 1]
    if not chosen:
        raise FileNotFoundError(errno.ENOENT, "no such NAPI thread; is 'threaded' on?")
    return chosen


def _read_napi(rest: str, iface: str, access: HostAccess) -> str:
    found = {allowed_cpus(access, tid) for tid in _threads(rest, iface, access)}
    if len(found) > 1:
        raise OSError(errno.EINVAL, f"threads on different CPUs: {', '.join(sorted(found))}")
    return found.pop()


def _write_napi(rest: str, iface: str, access: HostAccess, raw: str) -> None:
    for tid in _threads(rest, iface, access):
        # "" is where the kernel starts a thread: on every CPU
        access.set_task_cpus(tid, parse_cpus(raw or access.read(f"{CPU_DIR}/present")))


def process_states(access: HostAccess, comm: str) -> dict[int, str]:
    """Return ``{pid: state letter}`` of the processes of a name; T is one that was stopped."""
    found = {}
    for name in access.list("proc"):
        if name.isdigit() and access.try_read(f"proc/{name}/comm") == comm:
            stat = access.try_read(f"proc/{name}/stat") or ""
            state = stat.rpartition(")")[2].split()[:1]
            if state and state[0] not in "ZX":
                found[int(name)] = state[0]
    return found


def _read_process(rest: str, iface: str, access: HostAccess) -> str:
    return str(int(any(state != "T" for state in process_states(access, rest).values())))


def _write_process(rest: str, iface: str, access: HostAccess, raw: str) -> None:
    """Pause or continue: a stopped process keeps its pid, its arguments and what it has learned, and its manager sees it alive."""
    pids = process_states(access, rest)
    if raw == "1" and not pids:
        raise ProcessLookupError(errno.ESRCH, f"{rest} is not running")
    for pid in pids:
        access.signal(pid, signal.SIGCONT if raw == "1" else signal.SIGSTOP)
    # The signal is seen when the process next runs.
    _wait_for(lambda: _read_process(rest, iface, access) == raw, STOP_SECONDS)


def _wait_for(is_so: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.002)


# -- wishes that last as long as a file is open


def _read_hold(rest: str, iface: str, access: HostAccess) -> str:
    # Documentation/power/pm_qos_interface.rst: s32 microseconds, the smallest of everybody's wishes
    return str(struct.unpack("=i", access.read_bytes(rest, 4))[0])


def _write_hold(rest: str, iface: str, access: HostAccess, raw: str) -> None:
    access.hold(rest, struct.pack("=i", int(raw)))


_READ: dict[str, Callable[[str, str, HostAccess], str]] = {
    "file": _read_file,
    "ethtool": _read_ethtool,
    "rss": _read_rss,
    "irq": _read_irq,
    "napi": _read_napi,
    "process": _read_process,
    "hold": _read_hold,
}
_WRITE: dict[str, Callable[[str, str, HostAccess, str], None]] = {
    "file": _write_file,
    "ethtool": _write_ethtool,
    "rss": _write_rss,
    "irq": _write_irq,
    "napi": _write_napi,
    "process": _write_process,
    "hold": _write_hold,
}
