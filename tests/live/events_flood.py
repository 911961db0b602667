"""Kernel events at a chosen rate on one CPU: peeks at a byte of TCP, each raising skb_copy_datagram_iovec and sock_recv_length.

No packet moves and nobody sleeps, so the rate is bounded by the system call and the cost of tracing it, not by a network.
``python events_flood.py CPU EVENTS_PER_SECOND SECONDS`` prints how many events it raised and the seconds it took.
"""

from __future__ import annotations

import os
import socket
import sys
import time

EVENTS_PER_CALL = 2
BATCH = 50


def main() -> None:
    cpu, rate, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    os.sched_setaffinity(0, {cpu})
    # Not UDP: it copies a linear skb without skb_copy_datagram_iter(), so without that event (copy_linear_skb).
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    sender.send(b"x")
    sock.recv(1, socket.MSG_PEEK)  # waits for the byte; one call more
    buffer, peek, receive = bytearray(1), socket.MSG_PEEK, sock.recv_into
    n_calls, start = 0, time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        if n_calls * EVENTS_PER_CALL > passed * rate:
            continue
        for _ in range(BATCH):
            receive(buffer, 1, peek)
        n_calls += BATCH
    print((n_calls + 1) * EVENTS_PER_CALL, time.monotonic() - start)


if __name__ == "__main__":
    main()
