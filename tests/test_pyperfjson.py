"""pyperf as a workload: a real pyperf script, judged by what the script itself noted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyperf
import pytest

from rxlab.dataset import store
from rxlab.dataset.aggregate import combine
from rxlab.errors import FormatError
from rxlab.read.pyperfjson import read_pyperf
from rxlab.record.testbed import Endpoint
from rxlab.record.workload import Command, open_traffic
from rxlab.rundir import PYPERF_JSON, RUN_JSON, open_rundir, write_json
from tests.joined_builder import make_host, make_run

LOOPBACK = Endpoint(None, "lo", "127.0.0.1", "::1")
LOOPS = 4
SCRIPT = """
import os, socket, time
import pyperf

def connect(loops):
    started = time.perf_counter()
    for _ in range(loops):
        socket.create_server((os.environ["RXLAB_SERVER_ADDRESS"], 0)).close()
    took = time.perf_counter() - started
    with open({notes!r}, "a") as notes:
        print(took, file=notes)
    return took

pyperf.Runner(processes=2, values=3, warmups=0, loops={loops}).bench_time_func("open a socket", connect)
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder after a pyperf script was its workload, and the seconds of each of the script's calls."""
    folder = tmp_path_factory.mktemp("run")
    notes, script = folder / "notes", folder / "bench.py"
    script.write_text(SCRIPT.format(notes=str(notes), loops=LOOPS))
    traffic = open_traffic(Command([sys.executable, str(script)], pyperf=True), LOOPBACK, LOOPBACK, folder)
    traffic.prepare()
    traffic.go()
    assert traffic.wait(60)
    assert traffic.finish()["client_exit_code"] == 0, (folder / "command.log").read_text()
    return folder, np.loadtxt(notes)


def test_its_values_are_those_the_script_saw(measured: tuple[Path, np.ndarray]) -> None:
    folder, seconds = measured
    columns = read_pyperf(folder / PYPERF_JSON)
    assert columns.n == 6
    np.testing.assert_allclose(np.sort(columns["value"]), np.sort(seconds) / LOOPS * 1e9, rtol=1e-12)
    assert columns.attrs["categories"]["benchmark"] == ["open a socket"]
    assert (folder / PYPERF_JSON).stat().st_mode & 0o777 == 0o600


def test_they_become_a_variable_of_the_run_and_a_hop_of_the_sweep(measured: tuple[Path, np.ndarray]) -> None:
    folder, seconds = measured
    write_json(folder / RUN_JSON, make_run() | {"arm": "untraced"})
    logs = store.read_app_logs(open_rundir(folder))
    tree = store.build(None, run=make_run() | {"arm": "untraced"}, host=make_host(), app_latency=logs)
    app = tree["app"].to_dataset()
    assert app["benchmark_time"].attrs["units"] == "ns"
    assert set(app["benchmark"].values.tolist()) == {"open a socket"}
    hop = combine([tree]).sel(hop="benchmark_time").isel(repetition=0, arm=0)
    assert int(hop["count"].sum()) == 6
    low, high = np.sort(seconds)[[1, 4]] / LOOPS * 1e9
    assert low <= float(hop["latency"].sel(quantile=0.5)) <= high


def test_benchmarks_of_other_units_are_no_latency(tmp_path: Path) -> None:
    bytes_used = pyperf.Benchmark(
        [pyperf.Run([5.0], metadata={"name": "memory", "unit": "byte"}, collect_metadata=False)]
    )
    path = tmp_path / "suite.json"
    pyperf.BenchmarkSuite([bytes_used]).dump(str(path))
    assert read_pyperf(path).n == 0


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": "9"}', '{"version": "1.0", "benchmarks": [{}]}'])
def test_what_pyperf_cannot_read_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(FormatError, match="not a pyperf file"):
        read_pyperf(path)
