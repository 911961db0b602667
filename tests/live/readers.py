"""A server that reads in the ways real servers do, and logs each call; and a client for it. Run by test_readers_live.py.

``python readers.py serve KIND PROTO ADDRESS PORT FLOWS LOG`` and ``python readers.py send PROTO ADDRESS PORT FLOWS MESSAGES``.
"""

from __future__ import annotations

import os
import random
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

from rxlab.rundir import APP_LOG_STRUCT, MESSAGE_HEADER, MESSAGE_MAGIC

SIZE = 64
END = -1


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class Reader:
    """One connection (or UDP socket), its stream position, and the log of its calls."""

    def __init__(self, sock: socket.socket, proto: str, log: list[bytes]) -> None:
        self.sock, self.proto, self.log, self.position, self.open = sock, proto, log, 0, True
        self.lock = threading.Lock()

    def call(self, receive: Callable[[], tuple[bytes, int]]) -> bool:
        """Make one receive call and log it; False at the end of the stream."""
        t0 = now()
        try:
            content, port = receive()
        except BlockingIOError:
            return True
        except TimeoutError:
            return False
        t1 = now()
        with self.lock:
            begins, self.position = -self.position % SIZE, self.position + len(content)
        flow, seq, sent = -1, END, 0
        if begins + MESSAGE_HEADER.size <= len(content):
            _, flow, seq, sent = MESSAGE_HEADER.unpack_from(content, begins)
        ports = (port, self.sock.getsockname()[1], 6 if self.proto == "tcp" else 17, 2)
        self.log.append(
            APP_LOG_STRUCT.pack(t0, t1, seq, sent, 0, threading.get_native_id(), len(content), flow, *ports, 0)
        )
        return bool(content) and not (self.proto == "udp" and seq == END)


def receivers(sock: socket.socket, proto: str) -> dict[str, Callable[[], tuple[bytes, int]]]:
    """Ways to receive, by name; each returns the bytes and the peer's port."""
    port = sock.getpeername()[1] if proto == "tcp" else 0

    def recvfrom() -> tuple[bytes, int]:
        content, peer = sock.recvfrom(65536)
        return content, (peer[1] if peer else port)

    def readv() -> tuple[bytes, int]:
        parts = [bytearray(40), bytearray(4000)]
        n = os.readv(sock.fileno(), parts)
        return b"".join(parts)[:n], port

    def peek() -> tuple[bytes, int]:
        sock.recvfrom(SIZE, socket.MSG_PEEK)
        return recvfrom()

    return {
        "recvfrom": recvfrom,
        "recvmsg": lambda: (lambda got: (got[0], got[3][1] if got[3] else port))(sock.recvmsg(65536)),
        "read": lambda: (os.read(sock.fileno(), 65536), port),
        "readv": readv,
        "small": lambda: (sock.recv(10), port),
        "peek": peek,
    }


def serve(kind: str, proto: str, address: str, port: int, n_flows: int, path: str) -> None:
    log: list[bytes] = []
    readers = [Reader(sock, proto, log) for sock in open_sockets(proto, address, port, n_flows)]
    if kind.startswith("epoll"):
        serve_epoll(readers, select.EPOLLET if kind == "epoll_et" else 0)
    elif kind == "threads":
        run_threads([(reader, "recvfrom") for reader in readers for _ in range(2)])
    elif kind == "busy":
        for reader in readers:
            reader.sock.setblocking(False)
        run_threads([(reader, "recvfrom") for reader in readers])
    else:
        run_threads([(reader, kind) for reader in readers])
    with open(path + ".tmp", "wb") as stream:
        stream.write(b"".join(log))
    os.replace(path + ".tmp", path)


def open_sockets(proto: str, address: str, port: int, n_flows: int) -> list[socket.socket]:
    kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
    server = socket.socket(socket.AF_INET, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    if proto == "udp":
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        return [server]
    server.listen()
    return [server.accept()[0] for _ in range(n_flows)]


def run_threads(work: list[tuple[Reader, str]]) -> None:
    def loop(reader: Reader, way: str) -> None:
        receive = receivers(reader.sock, reader.proto)[way]
        while reader.open:
            if not reader.call(receive):
                reader.open = False
                if (
                    reader.proto == "udp"
                ):  # the other thread of the socket is asleep in its call: wake it to see the end
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
                        waker.sendto(b"", reader.sock.getsockname())

    threads = [threading.Thread(target=loop, args=entry) for entry in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve_epoll(readers: list[Reader], edge: int) -> None:
    poller = select.epoll()
    by_fd = {reader.sock.fileno(): reader for reader in readers}
    for reader in readers:
        reader.sock.setblocking(False)
        poller.register(reader.sock.fileno(), select.EPOLLIN | edge)
    ways = {fd: receivers(reader.sock, reader.proto)["recvfrom"] for fd, reader in by_fd.items()}
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


def send(proto: str, address: str, port: int, n_flows: int, messages: int) -> None:
    kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
    sockets = []
    for _ in range(n_flows):
        sock = socket.socket(socket.AF_INET, kind)
        sock.connect((address, port))
        if proto == "tcp":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets.append(sock)
    rng = random.Random(1)
    for number in range(messages):
        for flow, sock in enumerate(sockets):
            sock.send(MESSAGE_HEADER.pack(MESSAGE_MAGIC, flow, number, now()) + bytes(SIZE - MESSAGE_HEADER.size))
        due = now() + int(rng.expovariate(1 / 150_000))
        while now() < due:
            pass
    for sock in sockets:
        if proto == "udp":
            sock.send(MESSAGE_HEADER.pack(MESSAGE_MAGIC, 0, END, now()) + bytes(SIZE - MESSAGE_HEADER.size))
        sock.close()
    time.sleep(0.5)


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    if role == "serve":
        serve(rest[0], rest[1], rest[2], int(rest[3]), int(rest[4]), rest[5])
    else:
        send(rest[0], rest[1], int(rest[2]), int(rest[3]), int(rest[4]))
