"""The load generator: standard library only, one file, so that ``python3 rxlab-client.py`` runs on a bare machine.

One process per flow. A *closed* loop sends the next message when the reply to the last one came. An *open* loop sends at
times fixed beforehand (Poisson or constant arrivals); its latencies count from the intended time, so a stall of the server
delays no later measurement (no coordinated omission).

Start barrier: prints ``ready`` when all flows are connected and waits for a line on standard input. At the end prints one
JSON line; with ``--log -`` the binary log follows it, ``log_bytes`` long.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress

# Equal to the layouts of rxlab/rundir.py (a test guards it): this file must run where rxlab is not installed.
MESSAGE_MAGIC = 0x52584C42
MESSAGE_HEADER = struct.Struct("<Iiqq")  # magic, flow, seq, intended send time
CLIENT_LOG_STRUCT = struct.Struct("<qqqqii")  # intended, sent, replied, seq, flow, size
END_SEQ = -1  # seq of the datagram that ends a UDP flow
END_TRIES = 20
STREAM_PATIENCE = 60.0
LOG_CHUNK = 1 << 16  # records
PR_SET_PDEATHSIG = 1

now = time.monotonic_ns


class Log:
    """Fixed-size records in memory, written at the end: no system call and no allocation per message."""

    def __init__(self, layout: struct.Struct, capacity: int = LOG_CHUNK) -> None:
        self._layout, self._capacity = layout, max(capacity, 16)
        self._full: list[bytearray] = []
        self._grow()

    def _grow(self) -> None:
        # Written once, so that no page fault falls into the measured loop.
        self._chunk = bytearray(b"\xff") * (self._capacity * self._layout.size)
        self._used = 0

    def append(self, *fields: int) -> int:
        """Store one record and return its index."""
        if self._used == self._capacity:
            self._full.append(self._chunk)
            self._capacity = LOG_CHUNK
            self._grow()
        self._layout.pack_into(self._chunk, self._used * self._layout.size, *fields)
        self._used += 1
        return self._used - 1

    def content(self) -> bytes:
        """Return all records as they go into the file."""
        return b"".join([*self._full, memoryview(self._chunk)[: self._used * self._layout.size]])


class Outgoing:
    """Messages of an open loop: sent times by sequence number, completed by replies in any order."""

    def __init__(self, flow: int, size: int) -> None:
        self.flow, self.size = flow, size
        self.intended: list[int] = []
        self.sent: list[int] = []
        self.replied: list[int] = []

    def content(self) -> bytes:
        """Return the log records in order of the sequence number."""
        rows = zip(self.intended, self.sent, self.replied, strict=False)  # a stop can cut the last row
        return b"".join(CLIENT_LOG_STRUCT.pack(*row, seq, self.flow, self.size) for seq, row in enumerate(rows))


def die_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `signum` to this process when `parent` dies: nothing outlives a killed capture."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def settle(cpu: int | None) -> None:
    """Pin this process and keep the garbage collector out of the measured loop."""
    if cpu is not None and cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    with suppress(OSError), open("/proc/self/timerslack_ns", "w") as stream:
        stream.write("1")
    gc.collect()
    gc.disable()


def patience(options: argparse.Namespace) -> float:
    """Return how many seconds to wait for a reply. A stream loses none, so there only a dead peer is given up."""
    return max(options.timeout, STREAM_PATIENCE) if options.proto == "tcp" else options.timeout


def connect(options: argparse.Namespace, flow: int) -> socket.socket:
    """Open the socket of one flow. UDP flow `i` goes to port + i, TCP flows share the port."""
    kind = socket.SOCK_STREAM if options.proto == "tcp" else socket.SOCK_DGRAM
    port = options.port if options.proto == "tcp" else options.port + flow
    family, _, _, _, address = socket.getaddrinfo(options.address, port, type=kind)[0]
    sock = socket.socket(family, kind)
    seconds, fraction = divmod(patience(options), 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(seconds), int(fraction * 1e6)))
    sock.connect(address)
    if options.proto == "tcp":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def closed_loop(sock: socket.socket, options: argparse.Namespace, flow: int, log: Log) -> None:
    """Send a message, wait for its reply, and so on; a reply that does not come in time is logged as 0 and left behind."""
    message, reply = bytearray(options.size), bytearray(options.reply_size)
    receive = receive_stream if options.proto == "tcp" else receive_datagram
    deadline = now() + int(options.duration * 1e9) if options.duration else None
    seq = 0
    while (options.messages is None or seq < options.messages) and (deadline is None or now() < deadline):
        intended = now()
        MESSAGE_HEADER.pack_into(message, 0, MESSAGE_MAGIC, flow, seq, intended)
        sent = now()
        sock.send(message) if options.proto == "udp" else sock.sendall(message)
        log.append(intended, sent, receive(sock, reply, seq), seq, flow, options.size)
        seq += 1


def receive_stream(sock: socket.socket, reply: bytearray, seq: int) -> int:
    """Wait for one whole reply on a TCP connection and return the time it was complete."""
    try:
        got = sock.recv_into(reply, len(reply), socket.MSG_WAITALL)
    except BlockingIOError:
        raise ConnectionError(f"no reply to message {seq} came") from None
    arrived = now()
    if got != len(reply):
        raise ConnectionError(f"the server closed the connection in the reply to message {seq}")
    return arrived


def receive_datagram(sock: socket.socket, reply: bytearray, seq: int) -> int:
    """Wait for the datagram that answers `seq`, passing over late ones; 0 when none comes in time."""
    while True:
        try:
            sock.recv_into(reply)
        except (BlockingIOError, ConnectionRefusedError):
            return 0
        arrived = now()
        if MESSAGE_HEADER.unpack_from(reply)[2] == seq:
            return arrived


def gaps_of(options: argparse.Namespace, flow: int) -> Callable[[], float]:
    """Return the function that draws the next gap between sends, in ns. Each flow has a stream of its own."""
    rate = options.rate / options.flows
    if options.arrivals == "constant":
        return lambda: 1e9 / rate
    draw = random.Random(f"{options.seed}/{flow}").expovariate
    return lambda: draw(rate) * 1e9


def open_loop(sock: socket.socket, options: argparse.Namespace, sending: Outgoing) -> None:
    """Send at the intended times whatever the replies do."""
    replies = Replies(sock, options, sending)
    gap, message, unsent = gaps_of(options, sending.flow), bytearray(options.size), b""
    due = float(now()) + gap()
    stop = due + options.duration * 1e9 if options.duration else None
    while (options.messages is None or len(sending.sent) < options.messages) and (stop is None or due < stop):
        intended = int(due)
        while unsent or now() < intended:
            unsent = replies.until(intended, options.spin_us * 1000, unsent)
            if unsent and now() >= intended:
                break
        MESSAGE_HEADER.pack_into(message, 0, MESSAGE_MAGIC, sending.flow, len(sending.sent), intended)
        sending.intended.append(intended)
        sending.replied.append(0)
        sending.sent.append(now())
        unsent = send_some(sock, unsent + message if unsent else message)
        due += gap()
    while unsent:
        unsent = replies.until(now() + 10**8, 0, unsent)
    replies.drain()


def send_some(sock: socket.socket, content: bytes | bytearray) -> bytes:
    """Send what the socket takes at once and return the rest."""
    try:
        return bytes(content[sock.send(content, socket.MSG_DONTWAIT) :])
    except BlockingIOError:
        return bytes(content)
    except ConnectionRefusedError:
        return b""


class Replies:
    """The receiving half of an open loop: waits for replies while the next send is not due."""

    def __init__(self, sock: socket.socket, options: argparse.Namespace, sending: Outgoing) -> None:
        self._sock, self._sending = sock, sending
        self._stream = options.proto == "tcp"
        self._size, self._timeout = options.reply_size, patience(options)
        self._buffer = bytearray(1 << 16)
        self._bytes = self._n_replied = 0

    def until(self, due: int, spin_ns: int, unsent: bytes) -> bytes:
        """Handle replies until `due`; the last `spin_ns` without sleeping, as a timer alone wakes too late."""
        while True:
            left = due - now()
            if left <= 0:
                return unsent
            if left > spin_ns:
                writable = [self._sock] if unsent else []
                readable = [self._sock] if self._size else []
                ready = select.select(readable, writable, [], (left - spin_ns) / 1e9)
                if ready[1]:
                    return send_some(self._sock, unsent)
                if not ready[0]:
                    continue
            self.receive()

    def receive(self) -> None:
        """Take what has arrived, if anything, and note the time."""
        if not self._size:
            return
        try:
            n_bytes = self._sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionRefusedError):
            return
        arrived = now()
        replied = self._sending.replied
        if not self._stream:
            seq = MESSAGE_HEADER.unpack_from(self._buffer)[2]
            if 0 <= seq < len(replied) and not replied[seq]:
                replied[seq] = arrived
                self._n_replied += 1
            return
        if n_bytes == 0:
            raise ConnectionError(f"the server closed the connection after {self._n_replied} replies")
        # Replies of a stream come in order and have one size: count bytes.
        self._bytes += n_bytes
        for seq in range(self._n_replied, self._bytes // self._size):
            replied[seq] = arrived
        self._n_replied = self._bytes // self._size

    def drain(self) -> None:
        """Wait for the replies that are still to come, until none came for the timeout."""
        while self._size and self._n_replied < len(self._sending.replied):
            if not select.select([self._sock], [], [], self._timeout)[0]:
                return
            self.receive()


def finish(sock: socket.socket, options: argparse.Namespace, flow: int) -> None:
    """Return when the server has read everything: end of stream, or an END datagram and its answer."""
    if options.proto == "tcp":
        sock.shutdown(socket.SHUT_WR)
        with suppress(BlockingIOError):
            while sock.recv(1 << 16):
                pass
        return
    message = bytearray(options.size)
    MESSAGE_HEADER.pack_into(message, 0, MESSAGE_MAGIC, flow, END_SEQ, 0)
    answer = bytearray(1 << 16)
    for _ in range(END_TRIES):
        with suppress(ConnectionRefusedError):
            sock.send(message)
        if receive_datagram(sock, answer, END_SEQ):
            return
    raise ConnectionError("the server did not answer the end of the flow")


def run_flow(options: argparse.Namespace, flow: int, log: Log | Outgoing, ready: int, barrier: tuple[int, int]) -> None:
    """Be the process of one flow: connect, wait for the barrier, send."""
    os.close(barrier[1])
    sock = connect(options, flow)
    settle(options.cpu[flow % len(options.cpu)] if options.cpu else None)
    os.write(ready, b".")
    os.read(barrier[0], 1)  # end of file when the parent opens the barrier
    if isinstance(log, Outgoing):
        open_loop(sock, options, log)
    else:
        closed_loop(sock, options, flow, log)
    finish(sock, options, flow)


class Stopped(Exception):
    """A worker was told to stop; its log is kept."""


def raise_stopped(signum: int, frame: object) -> None:
    """Leave a blocking call."""
    raise Stopped


def fork_worker(work: Callable[[], None], log: Log | Outgoing) -> tuple[int, int]:
    """Run `work` in a process of its own and return (pid, descriptor that `log` is read from when it has ended)."""
    receive, send = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(send)
        return pid, receive
    status = 1
    try:
        signal.signal(signal.SIGTERM, raise_stopped)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_with_parent(parent)
        work()
        status = 0
    except Stopped:
        status = 2
    except Exception as error:
        print(f"{os.path.basename(sys.argv[0])}: {error!r}", file=sys.stderr, flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(OSError), os.fdopen(send, "wb") as stream:
            stream.write(log.content())
        os._exit(status)


def collect(workers: list[tuple[int, int]], watch_stdin: bool = True) -> tuple[bytes, list[int]]:
    """Wait for all workers; return their logs one after the other, and their exit codes.

    When standard input ends first, whoever started this program wants it to stop, or is dead: the workers are stopped.
    """
    parts: dict[int, list[bytes]] = {descriptor: [] for _, descriptor in workers}
    open_ends = set(parts) | ({sys.stdin.fileno()} if watch_stdin else set())
    while open_ends & set(parts):
        for descriptor in select.select(list(open_ends), [], [])[0]:
            content = os.read(descriptor, 1 << 20)
            if descriptor in parts:
                parts[descriptor].append(content)
            if content:
                continue
            open_ends.discard(descriptor)
            if descriptor not in parts:
                for pid, _ in workers:
                    os.kill(pid, signal.SIGTERM)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _ in workers]
    return b"".join(b"".join(part) for part in parts.values()), codes


def write_log(path: str, content: bytes) -> None:
    """Write a log file that only its owner can read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(content)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="rxlab-client", description="Load generator of rxlab.")
    parser.add_argument("address", help="address of the server")
    parser.add_argument("port", type=int)
    parser.add_argument("--proto", choices=("tcp", "udp"), default="tcp")
    parser.add_argument("--mode", choices=("closed", "open"), default="closed")
    parser.add_argument("--messages", type=int, help="messages per flow")
    parser.add_argument("--duration", type=float, help="seconds")
    parser.add_argument("--size", type=int, default=64, help="bytes per message (at least 24)")
    parser.add_argument("--reply-size", type=int, default=None, help="bytes per reply, 0: none (default: as --size)")
    parser.add_argument("--flows", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1000.0, help="open loop: messages per second over all flows")
    parser.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spin-us", type=int, default=50, help="open loop: do not sleep closer than this to a send")
    parser.add_argument("--cpu", type=int, action="append", help="pin flows to these CPUs in turn")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds until a reply counts as lost")
    parser.add_argument("--now", action="store_true", help="start without the barrier, ignore standard input")
    parser.add_argument("--log", default="client.log", help="file for the log; '-': standard output")
    options = parser.parse_args(arguments)
    options.reply_size = options.size if options.reply_size is None else options.reply_size
    if options.size < MESSAGE_HEADER.size or 0 < options.reply_size < MESSAGE_HEADER.size:
        parser.error(f"messages and replies need at least {MESSAGE_HEADER.size} bytes")
    if options.messages is None and options.duration is None:
        parser.error("give --messages or --duration")
    if options.mode == "closed" and not options.reply_size:
        parser.error("a closed loop needs replies; use --mode open for one-way traffic")
    return options


def start_flow(options: argparse.Namespace, flow: int, ready: int, barrier: tuple[int, int]) -> tuple[int, int]:
    """Start the process of one flow."""
    log: Log | Outgoing
    if options.mode == "open":
        log = Outgoing(flow, options.size)
    else:
        log = Log(CLIENT_LOG_STRUCT, options.messages or LOG_CHUNK)
    return fork_worker(lambda: run_flow(options, flow, log, ready, barrier), log)


def wait_ready(ready: int, n_flows: int) -> bool:
    """Wait until every flow has connected; False when one could not."""
    waiting = 0
    while waiting < n_flows and (dots := os.read(ready, n_flows)):
        waiting += len(dots)
    return waiting == n_flows


def main(arguments: list[str] | None = None) -> int:
    """Run the load generator."""
    options = parse_arguments(arguments)
    ready, arrived = os.pipe()
    barrier = os.pipe()
    workers = [start_flow(options, flow, arrived, barrier) for flow in range(options.flows)]
    os.close(arrived)
    os.close(barrier[0])
    go = wait_ready(ready, options.flows)
    if go and not options.now:
        print("ready", flush=True)
        go = bool(sys.stdin.readline())
    if not go:
        for pid, _ in workers:
            os.kill(pid, signal.SIGTERM)
    start = now()
    os.close(barrier[1])
    content, codes = collect(workers, watch_stdin=not options.now)
    records = list(CLIENT_LOG_STRUCT.iter_unpack(content))
    summary = {
        "sent": len(records),
        "replied": sum(record[2] != 0 for record in records),
        "failed_flows": sum(code != 0 for code in codes),
        "start_ns": start,
        "stop_ns": now(),
        "log_bytes": len(content),
    }
    print(json.dumps(summary), flush=True)
    if options.log == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        write_log(options.log, content)
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
