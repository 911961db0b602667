"""The kernel's own counters before and after a recording: they cost nothing, work untraced, and judge the join independently."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rxlab.host.access import HostAccess
from rxlab.host.interrupts import parse_interrupts

# /proc/net/softnet_stat, net/core/net-procfs.c: hexadecimal columns that count; column 12 is the CPU since Linux 5.10.
_SOFTNET = {
    "processed": 0,
    "dropped": 1,
    "time_squeeze": 2,
    "cpu_collision": 8,
    "received_rps": 9,
    "flow_limit_count": 10,
}
_SOFTNET_CPU = 12
_CPU_TIMES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")

# /proc/thread-self: a thread that entered a namespace sees its own, /proc/net would be the main thread's.
_NET = "proc/thread-self/net"


def read_counters(ifaces: list[str], netns: str | None = None, root: Path = Path("/")) -> dict[str, Any]:
    """Return the counters now (layout: rundir.py, counters.json).

    Parameters
    ----------
    ifaces : list of str
        Interfaces whose own counters to read.
    netns : str, optional
        Network namespace of the interfaces and of the protocol counters; the others are the host's.
    """
    with HostAccess(None, root) as host, HostAccess(netns, root) as inside:
        return {
            "interrupts": parse_interrupts(host.try_read("proc/interrupts") or ""),
            "softirqs": parse_softirqs(host.try_read("proc/softirqs") or ""),
            "softnet_stat": parse_softnet_stat(host.try_read("proc/net/softnet_stat") or ""),
            "cpu_time_ns": parse_cpu_times(host.try_read("proc/stat") or ""),
            "nstat": _protocol_counters(inside),
            "ethtool": {name: _driver_counters(inside, name) for name in ifaces},
            "interfaces": {name: _interface_counters(inside, name) for name in ifaces},
        }


def parse_softirqs(text: str) -> dict[str, list[int]]:
    """Return ``{softirq name: [count per CPU]}`` of /proc/softirqs."""
    rows = (line.partition(":") for line in text.splitlines()[1:])
    return {name.strip(): [int(count) for count in counts.split()] for name, _, counts in rows}


def parse_softnet_stat(text: str) -> list[dict[str, int]]:
    """Return one dict per CPU of /proc/net/softnet_stat; each count is the kernel's 32-bit one and wraps."""
    rows = []
    for number, line in enumerate(text.splitlines()):
        columns = [int(field, 16) for field in line.split()]
        cpu = columns[_SOFTNET_CPU] if len(columns) > _SOFTNET_CPU else number
        rows.append({"cpu": cpu, **{name: columns[i] for name, i in _SOFTNET.items() if i < len(columns)}})
    return rows


def parse_cpu_times(text: str) -> list[dict[str, int]]:
    """Return one dict per CPU of /proc/stat, in ns; the kernel counts in ticks, commonly of 10 ms."""
    tick_ns = 10**9 // os.sysconf("SC_CLK_TCK")
    rows = []
    for line in text.splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit():
            times = (int(count) * tick_ns for count in ticks[: len(_CPU_TIMES)])
            rows.append({"cpu": int(name[3:]), **dict(zip(_CPU_TIMES, times, strict=False))})
    return rows


def parse_protocol_table(text: str) -> dict[str, int]:
    """Return ``{"TcpExtTCPDelivered": n}`` of /proc/net/snmp or netstat: a line of names, then a line of values."""
    lines = text.splitlines()
    counters = {}
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        prefix = names.partition(":")[0]
        for name, value in zip(names.split()[1:], values.split()[1:], strict=False):
            counters[prefix + name] = int(value)
    return counters


def _protocol_counters(access: HostAccess) -> dict[str, int]:
    counters = {}
    for name in ("snmp", "netstat"):
        counters.update(parse_protocol_table(access.try_read(f"{_NET}/{name}") or ""))
    for line in (access.try_read(f"{_NET}/snmp6") or "").splitlines():
        name, value = line.split()
        counters[name] = int(value)
    return counters


def _driver_counters(access: HostAccess, iface: str) -> dict[str, int]:
    try:
        return access.call(access.ethtool.statistics, iface)
    except OSError:
        return {}


def _interface_counters(access: HostAccess, iface: str) -> dict[str, int]:
    folder = f"sys/class/net/{iface}/statistics"
    values = {name: access.try_read(f"{folder}/{name}") for name in access.list(folder)}
    return {name: int(value) for name, value in values.items() if value is not None}


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return after minus before, in the same layout.

    What is new after counts from 0; what is gone is left out. softnet_stat counts modulo 2**32.
    """
    softnet = _by_cpu(before["softnet_stat"], after["softnet_stat"], 2**32)
    return {
        **{key: _subtract(before.get(key, {}), value) for key, value in after.items() if isinstance(value, dict)},
        "softnet_stat": softnet,
        "cpu_time_ns": _by_cpu(before["cpu_time_ns"], after["cpu_time_ns"], None),
    }


def counters_json(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of counters.json."""
    return {"before": before, "after": after, "difference": difference(before, after)}


def _subtract(before: Any, after: Any) -> Any:
    if isinstance(after, dict):
        old = before if isinstance(before, dict) else {}
        return {key: _subtract(old.get(key), value) for key, value in after.items()}
    if isinstance(after, list):
        # A CPU that came online adds a column.
        old_list = list(before or ()) + [0] * len(after)
        return [value - old for value, old in zip(after, old_list, strict=False)]
    return after - (before or 0) if isinstance(after, int) else after


def _by_cpu(before: list[dict[str, int]], after: list[dict[str, int]], modulus: int | None) -> list[dict[str, int]]:
    old = {row["cpu"]: row for row in before}
    rows = []
    for row in after:
        start = old.get(row["cpu"], {})
        counts = {name: value - start.get(name, 0) for name, value in row.items() if name != "cpu"}
        rows.append({"cpu": row["cpu"], **{name: n % modulus if modulus else n for name, n in counts.items()}})
    return rows
