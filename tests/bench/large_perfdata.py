"""What reading a perf.data file costs here and elsewhere, on the same file in the same run.

    python tests/bench/large_perfdata.py [FILE] [--samples 10000000] [--runs 3] [--no-script] [--no-python-script]

Without FILE one is recorded under a temporary folder (root only), and a twentieth of it for `perf script -s`, which would need
minutes for all; its row is scaled to the same number of samples.

Each row is a whole process (interpreter, imports, work) with compiled kernels cached, unless it says "in a running kernel".
rxlab decodes every field of every tracepoint and sums every column; the sums of the fields that perf's text shows plainly
are compared with the peer's. Wall and CPU seconds are minima over the runs: the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recording import record

READ = """
import json, sys, time
from rxlab.read.perfdata import read_perfdata
import numpy as np
def status(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024
def total(array):
    if array.dtype.kind == "S":
        array = array.view(np.uint64 if array.dtype.itemsize % 8 == 0 else np.uint8)
    return int(array.sum(dtype=np.int64 if array.dtype.kind == "i" else np.uint64))
def go():
    begin = time.perf_counter()
    perf = read_perfdata(sys.argv[1], threads=int(sys.argv[2])).load()
    loaded = time.perf_counter() - begin
    sums = {}
    if len(sys.argv) > 4:
        sums = {event: {name: total(array) for name, array in columns.items()} for event, columns in perf.events.items()}
    return perf, sums, loaded
rest = status("RssAnon")
perf, sums, first = go()
held = sum(array.nbytes for columns in perf.events.values() for array in columns.values())
out = {"samples": perf.meta["samples"], "duplicates": perf.meta["duplicates"], "sums": sums, "first": first, "columns": held, "anon": status("RssAnon") - rest}
del perf
out["again"] = []
for _ in range(int(sys.argv[3])):
    perf, _, seconds = go()
    out["again"].append(seconds)
    del perf
print(json.dumps(out))
"""

CHUNKS = """
import json, sys
from rxlab.read.perfdata import read_perfdata
peak = 0
for part in read_perfdata(sys.argv[1], chunks=500_000).iter_chunks():
    part.load()
    peak = max(peak, int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024)
print(json.dumps({"anon": peak}))
"""

# One dict per sample, as a user of perf's own Python would keep them.
PERF_PYTHON = """
rows = []
def trace_unhandled(name, context, fields, sample):
    rows.append((name, fields))
"""

# What perf's own C interface costs: time, CPU, task, event and raw bytes of each sample are kept, no field is decoded.
DLFILTER = r"""
#include <perf/perf_dlfilter.h>
#include <stdlib.h>
#include <string.h>
struct row { __u64 time; __s32 cpu, pid, tid; const char *event; __u32 size; __u64 at; };
static struct row *rows; static char *bytes; static __u64 n, n_max, at, at_max;
int filter_event(void *data, const struct perf_dlfilter_sample *s, void *ctx)
{
    if (n == n_max) rows = realloc(rows, (n_max = n_max ? 2 * n_max : 1 << 20) * sizeof(*rows));
    while (at + s->raw_size > at_max) bytes = realloc(bytes, at_max = at_max ? 2 * at_max : 1 << 26);
    rows[n++] = (struct row){s->time, s->cpu, s->pid, s->tid, s->event, s->raw_size, at};
    memcpy(bytes + at, s->raw_data, s->raw_size);
    at += s->raw_size;
    return 1;
}
"""

# (event, pattern of the value in the line): fields whose text is a plain number.
SUMMED = {
    ("net:netif_rx", "len"): r"net:netif_rx: .*\blen=(\d+)",
    ("net:netif_receive_skb", "len"): r"net:netif_receive_skb: .*\blen=(\d+)",
    ("sched:sched_switch", "next_pid"): r"sched:sched_switch: .*\bnext_pid=(\d+)",
    ("sched:sched_waking", "field_pid"): r"sched:sched_waking: .*\bpid=(\d+)",
    ("tcp:tcp_probe", "snd_nxt"): r"tcp:tcp_probe: .*\bsnd_nxt=(0x[0-9a-f]+)",
    ("skb:skb_copy_datagram_iovec", "len"): r"skb:skb_copy_datagram_iovec: .*\blen=(\d+)",
}


def run(command: list[str], runs: int, *, to: object = subprocess.DEVNULL) -> tuple[float, float]:
    """Return the least wall and CPU seconds of some runs."""
    walls, cpus = [], []
    for _ in range(runs):
        before, begin = os.times(), time.perf_counter()
        subprocess.run(command, stdout=to, stderr=subprocess.DEVNULL, check=True)  # type: ignore[call-overload]
        walls.append(time.perf_counter() - begin)
        after = os.times()
        cpus.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(walls), min(cpus)


def rxlab(file: Path, threads: int, again: int) -> dict:
    """Run the reader in a process of its own and return what it measured."""
    command = [sys.executable, "-c", READ, str(file), str(threads), str(again), "sum"]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def read_limit(file: Path) -> float:
    """Return the seconds that read() into a 4 MiB buffer takes for the whole file, the least of 5."""
    buffer = bytearray(4 << 20)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
        best = min(best, time.perf_counter() - begin)
    return best


def compare_sums(file: Path, sums: dict, left_out: int) -> list[str]:
    """Return one line per field whose sum perf's text shows, and one about samples that perf wrote twice.

    rxlab leaves a sample out that repeats another to the last byte (`left_out` of them); perf prints it again. Its lines then
    are equal, task, CPU and nanosecond included, and stand among those of one instant.
    """
    script = ["perf", "script", "-F", "tid,cpu,time,event,trace", "--ns", "-i", str(file)]
    patterns = {key: re.compile(pattern) for key, pattern in SUMMED.items() if key[0] in sums}
    by_event = {key[0]: (key, pattern) for key, pattern in patterns.items()}
    totals, again = dict.fromkeys(patterns, 0), dict.fromkeys(patterns, 0)
    instant, seen, repeated = "", set(), 0
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        for line in child.stdout or ():
            head, _, rest = line.partition(": ")
            now = head.rpartition(" ")[2]
            if now != instant:
                instant, seen = now, set()
            is_again = line in seen
            seen.add(line)
            repeated += is_again
            entry = by_event.get(rest.partition(": ")[0].strip())
            if entry and (match := entry[1].search(line)):
                (again if is_again else totals)[entry[0]] += int(match[1], 0)
    lines = [f"duplicates left out: perf's text {repeated}, rxlab {left_out}: {_same(repeated, left_out)}"]
    for (event, name), value in totals.items():
        ours, twice = sums[event][name], again[event, name]
        noted = f" (and {twice} in samples it wrote twice)" if twice else ""
        lines.append(f"sum of {event} {name}: perf {value}{noted}, rxlab {ours}: {_same(value, ours)}")
    return lines


def _same(one: int, other: int) -> str:
    return "equal" if one == other else "DIFFERENT"


def first_call(file: Path) -> tuple[float, float]:
    """Return wall and CPU seconds of the first call ever on a small recording: nothing compiled, nothing cached."""
    with tempfile.TemporaryDirectory() as cache:
        environment = f"NUMBA_CACHE_DIR={cache}"
        return run(["env", environment, sys.executable, "-c", READ, str(file), "2", "0"], 1)


def peers(file: Path, small: Path | None, factor: float, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Run every peer as a process of its own; return wall and CPU seconds by name."""
    rows = {"cat": run(["cat", str(file)], options.runs)}
    rows["perf report --stats (no field)"] = run(["perf", "report", "--stats", "-i", str(file)], options.runs)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "keep.c"), Path(folder, "keep.so")
        source.write_text(DLFILTER)
        if shutil.which("gcc") and Path("/usr/include/perf/perf_dlfilter.h").exists():
            subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
            command = ["perf", "script", "--dlfilter", str(library), "-i", str(file)]
            rows["perf script --dlfilter in C (no field)"] = run(command, options.runs)
        if not options.no_script:
            fields = ["-F", "comm,tid,cpu,time,event,trace", "--ns"]
            rows["perf script, all fields as text"] = run(["perf", "script", *fields, "-i", str(file)], 1)
        if small is not None and not options.no_python_script:
            script = Path(folder, "keep.py")
            script.write_text(PERF_PYTHON)
            wall, cpu = run(["perf", "script", "-s", str(script), "-i", str(small)], 1)
            rows["perf script -s, a dict per sample *"] = (factor * wall, factor * cpu)
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--small", type=Path, help="a recording of the same events for perf script -s")
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-script", action="store_true", help="leave out perf script, the slow peer")
    parser.add_argument("--no-python-script", action="store_true", help="leave out perf script -s, slower still")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rxlab-bench-") as folder:
        file, small = options.file, options.small
        if file is None:
            file, small = Path(folder, "big.data"), Path(folder, "small.data")
            record(file, options.samples)
            record(small, options.samples // 20)
        print_table(file, small, options)


def print_table(file: Path, small: Path | None, options: argparse.Namespace) -> None:
    """Measure rxlab and its peers on a file and print the table."""
    size = file.stat().st_size
    result = rxlab(file, 2, 7)
    samples, steady = result["samples"], min(result["again"])
    rows = {}
    for threads in (1, 2):
        rows[f"rxlab, {threads} thread(s)"] = run(
            [sys.executable, "-c", READ, str(file), str(threads), "0"], options.runs
        )
    rows["rxlab, 2 threads, every column summed"] = run(
        [sys.executable, "-c", READ, str(file), "2", "0", "sum"], options.runs
    )
    factor = samples / rxlab(small, 2, 0)["samples"] if small else 1.0
    rows |= peers(file, small, factor, options)
    own = rows["rxlab, 2 thread(s)"]
    print(f"{samples} samples, {size / 1e6:.0f} MB, columns {result['columns'] / 1e6:.0f} MB\n")
    print(
        f"{'whole process':40} {'wall s':>8} {'CPU s':>8} {'M samples/s':>12} {'wall / rxlab':>13} {'CPU / rxlab':>12}"
    )
    for name, (wall, cpu) in rows.items():
        print(
            f"{name:40} {wall:8.3f} {cpu:8.3f} {samples / wall / 1e6:12.2f} {wall / own[0]:13.2f} {cpu / own[1]:12.2f}"
        )
    if small is not None:
        wall, cpu = first_call(small)
        print(
            f"\n* scaled from {samples / factor:.0f} samples, which also are the first call ever: {wall:.1f} s, {cpu:.1f} s of CPU"
        )
    limit = read_limit(file)
    print(
        f"\nin a running kernel, 2 threads: {steady:.3f} s, {samples / steady / 1e6:.1f} M samples/s, {size / steady / 1e6:.0f} MB/s"
    )
    print(f"read() of the file into 4 MiB: {limit:.3f} s; ratio {steady / limit:.1f}")
    print(
        f"anonymous memory after load: {result['anon'] / 1e6:.0f} MB, {result['anon'] / result['columns']:.2f} times the columns"
    )
    chunked = json.loads(
        subprocess.run([sys.executable, "-c", CHUNKS, str(file)], capture_output=True, check=True, text=True).stdout
    )
    print(f"anonymous memory with chunks of 500,000 samples, the whole process: {chunked['anon'] / 1e6:.0f} MB")
    if not options.no_script:
        print("\n".join(compare_sums(file, result["sums"], result["duplicates"])))


if __name__ == "__main__":
    main()
