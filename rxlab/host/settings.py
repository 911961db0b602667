"""Every host setting as an object: read, validate, write, read back.

Which keys there are says kinds.py. A key may name one queue: ``rps_cpus:0``. Values are text; CPUs are a list (``0,2-3``), a mask
with ``0x``, ``off``, or an intent (``sibling``) that topology.py resolves. Nothing is written here on its own: journal.py
decides when.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rxlab.errors import HostSettingError
from rxlab.host.access import HostAccess
from rxlab.host.cpulist import CPU_DIR, format_cpus, online_cpus, parse_cpus
from rxlab.host.interrupts import device_irqs, queue_irqs
from rxlab.host.kinds import (
    CHANNELS,
    COALESCE,
    FEATURES,
    HOST_WIDE,
    IRQS,
    KINDS,
    RINGS,
    canonical_value,
    check_keys,
    format_pattern,
    normal_key,
    parse_pattern,
)
from rxlab.host.napi import napi_threads
from rxlab.host.places import EFFECTIVE, read_place, release_place, write_place

_CHANNEL_KEYS = {"channels": "combined", "rx-channels": "rx", "tx-channels": "tx"}
_SWITCHES = {"switch": {"0": "off", "1": "on"}, "inverse": {"1": "off", "0": "on"}}


@dataclass(frozen=True)
class Setting:
    """One place on the host, and the value it shall have.

    Attributes
    ----------
    key : str
        The word in :data:`rxlab.host.kinds.KINDS`, or ``feature:NAME`` for an ethtool feature by its kernel name.
    label : str
        Key and what it belongs to: ``rps_cpus@eth0/rx-0``.
    place, value, rank
        As in :class:`rxlab.host.kinds.Kind`, filled in.
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

    @property
    def id(self) -> str:
        """What tells it from every other: two namespaces may have an interface of the same name."""
        return f"{self.netns or ''} {self.iface or ''} {self.place}"

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
            return read_place(self.place, self.iface, access)
        except (OSError, KeyError) as error:
            raise self._error("cannot be read", error) from None

    def write(self, access: HostAccess, raw: str) -> None:
        """Write a raw text, as :meth:`read` or :meth:`encode` returned it."""
        try:
            write_place(self.place, self.iface, access, raw)
        except (OSError, ValueError) as error:
            raise self._error(f"refused the value {raw!r}", error) from None

    def release(self, access: HostAccess) -> None:
        """Let go of a wish that lasts as long as somebody holds it; other settings are put back by :meth:`write`."""
        release_place(self.place, access)

    def canonical(self, raw: str) -> str:
        """Return the one spelling of a raw text: CPU list, integer, on/off."""
        if self.value in ("mask", "queues"):
            return format_cpus(parse_cpus("0x" + raw.replace(",", "")))
        if self.value == "cpus":
            return format_cpus(parse_cpus(raw.partition(EFFECTIVE)[0]))
        if self.value in _SWITCHES:
            return _SWITCHES[self.value].get(raw, raw)
        if self.value == "pattern":
            return format_pattern(parse_pattern(raw))
        return str(int(raw)) if self.value in ("int", "us") else raw

    def encode(self, canonical: str) -> str:
        """Return the raw text to write for a canonical value."""
        if self.value in ("mask", "queues"):
            digits = f"{sum(1 << cpu for cpu in parse_cpus(canonical)):x}"
            words = [digits[max(end - 8, 0) : end] for end in range(len(digits), 0, -8)]
            return ",".join(reversed(words))  # bitmap_parse(): 32-bit words, comma between
        raw_of = {word: raw for raw, word in _SWITCHES.get(self.value, {}).items()}
        return raw_of.get(canonical, canonical)

    def has(self, access: HostAccess) -> bool:
        """Tell whether the wanted value is there without a write; a wish that others may take back at any time never is."""
        if self.place.startswith("hold:"):
            return False
        try:
            return self.canonical(self.read(access)) == self.wanted and self.is_in_effect(access)
        except (HostSettingError, ValueError):
            return False

    def is_in_effect(self, access: HostAccess) -> bool:
        """Tell whether what was asked is also done: a driver may note a feature and not switch it."""
        _, _, rest = self.place.partition(":features:")
        if not rest or self.iface is None:
            return True
        state = access.call(access.ethtool.features, self.iface)[rest]
        return state["active"] == state["requested"]

    def _error(self, what: str, error: Exception) -> HostSettingError:
        code = error.errno if isinstance(error, OSError) else None
        hints = {
            errno.EACCES: "Changing host settings needs root.",
            errno.EPERM: "Changing host settings needs root.",
            errno.EIO: "The driver manages this interrupt itself." if self.place.startswith("irq:") else None,
            errno.ESRCH: "Start it, or leave the setting out." if self.place.startswith("process:") else None,
            errno.EINVAL: "An RSS table over more queues forbids it: set rss-table too, or 'ethtool -X IFACE default' first."
            if self.rank == CHANNELS
            else None,
            errno.ENOENT: "This device, driver or kernel does not have the setting.",
            errno.EOPNOTSUPP: "This device, driver or kernel does not have the setting.",
        }
        found = error.strerror or str(error) if isinstance(error, OSError) else f"no feature of that name ({error})"
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
    made = _made_by(wanted, iface, access)
    settings: list[Setting] = []
    for text, value in wanted.items():
        key, _, only = normal_key(text).partition(":")
        places = [place for place in expand(key, iface, netns, access, made) if not only or _number(place) == int(only)]
        if not places:
            raise HostSettingError(
                "this host has no place for the setting",
                where=f"{text} of {iface or 'the host'}",
                do="See 'rxlab host show' for what can be set.",
            )
        canonical = canonical_value(key, str(value), cpus)
        for place in places:
            if KINDS[key].scope not in made:
                _read_where_shown(place, access)
            settings.append(replace(place, wanted=canonical))
    return sorted(settings, key=lambda setting: setting.rank)


def _read_where_shown(place: Setting, access: HostAccess) -> None:
    if place.netns == access.netns:
        place.read(access)
        return
    # A network namespace does not show the sysctls it shares with the host (rps_sock_flow_entries).
    with HostAccess(place.netns, access.root) as own:
        place.read(own)


def expand(
    key: str,
    iface: str | None,
    netns: str | None,
    access: HostAccess,
    made: Mapping[str, Sequence[object]] | None = None,
) -> list[Setting]:
    """Return every place of one key on this host, without a wanted value.

    `made` gives the queues or threads of a scope that the same configuration is about to make.
    """
    kind = KINDS[key]
    is_ours = kind.scope in (*HOST_WIDE, "netns")
    if kind.scope in HOST_WIDE:
        netns = None
    if not is_ours and iface is None:
        raise HostSettingError("the setting belongs to an interface", where=key, do="Choose one with --iface.")
    settings = []
    for part, names in _parts(kind.scope, str(iface), access, made or {}):
        owner = "/".join(filter(None, (None if is_ours else iface, part)))
        settings.append(
            Setting(
                key=key,
                label=f"{key}@{owner}" if owner else key,
                place=kind.place.format(iface=iface, **names),
                value=kind.value,
                rank=kind.rank,
                iface=None if is_ours else iface,
                netns=netns,
            )
        )
    return settings


def _parts(
    scope: str, iface: str, access: HostAccess, made: Mapping[str, Sequence[object]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what a scope consists of: its name within the owner, and the words that fill in a place."""
    if scope in ("rx_queue", "tx_queue", "irq", "napi"):
        prefix = {"rx_queue": "rx-", "tx_queue": "tx-", "irq": "rx-", "napi": "napi-"}[scope]
        for number in made.get(scope) or _numbers(scope, iface, access):
            yield f"{prefix}{number}", {"queue": f"{prefix}{number}", "number": str(number)}
    elif scope in ("cpu", "idle_state"):
        for cpu in (f"cpu{number}" for number in online_cpus(access)):
            if scope == "idle_state":
                states = [name for name in access.list(f"{CPU_DIR}/{cpu}/cpuidle") if name.startswith("state")]
                for state in sorted(states, key=lambda name: int(name[5:])):
                    yield f"{cpu}/{state}", {"cpu": cpu, "state": state}
            elif access.exists(f"{CPU_DIR}/{cpu}/cpufreq"):
                yield cpu, {"cpu": cpu}
    else:
        yield "", {}


def _numbers(scope: str, iface: str, access: HostAccess) -> list[int]:
    if scope == "irq":
        return sorted(queue_irqs(access, iface))
    if scope == "napi":
        return list(range(len(napi_threads(access, iface))))
    prefix = scope[:3].replace("_", "-")
    return sorted(int(name[3:]) for name in access.list(f"sys/class/net/{iface}/queues") if name.startswith(prefix))


def _made_by(wanted: Mapping[str, object], iface: str | None, access: HostAccess) -> dict[str, Sequence[object]]:
    """Return the queues, interrupts and threads of each scope that there will be, where the configuration changes that."""
    made: dict[str, Sequence[object]] = {}
    given = {normal_key(key): str(value) for key, value in wanted.items()}
    if iface is not None and _CHANNEL_KEYS.keys() & given.keys():
        try:
            now = access.call(access.ethtool.get, iface, "channels")
        except OSError:
            return made  # said when the key itself is read
        n = {name: int(given.get(key, now[name])) for key, name in _CHANNEL_KEYS.items()}
        made["rx_queue"] = made["irq"] = range(n["combined"] + n["rx"])
        made["tx_queue"] = range(n["combined"] + n["tx"])
    if iface is not None and canonical_value("threaded", given.get("threaded", "off"), None) == "on":
        made["napi"] = ["all"]
    return made


def collateral(settings: Iterable[Setting], access_of: Callable[[str | None], HostAccess]) -> list[Setting]:
    """Return the places these changes may reset as a side effect, to be remembered and put back.

    A driver that is told by ethtool to change its queues, rings or features may reset anything of the interface, so everything
    of it is remembered.
    """
    chosen = list(settings)
    places: dict[tuple[str | None, str], Setting] = {}
    for setting in chosen:
        if setting.iface is not None and setting.place.startswith(("ethtool:", "rss:")):
            for place in iface_settings(setting.iface, setting.netns, access_of(setting.netns)):
                places.setdefault((place.netns, place.place), place)
    for setting in chosen:
        places.pop((setting.netns, setting.place), None)
    return [place for place in places.values() if _is_readable(place, access_of(place.netns))]


def iface_settings(iface: str, netns: str | None, access: HostAccess) -> Iterator[Setting]:
    """Yield every place of an interface: all keys of :data:`rxlab.host.kinds.KINDS`, and what else ethtool and its IRQs have."""
    seen = set()
    for key, kind in KINDS.items():
        if kind.scope not in (*HOST_WIDE, "netns"):
            for place in expand(key, iface, netns, access):
                seen.add(place.place)
                yield place
    for place in (*_ethtool_settings(iface, netns, access), *_irq_settings(iface, netns, access)):
        if place.place not in seen:
            yield place


def read_settings(iface: str | None, netns: str | None, access: HostAccess) -> dict[str, str]:
    """Return ``{label: canonical value}`` of everything that can be set here; what a host does not have is left out."""
    values = {}
    for key, kind in KINDS.items():
        if iface is None and kind.scope not in (*HOST_WIDE, "netns"):
            continue
        for place in expand(key, iface, netns, access):
            try:
                values[place.label] = place.canonical(place.read(access))
            except (HostSettingError, ValueError):
                continue
    return values


def _ethtool_settings(iface: str, netns: str | None, access: HostAccess) -> Iterator[Setting]:
    """Yield the fields of ethtool that can change: features by the kernel's names, coalescing, rings."""

    def setting(group: str, name: str, value: str, rank: int) -> Setting:
        key = f"feature:{name}" if group == "features" else f"{group}:{name}"
        return Setting(key, f"{name}@{iface}", f"ethtool:{group}:{name}", value, rank, iface, netns)

    try:
        features = access.call(access.ethtool.features, iface)
    except OSError:
        features = {}
    yield from (setting("features", name, "switch", FEATURES) for name, state in features.items() if not state["fixed"])
    for group, rank in (("rings", RINGS), ("coalesce", COALESCE)):
        try:
            fields = access.call(access.ethtool.get, iface, group)
        except OSError:
            continue
        yield from (setting(group, name, "int", rank) for name in fields if not name.endswith("-max"))


def _irq_settings(iface: str, netns: str | None, access: HostAccess) -> Iterator[Setting]:
    """Yield the interrupts that serve no receive queue: transmit, link changes, management."""
    of_queues = set(queue_irqs(access, iface).values())
    for action, irq in device_irqs(access, iface).items():
        if irq not in of_queues:
            yield Setting("irq_cpus", f"irq_cpus@{iface}/{action}", f"irq:action:{action}", "cpus", IRQS, iface, netns)


def _is_readable(place: Setting, access: HostAccess) -> bool:
    """Tell whether a place is there and keeps its value: adaptive moderation moves the timers it governs."""
    group, _, name = place.place.removeprefix("ethtool:").partition(":")
    try:
        place.read(access)
        if group == "coalesce" and place.iface is not None and name[:3] in ("rx-", "tx-"):
            fields = access.call(access.ethtool.get, place.iface, "coalesce")
            return not fields.get(f"adaptive-{name[:2]}")
    except HostSettingError:
        return False
    return True


def _number(setting: Setting) -> int:
    """Return the number of the queue, CPU, thread or idle state that a label ends in, -1 for none."""
    match = re.search(r"(?:rx-|tx-|napi-|cpu|state)(\d+)$", setting.label)
    return int(match[1]) if match else -1
