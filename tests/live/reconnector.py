"""Connections from one port, one after the other: ``reconnector.py serve ADDRESS PORT N LOG`` and ``connect ADDRESS PORT N FROM``.

Each connection ends in a reset, so that the next may use its port at once (no TIME_WAIT). The server logs every receive call.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

SIZE = 96 * 1024  # more than the ISN's clock (250 bytes a microsecond at most) lets go by while it is sent
PIECE = 4096


def serve(address: str, port: int, connections: int, log: Path) -> None:
    """Read each connection to its end, answer one byte, and write (connection, t0, t1, bytes) of each call that returned some."""
    calls = []
    with socket.create_server((address, port), backlog=64) as listener:
        for number in range(connections):
            connection, _ = listener.accept()
            taken = 0
            with connection:
                while taken < SIZE:
                    t0 = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
                    got = len(connection.recv(PIECE))
                    calls.append((number, t0, time.clock_gettime_ns(time.CLOCK_MONOTONIC), got))
                    taken += got
                connection.sendall(b"!")
                with suppress(ConnectionResetError):
                    connection.recv(1)
    log.write_text(json.dumps(calls))


def connect(address: str, port: int, connections: int, from_port: int) -> None:
    """Send SIZE bytes on each connection, wait for the answer, reset."""
    for _ in range(connections):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("", from_port))
            client.connect((address, port))
            client.sendall(bytes(SIZE))
            client.recv(1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


if __name__ == "__main__":
    who, address, port, connections, last = sys.argv[1:]
    if who == "serve":
        serve(address, int(port), int(connections), Path(last))
    else:
        connect(address, int(port), int(connections), int(last))
