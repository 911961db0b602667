"""The readers against the tools that people use today, on one recording in one run.

"whole process" is interpreter, imports and reading, compiled code cached; "in a running kernel" is the notebook's case. All
fields of all events are decoded: each column is summed, which no lazy reader survives.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pyperf

SUM_PERF = "import sys, rxlab; p = rxlab.read_perfdata(sys.argv[1]); [c.sum() for e in p.events.values() for c in e.values() if c.dtype.kind in 'iufb']"
SUM_PCAP = (
    "import sys, rxlab; p = rxlab.read_pcap(sys.argv[1]); [c.sum() for c in p.values() if c.dtype.kind in 'iufb']"
)
TSHARK_FIELDS = ["frame.time_epoch", "frame.len", "ip.src", "ip.dst", "ip.proto", "tcp.srcport", "tcp.dstport", "tcp.seq_raw", "udp.srcport", "udp.dstport"]  # fmt: skip


def bench(runner: pyperf.Runner, kind: str, path: Path, code: str, peer: list[str]) -> None:
    """Measure `cat`, the peer, and rxlab as a process and in a running kernel, on one file."""
    program = compile(code, "<bench>", "exec")

    def read() -> None:
        sys.argv = ["bench", str(path)]
        exec(program, {})

    runner.bench_command(f"{kind}: cat", ["cat", str(path)])
    if shutil.which(peer[0]):
        runner.bench_command(f"{kind}: {' '.join(peer[:2])}", peer)
    runner.bench_command(f"{kind}: rxlab, whole process", [sys.executable, "-c", code, str(path)])
    runner.bench_func(f"{kind}: rxlab, in a running kernel", read)


def main() -> None:
    """Run the benchmarks of the files that the run directory `RUN` has."""
    runner = pyperf.Runner()
    run = Path(os.environ["RUN"])
    perf, pcap = run / "perf.data", run / "rx.pcap"
    if perf.is_file():
        peer = ["perf", "script", "-F", "comm,tid,cpu,time,event,trace", "--ns", "-i", str(perf)]
        bench(runner, "perf.data", perf, SUM_PERF, peer)
    if pcap.is_file():
        fields = [argument for field in TSHARK_FIELDS for argument in ("-e", field)]
        bench(runner, "rx.pcap", pcap, SUM_PCAP, ["tshark", "-Tfields", "-n", *fields, "-r", str(pcap)])


if __name__ == "__main__":
    main()
