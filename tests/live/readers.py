"""Servers that read in the ways real servers do and log each call, and a client for them; run by scenarios.py.

``python readers.py serve KIND PROTO ADDRESS PORT LOG`` and ``python readers.py send PROTO ADDRESS PORT LOG``; both take
``--flows``, ``--size`` and ``--messages`` (per flow). The client ends when the server has written its log.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rawcalls import ManyMessages, Ring

from rxlab.rundir import APP_LOG_STRUCT, MESSAGE_HEADER, MESSAGE_MAGIC

END = -1
RECEIVE = 1 << 16
ACCEPT_SECONDS, IDLE_SECONDS, END_SECONDS = 20.0, 0.2, 20.0
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"

# A way to receive returns what one call brought, as (content, peer's port) of each message.
Way = Callable[[], list[tuple[bytes, int]]]

now = time.monotonic_ns


def thread_id() -> int:
    """Return this thread's id in the first pid namespace, which is perf's: /proc stays mounted from there."""
    return int(os.readlink("/proc/thread-self").rsplit("/", 1)[1])


class Ends:
    """Which flows have ended, seen by all processes and threads of the server."""

    def __init__(self, n_flows: int) -> None:
        self._marks, self._n = mmap.mmap(-1, max(n_flows, 1)), n_flows

    def mark(self, flow: int) -> None:
        if 0 <= flow < self._n:
            self._marks[flow] = 1

    def all(self) -> bool:
        return sum(self._marks[: self._n]) == self._n


class Reader:
    """One connection (or UDP socket), its stream position, and the log of its calls."""

    def __init__(self, sock: socket.socket, options: argparse.Namespace, log: list[bytes], ends: Ends) -> None:
        self.sock, self.log, self.ends, self.size = sock, log, ends, options.size
        self.is_tcp, self.pause, self.flow, self.position = options.proto == "tcp", options.pause_us / 1e6, -1, 0
        self.lock = threading.Lock()
        family = {socket.AF_INET: 2, socket.AF_INET6: 10}[socket.AddressFamily(sock.family)]
        self._constant = (sock.getsockname()[1], 6 if self.is_tcp else 17, family)

    def call(self, receive: Way) -> bool:
        """Make one receive call and log it; False when nothing more will come."""
        t0 = now()
        try:
            messages = receive()
        except BlockingIOError:
            return not self.ends.all()
        t1, tid = now(), thread_id()
        for content, port in messages:
            with self.lock:
                begins, self.position = -self.position % self.size, self.position + len(content)
            self._note(t0, t1, tid, content, port, begins if self.is_tcp else 0)
        if self.pause:
            time.sleep(self.pause)
        return bool(messages[-1][0]) if self.is_tcp else not self.ends.all()

    def _note(self, t0: int, t1: int, tid: int, content: bytes, port: int, begins: int) -> None:
        flow, seq, sent = self.flow, END, 0
        if begins + MESSAGE_HEADER.size <= len(content):
            header = MESSAGE_HEADER.unpack_from(content, begins)
            if header[0] == MESSAGE_MAGIC:
                _, flow, seq, sent = header
                self.flow = flow
        if seq == END and (not self.is_tcp or not content):
            self.ends.mark(flow)
        self.log.append(APP_LOG_STRUCT.pack(t0, t1, seq, sent, 0, tid, len(content), flow, port, *self._constant, 0))


def way_of(kind: str, sock: socket.socket, is_tcp: bool) -> Way:
    """Return the way to receive of that name."""
    port = sock.getpeername()[1] if is_tcp else 0

    def recvfrom() -> list[tuple[bytes, int]]:
        content, peer = sock.recvfrom(RECEIVE)
        return [(content, peer[1] if peer else port)]

    def recvmsg() -> list[tuple[bytes, int]]:
        content, _, _, peer = sock.recvmsg(RECEIVE)
        return [(content, peer[1] if peer else port)]

    def readv() -> list[tuple[bytes, int]]:
        parts = [bytearray(40), bytearray(RECEIVE)]
        n = os.readv(sock.fileno(), parts)
        return [(b"".join(parts)[:n], port)]

    def peek() -> list[tuple[bytes, int]]:
        sock.recv(RECEIVE, socket.MSG_PEEK)
        return recvfrom()

    if kind == "recvmmsg":
        many = ManyMessages(sock)
        return lambda: [(content, peer or port) for content, peer in many.receive()]
    if kind == "io_uring":
        ring = Ring(sock)
        return lambda: [(ring.receive(), port)]
    ways: dict[str, Way] = {
        "recv": lambda: [(sock.recv(RECEIVE), port)],
        "read": lambda: [(os.read(sock.fileno(), RECEIVE), port)],
        "small": lambda: [(sock.recv(10), port)],
        "recvmsg": recvmsg,
        "readv": readv,
        "peek": peek,
    }
    return ways.get(kind, recvfrom)


def new_socket(options: argparse.Namespace) -> socket.socket:
    """Return a bound socket; several share the port only in a reuseport group."""
    kind = socket.SOCK_STREAM if options.proto == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(socket.AF_INET6 if ":" in options.address else socket.AF_INET, kind)
    if options.proto == "tcp":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if options.kind == "reuseport":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((options.address, options.port))
    if options.proto == "tcp":
        sock.listen(512)
        return sock
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.rcvbuf)
    # The end of another reader's flow is seen at the next timeout.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, IDLE_TIMEVAL)
    return sock


IDLE_TIMEVAL = int(IDLE_SECONDS).to_bytes(8, "little") + int(IDLE_SECONDS * 1e6).to_bytes(8, "little")


def serve(options: argparse.Namespace) -> None:
    """Serve until every flow has ended, then write the log."""
    ends = Ends(options.flows)
    if options.kind in ("reuseport", "fork"):
        log = serve_in_processes(options, ends)
    else:
        log = b"".join(serve_here(options, ends))
    Path(options.log + ".tmp").write_bytes(log)
    os.replace(options.log + ".tmp", options.log)


def serve_here(options: argparse.Namespace, ends: Ends) -> list[bytes]:
    """Serve all flows from this process."""
    log: list[bytes] = []
    sock = new_socket(options)
    if options.kind == "http":
        return serve_http(sock, options, ends)
    is_tcp = options.proto == "tcp"
    sockets = [sock.accept()[0] for _ in range(options.flows)] if is_tcp else [sock]
    readers = [Reader(each, options, log, ends) for each in sockets]
    if options.kind.startswith("epoll"):
        serve_epoll(readers, select.EPOLLET if options.kind == "epoll_et" else 0)
        return log
    if options.kind == "busy":
        for reader in readers:
            reader.sock.setblocking(False)
    run_threads(readers * (2 if options.kind == "threads" else 1), options.kind)
    return log


def run_threads(readers: list[Reader], kind: str) -> None:
    """Read in one thread per entry; two entries of one reader share its socket."""

    def loop(reader: Reader) -> None:
        receive = way_of(kind, reader.sock, reader.is_tcp)
        while reader.call(receive):
            pass

    threads = [threading.Thread(target=loop, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve_epoll(readers: list[Reader], edge: int) -> None:
    """Serve all sockets from one epoll loop; edge triggered: read until the socket is empty."""
    poller = select.epoll()
    by_fd = {reader.sock.fileno(): reader for reader in readers}
    for reader in readers:
        reader.sock.setblocking(False)
        poller.register(reader.sock.fileno(), select.EPOLLIN | edge)
    ways = {fd: way_of("recvfrom", reader.sock, reader.is_tcp) for fd, reader in by_fd.items()}
    while by_fd:
        for fd, _ in poller.poll():
            reader = by_fd[fd]
            while True:
                n_calls = len(reader.log)
                if not reader.call(ways[fd]):
                    poller.unregister(fd)
                    del by_fd[fd]
                    break
                if not edge or len(reader.log) == n_calls:
                    break


def serve_in_processes(options: argparse.Namespace, ends: Ends) -> bytes:
    """Serve from two processes: one socket inherited by both ("fork"), or a socket of its own each ("reuseport")."""
    shared = new_socket(options) if options.kind == "fork" else None
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / str(index) for index in range(2)]
        children, finished = [], Ends(len(parts))
        for index, part in enumerate(parts):
            if child := os.fork():
                children.append(child)
                continue
            sock = shared or new_socket(options)
            part.write_bytes(b"".join(serve_child(sock, options, ends)))
            # A socket that leaves its group sends flows to another one: none does while somebody still reads.
            finished.mark(index)
            deadline = time.monotonic() + END_SECONDS
            while not finished.all() and time.monotonic() < deadline:
                time.sleep(0.005)
            os._exit(0)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise SystemExit(f"a child ended with {codes}")
        return b"".join(part.read_bytes() for part in parts)


def serve_child(sock: socket.socket, options: argparse.Namespace, ends: Ends) -> list[bytes]:
    """Read datagrams, or accept connections and read each to its end, until every flow has ended."""
    log: list[bytes] = []
    if options.proto == "udp":
        run_threads([Reader(sock, options, log, ends)], "recvfrom")
        return log
    sock.setblocking(False)
    while not ends.all():
        if not select.select([sock], [], [], IDLE_SECONDS)[0]:
            continue
        try:
            connection, _ = sock.accept()
        except BlockingIOError:  # the other child was faster
            continue
        connection.setblocking(True)
        with connection:
            run_threads([Reader(connection, options, log, ends)], "recvfrom")
    return log


def serve_http(listener: socket.socket, options: argparse.Namespace, ends: Ends) -> list[bytes]:
    """Answer one request per connection."""
    log: list[bytes] = []
    for _ in range(options.messages):
        connection, _ = listener.accept()
        with connection:
            reader = Reader(connection, options, log, ends)
            reader.call(way_of("recv", connection, True))
            connection.sendall(ANSWER)
    return log


def send(options: argparse.Namespace) -> None:
    """Send the messages of all flows in turn, then wait until the server has written its log."""
    sockets = [connected(options) for _ in range(options.flows)]
    rng = random.Random(1)
    rest = bytes(options.size - MESSAGE_HEADER.size)
    for number in range(options.messages):
        for flow, sock in enumerate(sockets):
            sock.sendall(MESSAGE_HEADER.pack(MESSAGE_MAGIC, flow, number, now()) + rest)
            if options.gap_us and number % options.burst == 0:
                due = now() + int(rng.expovariate(1 / (options.gap_us * 1000 * options.burst)))
                while now() < due:
                    pass
    deadline = time.monotonic() + END_SECONDS
    for sock in sockets if options.proto == "tcp" else ():
        sock.shutdown(socket.SHUT_WR)
    while not Path(options.log).exists() and time.monotonic() < deadline:
        for flow, sock in enumerate(sockets if options.proto == "udp" else ()):
            sock.send(MESSAGE_HEADER.pack(MESSAGE_MAGIC, flow, END, now()) + rest)
        time.sleep(0.05)
    sys.exit(0 if Path(options.log).exists() else "the server wrote no log")


def connected(options: argparse.Namespace) -> socket.socket:
    """Return a socket connected to the server."""
    kind = socket.SOCK_STREAM if options.proto == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(socket.AF_INET6 if ":" in options.address else socket.AF_INET, kind)
    sock.connect((options.address, options.port))
    if options.proto == "tcp":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    roles = parser.add_subparsers(dest="role", required=True)
    server, client = roles.add_parser("serve"), roles.add_parser("send")
    server.add_argument("kind")
    for role in (server, client):
        role.add_argument("proto", choices=("tcp", "udp"))
        role.add_argument("address")
        role.add_argument("port", type=int)
        role.add_argument("log")
        role.add_argument("--flows", type=int, default=1)
        role.add_argument("--size", type=int, default=64)
        role.add_argument("--messages", type=int, default=2000)
    server.add_argument("--pause-us", type=int, default=0, help="sleep after each call")
    server.add_argument("--rcvbuf", type=int, default=4 << 20)
    client.add_argument("--gap-us", type=int, default=150, help="mean time between sends; 0: as fast as possible")
    client.add_argument(
        "--burst", type=int, default=1, help="messages sent at once, with the time between them after it"
    )
    return parser.parse_args()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    arguments = parse_arguments()
    serve(arguments) if arguments.role == "serve" else send(arguments)
