"""What may not be changed without being told: the host outside a testbed, and the interface one is connected through."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rxlab.errors import HostSettingError
from rxlab.host.access import HostAccess
from rxlab.host.kinds import IRQBALANCE, IRQS, KINDS
from rxlab.host.places import process_states
from rxlab.host.settings import Setting
from rxlab.host.topology import local_identity


def check_allowed(settings: Sequence[Setting], allowed: bool, yes_this_nic: bool, access: HostAccess) -> None:
    """Refuse settings outside the testbed's namespaces unless the person said so.

    Raises
    ------
    HostSettingError
        Names the first setting and the option that would allow it.
    """
    if not settings:
        return
    first = settings[0]
    if not allowed:
        raise HostSettingError(
            "the setting is the host's, not the testbed's",
            where=first.label,
            do="Nothing was changed. Give --allow-system-changes to have it changed and put back.",
        )
    _check_irqbalance(settings, access)
    if yes_this_nic:
        return
    lifelines = lifeline_ifaces(access)
    for setting in settings:
        if setting.netns is None and setting.iface in lifelines:
            drop = KINDS.get(setting.key)
            dropping = "; this setting usually takes the link down" if drop and drop.drops_link else ""
            raise HostSettingError(
                f"this interface carries {lifelines[setting.iface]}{dropping}",
                where=setting.label,
                do="Nothing was changed. Give --yes-this-nic if you mean it.",
            )


def _check_irqbalance(settings: Sequence[Setting], access: HostAccess) -> None:
    """Refuse to move interrupts that a daemon would move back, unless the person said what is to become of the daemon."""
    moved = next((setting for setting in settings if setting.rank == IRQS), None)
    if moved is None or any(setting.rank == IRQBALANCE for setting in settings):
        return
    pids = [pid for pid, state in process_states(access, "irqbalance").items() if state != "T"]
    if pids:
        raise HostSettingError(
            "irqbalance is running and may move the interrupt again",
            where=moved.label,
            found=f"process {', '.join(map(str, pids))}",
            do="Nothing was changed. Add irqbalance=off to pause it until the end, or irqbalance=on to let it run.",
        )


def lifeline_ifaces(access: HostAccess) -> dict[str, str]:
    """Return ``{interface: why}`` of interfaces whose loss would cut the host off."""
    lifelines = {}
    # Iface Destination Gateway Flags RefCnt Use Metric Mask ...
    for line in (access.try_read("proc/thread-self/net/route") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == fields[7] == "00000000":
            lifelines[fields[0]] = "the default route"
    # destination, prefix length, source, its prefix length, next hop, metric, ref, use, flags, device
    for line in (access.try_read("proc/thread-self/net/ipv6_route") or "").splitlines():
        fields = line.split()
        if len(fields) == 10 and fields[1] == "00" and fields[9] != "lo":
            lifelines.setdefault(fields[9], "the default route")
    # "client address, client port, server address, server port"
    session = ssh_connection(access).split()
    if len(session) == 4 and access.is_real:
        for iface in access.list("sys/class/net"):
            if session[2] in local_identity(iface)[1]:
                lifelines[iface] = "this ssh session"
    # The ports of a bond or a bridge and the device below a VLAN carry what it carries.
    waiting = list(lifelines)
    while waiting:
        upper = waiting.pop()
        for name in access.list(f"sys/class/net/{upper}"):
            lower = name.removeprefix("lower_")
            if name != lower and lower not in lifelines:
                lifelines[lower] = f"{lifelines[upper]} of {upper}"
                waiting.append(lower)
    return lifelines


def ssh_connection(access: HostAccess) -> str:
    """Return SSH_CONNECTION of this process or of the nearest ancestor that has it: sudo takes it out of the environment."""
    if "SSH_CONNECTION" in os.environ:
        return os.environ["SSH_CONNECTION"]
    pid = os.getppid()
    while access.is_real and pid > 1:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        for entry in environment:
            if entry.startswith(b"SSH_CONNECTION="):
                return entry.partition(b"=")[2].decode(errors="replace")
    return ""
