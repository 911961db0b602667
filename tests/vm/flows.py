"""Many TCP connections from one process: ``flows.py serve ADDRESS PORT`` or ``flows.py send ADDRESS PORT FLOWS ROUNDS``.

The built-in workload has a process per flow, which an emulated machine takes minutes to start.
"""

from __future__ import annotations

import selectors
import socket
import sys


def serve(address: tuple[str, int]) -> None:
    """Read from all connections until the last one is closed; then end."""
    choose = selectors.DefaultSelector()
    listener = socket.create_server(address, backlog=256)
    choose.register(listener, selectors.EVENT_READ)
    had = False
    while not had or len(choose.get_map()) > 1:
        for key, _ in choose.select():
            if key.fileobj is listener:
                choose.register(listener.accept()[0], selectors.EVENT_READ)
                had = True
                continue
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            text = connection.recv(4096)
            if text:
                connection.sendall(text)
            else:
                choose.unregister(connection)
                connection.close()


def send(address: tuple[str, int], flows: int, rounds: int) -> None:
    """Send a message and await its echo on every connection in turn."""
    connections = [socket.create_connection(address) for _ in range(flows)]
    for _ in range(rounds):
        for connection in connections:
            connection.sendall(b"x" * 64)
            connection.recv(4096)
    for connection in connections:
        connection.close()


if __name__ == "__main__":
    what, host, port, *counts = sys.argv[1:]
    if what == "serve":
        serve((host, int(port)))
    else:
        send((host, int(port)), *map(int, counts))
