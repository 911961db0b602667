"""The join, from columns to rows, of recordings laid end to end: a TCP request/response run and a UDP reader that polls.

A million and five million events, and twenty with ``LARGE=1``; whole, and in slabs of a million, which bound memory. What
laying the recording costs is not counted.
"""

from __future__ import annotations

import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pyperf
from laid import laid_end_to_end

from rxlab.dataset.run import clock_of, machine_of, open_run
from rxlab.follow.join import join
from rxlab.follow.slabs import join_in_slabs

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from tests.simulate import simulate  # noqa: E402
from tests.slab_builder import slabs_of  # noqa: E402

SIZES = (1, 5, 20) if os.environ.get("LARGE") else (1, 5)
MILLION = 1_000_000


def tcp() -> tuple[Any, Any, Any, Any]:
    """Return events, packets, clock and machine of a recorded TCP run."""
    run = open_run(REPO / "data" / "tcp-rps-off")
    events = {name: run.perf.events[name] for name in run.perf.events}
    return events, run.packets, clock_of(run.rundir), machine_of(run.run, run.host)


def udp() -> tuple[Any, Any, Any, Any]:
    """Return the same of a simulated reader that asks again and again, and is told EAGAIN."""
    world = simulate(proto="udp", polling=True, n=3_000, mean_gap_ns=8_000)
    return world.events, world.packets, world.clock, world.machine


@cache
def laid(kind: str, millions: int) -> tuple[Any, Any, Any, Any]:
    """Return a recording of so many events."""
    events, packets, clock, machine = {"TCP": tcp, "polled UDP": udp}[kind]()
    return *laid_end_to_end(events, packets, millions * MILLION), clock, machine


def join_whole(loops: int, kind: str, millions: int, threads: int) -> float:
    """Join at once; return CPU seconds of one thread, for the machine may be shared, and what two take by the wall clock."""
    recorded = laid(kind, millions)
    now = time.process_time if threads == 1 else time.perf_counter
    begin = now()
    for _ in range(loops):
        join(*recorded, threads=threads)
    return now() - begin


def join_slabs(loops: int, kind: str, millions: int) -> float:
    """Join in slabs of a million events."""
    events, packets, clock, machine = laid(kind, millions)
    spent = 0.0
    for _ in range(loops):
        recording = slabs_of(events, packets, machine, millions, piece=MILLION)
        begin = time.process_time()
        join_in_slabs(recording, clock, machine)
        spent += time.process_time() - begin
    return spent


def main() -> None:
    """Run the benchmarks."""
    runner = pyperf.Runner()
    # A worker is told the number of its benchmark: it must count them as its manager does.
    args = runner.parse_args()
    args.inherit_environ = [*(args.inherit_environ or ()), "LARGE"]
    for kind in ("TCP", "polled UDP"):
        for millions in SIZES:
            name = f"join: {kind}, {millions} million events"
            runner.bench_time_func(f"{name}, CPU", join_whole, kind, millions, 1)
            runner.bench_time_func(f"{name}, two threads", join_whole, kind, millions, 2)
            runner.bench_time_func(f"{name}, CPU, in slabs", join_slabs, kind, millions)


if __name__ == "__main__":
    main()
