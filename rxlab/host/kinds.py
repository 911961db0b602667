"""Every knob there is: its key, where it lives, the values it takes, and the order in which knobs are turned.

Keys are the words of sysfs, sysctl and ethtool. Nothing here touches a host: places.py reads and writes what a row names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rxlab.errors import WrongSettingError
from rxlab.host.cpulist import CPU_INTENTS, format_cpus, parse_cpus
from rxlab.host.ethtool import RX_FILTERS, TX_TYPES

MAX_INT = 2**31 - 1

# Writing order: a write may reset what has a higher rank (``ethtool -L`` recreates the queues). irqbalance is silenced before
# anything is moved, and goes on after everything is back.
IRQBALANCE, CHANNELS, RSS, RINGS, FEATURES, COALESCE, NAPI, THREADS, IRQS, QUEUES, SYSCTLS, CPUS = range(12)


@dataclass(frozen=True)
class Kind:
    """One knob: where it lives and which values it takes.

    Attributes
    ----------
    scope : str
        "iface", "rx_queue", "tx_queue", "irq", "napi", "cpu", "idle_state", "netns" or "host": what the key expands to. Only
        :data:`HOST_WIDE` is the same in every network namespace.
    place : str
        Where places.py finds it, with ``{iface} {queue} {cpu} {number}`` to fill in.
    value : str
        "mask" (CPUs as sysfs bitmap), "cpus" (CPUs as list), "queues" (rx queues as bitmap), "pattern" (queue numbers, repeated
        over the RSS table), "bytes" (hex), "int", "us" (a number that cannot be "off"), "switch" (on/off), "inverse" (a switch
        whose file says 1 for off), "stamping" (RX/TX) or "word".
    rank : int
        Writing order, low first; restored in the same order.
    what : str
        What it does, with the unit.
    drops_link : bool
        Whether drivers usually take the link down for it.
    """

    scope: str
    place: str
    value: str
    rank: int
    what: str
    drops_link: bool = False


HOST_WIDE = ("host", "cpu", "idle_state")


def _net(name: str) -> str:
    return "file:sys/class/net/{iface}/" + name


def _core(name: str) -> str:
    return "file:proc/sys/net/core/" + name


def _cpu(name: str) -> str:
    return "file:sys/devices/system/cpu/{cpu}/" + name


KINDS: dict[str, Kind] = {
    "irqbalance": Kind("host", "process:irqbalance", "switch", IRQBALANCE, "the daemon; off pauses it until the end"),
    "channels": Kind("iface", "ethtool:channels:combined", "int", CHANNELS, "combined queues", True),
    "rx-channels": Kind("iface", "ethtool:channels:rx", "int", CHANNELS, "receive-only queues", True),
    "tx-channels": Kind("iface", "ethtool:channels:tx", "int", CHANNELS, "transmit-only queues", True),
    "rss-table": Kind("iface", "rss:table", "pattern", RSS, "RSS: queues of the table's entries, repeated to fill it"),
    "rss-key": Kind("iface", "rss:key", "bytes", RSS, "RSS: key of the hash"),
    "rx-ring": Kind("iface", "ethtool:rings:rx", "int", RINGS, "receive descriptors per queue", True),
    "tx-ring": Kind("iface", "ethtool:rings:tx", "int", RINGS, "transmit descriptors per queue", True),
    "gro": Kind("iface", "ethtool:features:rx-gro", "switch", FEATURES, "generic receive offload"),
    "lro": Kind("iface", "ethtool:features:rx-lro", "switch", FEATURES, "large receive offload", True),
    "gro-hw": Kind("iface", "ethtool:features:rx-gro-hw", "switch", FEATURES, "receive offload in the NIC", True),
    "gso": Kind(
        "iface", "ethtool:features:tx-generic-segmentation", "switch", FEATURES, "generic segmentation offload"
    ),
    "tso": Kind("iface", "ethtool:features:tx-tcp-segmentation", "switch", FEATURES, "TCP segmentation offload"),
    "rxhash": Kind("iface", "ethtool:features:rx-hashing", "switch", FEATURES, "flow hash from the NIC"),
    "ntuple": Kind(
        "iface", "ethtool:features:rx-ntuple-filter", "switch", FEATURES, "flow steering filters (aRFS)", True
    ),
    "adaptive-rx": Kind("iface", "ethtool:coalesce:adaptive-rx", "switch", COALESCE, "adaptive interrupt moderation"),
    "adaptive-tx": Kind("iface", "ethtool:coalesce:adaptive-tx", "switch", COALESCE, "the same, transmit side"),
    "rx-usecs": Kind("iface", "ethtool:coalesce:rx-usecs", "int", COALESCE, "us between frame and interrupt"),
    "rx-frames": Kind("iface", "ethtool:coalesce:rx-frames", "int", COALESCE, "frames per interrupt"),
    "rx-usecs-irq": Kind("iface", "ethtool:coalesce:rx-usecs-irq", "int", COALESCE, "the same while a poll runs"),
    "rx-frames-irq": Kind("iface", "ethtool:coalesce:rx-frames-irq", "int", COALESCE, "the same while a poll runs"),
    "tx-usecs": Kind("iface", "ethtool:coalesce:tx-usecs", "int", COALESCE, "us between transmit and interrupt"),
    "tx-frames": Kind("iface", "ethtool:coalesce:tx-frames", "int", COALESCE, "transmitted frames per interrupt"),
    "stamping": Kind(
        "iface", "ethtool:hwtstamp:config", "stamping", NAPI, "hardware time stamps, RX/TX: all/on, none/off"
    ),
    "gro_flush_timeout": Kind("iface", _net("gro_flush_timeout"), "int", NAPI, "ns GRO may hold packets over polls"),
    "napi_defer_hard_irqs": Kind(
        "iface", _net("napi_defer_hard_irqs"), "int", NAPI, "empty polls before the IRQ is enabled"
    ),
    "threaded": Kind("iface", _net("threaded"), "switch", NAPI, "NAPI in a kernel thread"),
    "napi_cpus": Kind("napi", "napi:{number}", "cpus", THREADS, "CPUs of the kernel threads of threaded NAPI"),
    "irq_cpus": Kind("irq", "irq:queue:{number}", "cpus", IRQS, "CPUs of the queue's interrupt"),
    "rps_cpus": Kind("rx_queue", _net("queues/{queue}/rps_cpus"), "mask", QUEUES, "RPS: CPUs packets are spread over"),
    "rps_flow_cnt": Kind(
        "rx_queue", _net("queues/{queue}/rps_flow_cnt"), "int", QUEUES, "RFS: flow table entries per queue"
    ),
    "xps_cpus": Kind("tx_queue", _net("queues/{queue}/xps_cpus"), "mask", QUEUES, "XPS: CPUs that send on the queue"),
    "xps_rxqs": Kind(
        "tx_queue", _net("queues/{queue}/xps_rxqs"), "queues", QUEUES, "XPS: receive queues answered on the queue"
    ),
    "rps_sock_flow_entries": Kind(
        "host", _core("rps_sock_flow_entries"), "int", SYSCTLS, "RFS: socket flow table entries"
    ),
    "busy_poll": Kind("host", _core("busy_poll"), "int", SYSCTLS, "us poll() and select() busy-poll"),
    "busy_read": Kind("host", _core("busy_read"), "int", SYSCTLS, "us a receive call busy-polls"),
    "netdev_budget": Kind("host", _core("netdev_budget"), "int", SYSCTLS, "packets per NET_RX softirq"),
    "netdev_budget_usecs": Kind("host", _core("netdev_budget_usecs"), "int", SYSCTLS, "us per NET_RX softirq"),
    "netdev_max_backlog": Kind("host", _core("netdev_max_backlog"), "int", SYSCTLS, "packets a CPU's backlog holds"),
    "netdev_tstamp_prequeue": Kind(
        "host", _core("netdev_tstamp_prequeue"), "switch", SYSCTLS, "stamp packets before RPS"
    ),
    "dev_weight": Kind("host", _core("dev_weight"), "int", SYSCTLS, "packets per backlog poll"),
    "gro_normal_batch": Kind("host", _core("gro_normal_batch"), "int", SYSCTLS, "packets GRO hands up at once"),
    "tcp_early_demux": Kind(
        "netns", "file:proc/sys/net/ipv4/tcp_early_demux", "switch", SYSCTLS, "socket lookup before routing"
    ),
    "governor": Kind("cpu", _cpu("cpufreq/scaling_governor"), "word", CPUS, "CPU frequency governor"),
    "idle_state": Kind(
        "idle_state", _cpu("cpuidle/{state}/disable"), "inverse", CPUS, "whether CPUs may use this idle state"
    ),
    "cpu_dma_latency": Kind(
        "host", "hold:dev/cpu_dma_latency", "us", CPUS, "us an idle state may need to wake; 0: never sleep"
    ),
}


def normal_key(text: str) -> str:
    """Accept rx_usecs for rx-usecs: Python and TOML like underscores, ethtool has hyphens."""
    key, colon, number = text.strip().partition(":")
    if key not in KINDS and key.replace("_", "-") in KINDS:
        key = key.replace("_", "-")
    if colon and not (number.isascii() and number.isdigit()):
        raise WrongSettingError(
            "not a queue number", where=text, found=repr(number), expected="KEY:N, as in rps_cpus:0"
        )
    return key + colon + number


def check_keys(wanted: Mapping[str, object]) -> None:
    """Check keys and the form of values without looking at a host; for plans made before the testbed exists."""
    for text, value in wanted.items():
        key = normal_key(text).partition(":")[0]
        if key not in KINDS:
            close = difflib.get_close_matches(key, KINDS, n=1, cutoff=0.6)
            raise WrongSettingError(
                "unknown setting",
                where=text,
                expected="one of " + ", ".join(KINDS),
                do=f"Is {close[0]} meant?" if close else None,
            )
        canonical_value(key, str(value), None)


def canonical_value(key: str, text: str, cpus: Iterable[int] | None) -> str:
    """Return the one spelling of a value a person wrote.

    Parameters
    ----------
    cpus : iterable of int, optional
        CPUs that are online; None leaves that unchecked.
    """
    kind, text = KINDS[key], text.strip()
    if kind.value in ("mask", "cpus", "queues"):
        return _canonical_cpus(key, text, cpus)
    if kind.value in ("switch", "inverse"):
        words = {"on": "on", "1": "on", "true": "on", "off": "off", "0": "off", "false": "off"}
        if text.lower() not in words:
            raise _wrong(key, text, "on or off")
        return words[text.lower()]
    if kind.value in ("int", "us"):
        number = "0" if text.lower() == "off" and kind.value == "int" else text
        if not number.isascii() or not number.isdigit() or int(number) > MAX_INT:
            raise _wrong(key, text, f"an integer from 0 to {MAX_INT} ({kind.what})")
        return str(int(number))
    if kind.value == "pattern":
        try:
            return format_pattern(parse_pattern(text))
        except ValueError:
            raise _wrong(
                key, text, "'equal N', or queue numbers in order, repeated to fill the table (0-3, 1,1,0)"
            ) from None
    if kind.value == "bytes":
        if not re.fullmatch(r"[0-9a-f]{2}(:?[0-9a-f]{2})*", text.lower(), re.ASCII):
            raise _wrong(key, text, "bytes in hex, as 6d:5a:..")
        return bytes.fromhex(text.replace(":", "")).hex(":")
    if kind.value == "stamping":
        rx_filter, _, tx_type = text.lower().partition("/")
        tx_type = tx_type or ("off" if rx_filter == "none" else "on")
        if rx_filter not in RX_FILTERS or tx_type not in TX_TYPES:
            raise _wrong(key, text, f"RX/TX, RX one of {', '.join(RX_FILTERS)}, TX one of {', '.join(TX_TYPES)}")
        return f"{rx_filter}/{tx_type}"
    if not text.isidentifier():
        raise _wrong(key, text, "one word")
    return text


def _canonical_cpus(key: str, text: str, cpus: Iterable[int] | None) -> str:
    kind = KINDS[key]
    if kind.value == "queues":
        try:
            return format_cpus(parse_cpus(text))
        except ValueError:
            raise _wrong(key, text, "receive queues as a list (0,2-3) or a mask (0x5), or off") from None
    if cpus is None and text in CPU_INTENTS:
        return text
    try:
        chosen = parse_cpus(text)
    except ValueError:
        expected = f"CPUs as a list (0,2-3), a mask (0x5), off, or one of {', '.join(CPU_INTENTS)}"
        raise _wrong(key, text, expected) from None
    if not chosen and kind.value == "cpus":
        raise _wrong(key, text, "at least one CPU")
    if cpus is not None and set(chosen) - set(cpus):
        raise _wrong(key, text, "CPUs that are online: " + format_cpus(cpus))
    return format_cpus(chosen)


def _wrong(key: str, text: str, expected: str) -> WrongSettingError:
    return WrongSettingError("not a value for this setting", where=key, found=repr(text), expected=expected)


def parse_pattern(text: str) -> list[int]:
    """Return the queue numbers of ``equal 4``, ``0-3`` or ``1,1,0``, in order; ValueError for anything else."""
    words = re.fullmatch(r"equal\s+(\d{1,4})", text.strip(), re.ASCII)
    if words and int(words[1]):
        return list(range(int(words[1])))
    queues: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part, re.ASCII)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f"not queue numbers: {text!r}")
        queues += range(int(match[1]), int(match[2] or match[1]) + 1)
    return queues


def format_pattern(queues: list[int]) -> str:
    """Return the shortest run of queue numbers whose repetition gives the list, as ``0-3`` or ``1,1,0``."""
    n = len(queues)
    # A table need not end with a whole repetition: 128 entries over 3 queues.
    period = next(
        p for p in range(1, n + 1) if all(queues[at] == queues[at % p] for at in range(p, n)) and 2 * p <= n or p == n
    )
    parts: list[list[int]] = []
    for queue in queues[:period]:
        if parts and parts[-1][1] == queue - 1:
            parts[-1][1] = queue
        else:
            parts.append([queue, queue])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
