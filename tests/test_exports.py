"""Exports are read by the tools they are for."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pyperf
import pytest
from joined_builder import NAT, OFFSET, make_host, make_joined, make_run
from report_builder import make_runs

from rxlab.dataset import store
from rxlab.errors import RxlabError, UsageError
from rxlab.show import exports
from rxlab.stages import STAGE_INDEX


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pyperf")
    runs = make_runs()
    return [
        exports.to_pyperf(
            [run for run in runs if run.run["configuration"]["rps_cpus"] == rps and run.arm == "untraced"],
            folder / f"rps{rps}.json",
        )
        for rps in ("0", "2")
    ]


def test_pyperf_compares_two_configurations(suites):
    done = subprocess.run(
        [sys.executable, "-m", "pyperf", "compare_to", *map(str, suites)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "one_way_latency" in done.stdout
    assert "slower" in done.stdout


@pytest.mark.parametrize("command", ["stats", "hist"])
def test_pyperf_reads_a_suite(suites, command):
    done = subprocess.run(
        [sys.executable, "-m", "pyperf", command, str(suites[0])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "us" in done.stdout


def test_pyperf_values_are_the_runs_in_seconds(suites):
    suite = pyperf.BenchmarkSuite.load(str(suites[0]))
    benchmark = suite.get_benchmark("one_way_latency")
    assert benchmark.get_nrun() == 5
    assert benchmark.median() == pytest.approx(10e-6, rel=0.05)


def test_hops_of_traced_runs_are_benchmarks_too(tmp_path):
    traced = [run for run in make_runs() if run.is_traced][:1]
    names = pyperf.BenchmarkSuite.load(
        str(exports.to_pyperf(traced, tmp_path / "t.json", hops=["copy"]))
    ).get_benchmark_names()
    assert set(names) == {"one_way_latency", "round_trip_latency", "copy"}


def test_nothing_to_export_is_said(tmp_path):
    tree = store.build(None, run=make_run(arm="untraced"), host=make_host())
    with pytest.raises(RxlabError, match="nothing to export"):
        exports.to_table(tree, tmp_path / "t.csv")
    with pytest.raises(RxlabError, match="nothing to export"):
        exports.to_pyperf([exports.AnalysedRun(make_run(), make_host(), tree, None)], tmp_path / "p.json")


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_tables_hold_the_packets(tmp_path, suffix):
    joined = make_joined(50, lost_rows=[3])
    path = exports.to_table(store.build(joined, run=make_run(), host=make_host()), tmp_path / f"packets{suffix}")
    frame = pd.read_parquet(path) if suffix == ".parquet" else pd.read_csv(path, parse_dates=["copy_time"])
    assert len(frame) == 50
    assert frame["status"].astype(str).tolist()[2:5] == ["complete", "lost", "complete"]
    assert frame["comm"].astype(str)[0] == "rx_server"
    planted = joined.time[:, STAGE_INDEX["copy"]]
    seen = planted != NAT
    np.testing.assert_array_equal(frame["copy_time"].isna(), ~seen)
    np.testing.assert_array_equal(
        frame["copy_time"][seen].astype("datetime64[ns]").astype(np.int64), planted[seen] + OFFSET
    )
    np.testing.assert_array_equal(frame["copy_ns"][seen], joined.truth[seen, STAGE_INDEX["copy"]])


def test_an_unknown_suffix_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"\.parquet or \.csv"):
        exports.to_table(store.build(make_joined(3), run=make_run(), host=make_host()), tmp_path / "x.xlsx")


@pytest.mark.parametrize(
    ("to", "start"), [("pcapng", b"\n\r\r\n"), ("perfetto", b"\n"), ("csv", b"flow,"), ("parquet", b"PAR1")]
)
def test_a_recorded_run_is_exported_in_every_format(repo, tmp_path, to, start):
    written = exports.export_run(repo / "data" / "http", to, tmp_path / f"x.{to}")
    assert written.stat().st_mode & 0o777 == 0o600
    assert written.read_bytes().startswith(start)


def test_an_unknown_format_lists_the_known_ones(repo, tmp_path):
    with pytest.raises(UsageError, match="pyperf, parquet, csv, netcdf, pcapng, perfetto"):
        exports.export_run(repo / "data" / "http", "har", tmp_path / "x")
    with pytest.raises(UsageError, match="one file"):
        exports.export_run(repo / "data" / "http", "csv", tmp_path)


@pytest.mark.parametrize(("to", "given"), [("perfetto", "x.gz"), ("csv", "x"), ("csv", "x.csv"), ("netcdf", "x.nc")])
def test_a_file_that_is_there_is_replaced_only_when_told(repo, tmp_path, to, given):
    written = tmp_path / ("x.csv" if to == "csv" else given)
    written.write_text("years of work")
    with pytest.raises(UsageError, match=f"{written.name}: there is a file here already.*--force"):
        exports.export_run(repo / "data" / "http", to, tmp_path / given)
    assert written.read_text() == "years of work"
    assert exports.export_run(repo / "data" / "http", to, tmp_path / given, force=True) == written
    assert b"years of work" not in written.read_bytes()


@pytest.mark.parametrize("name", ["rx.pcap", "perf.data", "app.log"])
def test_a_recording_is_never_replaced(repo, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(repo / "data" / "tcp-rps-on", run)
    recorded = (run / name).read_bytes()
    with pytest.raises(UsageError, match=f"{name}: a file of a recording. Nothing was replaced"):
        exports.export_run(run, "pcapng", run / name, force=True)
    assert (run / name).read_bytes() == recorded


def test_a_folder_that_is_not_there_is_named(repo, tmp_path):
    with pytest.raises(UsageError, match="no folder for this file: found no .*missing. Make it first"):
        exports.export_run(repo / "data" / "http", "csv", tmp_path / "missing" / "x.csv")
