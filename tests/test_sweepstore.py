"""A folder of runs as one Zarr store: each run in its place, counters from its own counters.json, readable everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from rxlab.dataset import aggregate
from rxlab.dataset.run import open_run
from rxlab.dataset.schema import VERDICTS
from rxlab.dataset.sweepstore import aggregate_sweep, create_store, grid_of, recorded_runs, write_run
from rxlab.errors import FormatError
from rxlab.rundir import CLIENT_LOG_FIELDS, read_json, write_json

DATA = Path(__file__).resolve().parent.parent / "data"
LABELS = [{"rps": rps, "load": load} for rps in ("off", "on") for load in (1000, 4000)]
CONFIGURATIONS = [
    {"rps_cpus": {"off": "off", "on": "1"}[entry["rps"]], "load": entry["load"], "gro": "off"} for entry in LABELS
]


def add_run(folder: Path, index: int, repetition: int, source: str, **changes: Any) -> Path:
    """Copy a recorded run of data/ into a sweep, as the run of one cell."""
    arm = "untraced" if "untraced" in source else "std"
    path = folder / f"c{index:02d}-r{repetition:02d}-{arm}"
    shutil.copytree(DATA / source, path)
    run = read_json(path / "run.json")
    cell = {"cell": path.name, "repetition": repetition, "labels": LABELS[index]}
    write_json(path / "run.json", {**run, "configuration": CONFIGURATIONS[index], "sweep": cell, **changes})
    return path


def write_plan(folder: Path, **changes: Any) -> Mapping[str, Any]:
    folder.mkdir(exist_ok=True)
    plan = {
        "configurations": CONFIGURATIONS,
        "labels": LABELS,
        "arms": ["untraced", "std"],
        "seed": 3,
        "order": "shuffled",
    }
    write_json(folder / "sweep.json", {**plan, "repetitions": 2, "repeated": [], **changes})
    return read_json(folder / "sweep.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four configurations of which the last one and some repetitions were not recorded."""
    folder = tmp_path_factory.mktemp("sweep")
    write_plan(folder)
    for index, repetition, source in (
        (0, 0, "tcp-rps-off-untraced-1"),
        (0, 1, "tcp-rps-off-untraced-2"),
        (1, 0, "tcp-rps-off-untraced-3"),
        (2, 0, "tcp-rps-on-untraced-1"),
        (0, 0, "tcp-rps-off"),
        (2, 1, "tcp-rps-on"),
    ):
        add_run(folder, index, repetition, source)
    add_run(folder, 3, 0, "tcp-rps-on-untraced-2", status="failed")
    aggregate_sweep(folder, say=lambda text: None)
    return folder


@pytest.fixture(scope="module")
def sweep(folder: Path) -> xr.Dataset:
    with xr.open_zarr(folder / "sweep.zarr") as lazy:
        return lazy.load()


def test_dimensions_are_what_varied(sweep: xr.Dataset) -> None:
    assert sweep.latency.dims == ("rps", "load", "repetition", "arm", "hop", "quantile")
    assert sweep.rps.values.tolist() == ["off", "on"]
    assert sweep["load"].values.tolist() == [1000, 4000]
    assert sweep["load"].dtype.kind == "i", "numbers are numbers, so that a plot has a scale"
    assert sweep.rps_cpus.dims == ("rps",)
    assert sweep.rps_cpus.values.tolist() == ["off", "1"], "what the label stands for"
    assert (sweep.gro.ndim, str(sweep.gro.values), str(sweep.proto.values)) == (0, "off", "tcp")
    assert "messages" not in sweep.coords, "the traced runs had fewer"


def test_each_run_is_in_its_place(sweep: xr.Dataset) -> None:
    names = np.array(VERDICTS)[sweep.verdict.sel(load=1000).values]
    assert names.tolist() == [
        [["untraced", "trusted"], ["untraced", "absent"]],
        [["untraced", "absent"], ["absent", "trusted"]],
    ]
    assert np.array(VERDICTS)[sweep.verdict.sel(rps="on", load=4000).values].tolist() == [["absent"] * 2] * 2
    missing = sweep.latency.sel(hop="round_trip_latency", quantile=0.5).isnull()
    np.testing.assert_array_equal(missing, sweep.verdict == 0)


def test_round_trips_are_those_of_the_clients_log(folder: Path, sweep: xr.Dataset) -> None:
    for path in folder.glob("c*-untraced"):
        run = json.loads((path / "run.json").read_text())
        if run["status"] == "failed":
            continue
        log = np.fromfile(path / "client.log", np.dtype(list(CLIENT_LOG_FIELDS)))
        trips = (log["replied"] - log["intended"])[log["replied"] > 0]
        cell = sweep.sel(run["sweep"]["labels"]).isel(repetition=run["sweep"]["repetition"]).sel(arm="untraced")
        for level in sweep["quantile"].values:
            found = float(cell.latency.sel(hop="round_trip_latency", quantile=level))
            assert found == pytest.approx(np.quantile(trips, level, method="median_unbiased"), rel=1e-12)
        assert int(cell["count"].sel(hop="round_trip_latency").sum()) == len(trips)


def test_the_cost_of_a_packet_is_that_of_the_counters(folder: Path, sweep: xr.Dataset) -> None:
    difference = json.loads((folder / "c02-r01-std" / "counters.json").read_text())["difference"]
    cell = sweep.sel(rps="on", load=1000, arm="std").isel(repetition=1)
    packets = difference["nstat"]["IpInReceives"] + difference["nstat"]["Ip6InReceives"]
    assert float(cell.packets) == packets
    assert float(cell.call_ipis_per_packet) == sum(difference["interrupts"]["CAL"]["cpus"]) / packets
    assert float(cell.reschedule_ipis_per_packet) == sum(difference["interrupts"]["RES"]["cpus"]) / packets
    for row in difference["cpu_time_ns"]:
        assert float(cell.cpu_time_per_packet.sel(cpu=row["cpu"], cpu_mode="system")) == row["system"] / packets
    for row in difference["softnet_stat"]:
        assert int(cell.softnet.sel(cpu=row["cpu"], softnet_field="received_rps")) == row["received_rps"]
    assert np.isnan(cell.softirqs_per_hardirq), "a veth has no interrupt"
    assert "interrupts" not in sweep
    assert 0 < float(cell.wakeups_per_packet) <= 1.01
    assert np.isnan(sweep.wakeups_per_packet.sel(arm="untraced")).all()


def test_the_store_and_the_same_runs_combined_in_memory_are_equal(folder: Path, sweep: xr.Dataset) -> None:
    names = ("c00-r00-std", "c02-r01-std")
    combined = aggregate.combine([open_run(folder / name).tree for name in names])
    for rps_cpus, rps, repetition in (("off", "off", 0), ("1", "on", 1)):
        ours = sweep.sel(rps=rps, load=1000, arm="std").isel(repetition=repetition)
        theirs = combined.sel(rps_cpus=rps_cpus, arm="std").isel(repetition=0)
        for name in theirs.data_vars:
            np.testing.assert_array_equal(ours[name].values, theirs[name].values, err_msg=str(name))


def test_runs_can_be_written_in_any_order(folder: Path, sweep: xr.Dataset, tmp_path: Path) -> None:
    plan, runs = read_json(folder / "sweep.json"), recorded_runs(folder, 2)[0]
    grid = grid_of(plan, runs)
    create_store(tmp_path / "other.zarr", grid, plan)
    for run in reversed(runs):
        write_run(tmp_path / "other.zarr", grid, run, plan)
    with xr.open_zarr(tmp_path / "other.zarr") as other:
        xr.testing.assert_identical(other.load(), sweep)


def test_a_run_that_cannot_be_read_is_told_and_stays_absent(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sweep"
    write_plan(copy)
    add_run(copy, 0, 0, "tcp-rps-off-untraced-1")
    broken = add_run(copy, 1, 0, "tcp-rps-off-untraced-2")
    write_json(
        broken / "run.json",
        {**read_json(broken / "run.json"), "sweep": {"cell": "x", "repetition": 0, "labels": {"rps": "maybe"}}},
    )
    said: list[str] = []
    aggregate_sweep(copy, say=said.append)
    assert any("not a run of this sweep" in line for line in said)
    with xr.open_zarr(copy / "sweep.zarr") as found:
        assert int((found.verdict != 0).sum()) == 1


def test_the_store_is_replaced_whole_and_nothing_else_is_left(folder: Path) -> None:
    before = {entry.name for entry in folder.iterdir()}
    aggregate_sweep(folder, say=lambda text: None)
    assert {entry.name for entry in folder.iterdir()} == before


def test_a_sweep_without_named_axes_takes_the_settings_that_differ(tmp_path: Path) -> None:
    configurations = [{}, {"rps_cpus": "1"}]
    plan = write_plan(tmp_path, configurations=configurations, labels=[], repetitions=1, arms=["untraced"])
    for index, source in enumerate(("tcp-rps-off-untraced-1", "tcp-rps-on-untraced-1")):
        path = add_run(tmp_path, index, 0, source)
        cell = {"cell": path.name, "repetition": 0}
        write_json(
            path / "run.json", {**read_json(path / "run.json"), "configuration": configurations[index], "sweep": cell}
        )
    assert grid_of(plan, recorded_runs(tmp_path, 1)[0]).axes == {"rps_cpus": ["", "1"]}
    aggregate_sweep(tmp_path, say=lambda text: None)
    with xr.open_zarr(tmp_path / "sweep.zarr") as found:
        assert (found.verdict == 1).all()


def test_an_empty_folder_is_a_format_error(tmp_path: Path) -> None:
    write_plan(tmp_path)
    with pytest.raises(FormatError, match="no run of a sweep"):
        aggregate_sweep(tmp_path)
