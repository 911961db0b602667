"""A large live recording for the benchmarks: this machine's tracepoints while messages go back and forth on loopback.

    python tests/bench/recording.py FILE [--samples 10000000]

Root only. Traffic is some request/response pairs of sockets on 127.0.0.1; recording ends when the file is large enough.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

EVENTS = [
    "net:netif_rx",
    "net:netif_receive_skb",
    "net:napi_gro_receive_entry",
    "irq:softirq_raise",
    "irq:softirq_entry",
    "tcp:tcp_probe",
    "sock:sk_data_ready",
    "skb:skb_copy_datagram_iovec",
    "sched:sched_switch",
    "sched:sched_waking",
    "sched:sched_wakeup",
    "csd:csd_queue_cpu",
]
BYTES_PER_SAMPLE = 104  # a little less than seen, so that the recording is rather too long
LONGEST_SECONDS = 240

# One pair of sockets per process: the parent's end sends, the child's answers.
TRAFFIC = """
import os, socket, sys
kind = socket.SOCK_STREAM if sys.argv[1] == "tcp" else socket.SOCK_DGRAM
server = socket.socket(socket.AF_INET, kind); server.bind(("127.0.0.1", 0))
client = socket.socket(socket.AF_INET, kind)
if kind == socket.SOCK_STREAM:
    server.listen(); client.connect(server.getsockname()); server, _ = server.accept()
else:
    client.bind(("127.0.0.1", 0)); client.connect(server.getsockname()); server.connect(client.getsockname())
end = client if os.fork() else server
if end is client: end.send(bytes(200))
while True:
    end.send(end.recv(2048))
"""


def record(path: Path, samples: int) -> None:
    """Record at least about `samples` samples of :data:`EVENTS` (those this kernel has) into `path`."""
    known = [name for name in EVENTS if Path("/sys/kernel/tracing/events", name.replace(":", "/")).is_dir()]
    command = ["perf", "record", "-q", "-a", "-k", "CLOCK_MONOTONIC", "-m", "16384", "-o", str(path)]
    pairs = [
        subprocess.Popen([sys.executable, "-c", TRAFFIC, kind], start_new_session=True)
        for kind in ("tcp", "tcp", "udp")
    ]
    perf = subprocess.Popen([*command, *(f"-e{name}" for name in known)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + LONGEST_SECONDS
        while perf.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if path.exists() and path.stat().st_size > samples * BYTES_PER_SAMPLE:
                break
    finally:
        for pair in pairs:
            os.killpg(pair.pid, signal.SIGKILL)
            pair.wait()
        perf.send_signal(signal.SIGINT)
        said = perf.communicate(timeout=60)[1].decode()
    if perf.returncode not in (0, -signal.SIGINT) or not path.exists():
        raise SystemExit(f"perf record ended with {perf.returncode}: {said.strip()}")


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--samples", type=int, default=10_000_000)
    options = parser.parse_args()
    record(options.file, options.samples)
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
