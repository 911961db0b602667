"""Mutation fuzzer of the perf.data reader: each damaged file ends in a PerfData or an RxlabError, soon and in little memory.

    python tests/fuzz/fuzz_perfdata.py 20000                            # cases 0 to 19,999, the same in every run
    NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=/tmp/x python tests/fuzz/fuzz_perfdata.py 2000
    python tests/fuzz/fuzz_perfdata.py 1 --first 4711 --keep /tmp/case  # one case again, its file kept

Seeds are recordings built here and, where there is one, those of the corpus up to 64 KiB. Each run works in a child process:
a crash ends the child, is counted with its case, and the next child goes on.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perf_builder import SAMPLE_TYPE, Builder  # noqa: E402

INTERESTING = (0, 1, 7, 8, 9, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
LIMIT_SECONDS, LIMIT_MIB = 1.0, 300
TIMEOUT_SECONDS = 60


def built_seeds() -> list[bytes]:
    """Return recordings of every form."""
    import zstandard

    seeds = []
    for order in "<>":
        for sample_type, read_format, before in (
            (SAMPLE_TYPE, 0, ""),
            (SAMPLE_TYPE | 1 << 5, 0, "chain"),
            (SAMPLE_TYPE | 1 << 4, 12, "group"),
            (SAMPLE_TYPE & ~(1 << 16) | 1 << 6, 0, ""),
        ):
            builder = Builder(order, sample_type=sample_type, read_format=read_format)
            parts = {"": b"", "chain": builder.pack("3Q", 2, 1, 2), "group": builder.pack("Q4Q", 2, 5, 11, 6, 12)}
            for number in range(12):
                builder.sample(number, time=1000 * number, cpu=number % 3, before_raw=parts[before])
            builder.add(2, builder.pack("QQ", 12, 40) + builder.pack("iiQiiQ", 1, 2, 5_000, 1, 0, 12))
            builder.add(13, builder.pack("Q", 40) + builder.pack("iiQiiQ", 1, 2, 5_000, 1, 0, 12))
            builder.add(78, builder.pack("QQ", 2, 12) + b"my:name\0")
            seeds += [builder.file(), builder.pipe()]
    inner, outer = Builder(), Builder()
    for number in range(40):
        inner.sample(number, time=number)
    stream = zstandard.ZstdCompressor().compress(b"".join(inner.records))
    for at in range(0, len(stream), 96):
        part = stream[at : at + 96]
        outer.add(81, part)
        outer.records.append(outer.record(83, outer.pack("Q", len(part)) + part.ljust(96, b"\0")))
    return [*seeds, outer.file(), outer.pipe()]


def corpus_seeds() -> list[bytes]:
    """Return the corpus' small recordings; none without a corpus."""
    folder = (
        Path(os.environ.get("RXLAB_CORPUS") or Path(__file__).resolve().parents[3] / "shared" / "corpus") / "perfdata"
    )
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size <= 1 << 16)
    return [path.read_bytes() for path in paths]


def mutate(seeds: list[bytes], case: int) -> bytes:
    """Return the file of one case: a seed with one to eight damages."""
    rng = random.Random(case)
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        if not content:
            break
        # Half of the damage goes to the front, where sizes and offsets are.
        at = rng.randrange(min(len(content), 512) if rng.random() < 0.5 else len(content))
        kind = rng.randrange(7)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind in (1, 2):
            width = rng.choice((1, 2, 4, 8))
            at -= at % width
            value = rng.choice(INTERESTING) & (1 << 8 * width) - 1
            content[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 3:
            del content[at : at + rng.choice((1, 8, 64, 1000))]
        elif kind == 4:
            other = rng.choice(seeds)
            start = rng.randrange(len(other))
            content[at:at] = other[start : start + rng.choice((8, 64, 512))]
        elif kind == 5:
            content[at : at + 8] = rng.randbytes(8)
        elif rng.random() < 0.5:
            del content[rng.randrange(len(content)) :]
    return bytes(content)


def peak_mib() -> float:
    """Return the most memory the process held since the last reset, and reset it."""
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def read_all(path: Path) -> str:
    """Read a file in every way; return what became of it."""
    from rxlab.errors import RxlabError
    from rxlab.read.perfdata import inspect_perfdata, read_perfdata

    try:
        perf = read_perfdata(path)
        perf.load()
        if sum(columns.n for columns in perf.events.values()) != perf.meta["samples"]:
            return "WRONG: rows and samples differ"
        rows = sum(part.meta["samples"] for part in perf.iter_chunks(10))
        if rows != perf.meta["samples"]:
            return f"WRONG: {rows} samples in chunks, {perf.meta['samples']} in all"
        inspect_perfdata(path)
    except RxlabError as error:
        return type(error).__name__ if "\n" not in str(error) else "WRONG: an error of several lines"
    return "truncated" if perf.meta["truncated"] else "read"


def work(first: int, last: int, keep: Path) -> int:
    """Run cases; print each finding. The case under way is in ``keep/case``."""
    seeds = built_seeds() + corpus_seeds()
    path = keep / "perf.data"
    for seed in seeds:  # compile and warm up outside the limits
        path.write_bytes(seed)
        read_all(path)
    outcomes: Counter[str] = Counter()
    slowest, largest = 0.0, 0.0
    base = float(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
    peak_mib()
    for case in range(first, last):
        (keep / "case").write_text(str(case))
        path.write_bytes(mutate(seeds, case))
        begin = time.process_time()
        try:
            outcome = read_all(path)
        except Exception as error:
            outcome = f"WRONG: {type(error).__name__}: {error}"
        seconds, mib = time.process_time() - begin, peak_mib() - base
        slowest, largest = max(slowest, seconds), max(largest, mib)
        if outcome.startswith("WRONG") or seconds > LIMIT_SECONDS or mib > LIMIT_MIB:
            print(f"case {case}: {outcome}, {seconds:.2f} s, {mib:.0f} MiB", flush=True)
            outcome = "WRONG"
        outcomes[outcome] += 1
    print(
        f"cases {first} to {last - 1}: {dict(outcomes)}, slowest {slowest:.3f} s of CPU, largest {largest:.0f} MiB above rest"
    )
    return 1 if outcomes["WRONG"] else 0


def main() -> int:
    """Run the cases in child processes; return 1 when any was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the file of the case under way")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.first, options.first + options.cases, options.keep)
    with tempfile.TemporaryDirectory() as scratch:
        keep = options.keep or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)
        first, last, status = options.first, options.first + options.cases, 0
        while first < last:
            # Not longer than this at a time, so that a hang is found.
            batch = min(500, last - first)
            command = [sys.executable, __file__, str(batch), "--first", str(first), "--keep", str(keep), "--worker"]
            child = subprocess.Popen(command)
            try:
                code = child.wait(TIMEOUT_SECONDS + batch)
            except subprocess.TimeoutExpired:
                child.kill()
                code = child.wait()
            first += batch
            if code not in (0, 1):
                at = int((keep / "case").read_text())
                print(f"case {at}: the child ended with {code}")
                first = at + 1
            status |= int(code != 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
