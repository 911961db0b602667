"""Speed and memory of `read_pcap` against its peers, on one file, in one run.

    python tests/bench/large_pcap.py CAPTURE [--packets 10000000] [--folder /tmp] [--runs 3]

CAPTURE is a real classic little-endian capture; it is repeated with shifted times until the file has `--packets`
packets, which is deleted afterwards. The last two columns are rxlab's packets per second over the peer's, by wall and
by processor time (on a busy machine the latter says more). Each peer is a process of its own, start and imports
included; slow ones read a head of the file. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rxlab.read.pcap import read_pcap

# What a user who wants columns asks tshark for.
TSHARK_FIELDS = [
    "frame.number",
    "frame.time_epoch",
    "frame.cap_len",
    "frame.len",
    "eth.src",
    "eth.dst",
    "eth.type",
    "ip.src",
    "ip.dst",
    "ip.proto",
    "ip.ttl",
    "ip.id",
    "tcp.srcport",
    "tcp.dstport",
    "tcp.seq_raw",
    "tcp.ack_raw",
    "tcp.flags",
    "tcp.window_size_value",
    "tcp.len",
    "udp.srcport",
    "udp.dstport",
    "udp.length",
]

RXLAB = "import sys; from rxlab.read.pcap import read_pcap; c = read_pcap(sys.argv[1]); print(c.n)"
RXLAB_CHUNKS = """
import sys, threading
from rxlab.read.pcap import read_pcap
n = top = 0
for piece in read_pcap(sys.argv[1], chunks=1 << 20):
    n += piece.n
    anon = next(l for l in open('/proc/self/status') if l.startswith('RssAnon'))
    top = max(top, int(anon.split()[1]))
print(n); print(top, file=sys.stderr)
"""
RXLAB_STEADY = """
import sys, time
from rxlab.read.pcap import read_pcap
best = 1e9
for _ in range(6):
    columns = None
    start = time.perf_counter(); columns = read_pcap(sys.argv[1]); best = min(best, time.perf_counter() - start)
anon = next(l for l in open('/proc/self/status') if l.startswith('RssAnon'))
size = sum(columns[name].nbytes for name in columns)
print(columns.n); print(best, int(anon.split()[1]), size // 1024, file=sys.stderr)
"""
DPKT = """
import sys, struct, dpkt
rows = []
for stamp, buf in dpkt.pcap.Reader(open(sys.argv[1], 'rb')):
    kind, = struct.unpack_from('>H', buf, 12)
    if kind == 0x800 and buf[23] in (6, 17):
        l4 = 14 + (buf[14] & 15) * 4
        rows.append((stamp, len(buf), *struct.unpack_from('>H2xBBxx4s4s', buf, 18), *struct.unpack_from('>HH', buf, l4),
                     *(struct.unpack_from('>IIHH', buf, l4 + 4) if buf[23] == 6 else (0, 0, 0, 0))))
    else:
        rows.append((stamp, len(buf)))
print(len(rows))
"""
PCAPY = """
import sys, pcapy
reader = pcapy.open_offline(sys.argv[1]); kept = []; n = 0
while True:
    batch = reader.next_batch(65536)
    if not batch or not len(batch[1]): break
    kept.append(batch); n += len(batch[1]) // 16
print(n)
"""
PYSHARK = """
import sys, pyshark
n = 0
for packet in pyshark.FileCapture(sys.argv[1], keep_packets=False, use_ek=True):
    packet.sniff_timestamp, packet.length, packet.highest_layer
    n += 1
print(n)
"""


class Result(NamedTuple):
    """One peer's best run."""

    packets: int
    wall: float
    cpu: float
    rss_mib: float
    said: str


def repeat_capture(source: Path, target: Path, packets: int) -> int:
    """Write `source` again and again, each time later by its length in seconds; return the number of packets."""
    columns, raw = read_pcap(source), np.fromfile(source, np.uint8)
    span = int((columns["time"].max() - columns["time"].min()) // 10**9) + 1
    heads = columns["offset"] - 16 - 24
    body = raw[24:].copy()
    seconds = raw[(heads + 24)[:, None] + np.arange(4)].copy().view("<u4")[:, 0].astype(np.int64)
    times = -(-packets // columns.n)
    with target.open("wb") as out:
        out.write(raw[:24].tobytes())
        for k in range(times):
            words = (seconds + k * span).astype("<u4").view(np.uint8).reshape(-1, 4)
            for byte in range(4):
                body[heads + byte] = words[:, byte]
            out.write(body.tobytes())
    return times * columns.n


def cut(source: Path, target: Path, packets: int) -> None:
    """Write the first packets of a classic capture."""
    piece = next(iter(read_pcap(source, chunks=packets)))
    end = int(piece["offset"][-1] + piece["caplen"][-1])
    with source.open("rb") as file:
        target.write_bytes(file.read(end))


def best_of(command: list[str], runs: int, count: Callable[[bytes], int]) -> Result | None:
    """Run a command some times; return its best run, None if it cannot run."""
    best: Result | None = None
    for _ in range(runs):
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate()
        wall = time.perf_counter() - start
        if process.returncode != 0:
            (why,) = err.decode(errors="replace").strip().splitlines()[-1:] or [f"status {process.returncode}"]
            if "No module named" in why:
                why += f". Have it: {sys.executable} -m pip install --constraint constraints.txt --editable '.[bench]'"
            print(f"left out: {why}")
            return None
        usage = _children_usage()
        result = Result(count(out), wall, usage[0], usage[1], err.decode(errors="replace").strip())
        best = result if best is None or result.wall < best.wall else best
    return best


_before = [0.0]


def _children_usage() -> tuple[float, float]:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = usage.ru_utime + usage.ru_stime
    spent, _before[0] = total - _before[0], total
    return spent, usage.ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capture", type=Path)
    parser.add_argument("--packets", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    big, head, tiny = (args.folder / f"rxlab-bench-{os.getpid()}-{size}.pcap" for size in ("big", "head", "tiny"))
    try:
        n = repeat_capture(args.capture, big, args.packets)
        cut(big, head, min(n, 200_000))
        cut(big, tiny, min(n, 3_000))
        print(f"{n} packets, {big.stat().st_size / 1e6:.0f} MB, load {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs")
        _table(big, head, tiny, args.runs)
    finally:
        for path in (big, head, tiny):
            path.unlink(missing_ok=True)


def _table(big: Path, head: Path, tiny: Path, runs: int) -> None:
    python = [sys.executable, "-c"]
    fields = [part for field in TSHARK_FIELDS for part in ("-e", field)]
    number = lambda out: int(out.split()[-1])  # noqa: E731
    peers = [
        ("rxlab, whole process", [*python, RXLAB, str(big)], runs, number),
        ("rxlab, chunks of 2**20", [*python, RXLAB_CHUNKS, str(big)], runs, number),
        ("rxlab, running kernel", [*python, RXLAB_STEADY, str(big)], 1, number),
        ("cat", ["cat", str(big)], runs, lambda out: 0),
        ("pcapy-ng next_batch, decodes nothing", [*python, PCAPY, str(big)], runs, number),
        ("dpkt Reader and struct", [*python, DPKT, str(head)], runs, number),
        (
            f"tshark -T fields ({len(TSHARK_FIELDS)})",
            ["tshark", "-n", "-r", str(head), "-T", "fields", *fields],
            runs,
            lambda out: out.count(b"\n"),
        ),
        ("pyshark use_ek", [*python, PYSHARK, str(tiny)], 1, number),
    ]
    ours: Result | None = None
    print(f"{'job':40} {'packets':>10} {'wall s':>8} {'cpu s':>8} {'packets/s':>12} {'by wall':>8} {'by cpu':>8}")
    for name, command, times, count in peers:
        result = best_of(command, times, count)
        if result is None:
            continue
        ours = ours or result
        if name == "rxlab, running kernel":
            best, anon, size = result.said.splitlines()[-1].split()
            result = result._replace(
                wall=float(best), said=f"RssAnon {int(anon) // 1024} MiB, columns {int(size) // 1024} MiB"
            )
        rate = result.packets / result.wall
        by_wall = ours.packets / ours.wall / rate if rate else 0
        by_cpu = ours.packets / ours.cpu / (result.packets / result.cpu) if rate else 0
        note = f"top RssAnon {int(result.said.split()[-1]) // 1024} MiB" if "chunks" in name else ""
        note = result.said if name == "rxlab, running kernel" else note
        print(
            f"{name:40} {result.packets:>10} {result.wall:8.3f} {result.cpu:8.3f} {rate:12,.0f} {by_wall:8.1f} {by_cpu:8.1f}  {note}"
        )


if __name__ == "__main__":
    main()
