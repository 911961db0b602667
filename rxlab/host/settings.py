"""Every host setting as an object: read, validate, write, read back.

Keys are the words of sysfs, sysctl and ethtool: :data:`KINDS` is the list. A key may name one queue: ``rps_cpus:0``. Values are
text; CPUs are a list (``0,2-3``), a mask with ``0x``, ``off``, or an intent (``sibling``) that topology.py resolves. Nothing
is written here on its own: journal.py decides when.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rxlab.errors import HostSettingError, WrongSettingError
from rxlab.host.access import HostAccess
from rxlab.host.cpulist import CPU_INTENTS, format_cpus, online_cpus, parse_cpus
from rxlab.host.ethtool import RX_FILTERS, TX_TYPES
from rxlab.host.interrupts import queue_irqs

MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class Kind:
    """One knob: where it lives and which values it takes.

    Attributes
    ----------
    scope : str
        "iface", "rx_queue", "tx_queue", "irq", "cpu", "netns" or "host": what the key expands to. Only "host" and "cpu" are
        the same in every network namespace.
    place : str
        ``file:PATH`` under the root, or ``ethtool:GROUP:NAME``, with ``{iface} {queue} {irq} {cpu}`` to fill in.
    value : str
        "mask" (CPUs as sysfs bitmap), "cpus" (CPUs as list), "int", "switch" (on/off) or "word".
    rank : int
        Writing order, low first; a change may reset settings of higher rank (``ethtool -L`` recreates the queues).
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


def _net(name: str) -> str:
    return "file:sys/class/net/{iface}/" + name


def _core(name: str) -> str:
    return "file:proc/sys/net/core/" + name


KINDS: dict[str, Kind] = {
    "channels": Kind("iface", "ethtool:channels:combined", "int", 0, "combined queues", True),
    "rx-channels": Kind("iface", "ethtool:channels:rx", "int", 0, "receive-only queues", True),
    "tx-channels": Kind("iface", "ethtool:channels:tx", "int", 0, "transmit-only queues", True),
    "rx-ring": Kind("iface", "ethtool:rings:rx", "int", 1, "receive descriptors per queue", True),
    "tx-ring": Kind("iface", "ethtool:rings:tx", "int", 1, "transmit descriptors per queue", True),
    "gro": Kind("iface", "ethtool:features:rx-gro", "switch", 2, "generic receive offload"),
    "lro": Kind("iface", "ethtool:features:rx-lro", "switch", 2, "large receive offload"),
    "gro-hw": Kind("iface", "ethtool:features:rx-gro-hw", "switch", 2, "receive offload in the NIC"),
    "gso": Kind("iface", "ethtool:features:tx-generic-segmentation", "switch", 2, "generic segmentation offload"),
    "tso": Kind("iface", "ethtool:features:tx-tcp-segmentation", "switch", 2, "TCP segmentation offload"),
    "rxhash": Kind("iface", "ethtool:features:rx-hashing", "switch", 2, "flow hash from the NIC"),
    "ntuple": Kind("iface", "ethtool:features:rx-ntuple-filter", "switch", 2, "flow steering filters (aRFS)"),
    "rx-usecs": Kind("iface", "ethtool:coalesce:rx-usecs", "int", 3, "us between frame and interrupt"),
    "rx-frames": Kind("iface", "ethtool:coalesce:rx-frames", "int", 3, "frames per interrupt"),
    "tx-usecs": Kind("iface", "ethtool:coalesce:tx-usecs", "int", 3, "us between transmit and interrupt"),
    "tx-frames": Kind("iface", "ethtool:coalesce:tx-frames", "int", 3, "transmitted frames per interrupt"),
    "adaptive-rx": Kind("iface", "ethtool:coalesce:adaptive-rx", "switch", 3, "adaptive interrupt moderation"),
    "stamping": Kind(
        "iface", "ethtool:hwtstamp:config", "stamping", 4, "hardware time stamps, RX/TX: all/on, none/off"
    ),
    "gro_flush_timeout": Kind("iface", _net("gro_flush_timeout"), "int", 4, "ns GRO may hold packets over polls"),
    "napi_defer_hard_irqs": Kind(
        "iface", _net("napi_defer_hard_irqs"), "int", 4, "empty polls before the IRQ is enabled"
    ),
    "threaded": Kind("iface", _net("threaded"), "switch", 4, "NAPI in a kernel thread"),
    "irq_cpus": Kind("irq", "file:proc/irq/{irq}/smp_affinity_list", "cpus", 5, "CPUs of the queue's interrupt"),
    "rps_cpus": Kind("rx_queue", _net("queues/{queue}/rps_cpus"), "mask", 6, "RPS: CPUs packets are spread over"),
    "rps_flow_cnt": Kind(
        "rx_queue", _net("queues/{queue}/rps_flow_cnt"), "int", 6, "RFS: flow table entries per queue"
    ),
    "xps_cpus": Kind("tx_queue", _net("queues/{queue}/xps_cpus"), "mask", 6, "XPS: CPUs that send on the queue"),
    "rps_sock_flow_entries": Kind("host", _core("rps_sock_flow_entries"), "int", 7, "RFS: socket flow table entries"),
    "busy_poll": Kind("host", _core("busy_poll"), "int", 7, "us poll() and select() busy-poll"),
    "busy_read": Kind("host", _core("busy_read"), "int", 7, "us a receive call busy-polls"),
    "netdev_budget": Kind("host", _core("netdev_budget"), "int", 7, "packets per NET_RX softirq"),
    "netdev_budget_usecs": Kind("host", _core("netdev_budget_usecs"), "int", 7, "us per NET_RX softirq"),
    "netdev_max_backlog": Kind("host", _core("netdev_max_backlog"), "int", 7, "packets a CPU's backlog holds"),
    "netdev_tstamp_prequeue": Kind("host", _core("netdev_tstamp_prequeue"), "switch", 7, "stamp packets before RPS"),
    "dev_weight": Kind("host", _core("dev_weight"), "int", 7, "packets per backlog poll"),
    "gro_normal_batch": Kind("host", _core("gro_normal_batch"), "int", 7, "packets GRO hands up at once"),
    "tcp_early_demux": Kind(
        "netns", "file:proc/sys/net/ipv4/tcp_early_demux", "switch", 7, "socket lookup before routing"
    ),
    "governor": Kind(
        "cpu", "file:sys/devices/system/cpu/{cpu}/cpufreq/scaling_governor", "word", 8, "CPU frequency governor"
    ),
}

# A queue's settings are lost when the driver recreates its queues; features switch each other.
_RESET_BY = {"channels": ("rx_queue", "tx_queue", "irq"), "rings": ("rx_queue", "tx_queue", "irq")}


@dataclass(frozen=True)
class Setting:
    """One place on the host, and the value it shall have.

    Attributes
    ----------
    key : str
        The word in :data:`KINDS`, or ``feature:NAME`` for an ethtool feature by its kernel name.
    label : str
        Key and what it belongs to: ``rps_cpus@eth0/rx-0``.
    place, value, rank
        As in :class:`Kind`, filled in.
    iface, netns : str or None
        None where the setting is not of one interface or namespace.
    wanted : str or None
        Canonical value; None for a place that is only remembered because another change may reset it.
    """

    key: str
    label: str
    place: str
    value: str
    rank: int
    iface: str | None
    netns: str | None
    wanted: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields for the journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Setting:
        """Return the setting a journal names."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})

    def read(self, access: HostAccess) -> str:
        """Return the raw text the host shows now."""
        try:
            return self._read(access)
        except (OSError, KeyError) as error:
            raise self._error("cannot be read", error) from None

    def write(self, access: HostAccess, raw: str) -> None:
        """Write a raw text, as :meth:`read` or :meth:`encode` returned it."""
        try:
            self._write(access, raw)
        except (OSError, ValueError) as error:
            raise self._error(f"refused the value {raw!r}", error) from None

    def canonical(self, raw: str) -> str:
        """Return the one spelling of a raw text: CPU list, integer, on/off."""
        if self.value == "mask":
            return format_cpus(parse_cpus("0x" + raw.replace(",", "")))
        if self.value == "cpus":
            return format_cpus(parse_cpus(raw))
        if self.value == "switch":
            return {"0": "off", "1": "on"}.get(raw, raw)
        return str(int(raw)) if self.value == "int" else raw

    def encode(self, canonical: str) -> str:
        """Return the raw text to write for a canonical value."""
        if self.value == "mask":
            digits = f"{sum(1 << cpu for cpu in parse_cpus(canonical)):x}"
            words = [digits[max(end - 8, 0) : end] for end in range(len(digits), 0, -8)]
            return ",".join(reversed(words))  # bitmap_parse(): 32-bit words, comma between
        if self.value == "switch":
            return {"off": "0", "on": "1"}.get(canonical, canonical)
        return canonical

    def is_in_effect(self, access: HostAccess) -> bool:
        """Tell whether what was asked is also done: a driver may note a feature and not switch it."""
        _, _, rest = self.place.partition(":features:")
        if not rest or self.iface is None:
            return True
        state = access.call(access.ethtool.features, self.iface)[rest]
        return state["active"] == state["requested"]

    def _read(self, access: HostAccess) -> str:
        where, rest = self.place.split(":", 1)
        if where == "file":
            return access.read(rest)
        group, name = rest.split(":")
        assert self.iface is not None
        if group == "features":
            return str(int(access.call(access.ethtool.features, self.iface)[name]["requested"]))
        if group == "hwtstamp":
            return access.call(access.ethtool.stamping, self.iface)
        return str(access.call(access.ethtool.get, self.iface, group)[name])

    def _write(self, access: HostAccess, raw: str) -> None:
        where, rest = self.place.split(":", 1)
        if where == "file":
            access.write(rest, raw)
            return
        group, name = rest.split(":")
        assert self.iface is not None
        if group == "features":
            access.call(access.ethtool.set_feature, self.iface, name, raw == "1")
        elif group == "hwtstamp":
            access.call(access.ethtool.set_stamping, self.iface, raw)
        else:
            access.call(access.ethtool.set, self.iface, group, name, int(raw))

    def _error(self, what: str, error: Exception) -> HostSettingError:
        code = error.errno if isinstance(error, OSError) else None
        hints = {
            errno.EACCES: "Changing host settings needs root.",
            errno.EPERM: "Changing host settings needs root.",
            errno.EIO: "The driver manages this interrupt itself." if self.key == "irq_cpus" else None,
            errno.ENOENT: "This device, driver or kernel does not have the setting.",
            errno.EOPNOTSUPP: "This device, driver or kernel does not have the setting.",
        }
        found = os.strerror(code) if code else f"no feature of that name ({error})"
        inside = f" in netns {self.netns}" if self.netns else ""
        return HostSettingError(
            what, where=self.label + inside, found=found, do=hints.get(code) if code else None
        )  # fmt: skip


def parse_settings(
    wanted: Mapping[str, object],
    iface: str | None = None,
    netns: str | None = None,
    *,
    access: HostAccess | None = None,
) -> list[Setting]:
    """Turn ``{"rps_cpus": "0,1", ...}`` into settings that exist on this host, in writing order.

    Everything that can be wrong is found here, before a write: the key, the value's form, CPUs that are not online, an
    interface, queue or file that is not there.

    Parameters
    ----------
    wanted : mapping of str
        Values by key; a key may end in ``:N`` for one queue.
    iface, netns : str, optional
        Interface and its network namespace.
    access : HostAccess, optional
        Where to look; by default the real host.

    Raises
    ------
    WrongSettingError
        A key or value that cannot be meant: one line that names the key, what was found and what would be right.
    HostSettingError
        This host does not have it, or it cannot be read.
    """
    check_keys(wanted)
    if access is None:
        with HostAccess(netns) as opened:
            return parse_settings(wanted, iface, netns, access=opened)
    if iface is not None and not access.exists(f"sys/class/net/{iface}"):
        names = ", ".join(access.list("sys/class/net")) or "none"
        raise HostSettingError("no such interface", where=iface, found=names, do="Choose one with --iface.")
    cpus = online_cpus(access)
    settings: list[Setting] = []
    for text, value in wanted.items():
        key, _, only = _normal_key(text).partition(":")
        n_queues = int(str(wanted["channels"])) if "channels" in wanted else None
        places = [s for s in expand(key, iface, netns, access, n_queues) if not only or _queue_number(s) == int(only)]
        if not places:
            raise HostSettingError(
                "this host has no place for the setting",
                where=f"{text} of {iface or 'the host'}",
                do="See 'rxlab host show' for what can be set.",
            )
        canonical = canonical_value(key, str(value), cpus)
        for place in places:
            if n_queues is None and place.netns == access.netns:
                place.read(access)
            elif n_queues is None:
                # A network namespace does not show the sysctls it shares with the host (rps_sock_flow_entries).
                with HostAccess(place.netns, access.root) as own:
                    place.read(own)
            settings.append(replace(place, wanted=canonical))
    return sorted(settings, key=lambda setting: setting.rank)


def check_keys(wanted: Mapping[str, object]) -> None:
    """Check keys and the form of values without looking at a host; for plans made before the testbed exists."""
    for text, value in wanted.items():
        key = _normal_key(text).partition(":")[0]
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

    def wrong(expected: str) -> WrongSettingError:
        return WrongSettingError("not a value for this setting", where=key, found=repr(text), expected=expected)

    if kind.value in ("mask", "cpus"):
        if cpus is None and text in CPU_INTENTS:
            return text
        try:
            chosen = parse_cpus(text)
        except ValueError:
            raise wrong(f"CPUs as a list (0,2-3), a mask (0x5), off, or one of {', '.join(CPU_INTENTS)}") from None
        if not chosen and kind.value == "cpus":
            raise wrong("at least one CPU")
        missing = sorted(set(chosen) - set(cpus)) if cpus is not None else []
        if missing:
            raise wrong("CPUs that are online: " + format_cpus(cpus or ()))
        return format_cpus(chosen)
    if kind.value == "switch":
        words = {"on": "on", "1": "on", "true": "on", "off": "off", "0": "off", "false": "off"}
        if text.lower() not in words:
            raise wrong("on or off")
        return words[text.lower()]
    if kind.value == "int":
        number = "0" if text.lower() == "off" else text
        if not number.isascii() or not number.isdigit() or int(number) > MAX_INT:
            raise wrong(f"an integer from 0 to {MAX_INT} ({kind.what})")
        return str(int(number))
    if kind.value == "stamping":
        rx_filter, _, tx_type = text.lower().partition("/")
        tx_type = tx_type or ("off" if rx_filter == "none" else "on")
        if rx_filter not in RX_FILTERS or tx_type not in TX_TYPES:
            raise wrong(f"RX/TX, RX one of {', '.join(RX_FILTERS)}, TX one of {', '.join(TX_TYPES)}")
        return f"{rx_filter}/{tx_type}"
    if not text.isidentifier():
        raise wrong("one word")
    return text


def expand(
    key: str, iface: str | None, netns: str | None, access: HostAccess, n_queues: int | None = None
) -> list[Setting]:
    """Return every place of one key on this host, without a wanted value.

    `n_queues` stands for the number of queues when the same configuration changes it.
    """
    kind = KINDS[key]
    if kind.scope in ("host", "cpu"):
        netns = None
    if kind.scope not in ("host", "cpu", "netns") and iface is None:
        raise HostSettingError("the setting belongs to an interface", where=key, do="Choose one with --iface.")
    names: list[dict[str, str]] = [{}]
    if kind.scope in ("rx_queue", "tx_queue"):
        prefix = kind.scope[:3].replace("_", "-")
        names = [{"queue": name} for name in access.list(f"sys/class/net/{iface}/queues") if name.startswith(prefix)]
        if n_queues is not None:
            names = [{"queue": f"{prefix}{number}"} for number in range(n_queues)]
        names.sort(key=lambda name: int(name["queue"][3:]))
    elif kind.scope == "irq":
        names = [{"irq": str(irq)} for _, irq in sorted(queue_irqs(access, str(iface)).items())]
    elif kind.scope == "cpu":
        names = [{"cpu": f"cpu{cpu}"} for cpu in online_cpus(access)]
        names = [name for name in names if access.exists(f"sys/devices/system/cpu/{name['cpu']}/cpufreq")]
    settings = []
    for name in names:
        part = "/".join(name.values())
        owner = "/".join(filter(None, (iface if kind.scope not in ("host", "cpu", "netns") else None, part)))
        settings.append(
            Setting(
                key=key,
                label=f"{key}@{owner}" if owner else key,
                place=kind.place.format(iface=iface, **name),
                value=kind.value,
                rank=kind.rank,
                iface=iface if kind.scope not in ("host", "cpu", "netns") else None,
                netns=netns,
            )
        )
    return settings


def collateral(settings: Iterable[Setting], access_of: Callable[[str | None], HostAccess]) -> list[Setting]:
    """Return the places these changes may reset as a side effect, to be remembered and put back."""
    chosen = list(settings)
    places: dict[tuple[str | None, str], Setting] = {}
    for setting in chosen:
        if not setting.place.startswith("ethtool:"):
            continue
        access, group = access_of(setting.netns), setting.place.split(":")[1]
        scopes = _RESET_BY.get(group, ())
        for key, kind in KINDS.items():
            if kind.scope in scopes:
                for place in expand(key, setting.iface, setting.netns, access):
                    places[place.netns, place.place] = place
        if group == "features":
            places.update({(place.netns, place.place): place for place in _features(setting, access)})
    for setting in chosen:
        places.pop((setting.netns, setting.place), None)
    return [place for place in places.values() if _is_readable(place, access_of(place.netns))]


def read_settings(iface: str | None, netns: str | None, access: HostAccess) -> dict[str, str]:
    """Return ``{label: canonical value}`` of everything that can be set here; what a host does not have is left out."""
    values = {}
    for key, kind in KINDS.items():
        if iface is None and kind.scope not in ("host", "cpu", "netns"):
            continue
        for place in expand(key, iface, netns, access):
            try:
                values[place.label] = place.canonical(place.read(access))
            except (HostSettingError, ValueError):
                continue
    return values


def _features(setting: Setting, access: HostAccess) -> list[Setting]:
    assert setting.iface is not None
    features = access.call(access.ethtool.features, setting.iface)
    return [
        replace(
            setting,
            key=f"feature:{name}",
            label=f"{name}@{setting.iface}",
            place=f"ethtool:features:{name}",
            wanted=None,
        )
        for name, state in features.items()
        if not state["fixed"]
    ]


def _is_readable(place: Setting, access: HostAccess) -> bool:
    try:
        place.read(access)
    except HostSettingError:
        return False
    return True


def _normal_key(text: str) -> str:
    """Accept rx_usecs for rx-usecs: Python and TOML like underscores, ethtool has hyphens."""
    key, colon, queue = text.strip().partition(":")
    if key not in KINDS and key.replace("_", "-") in KINDS:
        key = key.replace("_", "-")
    if colon and not queue.isdigit():
        raise WrongSettingError("not a queue number", where=text, found=repr(queue), expected="KEY:N, as in rps_cpus:0")
    return key + colon + queue


def _queue_number(setting: Setting) -> int:
    tail = setting.label.rsplit("/", 1)[-1]
    return int(tail[3:]) if tail[:3] in ("rx-", "tx-") else -1
