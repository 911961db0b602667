"""The embedded testbed: two network namespaces joined by a veth pair, made in ~0.1 s and gone afterwards.

``src`` sends, ``dst`` receives and is captured. A veth has no NIC and no hard IRQ, and without GRO its softirq runs on the
*sender's* CPU: results are not transferable to a NIC, and the report says so.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rxlab.errors import CaptureError, UsageError
from rxlab.host.topology import local_identity
from rxlab.host.undo import interrupt_later

NETNS_FOLDER = Path("/run/netns")


class Registry(Protocol):
    """What a testbed tells of the things a crash must not leave behind: :class:`rxlab.host.journal.Transaction`."""

    def register_namespace(self, name: str) -> None:
        """Note a namespace that is about to be made."""

    def leave_namespaces(self) -> None:
        """Let go of the namespaces, which are about to be removed."""

    def environment(self) -> dict[str, str]:
        """Return the environment for commands that are not to outlive this process."""


@dataclass(frozen=True)
class Endpoint:
    """One side of a testbed: an interface, the namespace it lives in, and its addresses.

    Attributes
    ----------
    netns : str or None
        Name of the namespace as ``ip netns`` knows it; None for the host's own.
    iface : str
    ipv4, ipv6 : str or None
        Addresses without prefix length.
    """

    netns: str | None
    iface: str
    ipv4: str | None
    ipv6: str | None

    @property
    def netns_path(self) -> str | None:
        """Path of the namespace file, as run.json keeps it."""
        return str(NETNS_FOLDER / self.netns) if self.netns else None

    def address(self, family: int) -> str:
        """Return the IPv4 (`family` 4) or IPv6 (6) address."""
        address = self.ipv6 if family == 6 else self.ipv4
        if address is None:
            raise CaptureError(f"interface {self.iface} has no IPv{family} address")
        return address

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return `argv` as a command that runs inside this endpoint's namespace."""
        return in_netns(self.netns, argv)


def in_netns(netns: str | None, argv: Sequence[str]) -> list[str]:
    """Return `argv` as a command that runs inside namespace `netns` (a name or a path below /run/netns; None: here).

    ``ip netns exec`` replaces itself by the command, so the process id is the command's.
    """
    return ["ip", "netns", "exec", Path(netns).name, *argv] if netns else list(argv)


class Testbed:
    """A veth pair between two namespaces, as a context manager.

    Parameters
    ----------
    gro : bool
        Switch GRO on and TSO off at both ends: the veth then runs NAPI (``napi_gro_receive``) instead of ``netif_rx``.
    mtu : int
    registry : Registry, optional
        Told of the namespaces *before* they exist, so that a SIGKILL at any moment leaves nothing behind.
    identifier : str, optional
        Part of the namespace names; random when not given.

    Attributes
    ----------
    src, dst : Endpoint
        The sending side and the receiving, captured side.
    """

    kind = "veth"
    __test__ = False  # not a test class, whatever pytest thinks of its name

    def __init__(
        self, *, gro: bool = False, mtu: int = 1500, registry: Registry | None = None, identifier: str | None = None
    ) -> None:
        self.identifier = identifier or secrets.token_hex(3)
        self.gro, self.mtu, self._registry = gro, mtu, registry
        self.src = Endpoint(f"rxlab-{self.identifier}-src", f"rxs-{self.identifier}", "10.77.0.1", "fd77::1")
        self.dst = Endpoint(f"rxlab-{self.identifier}-dst", f"rxd-{self.identifier}", "10.77.0.2", "fd77::2")

    def describe(self) -> dict[str, Any]:
        """Return the ``testbed`` object of run.json."""
        ends = {
            side: {"netns": end.netns, "iface": end.iface, "ipv4": end.ipv4, "ipv6": end.ipv6}
            for side, end in (("src", self.src), ("dst", self.dst))
        }
        return {"kind": self.kind, "id": self.identifier, "gro": self.gro, "mtu": self.mtu, **ends}

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise CaptureError(
                "the testbed needs root to make network namespaces",
                do="Run it with sudo, or capture on an interface of your own; 'rxlab doctor' says what is missing.",
            )
        if shutil.which("ip") is None:
            raise CaptureError("the testbed needs the 'ip' command", do="Install iproute2: apt install iproute2.")
        try:
            with interrupt_later():
                self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(self) -> None:
        for end in (self.src, self.dst):
            assert end.netns is not None
            if self._registry is not None:
                self._registry.register_namespace(end.netns)
            self._run(["ip", "netns", "add", end.netns])
        src, dst = self.src, self.dst
        mtu = str(self.mtu)
        pair = ["ip", "link", "add", src.iface, "netns", str(src.netns), "mtu", mtu, "type", "veth"]
        self._run([*pair, "peer", "name", dst.iface, "netns", str(dst.netns), "mtu", mtu])
        for end in (src, dst):
            self._configure(end)
        for end in (src, dst):
            self._verify(end)

    def _configure(self, end: Endpoint) -> None:
        # Without duplicate address detection the IPv6 address is usable at once; router solicitations would be packets
        # nobody asked for in the middle of a capture.
        quiet = "".join(
            f"echo {value} > /proc/sys/net/ipv6/conf/{end.iface}/{name};"
            for name, value in (("accept_dad", 0), ("router_solicitations", 0), ("accept_ra", 0))
        )
        script = f"if [ -d /proc/sys/net/ipv6/conf/{end.iface} ]; then {quiet} fi"
        self._run(end.command(["sh", "-c", script]))
        lines = [
            "link set lo up",
            f"addr add {end.ipv4}/24 dev {end.iface}",
            f"addr add {end.ipv6}/64 dev {end.iface} nodad",
            f"link set {end.iface} up",
        ]
        self._run(self._ip(end, "-batch", "-"), stdin="\n".join(lines) + "\n")
        if self.gro:
            # A veth hands packets to the peer's NAPI only when its own sender does not segment (drivers/net/veth.c).
            self._run(end.command(["ethtool", "-K", end.iface, "gro", "on", "tso", "off"]))

    def _verify(self, end: Endpoint) -> None:
        state = self._run(self._ip(end, "-o", "link", "show", "dev", end.iface))
        if "LOWER_UP" not in state:
            raise CaptureError("the testbed's link did not come up", where=end.iface, found=state, expected="LOWER_UP")

    @staticmethod
    def _ip(end: Endpoint, *arguments: str) -> list[str]:
        return ["ip", *(["-n", end.netns] if end.netns else []), *arguments]

    def _run(self, argv: Sequence[str], *, stdin: str | None = None) -> str:
        environment = self._registry.environment() if self._registry is not None else None
        return run_checked(argv, stdin=stdin, environment=environment)

    def close(self) -> None:
        """Remove both namespaces and with them the veth pair. Safe to call twice."""
        with interrupt_later():
            for end in (self.src, self.dst):
                if end.netns is not None and (NETNS_FOLDER / end.netns).exists():
                    if self._registry is not None:
                        self._registry.leave_namespaces()
                    self._run(["ip", "netns", "del", end.netns])


def run_checked(argv: Sequence[str], *, stdin: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a command that must succeed and return its standard output."""
    # A session of its own: Ctrl-C at the terminal reaches this process alone, not a command half done.
    finished = subprocess.run(
        argv, input=stdin, capture_output=True, text=True, check=False, env=environment, start_new_session=True
    )
    if finished.returncode != 0:
        raise CaptureError(
            "a command of the testbed failed",
            where=" ".join(argv),
            found=finished.stderr.strip() or f"exit status {finished.returncode}",
            do="Run 'rxlab doctor' to see what this host lacks.",
        )
    return finished.stdout


def endpoint_of(iface: str | None, netns: str | None) -> Endpoint:
    """Describe an interface of this machine, with its first address of each family."""
    if iface is None:
        raise UsageError("no interface to capture on", expected="--iface IF or --testbed")
    name = Path(netns).name if netns else None
    _, addresses = local_identity(iface, name)
    if not addresses and not (Path("/sys/class/net") / iface).exists() and name is None:
        raise CaptureError("no such interface", where=iface, do="'ip -br link' lists them.")
    ipv4 = next((address for address in addresses if ":" not in address), None)
    ipv6 = next((address for address in addresses if ":" in address and not address.startswith("fe80")), None)
    return Endpoint(name, iface, ipv4, ipv6)


def sender_of(testbed: Testbed | None, dst: Endpoint) -> Endpoint | None:
    """Return where the workload's client runs; None when only a remote host can be meant."""
    if testbed is not None:
        return testbed.src
    return dst if dst.iface == "lo" else None
