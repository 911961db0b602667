"""A run of ten million packets: the table of quantiles and the report, their time and memory.

    python tests/bench/scale_report.py [--packets 10000000] [--folder /tmp]

Makes a dataset of synthetic packets with 14 stages (tests/joined_builder.py; itself takes some 8 GB), deletes it afterwards, and reads it in two processes of their own, one per task: wall and processor time, start and imports included, and
the largest resident size the kernel saw. The limits are 60 s and 2 GB for both tasks together, on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def make_dataset(path: Path, n: int) -> None:
    """Write a run's dataset of `n` packets."""
    from joined_builder import make_app_logs, make_counters, make_host, make_joined, make_run

    from rxlab.dataset import store

    latency = np.random.default_rng(0).lognormal(10, 0.3, min(n, 1_000_000))
    tree = store.build(
        make_joined(n, path_kind="napi"),
        run=make_run(),
        host=make_host(),
        counters=make_counters(),
        app_latency=make_app_logs(latency),
    )
    store.save(tree, path)


def table(path: Path) -> None:
    """Print the table of quantiles."""
    from rxlab.dataset import stats
    from rxlab.dataset.store import open_dataset

    found = stats.quantile_table(open_dataset(path))
    print((found["latency"].sel(hop=["tcp_rcv", "switch_in", "total_latency"]) / 1e3).to_pandas().round(2))


def report(path: Path) -> None:
    """Write the report."""
    from joined_builder import make_host, make_run
    from report_builder import VERIFIED

    from rxlab.dataset.store import open_dataset
    from rxlab.show.report import write_report
    from rxlab.show.trust import AnalysedRun

    run = AnalysedRun(make_run(), make_host(), open_dataset(path), VERIFIED, path.parent)
    print(f"{write_report([run], path.with_suffix('.html')).stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Make the dataset, run both tasks, print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packets", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=("table", "report"), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make_dataset(given.path, given.packets)
        return
    if given.task:
        {"table": table, "report": report}[given.task](given.path)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / "run.nc"
        # A process of its own: its memory is not the report's.
        making = [sys.executable, __file__, "--make", "--packets", str(given.packets), "--path", str(path)]
        subprocess.run(making, check=True)
        print(
            f"{given.packets:,} packets, {path.stat().st_size / 1e9:.2f} GB, load {os.getloadavg()[0]:.1f}", flush=True
        )
        for task in ("table", "report"):
            start = time.monotonic()
            process = subprocess.Popen([sys.executable, __file__, "--task", task, "--path", str(path)])
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            wall, spent = time.monotonic() - start, used.ru_utime + used.ru_stime
            memory = used.ru_maxrss / 1e6
            print(
                f"{task}: status {process.returncode}, {wall:.1f} s, {spent:.1f} s of CPU, {memory:.2f} GB", flush=True
            )


if __name__ == "__main__":
    main()
