"""What may not be changed without being told: the host outside a testbed, and the interface one is connected through."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rxlab.errors import HostSettingError
from rxlab.host.access import HostAccess
from rxlab.host.settings import KINDS, Setting
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
    session = os.environ.get("SSH_CONNECTION", "").split()
    if len(session) == 4 and access.is_real:
        for iface in access.list("sys/class/net"):
            if session[2] in local_identity(iface)[1]:
                lifelines[iface] = "this ssh session"
    return lifelines
