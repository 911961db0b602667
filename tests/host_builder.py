"""A made-up host for tests: a sysfs and procfs tree of two CPUs and a NIC with two queues, and a driver that can misbehave."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

from rxlab.host.access import HostAccess
from rxlab.host.cpulist import format_cpus, parse_cpus
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
            "cpuidle/state0/disable": "0",
            "cpuidle/state1/disable": "0",
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
            ("tx", "xps_rxqs", "0"),
        )
    },
    "sys/class/net/eth0/device/msi_irqs/24": "msix",
    "sys/class/net/eth0/device/msi_irqs/25": "msix",
    "sys/class/net/eth0/device/msi_irqs/26": "msix",
    "proc/irq/24/smp_affinity_list": "0-1",
    "proc/irq/25/smp_affinity_list": "0-1",
    "proc/irq/26/smp_affinity_list": "0-1",
    "proc/irq/24/effective_affinity_list": "0",
    "proc/irq/25/effective_affinity_list": "0",
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
    "proc/sys/net/core/busy_read": "0",
    "proc/sys/net/core/netdev_budget_usecs": "8000",
    "proc/77/comm": "irqbalance",
    "proc/77/stat": "77 (irqbalance) S 1 77 77",
    "dev/cpu_dma_latency": "2000000000",
}
# NAPI threads of eth0, which exist while it is threaded.
THREADS = {88: "napi/eth0-8193", 89: "napi/eth0-8194"}


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
    """A driver that, like many, recreates its queues and interrupts when their number changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.groups = {
            "channels": {"combined-max": 2, "combined": 2, "rx": 0, "tx": 0, "other": 1},
            "rings": {"rx-max": 4096, "rx": 256, "tx": 256},
            "coalesce": {"rx-usecs": 3, "rx-frames": 0, "adaptive-rx": 0, "tx-usecs": 3, "tx-frames": 0},
        }
        self.switches = {"rx-gro": True, "rx-lro": False, "rx-hashing": True, "tx-nocache-copy": False}
        self.table, self.key, self.is_configured = [entry % 2 for entry in range(16)], bytes(range(40)), False
        self.writes: list[tuple[str, str, object]] = []
        self.errors: dict[str, int] = {}  # "GROUP:NAME" -> errno of every write
        self.once: dict[str, int] = {}  # the same, of the next write only
        self.rounds: dict[str, Callable[[int], int]] = {}

    def state(self) -> object:
        """Return what a restore has to bring back."""
        return json.loads(json.dumps([self.groups, self.switches, self.table, self.key.hex(), self.is_configured]))

    def driver(self, iface: str) -> dict[str, str]:
        return {"driver": "fake", "version": "1", "firmware": "", "bus": "0000:00:00.0"}

    def timestamping(self, iface: str) -> dict[str, object]:
        return {"capabilities": [], "phc": None, "tx_types": 0, "rx_filters": []}

    def statistics(self, iface: str) -> dict[str, int]:
        return {"rx_drops": 0}

    def get(self, iface: str, group: str) -> dict[str, int]:
        self._needs_a_device(iface)
        return dict(self.groups[group])

    def set(self, iface: str, group: str, name: str, value: int) -> None:
        value = self._take(group, name, value)
        if group == "channels" and self.is_configured and max(self.table) >= value:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # ethtool_set_channels, net/ethtool/ioctl.c
        self.groups[group][name] = value
        if group == "channels":
            self._recreate_queues(iface, value)

    def _recreate_queues(self, iface: str, n_queues: int) -> None:
        queues = self.root / f"sys/class/net/{iface}/queues"
        fresh = (("rx", "rps_cpus"), ("rx", "rps_flow_cnt"), ("tx", "xps_cpus"), ("tx", "xps_rxqs"))
        for number in range(2):
            for way, key in fresh:
                folder = queues / f"{way}-{number}"
                (folder / key).unlink(missing_ok=True)
                if number < n_queues:
                    folder.mkdir(exist_ok=True)
                    (folder / key).write_text("00000000,00000000\n" if key.endswith("_cpus") else "0\n")
            for way in ("rx", "tx"):
                if number >= n_queues and (queues / f"{way}-{number}").exists():
                    (queues / f"{way}-{number}").rmdir()
        for irq in (24, 25, 26):
            folder, is_there = self.root / f"proc/irq/{irq}", irq < 25 + n_queues
            for name, text in (("smp_affinity_list", "0-1"), ("effective_affinity_list", "0")):
                (folder / name).unlink(missing_ok=True)
                if is_there:
                    folder.mkdir(exist_ok=True)
                    (folder / name).write_text(text + "\n")
        lines = [line for line in INTERRUPTS.splitlines() if n_queues == 2 or "eth0-TxRx-1" not in line]
        (self.root / "proc/interrupts").write_text("\n".join(lines) + "\n")
        if not self.is_configured:
            self.table = [entry % n_queues for entry in range(16)]

    def features(self, iface: str) -> dict[str, dict[str, bool]]:
        self._needs_a_device(iface)
        return {name: {"active": on, "requested": on, "fixed": False} for name, on in self.switches.items()}

    def set_feature(self, iface: str, name: str, on: bool) -> None:
        on = bool(self._take("features", name, int(on)))
        self.switches[name] = on
        if name == "rx-gro" and not on:
            self.switches["tx-nocache-copy"] = True  # a driver that switches one feature with another

    def rings_of_rss(self, iface: str) -> int:
        return self.groups["channels"]["combined"]

    def rss(self, iface: str) -> tuple[list[int], bytes]:
        self._needs_a_device(iface)
        return list(self.table), self.key

    def set_rss(self, iface: str, *, table: list[int] | None = None, key: bytes = b"") -> None:
        self._take("rss", "key" if table is None else "table", 0)
        n_queues = self.groups["channels"]["combined"]
        if table and max(table) >= n_queues or key and len(key) != len(self.key):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.key = key or self.key
        if table is not None:
            self.is_configured = bool(table)
            self.table = list(table) or [entry % n_queues for entry in range(len(self.table))]

    def stamping(self, iface: str) -> str:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def _needs_a_device(self, iface: str) -> None:
        if iface != "eth0":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def _take(self, group: str, name: str, value: int) -> int:
        self.writes.append((group, name, value))
        for faults in (self.once, self.errors):
            if (code := faults.get(f"{group}:{name}")) is not None:
                self.once.pop(f"{group}:{name}", None)
                raise OSError(code, os.strerror(code))
        return self.rounds.get(f"{group}:{name}", int)(value)


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

    def state(self) -> tuple[dict[str, bytes], object]:
        """Return every file and what the NIC holds."""
        return tree_bytes(self.root), self.nic.state()

    def take(self, name: str, text: str) -> str:
        """Return what becomes of a text written to a file, or raise as its driver does."""
        for faults in (self.once, self.errors):
            for end, code in faults.items():
                if name.endswith(end):
                    self.once.pop(end, None)
                    raise OSError(code, os.strerror(code))
        for end, change in self.rounds.items():
            if name.endswith(end):
                text = change(text)
        return text


class FaultyAccess(HostAccess):
    """Access to a :class:`FakeHost`."""

    def __init__(self, host: FakeHost, netns: str | None) -> None:
        super().__init__(netns, host.root, host.nic)
        self.host, self.wishes = host, list[str]()

    def write(self, name: str, text: str) -> None:
        text = self.host.take(name, text)
        super().write(name, text)
        match = re.fullmatch(r"proc/irq/(\d+)/smp_affinity_list", name)
        if match:
            self._move_interrupt(int(match[1]), text)
        if name.endswith("eth0/threaded"):
            self._start_threads(text == "1")

    def _move_interrupt(self, irq: int, mask: str) -> None:
        """Leave an interrupt where it is while the mask allows, as x86 does."""
        file = f"proc/irq/{irq}/effective_affinity_list"
        if int(self.host.read(file)) not in parse_cpus(mask):
            self.host.write(file, str(parse_cpus(mask)[0]))

    def _start_threads(self, on: bool) -> None:
        for tid, comm in THREADS.items():
            folder = self.host.root / f"proc/{tid}"
            if on and not folder.exists():
                folder.mkdir()
                (folder / "comm").write_text(comm + "\n")
                (folder / "status").write_text("Name:\tx\nCpus_allowed_list:\t0-2\n")
            elif not on and folder.exists():
                shutil.rmtree(folder)

    def set_task_cpus(self, tid: int, cpus: Iterable[int]) -> None:
        text = self.host.take(f"proc/{tid}/status", format_cpus(cpus))
        self.host.write(f"proc/{tid}/status", f"Name:\tx\nCpus_allowed_list:\t{text}")

    def signal(self, pid: int, number: int) -> None:
        state = self.host.take(f"proc/{pid}/stat", "T" if number == signal.SIGSTOP else "S")
        comm = self.host.read(f"proc/{pid}/comm")
        self.host.write(f"proc/{pid}/stat", f"{pid} ({comm}) {state} 1 {pid} {pid}")

    def read_bytes(self, name: str, size: int) -> bytes:
        return struct.pack("=i", int(self.host.read(name)))

    def hold(self, name: str, content: bytes) -> None:
        text = self.host.take(name, str(struct.unpack("=i", content)[0]))
        self.wishes.append(text)
        self._wish(name)

    def let_go(self, name: str) -> None:
        if self.wishes:
            self.wishes.pop()
            self._wish(name)

    def _wish(self, name: str) -> None:
        self.host.write(name, str(min(map(int, [*self.wishes, "2000000000"]))))


EBUSY, EIO, EPERM = errno.EBUSY, errno.EIO, errno.EPERM
