"""A testbed of real hardware: two NIC ports of this machine cabled together, the sending one moved into a namespace.

Without the namespace the kernel would deliver between two addresses of its own without touching the cable. The captured port
stays where it is: its queues, interrupts and coalescing are the host's, so changing them needs the host's permission and they
are put back. A port in a namespace comes home when the namespace goes, so a crash needs no more than ``rxlab restore``; only
the two addresses of the captured port then stay until ``ip addr flush dev IF``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from rxlab.errors import CaptureError, UsageError
from rxlab.host.access import HostAccess
from rxlab.host.guard import lifeline_ifaces
from rxlab.record.testbed import Endpoint, Registry, Testbed

SYS_NET = Path("/sys/class/net")
IFF_UP = 1

# A copper port negotiates its link for two to four seconds.
LINK_SECONDS = 15.0
HOME_SECONDS = 5.0


def parse_ports(text: str) -> tuple[str, str]:
    """Return the sending and the captured interface of ``ports:IF1,IF2``."""
    kind, _, names = text.partition(":")
    ports = [name.strip() for name in names.split(",")]
    if kind != "ports" or len(ports) != 2 or not all(ports) or ports[0] == ports[1]:
        raise UsageError(
            "not a testbed",
            where="--testbed",
            found=repr(text),
            expected="ports:IF1,IF2 with two ports cabled together; IF1 sends, IF2 is captured",
        )
    return ports[0], ports[1]


class PortsTestbed(Testbed):
    """Two cabled ports, as a context manager.

    Parameters
    ----------
    sender, captured : str
        Interfaces of this host. Neither may have an address or carry the default route: both are reconfigured.
    registry : Registry, optional
        Told of the namespace before it exists.
    identifier : str, optional
        Part of the namespace's name; random when not given.
    """

    kind = "ports"

    def __init__(
        self, sender: str, captured: str, *, registry: Registry | None = None, identifier: str | None = None
    ) -> None:
        super().__init__(registry=registry, identifier=identifier)
        self.src = Endpoint(f"rxlab-{self.identifier}-src", sender, "10.77.0.1", "fd77::1")
        self.dst = Endpoint(None, captured, "10.77.0.2", "fd77::2")
        self._was_up: dict[str, bool] = {}

    def _build(self) -> None:
        src, dst = self.src, self.dst
        assert src.netns is not None
        for end in (src, dst):
            self._refuse_ports_in_use(end.iface)
        self._was_up = {end.iface: is_up(end.iface) for end in (src, dst)}
        self.mtu = int((SYS_NET / dst.iface / "mtu").read_text())
        if self._registry is not None:
            self._registry.register_namespace(src.netns)
        self._run(["ip", "netns", "add", src.netns])
        self._run(["ip", "link", "set", "dev", src.iface, "netns", src.netns])
        for end in (src, dst):
            self._configure(end)
        for end in (src, dst):
            self._await_link(end)

    def _refuse_ports_in_use(self, iface: str) -> None:
        if not (SYS_NET / iface).exists():
            raise CaptureError("no such interface", where=iface, do="'ip -br link' lists them.")
        if why := lifeline_ifaces(HostAccess()).get(iface):
            raise CaptureError(f"this interface carries {why}", where=iface, do="Choose ports that nothing uses.")
        [link] = json.loads(self._run(["ip", "-json", "addr", "show", "dev", iface]))
        used = [entry["local"] for entry in link["addr_info"] if entry.get("scope") == "global"]
        if used:
            raise CaptureError(
                "the interface is in use: it has an address",
                where=iface,
                found=", ".join(used),
                do=f"Remove it if you can spare the port: ip addr flush dev {iface}.",
            )

    def _await_link(self, end: Endpoint) -> None:
        deadline = time.monotonic() + LINK_SECONDS
        while True:
            try:
                self._verify(end)
                return
            except CaptureError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def close(self) -> None:
        """Bring the sending port home and leave both ports as they were. Safe to call twice."""
        super().close()
        for iface, was_up in self._was_up.items():
            # The namespace is taken down in the background, and a process still inside holds it a little longer.
            deadline = time.monotonic() + HOME_SECONDS
            while not (SYS_NET / iface).exists():
                if time.monotonic() > deadline:
                    raise CaptureError("the port did not come back from the testbed's namespace", where=iface)
                time.sleep(0.02)
            self._run(["ip", "addr", "flush", "dev", iface])
            self._run(["ip", "link", "set", "dev", iface, "up" if was_up else "down"])
        self._was_up = {}


def is_up(iface: str) -> bool:
    """Return whether an interface of this namespace is administratively up."""
    return bool(int((SYS_NET / iface / "flags").read_text(), 16) & IFF_UP)


def captured_port(spec: bool | str) -> str | None:
    """Return the captured interface of ``ports:IF1,IF2``; None for the embedded testbed, and for none at all."""
    return parse_ports(spec)[1] if isinstance(spec, str) and spec not in ("", "veth") else None


def check_place(iface: str | None, testbed: bool | str, netns: str | None = None) -> None:
    """Refuse a recording that has no place, or two."""
    if not iface and not testbed:
        raise UsageError("nothing to record on", expected="--iface IF or --testbed")
    if testbed and (iface or netns):
        other = f"--iface {iface}" if iface else f"--netns {netns}"
        raise UsageError(
            "two places to record on",
            found=f"{other} and --testbed",
            expected="one of them",
            do="A testbed has an interface of its own; leave one of the two out.",
        )


def open_testbed(spec: bool | str = True, *, gro: bool = False, registry: Registry | None = None) -> Testbed:
    """Return the testbed that `spec` names: the embedded veth pair (True or ``veth``), or ``ports:IF1,IF2``."""
    if captured_port(spec) is None:
        return Testbed(gro=gro, registry=registry)
    sender, captured = parse_ports(str(spec))
    if gro:
        raise UsageError("--gro is the veth testbed's", where=str(spec), do="Use --set gro=on for the captured port.")
    return PortsTestbed(sender, captured, registry=registry)
