"""CPU sets as text: lists (``0,2-3``), masks (``0x5``), ``off``; and which CPUs are online."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from rxlab.host.access import HostAccess

CPU_DIR = "sys/devices/system/cpu"
# CPUs said as intent, relative to the CPU the application reads on; topology.py resolves them.
CPU_INTENTS = ("same-core", "sibling", "same-llc", "other-node")


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


def mask_to_cpus(mask: str) -> str:
    """Return a sysfs bitmap (``00000000,00000003``) as a CPU list."""
    return format_cpus(parse_cpus("0x" + mask.strip().replace(",", "")))


def online_cpus(access: HostAccess) -> list[int]:
    """Return the CPUs that are online."""
    text = access.try_read(f"{CPU_DIR}/online")
    return parse_cpus(text) if text is not None else list(range(os.cpu_count() or 1))
