"""The built-in server: one blocking reader process per flow, which logs each receive call: the ground truth of a run.

Started by record/workload.py inside the captured namespace. Prints ``ready`` when it listens; ends by itself when every flow
has ended, or when its standard input is closed. Writes app.log (:data:`rxlab.rundir.APP_LOG_STRUCT`), flow by flow, not sorted
by time. ``proto`` is the IP protocol number, ``family`` the AF_ number, ``flags`` the MSG_ flags recvmsg returned.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import sys
import threading
from contextlib import suppress

from rxlab.record.client import (
    END_SEQ,
    MESSAGE_HEADER,
    MESSAGE_MAGIC,
    Log,
    collect,
    fork_worker,
    now,
    settle,
    write_log,
)
from rxlab.rundir import APP_LOG_STRUCT, MOVE_STRUCT

SO_TIMESTAMPNS = 35  # include/uapi/asm-generic/socket.h, SO_TIMESTAMPNS_OLD; SCM_TIMESTAMPNS is the same number
TIMESPEC = struct.Struct("@ll")
ANCILLARY_SIZE = socket.CMSG_SPACE(TIMESPEC.size)
RECEIVE_SIZE = 1 << 16


def obey(policy: str) -> None:
    """Take a scheduling policy: ``batch``, ``fifo:10``; sched(7)."""
    name, _, priority = policy.partition(":")
    kinds = {
        "other": os.SCHED_OTHER,
        "batch": os.SCHED_BATCH,
        "idle": os.SCHED_IDLE,
        "fifo": os.SCHED_FIFO,
        "rr": os.SCHED_RR,
    }
    os.sched_setscheduler(0, kinds[name], os.sched_param(int(priority or 0)))


def scm_time_of(ancillary: list[tuple[int, int, bytes]]) -> int:
    """Return SCM_TIMESTAMPNS in ns of CLOCK_REALTIME, or 0."""
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = TIMESPEC.unpack_from(content)
            return int(seconds * 1_000_000_000 + nanoseconds)
    return 0


def open_sockets(options: argparse.Namespace) -> list[socket.socket]:
    """Open what the flows read from: one listener for all TCP flows, or one socket per UDP flow."""
    kind = socket.SOCK_STREAM if options.proto == "tcp" else socket.SOCK_DGRAM
    family = socket.AF_INET6 if ":" in options.bind else socket.AF_INET
    n_sockets = 1 if options.proto == "tcp" else options.flows
    sockets = []
    for index in range(n_sockets):
        sock = socket.socket(family, kind)
        if options.proto == "tcp":  # two UDP sockets would share the port and the datagrams
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if options.scm:
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.bind((options.bind, options.port + index))
        if options.proto == "tcp":
            sock.listen(options.flows)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sockets.append(sock)
    return sockets


def serve_stream(listener: socket.socket, options: argparse.Namespace, log: Log) -> None:
    """Accept one connection and read it to its end, answering each whole message."""
    sock, peer = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    settle(options.cpu)
    obey(options.policy)
    if options.scm:
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    size, reply = options.size, bytearray(options.reply_size)
    buffer, tid = bytearray(RECEIVE_SIZE), threading.get_native_id()
    constant = (peer[1], sock.getsockname()[1], socket.IPPROTO_TCP, int(sock.family))
    position, flow = 0, -1
    while True:
        t0 = now()
        if options.scm:
            n_bytes, ancillary, flags, _ = sock.recvmsg_into([buffer], ANCILLARY_SIZE)
        else:
            n_bytes, ancillary, flags = sock.recv_into(buffer), [], 0
        t1 = now()
        begins = -position % size
        seq, sent = -1, 0
        if begins + MESSAGE_HEADER.size <= n_bytes:
            _, flow, seq, sent = MESSAGE_HEADER.unpack_from(buffer, begins)
        elif begins < n_bytes:  # a header cut by the end of the call: messages of a flow count from 0
            seq = (position + begins) // size
        log.append(t0, t1, seq, sent, scm_time_of(ancillary), tid, n_bytes, flow, *constant, flags & 0xFFFF)
        if n_bytes == 0:
            return
        first, position = position // size, position + n_bytes
        for number in range(first, position // size):
            if reply:
                MESSAGE_HEADER.pack_into(reply, 0, MESSAGE_MAGIC, flow, number, sent)
                sock.sendall(reply)


def serve_datagrams(sock: socket.socket, options: argparse.Namespace, log: Log) -> None:
    """Read datagrams until the client says END, answering each."""
    settle(options.cpu)
    obey(options.policy)
    reply, buffer, tid = bytearray(options.reply_size), bytearray(RECEIVE_SIZE), threading.get_native_id()
    constant = (sock.getsockname()[1], socket.IPPROTO_UDP, int(sock.family))
    while True:
        t0 = now()
        n_bytes, ancillary, flags, peer = sock.recvmsg_into([buffer], ANCILLARY_SIZE)
        t1 = now()
        magic, flow, seq, sent = (
            MESSAGE_HEADER.unpack_from(buffer) if n_bytes >= MESSAGE_HEADER.size else (0, -1, -1, 0)
        )
        log.append(t0, t1, seq, sent, scm_time_of(ancillary), tid, n_bytes, flow, peer[1], *constant, flags & 0xFFFF)
        if magic == MESSAGE_MAGIC and seq == END_SEQ:
            sock.sendto(buffer[:n_bytes], peer)
            return
        if reply:
            MESSAGE_HEADER.pack_into(reply, 0, MESSAGE_MAGIC, flow, seq, sent)
            sock.sendto(reply, peer)


def start_reader(sock: socket.socket, options: argparse.Namespace) -> tuple[int, int]:
    """Start the reader of one flow."""
    log = Log(APP_LOG_STRUCT, options.capacity)
    serve = serve_stream if options.proto == "tcp" else serve_datagrams
    return fork_worker(lambda: serve(sock, options, log), log)


class Mover(threading.Thread):
    """Moves the readers of a server from CPU to CPU on a schedule, and logs each move.

    A thread of the parent, which otherwise waits: a reader that moved itself would do so only when a message comes, and would
    always be awake then. The scheduler moves sleeping tasks too.
    """

    def __init__(self, tids: list[int], seconds: float, cpus: list[int]) -> None:
        super().__init__(daemon=True)
        self._tids, self._period, self._cpus = tids, int(seconds * 1e9), cpus
        self._end = threading.Event()
        self.log = Log(MOVE_STRUCT)
        self._move(cpus[0])

    def run(self) -> None:
        """Move on at times fixed beforehand until told to stop."""
        due, number = now(), 0
        while True:
            due, number = due + self._period, number + 1
            if self._end.wait(max(due - now(), 0) / 1e9):
                return
            self._move(self._cpus[number % len(self._cpus)])

    def _move(self, cpu: int) -> None:
        for tid in self._tids:
            t0 = now()
            with suppress(ProcessLookupError):
                os.sched_setaffinity(tid, {cpu})
                self.log.append(t0, now(), tid, cpu)

    def stop(self) -> bytes:
        """End the thread and return the log."""
        self._end.set()
        self.join()
        return self.log.content()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="rxlab-server", description="Logging server of rxlab.")
    parser.add_argument("bind", help="address to listen on")
    parser.add_argument("port", type=int)
    parser.add_argument("--proto", choices=("tcp", "udp"), default="tcp")
    parser.add_argument("--flows", type=int, default=1)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--reply-size", type=int, default=64)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--policy", default="other")
    parser.add_argument("--move-every", type=float, help="seconds between moves of all readers to the next CPU")
    parser.add_argument("--move-to", type=lambda text: [int(cpu) for cpu in text.split(",")], help="CPUs, in turn")
    parser.add_argument("--moves", default="moves.log", help="log of the moves")
    parser.add_argument("--scm", action="store_true", help="log SCM_TIMESTAMPNS")
    parser.add_argument("--capacity", type=int, default=1 << 16, help="records to make room for per flow")
    parser.add_argument("--log", default="app.log")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the server."""
    options = parse_arguments(arguments)
    sockets = open_sockets(options)
    readers = [start_reader(sockets[flow % len(sockets)], options) for flow in range(options.flows)]
    mover = Mover([pid for pid, _ in readers], options.move_every, options.move_to) if options.move_every else None
    if mover is not None:
        mover.start()
    print("ready", flush=True)
    content, codes = collect(readers)
    if mover is not None:
        write_log(options.moves, mover.stop())
    write_log(options.log, content)
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
