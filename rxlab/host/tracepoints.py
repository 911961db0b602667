"""Which tracepoints this kernel has, and which of their fields; from tracefs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rxlab.stages import EVENT_PRESETS, STAGES

TRACEFS = ("sys/kernel/tracing", "sys/kernel/debug/tracing")

# Fields the join reads. An event without one of them cannot show its stage (older kernels: tcp_probe without skbaddr).
NEEDED_FIELDS: dict[str, tuple[str, ...]] = {
    "irq:irq_handler_entry": ("irq", "name"),
    "irq:softirq_raise": ("vec",),
    "irq:softirq_entry": ("vec",),
    "net:napi_gro_receive_entry": ("skbaddr", "len", "napi_id", "hash"),
    "net:netif_rx_entry": ("skbaddr", "len", "hash"),
    "net:netif_rx": ("skbaddr", "len"),
    "csd:csd_queue_cpu": ("cpu", "func", "csd"),
    "csd:csd_function_entry": ("func", "csd"),
    "net:netif_receive_skb": ("skbaddr", "len", "name"),
    "tcp:tcp_probe": ("skbaddr", "skaddr", "sock_cookie", "sport", "dport", "data_len", "snd_una"),
    "sock:sk_data_ready": ("skaddr", "family", "protocol"),
    "sched:sched_waking": ("pid", "target_cpu"),
    "sched:sched_wakeup": ("pid", "target_cpu"),
    "sched:sched_switch": ("prev_pid", "prev_state", "next_pid", "next_comm"),
    "skb:skb_copy_datagram_iovec": ("skbaddr", "len"),
    "sock:sock_recv_length": ("sk", "family", "protocol", "ret", "flags"),
    "skb:kfree_skb": ("skbaddr", "reason"),
}


@dataclass(frozen=True)
class TracepointReport:
    """What of the presets this kernel can record.

    Attributes
    ----------
    readable : bool
        Whether tracefs could be read at all; False says nothing about the kernel.
    missing : list of str
        Events of the presets that do not exist.
    missing_fields : dict
        Event -> fields the join needs and the kernel does not record.
    lost_stages : list of str
        Stages that none of the usable events shows.
    """

    readable: bool
    missing: list[str]
    missing_fields: dict[str, list[str]]
    lost_stages: list[str]


def tracefs_dir(root: Path = Path("/")) -> Path | None:
    """Return tracefs' events directory if this process may read it."""
    for name in TRACEFS:
        folder = root / name / "events"
        try:
            if any(folder.iterdir()):
                return folder
        except OSError:
            continue
    return None


def event_fields(event: str, root: Path = Path("/")) -> list[str] | None:
    """Return the names of an event's own fields, None when the kernel has no such event."""
    folder = tracefs_dir(root)
    if folder is None:
        return None
    try:
        text = (folder / event.replace(":", "/") / "format").read_text()
    except OSError:
        return None
    declarations = re.findall(r"^\s*field:([^;]+);", text, re.MULTILINE)
    names = [declaration.split()[-1].split("[")[0].lstrip("*") for declaration in declarations]
    return [name for name in names if not name.startswith("common_")]


def check_tracepoints(events: Iterable[str] = EVENT_PRESETS["full"], root: Path = Path("/")) -> TracepointReport:
    """Compare the events of the presets and the fields the join needs with what the kernel has."""
    if tracefs_dir(root) is None:
        return TracepointReport(readable=False, missing=[], missing_fields={}, lost_stages=[])
    fields = {event: event_fields(event, root) for event in events}
    missing = [event for event, names in fields.items() if names is None]
    lacking: dict[str, list[str]] = {}
    for event, names in fields.items():
        absent = [name for name in NEEDED_FIELDS.get(event, ()) if names is not None and name not in names]
        if absent:
            lacking[event] = absent
    # A copy without its drop reason is still a drop; every other needed field identifies something.
    usable = {event for event in fields if event not in missing and event not in lacking} | {"skb:kfree_skb"}
    lost = [stage.name for stage in STAGES if stage.events and not usable.intersection(stage.events)]
    return TracepointReport(readable=True, missing=missing, missing_fields=lacking, lost_stages=lost)
