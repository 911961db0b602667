"""An HTTP server that logs its accept calls: ``acceptor.py ADDRESS PORT CONNECTIONS LOG``."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


def main(address: str, port: str, connections: str, log: str) -> None:
    """Answer one request per connection; write the clock before and after each accept, the peer's port, and the thread."""
    told = []
    with socket.create_server((address, int(port)), backlog=64) as listener:
        for _ in range(int(connections)):
            t0 = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            connection, peer = listener.accept()
            t1 = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            told.append({"t0": t0, "t1": t1, "port": peer[1], "tid": threading.get_native_id()})
            with connection:
                connection.recv(65536)
                connection.sendall(ANSWER)
    Path(log).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
