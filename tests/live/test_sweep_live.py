"""A real sweep on the testbed: the dataset against the runs' own files, and the resume after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from rxlab.host.settings import parse_settings
from rxlab.record.testbed import Testbed
from rxlab.rundir import CLIENT_LOG_FIELDS, RUN_JSON

SPEC = """
title = "RPS x CPU of the reader"
repetitions = 1
warm_up = 0
idle = "spin"
[axes.rps]
off = { rps_cpus = "off" }
on = { rps_cpus = "same-core" }
[workload]
messages = 200
app_cpu = [0, 1]
client_cpu = 0
"""
KILL_AFTER = 3  # runs
DEADLINE = 90.0


def rxlab(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rxlab", "sweep", *arguments]


def stamps(folder: Path) -> dict[str, int]:
    """Return when each complete run was recorded, by name."""
    found = {}
    for path in sorted(folder.glob(f"c*/{RUN_JSON}")):
        run = json.loads(path.read_text())
        if run["status"] == "complete":
            found[path.parent.name] = int(run["start_ns"])
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], str]:
    """A sweep that was killed after some runs and taken up again: its folder, the runs before the kill, what was said."""
    folder = tmp_path_factory.mktemp("sweep")
    spec = folder / "small.toml"
    spec.write_text(SPEC)
    out = folder / "out"
    command = rxlab(str(spec), "--testbed", "--out", str(out))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as victim:
        deadline = time.monotonic() + DEADLINE
        while len(stamps(out)) < KILL_AFTER and victim.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(victim.pid, signal.SIGKILL)
    before = stamps(out)
    assert KILL_AFTER <= len(before) < 8
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--resume" in refused.stderr
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    return out, before, resumed.stdout


def test_resume_records_only_what_is_missing(swept: tuple[Path, dict[str, int], str]) -> None:
    out, before, said = swept
    after = stamps(out)
    assert len(after) == 8
    assert {name: after[name] for name in before} == before
    assert said.count("there already") == len(before)


def test_the_dataset_has_the_dimensions_that_varied_and_opens_in_plain_xarray(
    swept: tuple[Path, dict[str, int], str],
) -> None:
    # A fresh interpreter that never heard of rxlab.
    code = (
        "import sys, json, xarray as xr; d = xr.open_zarr(sys.argv[1]); assert 'rxlab' not in sys.modules;"
        "print(json.dumps({'dims': d.latency.dims, 'sizes': dict(d.sizes), 'rps': d.rps.values.tolist(),"
        "'cpu': d.app_cpu.values.tolist(), 'arm': d.arm.values.tolist(), 'messages': int(d.messages)}))"
    )
    store = str(swept[0] / "sweep.zarr")
    shown = subprocess.run([sys.executable, "-c", code, store], capture_output=True, text=True, check=False, cwd="/")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["dims"] == ["rps", "app_cpu", "repetition", "arm", "hop", "quantile"]
    assert {name: found["sizes"][name] for name in found["dims"][:4]} == {
        "rps": 2,
        "app_cpu": 2,
        "repetition": 1,
        "arm": 2,
    }
    assert (found["rps"], found["cpu"], found["arm"]) == (["off", "on"], [0, 1], ["untraced", "std"])
    assert found["messages"] == 200


def test_latencies_equal_those_of_the_runs_own_files(swept: tuple[Path, dict[str, int], str]) -> None:
    out = swept[0]
    with xr.open_zarr(out / "sweep.zarr") as lazy:
        sweep = lazy.load()
    for path in sorted(out.glob("c*")):
        run = json.loads((path / RUN_JSON).read_text())
        labels = run["sweep"]["labels"]
        assert labels["app_cpu"] == run["workload"]["server_cpu"]
        cell = sweep.sel(labels, drop=True).isel(repetition=0).sel(arm=run["arm"])
        # The client's log, read as bytes: reply minus intended send time.
        log = np.fromfile(path / "client.log", np.dtype(list(CLIENT_LOG_FIELDS)))
        check_quantiles(cell, "round_trip_latency", (log["replied"] - log["intended"])[log["replied"] > 0])
        if run["arm"] == "std":
            with xr.open_dataset(path / "run.nc", group="packets", engine="h5netcdf") as packets:
                complete = packets.status.attrs["flag_meanings"].split().index("complete")
                usable = (packets.status == packets.status.attrs["flag_values"][complete]) & (packets.is_data != 0)
                seen = packets.time.values[usable.values]
                stages = packets.stage.values.tolist()
            first = np.fmin.reduce(seen, axis=1)  # fmin passes over NaT: not every stage is on every path
            check_quantiles(cell, "total_latency", (seen[:, stages.index("recvmsg")] - first).astype(np.int64))


def check_quantiles(cell: xr.Dataset, hop: str, values: np.ndarray) -> None:
    """Compare with NumPy's own quantile; the histogram must hold every value and be within its 1 %."""
    for level in cell["quantile"].values:
        expected = float(np.quantile(values, level, method="median_unbiased"))
        assert float(cell.latency.sel(hop=hop, quantile=level)) == pytest.approx(expected, rel=1e-12)
    counts = cell["count"].sel(hop=hop)
    assert int(counts.sum()) == len(values)
    median = float(cell.bucket[int(np.searchsorted(counts.cumsum("bucket").values, np.ceil(len(values) / 2)))])
    assert median == pytest.approx(float(np.quantile(values, 0.5, method="inverted_cdf")), rel=0.011)


def test_counters_show_rps_at_work(swept: tuple[Path, dict[str, int], str]) -> None:
    with xr.open_zarr(swept[0] / "sweep.zarr") as lazy:
        sweep = lazy.load()
    steered = sweep.softnet.sel(softnet_field="received_rps").sum("cpu").isel(repetition=0)
    # The client sends from CPU 0: with RPS every message crosses to the reader on CPU 1, and none without.
    assert (steered.sel(rps="on", app_cpu=1) >= 200).all()
    assert (steered.sel(rps="off") < 20).all()
    assert (sweep.verdict.sel(arm="untraced") == 1).all()
    assert (sweep.verdict.sel(arm="std") == 2).all(), "every traced run is trusted"
    assert (sweep.packets >= 200).all()


def test_nothing_of_the_sweep_is_left(swept: tuple[Path, dict[str, int], str]) -> None:
    left = [entry.name for entry in swept[0].iterdir() if entry.name.startswith(".")]
    assert left == []


def test_settings_that_a_namespace_does_not_show_can_be_swept(testbed: Testbed) -> None:
    # rps_sock_flow_entries is the whole host's: /proc/sys/net/core of the testbed's namespace lacks it.
    wanted = {"rps_sock_flow_entries": 1024, "rps_flow_cnt": 1024}
    found = {setting.key: setting.netns for setting in parse_settings(wanted, testbed.dst.iface, testbed.dst.netns)}
    assert found == {"rps_sock_flow_entries": None, "rps_flow_cnt": testbed.dst.netns}
