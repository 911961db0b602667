"""/proc/interrupts, and which interrupt serves which receive queue."""

from __future__ import annotations

import re

from rxlab.host.access import HostAccess

# Parts of interrupt names that are not receive queues: transmit-only vectors, management, link changes, command queues.
_NOT_RX = re.compile(
    r"output|(?<!x-)(?<!r)tx(?!-?rx)|config|event|async|cmd|ctrl|control|mgmnt|mgmt|admin|misc|other|lsc|aeq|fdir", re.I
)


def parse_interrupts(text: str) -> dict[str, dict[str, object]]:
    """Return ``{irq: {"label", "cpus": [count per CPU column]}}`` of /proc/interrupts; irq is a number or a name as ``LOC``."""
    lines = text.splitlines()
    if not lines:
        return {}
    n_cpus = len(lines[0].split())
    table: dict[str, dict[str, object]] = {}
    for line in lines[1:]:
        name, _, rest = line.partition(":")
        fields = rest.split()
        counts = [int(field) for field in fields[:n_cpus] if field.isdigit()]
        label = " ".join(fields[len(counts) :])
        # ERR and MIS have one number for the whole machine.
        table[name.strip()] = {"label": label, "cpus": counts + [0] * (n_cpus - len(counts))}
    return table


def device_irqs(access: HostAccess, iface: str) -> dict[str, int]:
    """Return ``{action: irq}`` of every interrupt of an interface's device; empty for one without (veth, lo).

    Interrupts are found by the device's ``msi_irqs`` or by name.
    """
    device = f"sys/class/net/{iface}/device"
    if not access.exists(device):
        return {}
    owned = set(access.list(f"{device}/msi_irqs"))
    names = _device_names(access, iface)
    irqs: dict[str, int] = {}
    for irq, row in parse_interrupts(access.try_read("proc/interrupts") or "").items():
        action = str(row["label"]).split(" ")[-1]
        if irq.isdigit() and (irq in owned or any(_names(name, action) for name in names)):
            irqs.setdefault(action, int(irq))
    return irqs


def queue_irqs(access: HostAccess, iface: str) -> dict[int, int]:
    """Return ``{rx queue number: irq}`` of an interface; empty for one without interrupts of its own (veth, lo).

    Which queue an interrupt serves is only in its name (``eth0-TxRx-3``, ``virtio0-input.1``, ``mlx5_comp2@pci:...``). A driver
    that names them otherwise is left out.
    """
    names = _device_names(access, iface)
    queues: dict[int, int] = {}
    whole: list[int] = []  # named as the device: the only vector, or the one for link changes
    for action, irq in device_irqs(access, iface).items():
        rest = _strip(action, names)
        if _NOT_RX.search(rest):
            continue
        number = re.search(r"(\d+)\D*$", rest)
        if number or re.search(r"rx|input", rest, re.I):
            queues.setdefault(int(number[1]) if number else 0, irq)
        elif not rest.strip("-:. "):
            whole.append(irq)
    return queues or ({0: whole[0]} if len(whole) == 1 else {})


def _device_names(access: HostAccess, iface: str) -> set[str]:
    # A virtio device's interrupts are those of the PCI device it sits on, which may serve others too: by name.
    bus_name = access.link_name(f"sys/class/net/{iface}/device") or ""
    return {name for name in (iface, bus_name) if name}


def _names(device: str, action: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(device)}(?!\d)", action) is not None


def _strip(action: str, names: set[str]) -> str:
    """Drop device names and the bus address, whose digits and letters are no queue."""
    action = action.partition("@")[0]
    for name in sorted(names, key=len, reverse=True):
        action = action.replace(name, "")
    return action
