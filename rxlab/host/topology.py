"""What the machine is: CPUs, caches, NUMA nodes, interfaces, their queues and the queues' interrupts: host.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rxlab.errors import HostSettingError
from rxlab.host.access import HostAccess
from rxlab.host.cpulist import CPU_DIR, CPU_INTENTS, mask_to_cpus, online_cpus, parse_cpus
from rxlab.host.interrupts import device_irqs, parse_interrupts, queue_irqs
from rxlab.host.kinds import KINDS
from rxlab.host.settings import read_settings

# Sysctls that change what a packet meets. Under net.core only a few exist in a namespace other than the first.
_CORE = (
    "busy_poll busy_read default_qdisc dev_weight dev_weight_rx_bias gro_normal_batch netdev_budget netdev_budget_usecs "
    "netdev_max_backlog netdev_tstamp_prequeue rmem_default rmem_max wmem_default wmem_max rps_default_mask "
    "rps_sock_flow_entries skb_defer_max"
)
_IPV4 = (
    "ip_early_demux tcp_early_demux udp_early_demux tcp_congestion_control tcp_rmem tcp_wmem tcp_timestamps tcp_sack"
)
_KERNEL = "perf_event_paranoid perf_event_max_sample_rate perf_event_mlock_kb numa_balancing sched_rt_runtime_us"
SYSCTLS = (
    *(f"net.core.{name}" for name in _CORE.split()),
    *(f"net.ipv4.{name}" for name in _IPV4.split()),
    *(f"kernel.{name}" for name in _KERNEL.split()),
)


def snapshot_host(
    iface: str | None, netns: str | None = None, root: Path = Path("/"), *, everything: bool = False
) -> dict[str, Any]:
    """Return what host.json holds (layout: rundir.py): what the machine is and how it is set.

    Nothing in it changes by itself, so two snapshots with nothing between them are equal.

    Parameters
    ----------
    iface : str or None
        Interface to describe in full; None describes all of the namespace.
    netns : str, optional
        Network namespace of the interface; CPUs and host-wide sysctls are those of the host anyway.
    root : Path
        Directory that stands for ``/``.
    everything : bool
        Also all interrupts, all sysctls of the network and what is set up in tracefs: ``rxlab host export``.

    Raises
    ------
    HostSettingError
        No such interface or namespace.
    """
    with HostAccess(None, root) as host, HostAccess(netns, root) as inside:
        names = inside.list("sys/class/net")
        if iface is not None and iface not in names:
            raise HostSettingError(
                "no such interface",
                where=f"{iface} in netns {netns}" if netns else iface,
                found=", ".join(names) or "none",
                do="'ip -br link' lists them.",
            )
        chosen = (
            [iface] if iface is not None else [name for name in names if inside.exists(f"sys/class/net/{name}/mtu")]
        )
        sysctls = {name: _sysctl(inside, name) or _sysctl(host, name) for name in SYSCTLS}
        more = (
            {"irqs": _all_irqs(host), "network": _all_sysctls(inside), "tracing": _tracing(host)} if everything else {}
        )
        return {
            "kernel": host.try_read("proc/sys/kernel/osrelease") or platform.release(),
            "hostname": host.try_read("proc/sys/kernel/hostname") or platform.node(),
            "machine": platform.machine(),
            "hypervisor": _has_hypervisor(host),
            "netns": netns,
            "cpus": read_cpus(host),
            "isolated_cpus": host.try_read(f"{CPU_DIR}/isolated") or None,
            "ifaces": {name: _iface(inside, host, name) for name in chosen},
            "settings": {**read_settings(None, None, host), **read_settings(None, netns, inside)},
            "sysctls": {name: value for name, value in sysctls.items() if value is not None},
            "governor": host.try_read(f"{CPU_DIR}/cpu0/cpufreq/scaling_governor"),
            "clocksource": host.try_read("sys/devices/system/clocksource/clocksource0/current_clocksource"),
            "irqbalance": is_running(host, "irqbalance"),
            "tcp_early_demux": sysctls["net.ipv4.tcp_early_demux"],
            **more,
        }


def _all_irqs(host: HostAccess) -> dict[str, dict[str, str | None]]:
    """Return what every interrupt is called, where it may run and where it does."""
    table = parse_interrupts(host.try_read("proc/interrupts") or "")
    return {
        irq: {
            "label": str(row["label"]),
            "cpus": host.try_read(f"proc/irq/{irq}/smp_affinity_list"),
            "effective": host.try_read(f"proc/irq/{irq}/effective_affinity_list"),
        }
        for irq, row in table.items()
        if irq.isdigit()
    }


def _all_sysctls(access: HostAccess) -> dict[str, str]:
    """Return every file right below net.core, net.ipv4 and net.ipv6, but no secret (tcp_fastopen_key, netdev_rss_key)."""
    found = {}
    for folder in ("core", "ipv4", "ipv6"):
        for name in access.list(f"proc/sys/net/{folder}"):
            value = access.try_read(f"proc/sys/net/{folder}/{name}") if not name.endswith(("_key", "_secret")) else None
            if value is not None:
                found[f"net.{folder}.{name}"] = value
    return found


def _tracing(host: HostAccess) -> dict[str, str | None]:
    names = ("current_tracer", "tracing_on", "set_event", "kprobe_events", "uprobe_events", "dynamic_events")
    return {name: host.try_read(f"sys/kernel/tracing/{name}") for name in names}


def read_cpus(access: HostAccess) -> list[dict[str, Any]]:
    """Return ``[{"cpu", "core", "package", "llc", "node", "online", "siblings"}]``.

    ``core`` and ``llc`` are the lowest CPU that shares the core or the last-level cache (kernel ids repeat between packages);
    None where the CPU is offline or the kernel does not say.
    """
    present = parse_cpus(access.try_read(f"{CPU_DIR}/present") or "") or online_cpus(access)
    online, nodes = set(online_cpus(access)), _nodes(access)
    cpus = []
    for cpu in present:
        folder = f"{CPU_DIR}/cpu{cpu}"
        package = access.try_read(f"{folder}/topology/physical_package_id")
        siblings = access.try_read(f"{folder}/topology/thread_siblings_list")
        cpus.append(
            {
                "cpu": cpu,
                "core": min(parse_cpus(siblings)) if siblings else None,
                "package": int(package) if package is not None else None,
                "llc": _llc(access, folder),
                "node": nodes.get(cpu),
                "online": cpu in online,
                "siblings": siblings,
            }
        )
    return cpus


def resolve_intents(wanted: Mapping[str, Any], near: int | None, access: HostAccess) -> dict[str, Any]:
    """Replace CPUs said as intent (``irq_cpus = "sibling"``) by the CPU that is meant on this machine.

    Parameters
    ----------
    wanted : mapping
        Settings by key; a key may name one queue.
    near : int or None
        CPU the application reads on; None where nobody knows it, which is an error only if an intent is there.
    access : HostAccess
        Where the topology is read.

    Raises
    ------
    HostSettingError
        The machine has no such CPU.
    """
    resolved = dict(wanted)
    for key, value in wanted.items():
        kind = KINDS.get(key.partition(":")[0].strip())
        if kind is None or kind.value not in ("mask", "cpus") or str(value).strip() not in CPU_INTENTS:
            continue
        if near is None:
            raise HostSettingError(
                "nobody says which CPU the application reads on",
                where=f"{key}={value}",
                do="Name a CPU, or pin the built-in workload's server (app_cpu).",
            )
        resolved[key] = str(cpu_meant(str(value).strip(), near, read_cpus(access)))
    return resolved


def cpu_meant(intent: str, near: int, cpus: Sequence[Mapping[str, Any]]) -> int:
    """Return the CPU an intent means, the lowest where several would do.

    Parameters
    ----------
    intent : {"same-core", "sibling", "same-llc", "other-node"}
        The CPU `near` itself; the other hardware thread of its core; another core behind the same last-level cache; a CPU
        of another NUMA node.
    near : int
        CPU the application reads on.
    cpus : sequence of mapping
        As :func:`read_cpus` returns them.
    """
    online = {int(entry["cpu"]): entry for entry in cpus if entry["online"]}
    if near not in online:
        raise HostSettingError("no such CPU online", where=f"CPU {near}", expected=", ".join(map(str, online)))
    here = online[near]

    def is_meant(entry: Mapping[str, Any]) -> bool:
        same = {name: entry[name] is not None and entry[name] == here[name] for name in ("core", "llc")}
        if intent == "sibling":
            return same["core"] and entry["cpu"] != near
        if intent == "same-llc":
            return same["llc"] and not same["core"] and entry["cpu"] != near
        return None not in (entry["node"], here["node"]) and entry["node"] != here["node"]

    found = [near] if intent == "same-core" else sorted(cpu for cpu, entry in online.items() if is_meant(entry))
    if not found:
        what = {"sibling": "second hardware thread", "same-llc": "other core behind the same last-level cache"}
        raise HostSettingError(
            f"this machine has no {what.get(intent, 'other NUMA node')}",
            where=f"{intent} of CPU {near}",
            do="Leave the value out of the sweep, or name a CPU.",
        )
    return found[0]


def _llc(access: HostAccess, folder: str) -> int | None:
    best, shared = -1, None
    for index in access.list(f"{folder}/cache"):
        level = access.try_read(f"{folder}/cache/{index}/level")
        cpus = access.try_read(f"{folder}/cache/{index}/shared_cpu_list")
        if level is not None and cpus and int(level) > best:
            best, shared = int(level), min(parse_cpus(cpus))
    return shared


def _nodes(access: HostAccess) -> dict[int, int]:
    nodes = {}
    for name in access.list("sys/devices/system/node"):
        cpus = access.try_read(f"sys/devices/system/node/{name}/cpulist") if name[4:].isdigit() else None
        nodes.update({cpu: int(name[4:]) for cpu in parse_cpus(cpus or "")})
    return nodes


def read_queues(access: HostAccess, iface: str) -> list[dict[str, Any]]:
    """Return ``[{"queue", "irq", "irq_cpus", "irq_effective", "rps_cpus", "rps_flow_cnt", "xps_cpus"}]`` per queue number."""
    folder = f"sys/class/net/{iface}/queues"
    numbers = sorted({int(name[3:]) for name in access.list(folder) if name[:3] in ("rx-", "tx-")})
    irqs = queue_irqs(access, iface)
    queues = []
    for number in numbers:
        irq = irqs.get(number)
        rps, xps = (access.try_read(f"{folder}/{name}") for name in (f"rx-{number}/rps_cpus", f"tx-{number}/xps_cpus"))
        flows = access.try_read(f"{folder}/rx-{number}/rps_flow_cnt")
        queues.append(
            {
                "queue": number,
                "irq": irq,
                "irq_cpus": access.try_read(f"proc/irq/{irq}/smp_affinity_list") if irq is not None else None,
                "irq_effective": access.try_read(f"proc/irq/{irq}/effective_affinity_list")
                if irq is not None
                else None,
                "rps_cpus": mask_to_cpus(rps) if rps is not None else None,
                "rps_flow_cnt": int(flows) if flows is not None else None,
                "xps_cpus": mask_to_cpus(xps) if xps is not None else None,
            }
        )
    return queues


def _iface(access: HostAccess, host: HostAccess, iface: str) -> dict[str, Any]:
    tool = access.ethtool

    def ask(function: Callable[..., Any], *args: str) -> Any:
        try:
            return access.call(function, iface, *args)
        except OSError:
            return None

    driver = ask(tool.driver) or {}
    features = ask(tool.features)
    mtu = access.try_read(f"sys/class/net/{iface}/mtu")
    return {
        "mac": access.try_read(f"sys/class/net/{iface}/address"),
        "addresses": _identity(access, iface)[1],
        "mtu": int(mtu) if mtu else None,
        "operstate": access.try_read(f"sys/class/net/{iface}/operstate"),
        "driver": driver.get("driver") or access.link_name(f"sys/class/net/{iface}/device/driver"),
        "bus": driver.get("bus") or access.link_name(f"sys/class/net/{iface}/device"),
        "queues": read_queues(access, iface),
        "features": {name: state["active"] for name, state in features.items()} if features else None,
        **{group: ask(tool.get, group) for group in ("coalesce", "rings", "channels")},
        "rss": {"table": list(rss[0]), "key": rss[1].hex(":")} if (rss := ask(tool.rss)) else None,
        "irqs": device_irqs(access, iface),
        "flags": access.try_read(f"sys/class/net/{iface}/flags"),
        "tx_queue_len": access.try_read(f"sys/class/net/{iface}/tx_queue_len"),
        "timestamping": ask(tool.timestamping),
        "settings": {
            label: value for label, value in read_settings(iface, access.netns, access).items() if f"@{iface}" in label
        },
    }


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
    try:
        done = access.call(subprocess.run, command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise HostSettingError("the ip command is missing", do="Install it: apt install iproute2.") from None
    links = json.loads(done.stdout or "[]") if done.returncode == 0 else []
    macs = [link["address"] for link in links if link.get("address")]
    return macs, [entry["local"] for link in links for entry in link.get("addr_info", ()) if "local" in entry]


def is_running(access: HostAccess, comm: str) -> bool:
    """Tell whether a process of this name runs."""
    return any(access.try_read(f"proc/{name}/comm") == comm for name in access.list("proc") if name.isdigit())


def _sysctl(access: HostAccess, name: str) -> str | None:
    return access.try_read(os.path.join("proc/sys", *name.split(".")))


def _has_hypervisor(access: HostAccess) -> bool:
    flags = next((ln for ln in (access.try_read("proc/cpuinfo") or "").splitlines() if ln.startswith("flags")), "")
    return " hypervisor" in flags
