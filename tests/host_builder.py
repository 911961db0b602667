"""A made-up host for tests: a sysfs and procfs tree of two CPUs and a NIC with two queues, and a driver that can misbehave."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from rxlab.host.access import HostAccess
from rxlab.host.ethtool import Ethtool

INTERRUPTS = """\
           CPU0       CPU1
  0:         10          0   IO-APIC   2-edge      timer
 24:          0          5   PCI-MSI 1048576-edge      eth0
 25:        100          7   PCI-MSI 1048577-edge      eth0-TxRx-0
 26:          8        200   PCI-MSI 1048578-edge      eth0-TxRx-1
 27:          1          1   PCI-MSI 1048579-edge      eth01-TxRx-0
LOC:       1000       2000   Local timer interrupts
ERR:          3
"""

# Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
ROUTES = (
    "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
    "uplink\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
    "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
)

FILES = {
    "sys/devices/system/cpu/online": "0-1",
    "sys/devices/system/cpu/present": "0-2",
    **{
        f"sys/devices/system/cpu/cpu{cpu}/{name}": value
        for cpu in (0, 1)
        for name, value in {
            "topology/physical_package_id": "0",
            "topology/thread_siblings_list": "0-1",
            "cache/index0/level": "1",
            "cache/index0/shared_cpu_list": str(cpu),
            "cache/index3/level": "3",
            "cache/index3/shared_cpu_list": "0-1",
            "cpufreq/scaling_governor": "powersave",
        }.items()
    },
    "sys/devices/system/node/node0/cpulist": "0",
    "sys/devices/system/node/node1/cpulist": "1",
    "sys/class/net/eth0/address": "02:00:00:00:00:01",
    "sys/class/net/eth0/mtu": "1500",
    "sys/class/net/eth0/operstate": "up",
    "sys/class/net/eth0/gro_flush_timeout": "0",
    "sys/class/net/eth0/napi_defer_hard_irqs": "0",
    "sys/class/net/eth0/threaded": "0",
    "sys/class/net/uplink/mtu": "1500",
    "sys/class/net/uplink/queues/rx-0/rps_cpus": "0",
    **{
        f"sys/class/net/eth0/queues/{way}-{queue}/{name}": value
        for queue in (0, 1)
        for way, name, value in (
            ("rx", "rps_cpus", "00000000,00000000"),
            ("rx", "rps_flow_cnt", "0"),
            ("tx", "xps_cpus", "00000000,00000001"),
        )
    },
    "sys/class/net/eth0/device/msi_irqs/24": "msix",
    "sys/class/net/eth0/device/msi_irqs/25": "msix",
    "sys/class/net/eth0/device/msi_irqs/26": "msix",
    "proc/irq/25/smp_affinity_list": "0-1",
    "proc/irq/26/smp_affinity_list": "0-1",
    "proc/irq/26/effective_affinity_list": "1",
    "proc/interrupts": INTERRUPTS.rstrip("\n"),
    "proc/thread-self/net/route": ROUTES.rstrip("\n"),
    "proc/sys/net/core/rps_sock_flow_entries": "0",
    "proc/sys/net/core/busy_poll": "0",
    "proc/sys/net/core/netdev_budget": "300",
    "proc/sys/net/core/netdev_tstamp_prequeue": "1",
    "proc/sys/net/ipv4/tcp_early_demux": "1",
    "proc/sys/kernel/osrelease": "6.1.0-fake",
    "proc/sys/kernel/hostname": "fake",
    "proc/77/comm": "irqbalance",
}


def build_tree(root: Path) -> Path:
    """Write the tree below `root`."""
    for name, value in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value + "\n")
    return root


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Return every file of the tree."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


class FakeNic(Ethtool):
    """A driver that, like many, recreates its queues when their number changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.groups = {
            "channels": {"combined": 2, "rx": 0, "tx": 0},
            "rings": {"rx": 256, "tx": 256},
            "coalesce": {"rx-usecs": 3, "rx-frames": 0, "adaptive-rx": 1, "tx-usecs": 3, "tx-frames": 0},
        }
        self.switches = {"rx-gro": True, "rx-lro": False, "rx-hashing": True, "tx-nocache-copy": False}
        self.writes: list[tuple[str, str, object]] = []

    def driver(self, iface: str) -> dict[str, str]:
        return {"driver": "fake", "version": "1", "firmware": "", "bus": "0000:00:00.0"}

    def timestamping(self, iface: str) -> dict[str, object]:
        return {"capabilities": [], "phc": None, "tx_types": 0, "rx_filters": []}

    def statistics(self, iface: str) -> dict[str, int]:
        return {"rx_drops": 0}

    def get(self, iface: str, group: str) -> dict[str, int]:
        return dict(self.groups[group])

    def set(self, iface: str, group: str, name: str, value: int) -> None:
        self.writes.append((group, name, value))
        self.groups[group][name] = value
        if group == "channels":
            queues = self.root / f"sys/class/net/{iface}/queues"
            for number in range(2):
                for way, key, text in (("rx", "rps_cpus", "0"), ("rx", "rps_flow_cnt", "0"), ("tx", "xps_cpus", "0")):
                    folder = queues / f"{way}-{number}"
                    (folder / key).unlink(missing_ok=True)
                    if number < value:
                        folder.mkdir(exist_ok=True)
                        (folder / key).write_text(text + "\n")
                for way in ("rx", "tx"):
                    if number >= value and (queues / f"{way}-{number}").exists():
                        (queues / f"{way}-{number}").rmdir()

    def features(self, iface: str) -> dict[str, dict[str, bool]]:
        return {name: {"active": on, "requested": on, "fixed": False} for name, on in self.switches.items()}

    def set_feature(self, iface: str, name: str, on: bool) -> None:
        self.writes.append(("features", name, on))
        self.switches[name] = on
        if name == "rx-gro" and not on:
            self.switches["tx-nocache-copy"] = True  # a driver that switches one feature with another


class FakeHost:
    """Opens accesses to one made-up tree; ``errors`` and ``rounds`` say how its files misbehave."""

    def __init__(self, root: Path) -> None:
        self.root = build_tree(root)
        self.nic = FakeNic(root)
        self.errors: dict[str, int] = {}  # file name's end -> errno of every write
        self.once: dict[str, int] = {}  # the same, of the next write only
        self.rounds: dict[str, Callable[[str], str]] = {}

    def open(self, netns: str | None = None) -> HostAccess:
        return FaultyAccess(self, netns)

    def read(self, name: str) -> str:
        return (self.root / name).read_text().rstrip("\n")

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text + "\n")


class FaultyAccess(HostAccess):
    """Access to a :class:`FakeHost`."""

    def __init__(self, host: FakeHost, netns: str | None) -> None:
        super().__init__(netns, host.root, host.nic)
        self.host = host

    def write(self, name: str, text: str) -> None:
        for end, code in (*self.host.errors.items(), *self.host.once.items()):
            if name.endswith(end):
                self.host.once.pop(end, None)
                raise OSError(code, os.strerror(code))
        for end, change in self.host.rounds.items():
            if name.endswith(end):
                text = change(text)
        super().write(name, text)


EBUSY, EIO, EPERM = errno.EBUSY, errno.EIO, errno.EPERM
