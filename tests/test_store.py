"""The tree says what was planted, survives the disk exactly, and opens without rxlab."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
import xarray as xr
from joined_builder import NAT, OFFSET, STEPS, make_app_logs, make_counters, make_host, make_joined, make_run

from rxlab.dataset import schema, store
from rxlab.errors import FormatError, SchemaError
from rxlab.rundir import APP_LOG_STRUCT, CLIENT_LOG_STRUCT, MOVE_FIELDS, RunDir
from rxlab.stages import STAGE_INDEX, TOTALS


def _build(joined, **changes):
    given = {"run": make_run(), "host": make_host(), "counters": make_counters(), **changes}
    return store.build(joined, **given)


@pytest.mark.parametrize("path_kind", list(STEPS))
def test_steps_are_the_planted_ones_and_add_up(path_kind):
    joined = make_joined(300, path_kind=path_kind)
    hops = _build(joined)["hops"].to_dataset()
    latency = hops.latency
    for name in joined.order[1:]:
        np.testing.assert_array_equal(latency.sel(hop=name), joined.truth[:, STAGE_INDEX[name]])
    steps = latency.where(hops.hop_kind == "step", drop=True)
    np.testing.assert_array_equal(steps.sum("hop"), latency.sel(hop="total_latency"))
    np.testing.assert_array_equal(
        latency.sel(hop="total_latency"), joined.truth[:, [STAGE_INDEX[s] for s in joined.order[1:]]].sum(axis=1)
    )


@pytest.mark.parametrize("path_kind", list(STEPS))
def test_totals_are_end_minus_start_and_rps_latency_needs_rps(path_kind):
    joined = make_joined(50, path_kind=path_kind)
    latency = _build(joined)["hops"]["latency"]
    for name, end, start, _ in TOTALS:
        if start == "t0_stage" or STAGE_INDEX[start] == 0:
            continue
        if name == "rps_latency" and "rps" not in path_kind:
            assert latency.sel(hop=name).isnull().all()
        else:
            np.testing.assert_array_equal(
                latency.sel(hop=name), joined.time[:, STAGE_INDEX[end]] - joined.time[:, STAGE_INDEX[start]]
            )


def test_a_stage_not_seen_moves_its_time_to_the_next_step():
    joined = make_joined(10)
    joined.time[:, STAGE_INDEX["wakeup"]] = NAT
    hops = _build(joined)["hops"].to_dataset()
    assert hops.latency.sel(hop="wakeup").isnull().all()
    both = joined.truth[:, STAGE_INDEX["wakeup"]] + joined.truth[:, STAGE_INDEX["switch_in"]]
    np.testing.assert_array_equal(hops.latency.sel(hop="switch_in"), both)
    assert (hops.hop_from.sel(hop="switch_in") == STAGE_INDEX["waking"]).all()
    assert (hops.hop_from.sel(hop="wakeup") == -1).all()


def test_blocks_do_not_show(monkeypatch):
    joined = make_joined(100, lost_rows=[7, 63])
    whole = _build(joined)["hops"].to_dataset()
    monkeypatch.setattr(store, "BLOCK", 7)
    xr.testing.assert_identical(whole, _build(joined)["hops"].to_dataset())


def test_a_backward_hop_is_kept():
    joined = make_joined(5)
    joined.time[2, STAGE_INDEX["copy"]] -= 10**6
    latency = _build(joined)["hops"]["latency"]
    assert latency.sel(hop="copy")[2] < 0
    assert latency.sel(hop="recvmsg")[2] > 10**6


def test_saved_and_opened_is_the_same_to_the_nanosecond(tmp_path):
    joined = make_joined(500, lost_rows=[0, 499])
    tree = _build(joined, app_latency=make_app_logs(np.arange(1000.0, 1100.0)))
    path = store.save(tree, tmp_path / "run.nc")
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["run.nc"]
    with store.open_dataset(path) as opened:
        schema.validate(opened)
        for group in tree.children:
            xr.testing.assert_equal(tree[group].to_dataset().load(), opened[group].to_dataset().load())
        mono = opened["packets"]["time"].values.view(np.int64) - int(opened["clocks"]["axis_offset"])
        np.testing.assert_array_equal(np.where(joined.time == NAT, NAT, mono), joined.time)
        assert np.isnat(opened["packets"]["time"].values[joined.time == NAT]).all()
        pcap = opened["packets"]["pcap_time"].values.view(np.int64)
        np.testing.assert_array_equal(pcap, joined.packets["pcap_time"])


def test_columns_are_compressed_and_chunked_by_stage(tmp_path):
    path = store.save(_build(make_joined(5000)), tmp_path / "run.nc")
    with h5py.File(path) as file:
        time = file["packets/time"]
        assert time.compression == "gzip"
        assert time.chunks == (5000, 1)
    assert path.stat().st_size < 5000 * (14 * 8 + 21 * 8) / 2


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    tree = _build(make_joined(5))
    path = store.save(tree, tmp_path / "run.nc")
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(xr.DataTree, "to_netcdf", fail)
    with pytest.raises(OSError, match="No space"):
        store.save(tree, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.nc"]


def test_plain_xarray_shows_units_and_long_names(tmp_path):
    path = store.save(_build(make_joined(20), app_latency=make_app_logs(np.full(5, 9e3))), tmp_path / "run.nc")
    code = """
        import sys
        sys.modules["rxlab"] = None  # an environment without rxlab
        import xarray as xr
        tree = xr.open_datatree(sys.argv[1])
        for node in tree.subtree:
            for name, array in node.variables.items():
                assert array.attrs.get("long_name"), (node.path, name)
                if array.dtype.kind in "iuf":
                    assert array.attrs.get("units"), (node.path, name)
        latency = tree["hops"]["latency"].sel(hop="total_latency")
        print(latency.attrs["units"], latency.dtype, tree["packets"]["time"].dtype, tree["flows"]["label"].values[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ns", "float64", "datetime64[ns]", "10.0.0.1:40000>10.0.0.2:7000", "tcp"]


def test_locality_compares_the_stack_cpu_with_the_readers():
    joined = make_joined(4, cpus=(1, 2))
    joined.packets["reader_cpu"][:] = [1, 2, 3, -1]
    cpus = [{"cpu": c, "core": c // 2, "package": 0, "llc": c // 2, "node": 0} for c in range(4)]
    packets = _build(joined, host={**make_host(), "cpus": cpus})["packets"]
    assert packets["same_cpu"].values.tolist() == [1, 0, 0, -1]
    assert packets["same_core"].values.tolist() == [0, 0, 0, -1] or packets["same_core"].values.tolist() == [
        1,
        0,
        0,
        -1,
    ]
    assert packets["same_core"].values[1] == 0
    assert packets["same_node"].values.tolist() == [1, 1, 1, -1]


def test_locality_is_unknown_without_a_topology():
    packets = _build(make_joined(3), host={"hostname": "x"})["packets"]
    assert (packets["same_llc"] == -1).all()
    assert (packets["same_cpu"] == 0).all()


def test_coverage_counts_causes_and_adds_up():
    coverage = _build(make_joined(100, lost_rows=[1, 2, 3]))["coverage"].to_dataset()
    assert int(coverage.missing.sel(stage="recvmsg", cause="lost")) == 3
    assert float(coverage.fraction.sel(stage="recvmsg")) == pytest.approx(0.97)
    np.testing.assert_array_equal(coverage.expected, coverage.matched + coverage.missing.sum("cause"))
    assert int(coverage.packets.sum()) == 100
    assert np.isnan(coverage.fraction.sel(stage="rps_ipi"))


def test_flows_and_clock():
    tree = _build(make_joined(10))
    assert tree["flows"]["src"].values.tolist() == ["10.0.0.1", "fd00::1"]
    assert tree["flows"]["packets"].values.tolist() == [5, 5]
    clocks = tree["clocks"].to_dataset()
    assert int(clocks.axis_offset) == OFFSET
    assert float(clocks.residual.sel(quantile=0.5)) == 402
    assert float(clocks.bound) == 25
    assert str(clocks.stamp_position.values) == "bracket"


def test_counters_become_tables_and_missing_ones_are_absent():
    counters = _build(make_joined(3))["counters"].to_dataset()
    assert int(counters.softnet.sel(softnet_field="received_rps", cpu=1)) == 400
    assert int(counters.softirqs.sel(softirq="NET_RX").sum()) == 700
    assert int(counters.interrupts.sel(irq="ERR").sum()) == 0
    assert float(counters.cpu_time.sel(cpu_mode="softirq", cpu=0)) == 5e6
    few = _build(make_joined(3), counters={"difference": {"nstat": {"IpInReceives": 5}}})["counters"].to_dataset()
    assert set(few.data_vars) == {"nstat"}


def test_an_untraced_run_has_counters_and_app_only(tmp_path):
    logs = make_app_logs(np.array([10_000, 20_000, 30_000]))
    logs["server"]["sent"][1] = 0
    logs["client"]["replied"][2] = 0
    tree = _build(None, run=make_run(arm="untraced", perf=None), app_latency=logs)
    assert set(tree.children) == {"counters", "app"}
    np.testing.assert_array_equal(tree["app"]["one_way_latency"], [10_000, np.nan, 30_000])
    np.testing.assert_array_equal(tree["app"]["round_trip_latency"], [20_000, 40_000, np.nan])
    np.testing.assert_array_equal(tree["app"]["service_latency"], [19_700, 39_700, np.nan])
    with store.open_dataset(store.save(tree, tmp_path / "u.nc")) as opened:
        assert opened.attrs["arm"] == "untraced"


def test_another_hosts_clock_gives_no_one_way_latency():
    run = make_run(workload={"name": "pingpong", "remote": "ssh:generator"})
    app = _build(None, run=run, app_latency=make_app_logs(np.full(3, 1e4)))["app"]
    assert "one_way_latency" not in app.data_vars
    assert "round_trip_latency" in app.data_vars


def test_app_logs_are_read_whole_records_only(tmp_path):
    server = APP_LOG_STRUCT.pack(100, 200, 7, 50, 0, 42, 64, 1, 4000, 7000, 6, 2, 0)
    (tmp_path / "app.log").write_bytes(server + server[:30])
    (tmp_path / "client.log").write_bytes(CLIENT_LOG_STRUCT.pack(40, 50, 260, 7, 1, 64) * 2)
    logs = store.read_app_logs(RunDir(tmp_path, {}))
    assert len(logs["server"]) == 1
    assert (int(logs["server"]["t1"][0]), int(logs["server"]["seq"][0])) == (200, 7)
    assert logs["client"]["replied"].tolist() == [260, 260]
    assert store.read_app_logs(RunDir(tmp_path / "none", {})) == {}


def test_moves_of_a_reader_are_a_group_on_the_datasets_time_axis():
    joined = make_joined(40, path_kind="backlog_rps", cpus=(0, 1))
    driver = joined.time[:, STAGE_INDEX["driver_rx"]]
    tid = int(joined.packets["tid"][0])
    ordered = [(0, int(driver[0]) - 10, tid, 0), (0, int(driver[10]) - 10, tid, 1)]
    logs = make_app_logs(np.full(5, 9e3)) | {"moves": np.array(ordered, np.dtype(list(MOVE_FIELDS)))}
    tree = _build(joined, app_latency=logs)
    moves = tree["moves"].to_dataset()
    assert (moves.cpu.values.tolist(), moves.packets.values.tolist()) == ([1, 1], [15, 15]), "two flows, in turn"
    assert moves.lag_packets.values.tolist() == [0, 0]
    assert sorted(moves.lag.values) == [10, 10 + driver[11] - driver[10]]
    at = tree["packets"]["time"].sel(stage="driver_rx").values[10]
    assert (at - moves.time.values[0]).astype(int) == 10
    assert "moves" not in _build(joined, app_latency=make_app_logs(np.full(5, 9e3))).children


def test_root_says_what_the_run_was():
    attrs = _build(make_joined(3)).attrs
    assert json.loads(attrs["configuration"]) == {"rps_cpus": "0"}
    assert (attrs["testbed"], attrs["arm"], attrs["verdict"], attrs["kernel"]) == (1, "std", "trusted", "6.1.0")


def test_no_packets_at_all_still_builds_and_saves(tmp_path):
    tree = _build(make_joined(1))
    empty = xr.DataTree.from_dict(
        {n.path: n.to_dataset().isel(packet=slice(0)) if "packet" in n.dims else n.to_dataset() for n in tree.subtree}
    )
    with store.open_dataset(store.save(empty, tmp_path / "e.nc")) as opened:
        schema.validate(opened)


def test_opening_what_is_not_a_dataset_says_so(tmp_path):
    with pytest.raises(FormatError, match="no such dataset"):
        store.open_dataset(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("hello")
    with pytest.raises(FormatError, match="not a netCDF4 file"):
        store.open_dataset(tmp_path / "text.nc")
    xr.Dataset({"x": 1}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(SchemaError, match="not an rxlab dataset"):
        store.open_dataset(tmp_path / "other.nc")
