"""Traffic for a capture: the built-in logged client and server, or any command; both behind one small interface.

Everything synchronises by lines on pipes: a server prints ``ready`` when it listens, a client when it is connected, and the
client sends nothing before the barrier opens.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rxlab.errors import CaptureError, UsageError
from rxlab.host.cpulist import parse_cpus
from rxlab.record.processes import (
    READY_TIMEOUT,
    close_quietly,
    kill_after,
    kill_group,
    last_line,
    open_private,
    read_line,
    wait_listening,
)
from rxlab.record.testbed import Endpoint, in_netns
from rxlab.rundir import APP_LOG, APP_LOG_STRUCT, CLIENT_LOG, MESSAGE_HEADER, MOVES_LOG, PYPERF_JSON

Starter = Callable[..., subprocess.Popen[bytes]]

END_TIMEOUT = 10.0
MAX_UDP_SIZE = 65507  # 65535 less 20 bytes of IPv4 header and 8 of UDP
MAX_TCP_SIZE = 64 << 20  # each end holds a whole message
SHORTEST_STAY = 0.001  # seconds of a migrating reader on one CPU: several messages have to fit
COMMAND_LOG = "command.log"
# Environment variables that tell a command where both ends are.
ADDRESSES = ("RXLAB_SERVER_ADDRESS", "RXLAB_CLIENT_ADDRESS")
CLIENT_SCRIPT = Path(__file__).with_name("client.py")
PACKAGE_PARENT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Workload:
    """The built-in workload.

    Attributes
    ----------
    proto : {"tcp", "udp"}
    family : {4, 6}
    mode : {"closed", "open"}
        Closed loop: the next message after the last one's reply. Open loop: at times fixed beforehand.
    messages : int or None
        Per flow. None: as many as fit `duration`.
    duration : float or None
        Seconds.
    size, reply_size : int
        Bytes per message and per reply; 0 replies for one-way traffic (open loop only).
    flows : int
        Connections (TCP), or sockets on consecutive ports (UDP); a process per flow at both ends.
    rate : float
        Open loop: messages per second over all flows.
    arrivals : {"poisson", "constant"}
    client_cpu, server_cpu : int or None
        Pinned CPU, None: not pinned, -1: first CPU for the client and last for the server.
    server_policy : str
        Scheduling policy of the readers: other, batch, idle, fifo:PRIORITY or rr:PRIORITY (sched(7)).
    migrate : float or None
        Seconds between two moves of every reader to its next CPU; None: it stays on `server_cpu`. Logged in ``moves.log``.
    migrate_cpus : str or None
        List of the CPUs it visits in turn, beginning with the first; None: all, beginning with `server_cpu`.
    scm : bool
        Log SCM_TIMESTAMPNS. Switches the kernel's network timestamps on and so moves the pcap's software stamp to an earlier
        point of the path, as ``tcpdump --time-stamp-precision=nano`` does anyway.
    remote : str or None
        ``ssh:HOST``: run the client there.
    """

    proto: str = "tcp"
    family: int = 4
    mode: str = "closed"
    messages: int | None = 20_000
    duration: float | None = None
    size: int = 64
    reply_size: int = 64
    flows: int = 1
    rate: float = 2000.0
    arrivals: str = "poisson"
    seed: int = 1
    client_cpu: int | None = -1
    server_cpu: int | None = -1
    server_policy: str = "other"
    migrate: float | None = None
    migrate_cpus: str | None = None
    scm: bool = True
    port: int = 47000
    timeout: float = 1.0
    remote: str | None = None

    name = "builtin"

    def __post_init__(self) -> None:
        limits: dict[str, str] = {"migrate": f"{SHORTEST_STAY} seconds or more", "migrate_cpus": "two CPUs or more"}
        largest = MAX_UDP_SIZE if self.proto == "udp" else MAX_TCP_SIZE
        limits |= dict.fromkeys(("size", "reply_size"), f"{MESSAGE_HEADER.size} to {largest} bytes for {self.proto}")
        checks = {
            "proto": self.proto in ("tcp", "udp"),
            "family": self.family in (4, 6),
            "mode": self.mode in ("closed", "open"),
            "arrivals": self.arrivals in ("poisson", "constant"),
            "flows": self.flows >= 1,
            "size": MESSAGE_HEADER.size <= self.size <= largest,
            "reply_size": MESSAGE_HEADER.size <= self.reply_size <= largest
            or (self.reply_size == 0 and self.mode == "open"),
            "duration": self.duration is None or 0 < self.duration < math.inf,
            "messages": (self.messages or 0) > 0 or (self.duration or 0) > 0,
            "rate": self.rate > 0,
            "server_policy": re.fullmatch(r"other|batch|idle|(fifo|rr):[1-9][0-9]?", self.server_policy) is not None,
            "migrate": self.migrate is None or SHORTEST_STAY <= self.migrate < math.inf,
            "migrate_cpus": self.migrate_cpus is None or len(self.visited()) > 1,
            "remote": self.remote is None or self.remote.startswith("ssh:"),
        }
        for key, is_good in checks.items():
            if not is_good:
                raise UsageError(f"workload: {key} cannot be {getattr(self, key)!r}", expected=limits.get(key))

    def describe(self) -> dict[str, Any]:
        """Return the ``workload`` object of run.json."""
        return {"name": self.name, **asdict(self)}

    def visited(self) -> list[int]:
        """Return the CPUs that a migrating reader visits in turn, [] where `migrate_cpus` is no list of CPUs."""
        if self.migrate_cpus is not None:
            try:
                return parse_cpus(self.migrate_cpus)
            except ValueError:
                return []
        cpus = sorted(os.sched_getaffinity(0))
        first = cpus.index(self.server_cpu) if self.server_cpu in cpus else len(cpus) - 1
        return cpus[first:] + cpus[:first]

    def pinned(self) -> Workload:
        """Return the workload with -1 CPUs resolved on this machine."""
        cpus = sorted(os.sched_getaffinity(0))
        client = cpus[0] if self.client_cpu == -1 else self.client_cpu
        return replace(
            self,
            client_cpu=None if self.remote and self.client_cpu == -1 else client,
            server_cpu=cpus[-1] if self.server_cpu == -1 else self.server_cpu,
        )

    def server_argv(self, address: str, log: Path) -> list[str]:
        """Return the server's command line."""
        argv = [sys.executable, "-m", "rxlab.record.server", address, str(self.port), "--proto", self.proto]
        argv += ["--flows", str(self.flows), "--size", str(self.size), "--reply-size", str(self.reply_size)]
        argv += ["--capacity", str((self.messages or 1 << 16) + 1000), "--log", str(log)]
        argv += ["--policy", self.server_policy] if self.server_policy != "other" else []
        if self.migrate is not None:
            argv += ["--move-every", str(self.migrate), "--move-to", ",".join(map(str, self.visited()))]
            argv += ["--moves", str(log.with_name(MOVES_LOG))]
        elif self.server_cpu is not None:
            argv += ["--cpu", str(self.server_cpu)]
        return argv + (["--scm"] if self.scm else [])

    def client_arguments(self, address: str) -> list[str]:
        """Return the arguments of record/client.py, all but ``--log``."""
        argv = [address, str(self.port), "--proto", self.proto, "--mode", self.mode, "--flows", str(self.flows)]
        argv += ["--size", str(self.size), "--reply-size", str(self.reply_size), "--rate", str(self.rate)]
        argv += ["--arrivals", self.arrivals, "--seed", str(self.seed), "--timeout", str(self.timeout)]
        argv += ["--messages", str(self.messages)] if self.messages else []
        argv += ["--duration", str(self.duration)] if self.duration else []
        return argv + (["--cpu", str(self.client_cpu)] if self.client_cpu is not None else [])


@dataclass(frozen=True)
class Command:
    """Any command as workload.

    Attributes
    ----------
    argv : sequence of str
        Runs on the sending side of a testbed, or in the namespace of the captured interface. It finds the addresses in
        ``RXLAB_SERVER_ADDRESS`` and ``RXLAB_CLIENT_ADDRESS``.
    server_argv : sequence of str
        Runs on the captured side first, is stopped afterwards.
    server_port : int or None
        The traffic starts when something listens on this port there.
    pyperf : bool
        The command is a pyperf script: it is told to write its values into the run, and to hand the addresses on to its worker
        processes, which get no environment otherwise (``--inherit-environ``).
    """

    argv: Sequence[str]
    server_argv: Sequence[str] = ()
    server_port: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    pyperf: bool = False

    name = "command"

    def check(self) -> None:
        """Raise the usage error for a program that does not exist."""
        for argv in filter(None, (self.argv, self.server_argv)):
            if shutil.which(argv[0]) is None:
                raise UsageError(f"the workload's command does not exist: {argv[0]}")

    def describe(self) -> dict[str, Any]:
        """Return the ``workload`` object of run.json."""
        return {
            "name": self.name,
            "argv": list(self.argv),
            "server_argv": list(self.server_argv),
            "server_port": self.server_port,
            "pyperf": self.pyperf,
        }


class Traffic(Protocol):
    """A workload that was started: what the capture does with it."""

    def prepare(self) -> None:
        """Start servers and clients; return when nothing but the barrier holds the traffic back."""

    def go(self) -> None:
        """Open the barrier."""

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for the end of the traffic and tell whether it has ended."""

    def finish(self) -> dict[str, Any]:
        """Stop what still runs, let it write its logs, and return what was got. Safe to call at any time."""


class BuiltinTraffic:
    """The built-in server on `dst` and its client on `src` (None: the remote host of the workload)."""

    def __init__(
        self,
        workload: Workload,
        src: Endpoint | None,
        dst: Endpoint,
        out: Path,
        start_process: Starter = subprocess.Popen,
    ) -> None:
        if src is None and workload.remote is None:
            raise UsageError(
                "the built-in workload needs a sender on another machine or namespace",
                do="Give --testbed, --remote ssh:HOST, --attach, or a command after '--'.",
            )
        self._workload, self._src, self._dst, self._out, self._start_process = (
            workload.pinned(),
            src,
            dst,
            out,
            start_process,
        )
        self._server: subprocess.Popen[bytes] | None = None
        self._client: subprocess.Popen[bytes] | None = None
        self._answer = bytearray()
        self._stderr = open_private(out / COMMAND_LOG)

    def prepare(self) -> None:
        """Start the server, then the client."""
        load = self._workload
        address = self._dst.address(load.family)
        server = self._dst.command(load.server_argv(address, self._out / APP_LOG))
        # The server is a module of this package, which need not be installed where Python looks first.
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "PYTHONDONTWRITEBYTECODE": "1"}
        self._server = self._start(server, environment)
        self._expect_ready(self._server, "server")
        arguments = load.client_arguments(address)
        if load.remote is not None:
            script = CLIENT_SCRIPT.read_bytes()
            self._client = self._start(remote_argv(load.remote, len(script), [*arguments, "--log", "-"]), None)
            assert self._client.stdin is not None
            with suppress(BrokenPipeError):  # an ssh that failed says why on its standard error
                self._client.stdin.write(script)
        else:
            local = [sys.executable, "-I", str(CLIENT_SCRIPT), *arguments, "--log", str(self._out / CLIENT_LOG)]
            self._client = self._start(in_netns(self._src.netns if self._src else None, local), None)
        self._expect_ready(self._client, "client")

    def _start(self, argv: Sequence[str], environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
        return self._start_process(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C at the terminal reaches the capture alone, which ends things in order
        )

    def _expect_ready(self, process: subprocess.Popen[bytes], who: str) -> None:
        line = read_line(process, READY_TIMEOUT)
        if line != b"ready\n":
            process.kill()
            process.wait()
            raise CaptureError(
                f"the workload's {who} did not start",
                where=str(self._out / COMMAND_LOG),
                found=last_line(self._out / COMMAND_LOG) or line.decode(errors="replace").strip() or "no answer",
                expected="'ready'",
            )

    def go(self) -> None:
        """Open the barrier."""
        assert self._client is not None
        assert self._client.stdin is not None
        with suppress(BrokenPipeError):  # then its end, or its exit status, tells
            self._client.stdin.write(b"go\n")

    def wait(self, timeout: float) -> bool:
        """Collect what the client prints until it ends."""
        assert self._client is not None
        assert self._client.stdout is not None
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._client.stdout], [], [], left)[0]:
                return False
            content = os.read(self._client.stdout.fileno(), 1 << 20)
            if not content:
                self._client.wait()
                return True
            self._answer += content
        return False

    def finish(self) -> dict[str, Any]:
        """End both sides and return the client's summary."""
        for process in (self._client, self._server):
            if process is None:
                continue
            if process is self._client and process.poll() is None:
                close_quietly(process.stdin)  # the client takes this as the order to stop
                self.wait(END_TIMEOUT)
            if process is self._server and self._client_failed():
                close_quietly(process.stdin)
            try:
                process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                close_quietly(process.stdin)
                kill_after(process, END_TIMEOUT)
            close_quietly(process.stdin)
            close_quietly(process.stdout)
        self._stderr.close()
        if (self._out / COMMAND_LOG).exists() and (self._out / COMMAND_LOG).stat().st_size == 0:
            (self._out / COMMAND_LOG).unlink()
        return self._summary()

    def _client_failed(self) -> bool:
        return self._client is None or self._client.returncode != 0

    def _summary(self) -> dict[str, Any]:
        head, _, rest = bytes(self._answer).partition(b"\n")
        summary = json.loads(head) if head.startswith(b"{") else {}
        if self._workload.remote is not None and summary:
            with open_private(self._out / CLIENT_LOG) as stream:
                stream.write(rest[: summary["log_bytes"]])
        log = self._out / APP_LOG
        summary["received_calls"] = log.stat().st_size // APP_LOG_STRUCT.size if log.exists() else 0
        for who, process in (("client", self._client), ("server", self._server)):
            summary[f"{who}_exit_code"] = None if process is None else process.returncode
        return summary


class CommandTraffic:
    """A command on `src` (or beside `dst` when there is no testbed), and perhaps its server on `dst`."""

    def __init__(
        self,
        command: Command,
        src: Endpoint | None,
        dst: Endpoint,
        out: Path,
        start_process: Starter = subprocess.Popen,
    ) -> None:
        command.check()
        self._command, self._src, self._dst, self._out, self._start_process = (
            command,
            src or dst,
            dst,
            out,
            start_process,
        )
        self._server: subprocess.Popen[bytes] | None = None
        self._client: subprocess.Popen[bytes] | None = None
        self._log = open_private(out / COMMAND_LOG)

    def _start(self, end: Endpoint, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self._command.environment}
        environment[ADDRESSES[0]] = self._dst.ipv4 or self._dst.ipv6 or ""
        environment[ADDRESSES[1]] = self._src.ipv4 or self._src.ipv6 or ""
        return self._start_process(
            end.command(argv),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def prepare(self) -> None:
        """Start the server, if there is one, and wait until it listens."""
        if not self._command.server_argv:
            return
        self._server = self._start(self._dst, self._command.server_argv)
        if self._command.server_port is not None:
            wait_listening(self._server, self._command.server_port)

    def go(self) -> None:
        """Start the command."""
        argv = list(self._command.argv)
        if self._command.pyperf:
            argv += ["--output", str(self._out / PYPERF_JSON), "--inherit-environ", ",".join(ADDRESSES)]
        self._client = self._start(self._src, argv)

    def wait(self, timeout: float) -> bool:
        """Wait for the command."""
        assert self._client is not None
        try:
            self._client.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def finish(self) -> dict[str, Any]:
        """Stop the command if it still runs, then the server."""
        for process in (self._client, self._server):
            if process is not None and process.poll() is None:
                kill_group(process, signal.SIGTERM)
                kill_after(process, END_TIMEOUT)
        self._log.close()
        if self._command.pyperf and (self._out / PYPERF_JSON).exists():
            (self._out / PYPERF_JSON).chmod(0o600)
        return {"client_exit_code": self._client.returncode if self._client else None, "output": COMMAND_LOG}


def open_traffic(
    workload: Workload | Command,
    src: Endpoint | None,
    dst: Endpoint,
    out: Path,
    start_process: Starter = subprocess.Popen,
) -> Traffic:
    """Return the traffic of a workload, not started yet."""
    if isinstance(workload, Command):
        return CommandTraffic(workload, src, dst, out, start_process)
    return BuiltinTraffic(workload, src, dst, out, start_process)


def remote_argv(remote: str, script_bytes: int, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs the client on another host, its source first on standard input: nothing to install."""
    loader = f"import sys; exec(compile(sys.stdin.buffer.read({script_bytes}), 'rxlab-client.py', 'exec'))"
    host = remote.removeprefix("ssh:")
    return ["ssh", "-T", "-o", "BatchMode=yes", host, shlex.join(["python3", "-c", loader, *arguments])]
