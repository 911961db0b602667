"""Many TCP flows between two single processes, and what the kernel says of its queues meanwhile.

flows.py serve ADDRESS PORT                        echo, until ended
flows.py send ADDRESS PORT IFACE SNAPSHOT [ROUNDS [FLOWS]]   a message on each flow in turn, `ROUNDS` times; SNAPSHOT gets JSON:
``before`` and ``after`` the traffic /proc/interrupts between two readings of CLOCK_MONOTONIC, in between RSS table and affinities
"""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZE = 64


def serve(address: str, port: str) -> None:
    """Echo whatever comes."""
    listener = socket.create_server((address, int(port)), backlog=256)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            end = key.fileobj
            assert isinstance(end, socket.socket)
            if end is listener:
                accepted, _ = listener.accept()
                selector.register(accepted, selectors.EVENT_READ)
            elif content := end.recv(4096):
                end.sendall(content)
            else:
                selector.unregister(end)
                end.close()


def counters() -> dict[str, Any]:
    """Return /proc/interrupts between two readings of the clock."""
    before = time.monotonic_ns()
    text = Path("/proc/interrupts").read_text()
    return {"before_ns": before, "text": text, "after_ns": time.monotonic_ns()}


def steering(iface: str) -> dict[str, Any]:
    """Return the RSS table and key, and which CPUs may take each interrupt; of the host, whatever namespace this runs in."""
    table = subprocess.run(["nsenter", "-t", "1", "-n", "ethtool", "-x", iface], capture_output=True, text=True, check=False)
    key = Path("/proc/1/root/proc/sys/net/core/netdev_rss_key")
    affinity = {
        path.parent.name: path.read_text().strip() for path in Path("/proc/irq").glob("*/effective_affinity_list")
    }
    return {"table": table.stdout, "key": key.read_text().strip(), "affinity": affinity}


def send(address: str, port: str, iface: str, snapshot: str, rounds: str = "6", flows: str = "64") -> None:
    """Send and await each reply, so that packets come one by one."""
    ends = [socket.create_connection((address, int(port))) for _ in range(int(flows))]
    time.sleep(0.5)
    seen = {"before": counters()}
    for number in range(int(rounds)):
        for end in ends:
            end.sendall(number.to_bytes(4, "big") * (SIZE // 4))
            end.recv(4096)
    time.sleep(0.5)
    seen |= {"after": counters(), **steering(iface)}
    Path(snapshot).write_text(json.dumps(seen))


if __name__ == "__main__":
    {"serve": serve, "send": send}[sys.argv[1]](*sys.argv[2:])
