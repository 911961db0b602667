"""CPUs, cores, last-level caches, NUMA nodes; interfaces, their queues and the queues' interrupts: host.json."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable

from rxlab.host.access import HostAccess

CPU_DIR = "sys/devices/system/cpu"


def parse_cpus(text: str) -> list[int]:
    """Return the CPUs of a list (``0,2-3``), a mask (``0x5``) or ``off``, ascending; ValueError when it is none of these."""
    text = text.strip().lower()
    if text in ("", "off", "none"):
        return []
    if text.startswith("0x"):
        mask = int(text, 16)
        return [cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1]
    cpus: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part, re.ASCII)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f"not a CPU list: {text!r}")
        cpus.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(cpus)


def format_cpus(cpus: Iterable[int]) -> str:
    """Return CPUs as the kernel lists them, ``0-1,3``; ``off`` for none."""
    parts: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if parts and parts[-1][1] == cpu - 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts) or "off"


def online_cpus(access: HostAccess) -> list[int]:
    """Return the CPUs that are online."""
    text = access.try_read(f"{CPU_DIR}/online")
    return parse_cpus(text) if text is not None else list(range(os.cpu_count() or 1))


def queue_irqs(access: HostAccess, iface: str) -> dict[int, int]:
    """Return ``{rx queue number: irq}`` of an interface; empty for one without interrupts of its own (veth, lo)."""
    return {}


def local_identity(iface: str | None, netns: str | None = None) -> tuple[list[str], list[str]]:
    """Return the MAC and IP addresses of an interface, or of all interfaces of the namespace.

    Returns
    -------
    (list of str, list of str)
        MACs as ``aa:bb:cc:dd:ee:ff``, addresses without prefix length.
    """
    with HostAccess(netns) as access:
        return _identity(access, iface)


def _identity(access: HostAccess, iface: str | None) -> tuple[list[str], list[str]]:
    if not access.is_real:
        return [], []
    command = ["ip", "-json", "address", "show", *(["dev", iface] if iface else [])]
    done = access.call(subprocess.run, command, capture_output=True, text=True, check=False)
    links = json.loads(done.stdout or "[]") if done.returncode == 0 else []
    macs = [link["address"] for link in links if link.get("address")]
    return macs, [entry["local"] for link in links for entry in link.get("addr_info", ()) if "local" in entry]
