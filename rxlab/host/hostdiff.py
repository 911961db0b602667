"""What differs between two looks at a host: two exports, an export and now, the beginning and the end of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rxlab.errors import FormatError
from rxlab.host.access import HostAccess
from rxlab.host.cpulist import parse_cpus
from rxlab.host.settings import read_settings
from rxlab.host.topology import read_queues
from rxlab.rundir import HOST_JSON, read_json

# Said by the settings in the same snapshot; what is left of a queue is its interrupt and where that is.
_SAID_TWICE = ("irq_cpus", "rps_cpus", "rps_flow_cnt", "xps_cpus")
_NUMBERED = ("cpu", "queue")


def read_snapshot(path: Path) -> dict[str, Any]:
    """Return what ``rxlab host export`` wrote, or the host.json of a run directory.

    Raises
    ------
    FormatError
        The path is neither.
    """
    file = path / HOST_JSON if path.is_dir() else path
    problem = None if file.is_file() else f"a folder without {HOST_JSON}" if path.is_dir() else "nothing there"
    content = {} if problem else read_json(file)
    if not problem and "settings" not in content:
        problem = f"JSON with {', '.join(sorted(content)[:4])}"
    if problem:
        raise FormatError(
            "not a look at a host",
            where=str(path),
            found=problem,
            expected=f"a file that 'rxlab host export -o FILE' wrote, or a run directory with its {HOST_JSON}",
        )
    return content


def diff_snapshots(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Return ``{name: (before, after)}`` of what differs; None where one of them does not have it.

    A part that only one of the two looked at (a run's host.json has not all an export has) is not compared.
    """
    one, other = dict(_leaves(before)), dict(_leaves(after))
    parts = {_part(name) for name in one} & {_part(name) for name in other}
    names = [name for name in {**one, **other} if _part(name) in parts and one.get(name) != other.get(name)]
    return {name: (one.get(name), other.get(name)) for name in names}


def diff_lines(differences: Mapping[str, tuple[str | None, str | None]]) -> list[str]:
    """Return differences as lines for people."""
    return [
        f"{name}: {'not there' if before is None else before} -> {'not there' if after is None else after}"
        for name, (before, after) in differences.items()
    ]


def settings_drift(
    snapshot: Mapping[str, Any], iface: str, netns: str | None, root: Path = Path("/")
) -> dict[str, tuple[str, str | None]]:
    """Return the settings that are not now as a run's host.json says, and the interrupts that were moved: label to values.

    Timers that adaptive moderation moves by itself are left out. So is an interrupt that was not yet where it had been sent: without
    interrupt remapping it moves when it next comes (arch/x86/kernel/apic/msi.c: msi_set_affinity, IRQD_SETAFFINITY_PENDING).
    """
    then = snapshot["ifaces"].get(iface) or {}
    moved = filter(_has_moved, then.get("queues") or [])
    before = {**snapshot.get("settings", {}), **then.get("settings", {}), **_effective(iface, moved)}
    with HostAccess(None, root) as host, HostAccess(netns, root) as inside:
        now = {
            **read_settings(None, None, host),
            **read_settings(iface, inside.netns, inside),
            **_effective(iface, read_queues(inside, iface)),
        }
    adaptive = [way for way in ("rx", "tx") if before.get(f"adaptive-{way}@{iface}") not in (None, "off")]
    return {
        label: (value, now.get(label))
        for label, value in before.items()
        if now.get(label) != value and not any(label.startswith((f"{way}-usecs", f"{way}-frames")) for way in adaptive)
    }


def _effective(iface: str, queues: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {
        f"irq_effective@{iface}/rx-{queue['queue']}": queue["irq_effective"]
        for queue in queues
        if queue.get("irq_effective")
    }


def _has_moved(queue: Mapping[str, Any]) -> bool:
    """Tell whether a queue's interrupt comes where it was sent."""
    came, sent = queue.get("irq_effective"), queue.get("irq_cpus")
    return not came or not sent or set(parse_cpus(came)) <= set(parse_cpus(sent))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every value of a snapshot under a name that people can find again: ``ifaces.eth0.rings.rx``."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "schema_version":
                yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        for entry in value:
            key = next(key for key in _NUMBERED if key in entry)
            inner = {item: entry[item] for item in entry if item != key and item not in _SAID_TWICE}
            yield from _leaves(inner, f"{name}.{entry[key]}")
    elif value is not None:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _part(name: str) -> str:
    """Return the section of a name: ``settings``, or ``ifaces.eth0.rings``."""
    words = name.split(".")
    return ".".join(words[: 3 if words[0] == "ifaces" else 1])
