"""What the join is judged on: one table of ways in which packets reach readers, and how each is recorded.

The suite takes a small draw of it (test_scenarios_live.py), ``python tests/live/long_draw.py`` the million.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from witness import watching

from rxlab.host.journal import Transaction
from rxlab.host.settings import parse_settings
from rxlab.record.capture import capture
from rxlab.record.testbed import Endpoint, Testbed
from rxlab.record.workload import Command, Workload
from rxlab.rundir import APP_LOG, RunDir

FOLDER = Path(__file__).resolve().parent
PORT = 47900
RFS_ENTRIES = 4096


@dataclass(frozen=True)
class Scenario:
    """One way in which packets reach a reader.

    Attributes
    ----------
    name : str
    reader : str
        A kind of readers.py, "builtin" (the package's own workload), "nginx" or "redis".
    flows, size, gap_us, burst
        Connections, bytes per message, mean time between messages (0: as fast as possible), messages sent at once.
    pause_us, rcvbuf : int
        The reader sleeps after each call; its socket's buffer (UDP).
    per_message : float
        Data packets that a message makes, about.
    gro, tso : bool
        Offloads of the testbed; without `tso` the sender's stack cuts into MTU segments.
    bed : {"veth", "lo", "containers", "routed", "bridged", "bridge"}
        "containers": both ends are called eth0, and the server lives in a pid namespace of its own.
    queues : int
        Receive queues of the captured veth.
    settings : tuple of (key, value)
        Host settings beside those of the state.
    states : tuple of str
        RPS off, RPS on, RFS; small draws take turns.
    witness : {"", "links", "calls"}
        What bpftrace watches beside perf (witness.py).
    events : str
        Preset of tracepoints.
    checked : float
        Share of the data packets that the judge must have checked, beside those that perf did not show.
    is_drawn_small : bool
        The suite draws it too; the long draw takes all.
    """

    name: str
    reader: str = "recvfrom"
    proto: str = "tcp"
    family: int = 4
    flows: int = 1
    size: int = 64
    gap_us: int = 110
    burst: int = 1
    pause_us: int = 0
    per_message: float = 1.0
    gro: bool = False
    tso: bool = True
    bed: str = "veth"
    queues: int = 1
    settings: tuple[tuple[str, str], ...] = ()
    states: tuple[str, ...] = ("off", "on")
    rcvbuf: int = 4 << 20
    witness: str = ""
    events: str = "std"
    checked: float = 0.97
    builtin: tuple[tuple[str, Any], ...] = ()
    is_drawn_small: bool = True


ALL = ("off", "on", "rfs")
MSS = 1448  # 1500 bytes of MTU less 20 of IPv4, 20 of TCP and 12 of its timestamp option

SCENARIOS: tuple[Scenario, ...] = (
    # The package's own workload: request and response, and an open loop.
    Scenario("TCP ping-pong v4", "builtin", states=ALL),
    Scenario("TCP ping-pong v6", "builtin", family=6),
    Scenario("UDP ping-pong v4", "builtin", "udp", states=ALL),
    Scenario("UDP ping-pong v6", "builtin", "udp", family=6),
    # Datagrams of three IP fragments.
    Scenario("UDP in fragments v4", "builtin", "udp", size=4000),
    Scenario("UDP in fragments v6", "builtin", "udp", family=6, size=4000, is_drawn_small=False),
    # The witness watches packet by packet inside the kernel, not only at the ends.
    Scenario("TCP, skbs seen by bpftrace", witness="links", states=ALL),
    Scenario("UDP, skbs seen by bpftrace", proto="udp", witness="links"),
    Scenario("TCP, copies seen by bpftrace", size=4000, tso=False, per_message=3, gap_us=250, witness="calls"),
    # Bulk: backlog merging, one call for many segments, one skb of many segments.
    Scenario("TCP bulk, MTU segments", size=8 * MSS, gap_us=250, per_message=8, tso=False, states=ALL),
    Scenario("TCP bulk, TSO", size=8 * MSS, gap_us=80),
    Scenario("TCP bulk, GRO", size=8 * MSS, gap_us=250, gro=True, per_message=1.5),
    Scenario("TCP flood, eight connections", flows=8, size=8 * MSS, gap_us=0, per_message=8, tso=False),
    # How servers wait.
    Scenario("epoll level, 8 connections", "epoll", flows=8, states=ALL),
    Scenario("epoll edge, 8 connections", "epoll_et", flows=8),
    Scenario("busy reader, TCP", "busy"),
    Scenario("busy reader, UDP", "busy", "udp"),
    # How servers read.
    Scenario("peek then recv, TCP", "peek"),
    Scenario("peek then recv, UDP", "peek", "udp"),
    Scenario("small reads of large messages", "small"),
    Scenario("large reads of many messages", "recv", gap_us=60, pause_us=500),
    Scenario("read", "read"),
    Scenario("readv, v6", "readv", family=6),
    Scenario("recv", "recv"),
    Scenario("recvmsg, UDP", "recvmsg", "udp"),
    Scenario("recvmmsg, UDP", "recvmmsg", "udp"),
    Scenario("recvmmsg, TCP", "recvmmsg"),
    Scenario("io_uring", "io_uring"),
    # Who reads.
    Scenario("threads on one TCP socket", "threads"),
    # Of two tasks that return one after the other either may have taken either datagram: those are ambiguous, not claimed.
    Scenario("threads on one UDP socket", "threads", "udp", checked=0.4),
    Scenario("SO_REUSEPORT, TCP", "reuseport", flows=8),
    Scenario("SO_REUSEPORT, UDP", "reuseport", "udp", flows=8),
    Scenario("forked, shared listener", "fork", flows=2),
    # The entries of their calls tell most of them apart.
    Scenario("forked, shared UDP socket", "fork", "udp", events="full", checked=0.4),
    # How packets come in.
    Scenario("NAPI veth with GRO", gro=True, states=ALL),
    Scenario("NAPI veth with GRO, UDP", proto="udp", gro=True),
    Scenario("threaded NAPI", gro=True, per_message=0.3, settings=(("threaded", "on"),)),
    Scenario("several queues", "epoll", flows=8, gro=True, queues=2),
    Scenario("loopback", bed="lo", states=("off",)),
    Scenario("loopback, UDP", proto="udp", bed="lo", states=("off",)),
    Scenario("containers", bed="containers"),
    # Captured where they come in; the reader is behind another device.
    Scenario("routed to a container", bed="routed"),
    Scenario("routed to a container, UDP, all events", proto="udp", bed="routed", events="full", is_drawn_small=False),
    Scenario("bridged to a container", bed="bridged"),
    Scenario("bridged to a container, NAPI veth", bed="bridged", gro=True, events="full"),
    Scenario("bridge with the host's address, UDP", proto="udp", bed="bridge"),
    Scenario("full socket buffer", "recvfrom", "udp", gap_us=60, burst=100, pause_us=20, rcvbuf=16 << 10),
    # Servers nobody here wrote.
    Scenario("connection set-up (curl)", "http"),
    Scenario("nginx under wrk", "nginx", flows=8, witness="calls"),
    Scenario("redis under redis-benchmark", "redis", flows=8, witness="calls"),
)


class ContainerTestbed(Testbed):
    """A testbed whose two ends have the same name, as containers have."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.src, self.dst = replace(self.src, iface="eth0"), replace(self.dst, iface="eth0")


class ForwardingTestbed(Testbed):
    """A testbed whose receiving end hands packets on: by routing or a bridge to a container, or by a bridge to itself.

    ``server`` is where they end.
    """

    def __init__(self, how: str, **options: Any) -> None:
        super().__init__(**options)
        inner = None if how == "bridge" else f"rxlab-{self.identifier}-pod"
        address = {"routed": "10.78.0.2", "bridged": "10.77.0.3", "bridge": "10.77.0.4"}[how]
        self.how, self.server = how, Endpoint(inner or self.dst.netns, "eth1" if inner else "br0", address, None)

    def _build(self) -> None:
        super()._build()
        host, device = ["-n", str(self.dst.netns)], self.dst.iface
        lines = [[*host, "link", "add", "br0", "type", "bridge"], [*host, "link", "set", device, "master", "br0"]]
        lines += [[*host, "link", "set", "br0", "up"]]
        if self.how == "bridge":
            lines += [[*host, "addr", "add", f"{self.server.ipv4}/24", "dev", "br0"]]
        if self.how == "routed":
            lines = []
        if self.how != "bridge":
            inner = str(self.server.netns)
            assert self._registry is not None
            self._registry.register_namespace(inner)
            self._run(["ip", "netns", "add", inner])
            peer = ["peer", "name", "eth1", "netns", inner]
            lines += [[*host, "link", "add", "pod0", "type", "veth", *peer], ["-n", inner, "link", "set", "eth1", "up"]]
            lines += [
                ["-n", inner, "addr", "add", f"{self.server.ipv4}/24", "dev", "eth1"],
                [*host, "link", "set", "pod0", "up"],
            ]
        if self.how == "bridged":
            lines += [[*host, "link", "set", "pod0", "master", "br0"]]
        if self.how == "routed":
            lines += [
                [*host, "addr", "add", "10.78.0.1/24", "dev", "pod0"],
                ["-n", inner, "route", "add", "default", "via", "10.78.0.1"],
                ["-n", str(self.src.netns), "route", "add", "10.78.0.0/24", "via", str(self.dst.ipv4)],
            ]
        for line in lines:
            self._run(["ip", *line])
        if self.how == "routed":
            self._run(self.dst.command(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]))

    def close(self) -> None:
        if self.server.netns != self.dst.netns:
            subprocess.run(["ip", "netns", "del", str(self.server.netns)], check=False, stderr=subprocess.DEVNULL)
        super().close()


def record(scenario: Scenario, state: str, out: Path, packets: int, journal: Transaction, **options: Any) -> RunDir:
    """Record one run of about `packets` data packets."""
    messages, server = max(int(packets / scenario.per_message / scenario.flows), 1), None
    with ExitStack() as stack:
        if scenario.bed == "lo":
            options |= {"iface": "lo"}
            dst = Endpoint(None, "lo", "127.0.0.1", "::1")
            stack.enter_context(settled(scenario, state, dst, None, journal))
        else:
            bed: Testbed = stack.enter_context(testbed_of(scenario, journal))
            options |= {"testbed": bed}
            dst = bed.dst
            if isinstance(bed, ForwardingTestbed):
                server = bed.server
            if scenario.witness:
                stack.enter_context(watching(scenario.witness, dst.iface, witness_of(out)))
            stack.enter_context(settled(scenario, state, dst, bed.src, journal))
        load = workload_of(scenario, server or dst, out, messages)
        if server is not None and isinstance(load, Command):
            load = replace(load, server_argv=server.command(load.server_argv))
        return capture(
            out, workload=load, idle="spin", events=scenario.events, transaction=journal,
            configuration={"scenario": scenario.name, "rps": state}, **options,
        )  # fmt: skip


def testbed_of(scenario: Scenario, journal: Transaction) -> Testbed:
    """Return the testbed of a scenario."""
    if scenario.bed in ("routed", "bridged", "bridge"):
        return ForwardingTestbed(scenario.bed, gro=scenario.gro, registry=journal)
    return (ContainerTestbed if scenario.bed == "containers" else Testbed)(gro=scenario.gro, registry=journal)


@contextmanager
def settled(
    scenario: Scenario, state: str, dst: Endpoint, src: Endpoint | None, journal: Transaction
) -> Iterator[None]:
    """Apply the scenario's settings and the state's inside the block."""
    wanted = dict(scenario.settings)
    if scenario.queues > 1:
        wanted["rx-channels"] = str(scenario.queues)
    with ExitStack() as stack:
        if src is not None and scenario.queues > 1:
            sender = parse_settings({"tx-channels": str(scenario.queues)}, src.iface, src.netns)
            stack.enter_context(journal.change(sender))
        if src is not None and not scenario.tso:
            stack.enter_context(journal.change(parse_settings({"tso": "off", "gso": "off"}, src.iface, src.netns)))
        stack.enter_context(journal.change(parse_settings(wanted, dst.iface, dst.netns)))
        stack.enter_context(journal.change(parse_settings(steering(state), dst.iface, dst.netns)))
        yield


def steering(state: str) -> dict[str, str]:
    """Return the settings of RPS off, on, or RFS."""
    cpus = sorted(os.sched_getaffinity(0))
    if state == "off":
        return {}
    if state == "on":
        return {"rps_cpus": str(cpus[-1])}
    entries = str(RFS_ENTRIES)
    return {"rps_cpus": f"{cpus[0]}-{cpus[-1]}", "rps_flow_cnt": entries, "rps_sock_flow_entries": entries}


def workload_of(scenario: Scenario, dst: Endpoint, out: Path, messages: int) -> Workload | Command:
    """Return the traffic of a scenario."""
    address, log = dst.address(scenario.family), str(out / APP_LOG)
    if scenario.reader == "builtin":
        fields: dict[str, Any] = {"proto": scenario.proto, "family": scenario.family, "messages": messages}
        return Workload(**fields | dict(scenario.builtin), flows=scenario.flows, size=scenario.size, port=PORT)
    if scenario.reader == "nginx":
        return nginx(address, scenario.flows, messages, out)
    if scenario.reader == "redis":
        return redis(address, scenario.flows, messages * scenario.flows, out)
    place = [scenario.proto, address, str(PORT), log]
    shape = ["--flows", str(scenario.flows), "--size", str(scenario.size), "--messages", str(messages)]
    server = [*reader_program(), "serve", scenario.reader, *place, *shape]
    server += ["--pause-us", str(scenario.pause_us), "--rcvbuf", str(scenario.rcvbuf)]
    client = [
        *reader_program(),
        "send",
        *place,
        *shape,
        "--gap-us",
        str(scenario.gap_us),
        "--burst",
        str(scenario.burst),
    ]
    if scenario.bed == "containers":
        server = ["unshare", "--pid", "--fork", "--kill-child", *server]
    if scenario.reader == "http":
        url = f"http://{address}:{PORT}/?[1-{messages}]"
        fetch = f"curl -s -S -o /dev/null -H 'Connection: close' '{url}'"
        client = ["sh", "-c", f"{fetch} && for i in $(seq 200); do [ -s '{log}' ] && exit; sleep 0.05; done; exit 1"]
    return Command(client, server, PORT)


def witness_of(out: Path) -> Path:
    """Return where the witness of a run writes."""
    return out.with_name(out.name + ".witness")


def reader_program() -> list[str]:
    return [sys.executable, str(FOLDER / "readers.py")]


def nginx(address: str, flows: int, messages: int, out: Path) -> Command:
    """Debian's nginx under wrk."""
    configuration = out.with_name(out.name + ".nginx.conf")
    configuration.write_text(
        f"daemon off; worker_processes 1; pid {out}.nginx.pid; error_log stderr;\n"
        "events {}\nhttp { access_log off; "
        + "".join(
            f"{kind}_temp_path {out}.nginx.tmp; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        + f"server {{ listen {address}:{PORT}; keepalive_requests 10000000; location / {{ return 200 'ok'; }} }} }}\n"
    )
    seconds = max(round(messages * flows / 9000), 1)
    client = ["wrk", "-t1", f"-c{flows}", f"-d{seconds}s", f"http://{address}:{PORT}/"]
    return Command(client, ["nginx", "-c", str(configuration)], PORT)


def redis(address: str, flows: int, requests: int, out: Path) -> Command:
    """Debian's redis under redis-benchmark."""
    server: Sequence[str] = ["redis-server", "--bind", address, "--port", str(PORT), "--save", "", "--appendonly", "no"]
    client = [
        "redis-benchmark",
        "-h",
        address,
        "-p",
        str(PORT),
        "-c",
        str(flows),
        "-n",
        str(requests),
        "-t",
        "set",
        "-q",
    ]
    return Command(client, [*server, "--protected-mode", "no"], PORT)
