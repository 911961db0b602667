"""What both mutation fuzzers share: numbered cases in child processes, each held to its limits of time and memory.

Each run works in a child: a crash ends the child, is counted with its case, and the next child goes on. Time is the
processor's: on a busy machine the clock on the wall says nothing about the reader.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

LIMIT_SECONDS, LIMIT_MIB = 1.0, 300
TIMEOUT_SECONDS = 60
# Cases per child: not longer than this at a time, so that a hang is found.
BATCH = 2000


class Target(NamedTuple):
    """A reader under test.

    Attributes
    ----------
    script : str
        The file that calls :func:`run`, for the children.
    seeds : callable
        Returns the files to damage.
    mutate : callable
        (seeds, case) -> the damaged file of one case, the same in every run.
    read : callable
        (path, case) -> what became of it in a word; ``WRONG: ...`` where it broke a promise.
    """

    script: str
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[list[bytes], int], bytes]
    read: Callable[[Path, int], str]


def corpus_seeds(kind: str, limit: int) -> list[bytes]:
    """Return the files of one folder of the corpus up to `limit` bytes; none without a corpus."""
    folder = Path(os.environ.get("RXLAB_CORPUS") or TESTS.parents[1] / "shared" / "corpus") / kind
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size <= limit)
    return [path.read_bytes() for path in paths]


def peak_mib() -> float:
    """Return the most memory the process held since the last reset, and reset it."""
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def judge(target: Target, path: Path, case: int) -> str:
    """Read one file; whatever is not a result or an RxlabError of one line is wrong."""
    try:
        return target.read(path, case)
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"


def work(target: Target, first: int, last: int, keep: Path) -> int:
    """Run cases and print each finding; the case under way is in ``keep/case``, its file in ``keep/mutated``."""
    seeds, path = target.seeds(), keep / "mutated"
    for seed in seeds:  # compile and warm up outside the limits
        path.write_bytes(seed)
        judge(target, path, 0)
    outcomes: Counter[str] = Counter()
    slowest, largest = 0.0, 0.0
    base = float(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
    peak_mib()
    for case in range(first, last):
        (keep / "case").write_text(str(case))
        path.write_bytes(target.mutate(seeds, case))
        begin = time.process_time()
        outcome = judge(target, path, case)
        seconds, mib = time.process_time() - begin, peak_mib() - base
        slowest, largest = max(slowest, seconds), max(largest, mib)
        if outcome.startswith("WRONG") or seconds > LIMIT_SECONDS or mib > LIMIT_MIB:
            print(f"case {case}: {outcome}, {seconds:.2f} s, {mib:.0f} MiB", flush=True)
            outcome = "WRONG"
        outcomes[outcome] += 1
    told = ", ".join(f"{outcomes[name]} {name}" for name in sorted(outcomes))
    print(
        f"cases {first} to {last - 1} from {len(seeds)} seeds: {told}; slowest {slowest:.3f} s of CPU, "
        f"largest {largest:.0f} MiB above rest"
    )
    return 1 if outcomes["WRONG"] else 0


def run(target: Target, doc: str) -> int:
    """Run the cases of the command line in child processes; return 1 when any was wrong."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("cases", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the file of the case under way")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(target, options.first, options.first + options.cases, options.keep)
    with tempfile.TemporaryDirectory() as scratch:
        keep = options.keep or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)
        first, last, status = options.first, options.first + options.cases, 0
        while first < last:
            batch = min(BATCH, last - first)
            command = [sys.executable, target.script, str(batch), "--first", str(first), "--keep", str(keep)]
            child = subprocess.Popen([*command, "--worker"])
            try:
                code = child.wait(TIMEOUT_SECONDS + batch)
            except subprocess.TimeoutExpired:
                child.kill()
                code = child.wait()
            first += batch
            if code not in (0, 1):
                at = int((keep / "case").read_text())
                print(f"case {at}: the child ended with {code}", flush=True)
                first = at + 1
            status |= int(code != 0)
    return status
