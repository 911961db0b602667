"""A recorded run laid end to end with itself until its files are large, analysed at once and in chunks: time and memory.

    python tests/bench/large_run.py [RUN] [--samples 20000000] [--chunks 1000000] [--whole]

The copies follow each other in time and their TCP streams go on, so what was one run of a few hundred packets is one of many. Each
analysis is a process of its own; its highest anonymous memory (RssAnon) is looked up a hundred times a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rxlab import read_pcap, read_perfdata
from rxlab.read import perfindex
from rxlab.read.perffile import open_perffile

GAP_NS = 1_000_000
DATA_OFFSET, DATA_SIZE = 0x28, 0x30  # struct perf_file_header (tools/perf/util/header.h)
FEATURES = slice(0x48, 0x68)
TCP_SEQ = 14 + 20 + 4  # Ethernet and IPv4 without options

ANALYZE = """
import json, sys, threading, time
import rxlab.dataset.run
from rxlab.pipeline import analyze_run
def anon():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
peak, done = anon(), threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anon())
rest, watcher = peak, threading.Thread(target=watch)
watcher.start()
begin, cpu = time.perf_counter(), time.process_time()
chunks = int(sys.argv[3]) or None
rxlab.dataset.run.LARGE_BYTES = 1 << 60
result = analyze_run(sys.argv[1], out=sys.argv[2], chunks=chunks, say=lambda text: None)
result |= {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
done.set()
watcher.join()
print(json.dumps({**result, "anon": peak, "rest": rest}))
"""


def lay_perfdata(source: Path, target: Path, times: int, shift: int) -> None:
    """Write a perf.data with its data section repeated, every sample later by `shift` ns from copy to copy."""
    perf = open_perffile(source)
    samples = perfindex.read_samples(perf, perfindex.Tables(perf))
    content = bytearray(source.read_bytes())
    begin, size = struct.unpack_from("<QQ", content, DATA_OFFSET)
    data = np.frombuffer(bytes(content[begin : begin + size]), np.uint8).copy()
    starts = samples.start[samples.event >= 0] - (0 if samples.start.max() < size else begin)
    stamps = samples.time[samples.event >= 0]
    first = data[starts[0] :][: 8 * 16].view("<i8") if starts[0] % 8 == 0 else None
    assert first is not None, "perf aligns its records"
    at = starts + 8 * int(np.flatnonzero(first == stamps[0])[0])
    words = data.view("<i8")
    assert (words[at // 8] == stamps).all(), "all events have the same sample fields"
    tail = bytearray(content[begin + size :])
    moved = size * (times - 1)
    for feature in range(sum(bin(byte).count("1") for byte in content[FEATURES])):
        offset, length = struct.unpack_from("<QQ", tail, 16 * feature)
        struct.pack_into("<QQ", tail, 16 * feature, offset + moved, length)
    struct.pack_into("<Q", content, DATA_SIZE, size * times)
    with target.open("wb") as file:
        file.write(content[:begin])
        for _ in range(times):
            file.write(data.tobytes())
            words[at // 8] += shift
        file.write(tail)


def lay_pcap(source: Path, target: Path, times: int, shift: int) -> None:
    """Write a pcap with its packets repeated, later by `shift` ns from copy to copy, TCP streams going on."""
    packets = read_pcap(source)
    content = np.frombuffer(source.read_bytes(), np.uint8)
    assert content[:4].tobytes() == b"\x4d\x3c\xb2\xa1", "a little-endian pcap with nanoseconds"
    is_tcp = np.flatnonzero(packets["proto"] == 6)
    seq = packets["seq"][is_tcp].astype(np.int64)
    turn = int((seq + packets["payload_len"][is_tcp]).max() - seq.min()) + 2 if len(seq) else 0
    body = content[24:].copy()
    heads = packets["offset"] - 16 - 24
    with target.open("wb") as file:
        file.write(content[:24].tobytes())
        for copy in range(times):
            stamp = packets["time"] + copy * shift
            _put(body, heads, np.stack([stamp // 10**9, stamp % 10**9], axis=1).astype("<u4"))
            _put(body, packets["offset"][is_tcp] - 24 + TCP_SEQ, ((seq + copy * turn) % 2**32).astype(">u4"))
            file.write(body.tobytes())


def _put(body: np.ndarray, at: np.ndarray, values: np.ndarray) -> None:
    """Write each row of values as bytes at its place."""
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(at), -1)
    body[at[:, None] + np.arange(raw.shape[1])] = raw


def lay_run(source: Path, target: Path, n_samples: int) -> int:
    """Write a run directory of about so many samples; return how many it has."""
    perf = read_perfdata(source / "perf.data", chunks=1_000_000)
    stamps = read_pcap(source / "rx.pcap")["time"]
    times = max(1, round(n_samples / perf.meta["samples"]))
    shift = max(perf.meta["last_ns"] - perf.meta["first_ns"], int(stamps.max() - stamps.min())) + GAP_NS
    for name in ("run.json", "host.json", "clock.json"):
        shutil.copy(source / name, target / name)
    lay_perfdata(source / "perf.data", target / "perf.data", times, shift)
    lay_pcap(source / "rx.pcap", target / "rx.pcap", times, shift)
    return times * int(perf.meta["samples"])


def main() -> None:
    """Lay, analyse, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    repo = Path(__file__).resolve().parents[2]
    parser.add_argument("run", type=Path, nargs="?", default=repo / "data" / "tcp-rps-off")
    parser.add_argument("--samples", type=int, default=20_000_000)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--whole", action="store_true", help="also at once: ten times the memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rxlab-bench-") as folder:
        begin = time.perf_counter()
        n = lay_run(options.run, Path(folder), options.samples)
        size = (Path(folder) / "perf.data").stat().st_size
        print(f"{n} samples, perf.data {size / 1e6:.0f} MB, laid in {time.perf_counter() - begin:.0f} s", flush=True)
        ways = {f"chunks of {options.chunks}": [str(options.chunks)]}
        if options.whole:
            ways["at once"] = ["0"]
        for name, arguments in ways.items():
            command = [sys.executable, "-c", ANALYZE, folder, str(Path(folder) / "out.nc"), *arguments]
            done = subprocess.run(command, capture_output=True, check=True, text=True)
            told = json.loads(done.stdout)
            print(
                f"{name}: {told['seconds']:.1f} s, {told['cpu']:.1f} s of CPU, {n / told['cpu'] / 1e6:.2f} M samples/s; RssAnon "
                f"{told['anon'] / 1e6:.0f} MB, {told['rest'] / 1e6:.0f} at the start; {told['packets']} packets, "
                f"complete {told['complete']:.4f}, {told['verdict']} {'; '.join(told['reasons'])[:200]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
