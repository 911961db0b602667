"""A sweep on a Dask cluster of real processes: two workers, two testbeds, one of them killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import xarray as xr

from rxlab.dataset.run import open_run
from rxlab.dataset.schema import VERDICTS
from rxlab.dataset.sweepstore import aggregate_sweep
from rxlab.host.journalfile import default_journal_dir
from rxlab.rundir import RUN_JSON, list_runs

SPEC = """
title = "RPS on two machines"
repetitions = 2
warm_up = 0
idle = "spin"
[settings]
rps_sock_flow_entries = 4096
[axes.rps]
off = { rps_cpus = "off" }
on = { rps_cpus = "1" }
[workload]
messages = 300
app_cpu = 1
client_cpu = 0
"""
FLOW_ENTRIES = Path("/proc/sys/net/core/rps_sock_flow_entries")
DEADLINE = 240.0


def end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def cluster(folder: Path, workers: int = 2) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """A scheduler and workers as docs/cluster.md starts them, each a process of its own, on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    dask = [str(Path(sys.executable).with_name("dask"))]
    environment = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__WORK_STEALING": "False"}
    options = [
        "--no-dashboard",
        "--nthreads",
        "1",
        "--no-nanny",
        "--death-timeout",
        "60",
        "--local-directory",
        str(folder),
    ]
    with ExitStack() as stack:

        def start(*argv: str) -> subprocess.Popen[str]:
            log = stack.enter_context(open(folder / f"{len(started)}.log", "w"))
            process = subprocess.Popen(argv, stdout=log, stderr=log, text=True, env=environment, start_new_session=True)
            started.append(process)
            return process

        started: list[subprocess.Popen[str]] = []
        stack.callback(lambda: [end(process) for process in reversed(started)])
        start(*dask, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
        nic = [start(*dask, "worker", address, *options, "--resources", "NIC=1") for _ in range(workers)]
        yield address, nic


def namespaces() -> set[str]:
    return {entry.name for entry in Path("/run/netns").glob("rxlab-*")}


def finished(out: Path) -> list[str]:
    runs = {path.parent.name: json.loads(path.read_text())["status"] for path in out.glob(f"c*/{RUN_JSON}")}
    return [name for name, status in runs.items() if status == "complete"]


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_worker_killed_in_the_middle_costs_nothing(tmp_path: Path) -> None:
    spec, out = tmp_path / "two.toml", tmp_path / "out"
    spec.write_text(SPEC)
    before = FLOW_ENTRIES.read_text()
    names = namespaces()
    with cluster(tmp_path) as (address, workers):
        argv = [sys.executable, "-m", "rxlab", "sweep", str(spec), "--testbed", "--out", str(out)]
        argv += ["--scheduler", address, "--allow-system-changes"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sweep:
            wait_until(lambda: finished(out) or sweep.poll() is not None, "the first run")
            assert sweep.poll() is None, sweep.stderr and sweep.stderr.read()
            assert FLOW_ENTRIES.read_text().strip() == "4096", "held for the whole sweep"
            os.kill(workers[0].pid, signal.SIGKILL)
            said, complaints = sweep.communicate(timeout=DEADLINE)
        assert sweep.returncode == 0, complaints
        assert len(finished(out)) == 8, said
    # Both testbeds are clean and the knob is back.
    wait_until(lambda: namespaces() == names, "namespaces left behind")
    assert FLOW_ENTRIES.read_text() == before
    wait_until(lambda: not list(default_journal_dir().glob("*.journal")), "a journal is left")

    # The same as one process makes of the same runs, bit by bit.
    alone = aggregate_sweep(out, tmp_path / "alone.zarr", say=lambda text: None)
    with xr.open_zarr(out / "sweep.zarr") as many, xr.open_zarr(alone) as one:
        assert many.latency.dims == ("rps", "repetition", "arm", "hop", "quantile")
        assert dict(many.sizes) == dict(one.sizes)
        for name in one.variables:
            np.testing.assert_array_equal(many[name].values, one[name].values, err_msg=str(name))
        assert (many["count"].sel(hop="round_trip_latency").sum("bucket") == 300).all()
        verdicts = many.verdict.sel(arm="std").values.ravel().tolist()
    # Two machines' worth of recordings on one: perf may have been blind for a moment, and the run then says so. None is wrong.
    # (The host's counters count both testbeds, so they say nothing of one.)
    traced = [open_run(run.path) for run in list_runs(out) if run.run["arm"] == "std"]
    results = [run.verify() for run in traced]
    assert len(results) == len(verdicts) == 4
    assert all(result["misjoined"] == 0 and result["checked"] >= 250 for result in results), results
    assert sorted(verdicts) == sorted(VERDICTS.index(run.joined.verdict) for run in traced)


def test_without_a_worker_that_may_record_it_is_one_line(tmp_path: Path) -> None:
    spec = tmp_path / "two.toml"
    spec.write_text(SPEC)
    argv = [sys.executable, "-m", "rxlab", "sweep", str(spec), "--testbed", "--out", str(tmp_path / "out")]
    with cluster(tmp_path, workers=0) as (address, _):
        done = subprocess.run([*argv, "--scheduler", address], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "NIC=1" in done.stderr
    assert not (tmp_path / "out").exists()
