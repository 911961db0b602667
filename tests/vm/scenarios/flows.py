"""Many TCP flows between two single processes, and what the kernel says of its queues meanwhile.

flows.py serve ADDRESS PORT                        echo, until ended
flows.py send ADDRESS PORT IFACE SNAPSHOT [ROUNDS [FLOWS]]   a message on each flow in turn, `ROUNDS` times; SNAPSHOT gets JSON:
    ``before`` and ``after`` the traffic /proc/interrupts between two readings of CLOCK_MONOTONIC; RSS table and affinities
flows.py migrate ADDRESS PORT LOG CPU...           read one flow, on the next CPU every 40 messages; LOG gets the moves as JSON
flows.py stream ADDRESS PORT [MESSAGES]            a message every 4 ms, whatever becomes of the one before
"""

from __future__ import annotations

import json
import os
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

    def outside(*argv: str) -> str:
        return subprocess.run(["nsenter", "-t", "1", "-n", *argv], capture_output=True, text=True, check=True).stdout

    affinity = {
        path.parent.name: path.read_text().strip() for path in Path("/proc/irq").glob("*/effective_affinity_list")
    }
    return {
        "table": outside("ethtool", "-x", iface),
        "key": outside("cat", "/proc/sys/net/core/netdev_rss_key").strip(),
        "affinity": affinity,
    }


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


def migrate(address: str, port: str, log: str, *cpus: str) -> None:
    """Read one flow; before reading on after a move, let messages gather, as a reader does that has other work first."""
    listener = socket.create_server((address, int(port)))
    accepted, _ = listener.accept()
    received, moves = 0, []
    os.sched_setaffinity(0, {int(cpus[0])})
    while content := accepted.recv(SIZE, socket.MSG_WAITALL):
        received += len(content) // SIZE
        if received % 40 == 0:
            cpu = int(cpus[len(moves) % len(cpus) - len(cpus) + 1])
            os.sched_setaffinity(0, {cpu})
            moves.append({"cpu": cpu, "received": received, "at_ns": time.monotonic_ns()})
            Path(log).write_text(json.dumps(moves))
            time.sleep(0.03)
            moves[-1]["reads_ns"] = time.monotonic_ns()
            Path(log).write_text(json.dumps(moves))


def stream(address: str, port: str, messages: str = "400") -> None:
    """Send on a schedule, one message per segment."""
    end = socket.create_connection((address, int(port)))
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    due = time.monotonic()
    for number in range(int(messages)):
        end.sendall(number.to_bytes(4, "big") * (SIZE // 4))
        due += 0.004
        time.sleep(max(due - time.monotonic(), 0))
    time.sleep(0.5)


if __name__ == "__main__":
    {"serve": serve, "send": send, "migrate": migrate, "stream": stream}[sys.argv[1]](*sys.argv[2:])
