"""Histograms are within 1 % and merge exactly; a sweep is labelled by what varied."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from joined_builder import make_app_logs, make_counters, make_host, make_joined, make_run, plant_steering

from rxlab.dataset import aggregate, schema, stats, store
from rxlab.errors import RxlabError, SchemaError

LATENCIES = st.lists(st.floats(1.0, 1e12), min_size=1, max_size=60)


@given(LATENCIES, st.floats(0.0, 1.0))
def test_quantiles_are_within_one_percent(values, level):
    exact = np.sort(values)[min(max(int(np.ceil(level * len(values))) - 1, 0), len(values) - 1)]
    assert aggregate.LogHistogram().add(np.array(values)).quantile(level) == pytest.approx(exact, rel=0.01 + 1e-9)


@given(LATENCIES, LATENCIES)
def test_merging_is_counting_all_in_one(left, right):
    both = aggregate.LogHistogram().add(np.array(left + right))
    merged = aggregate.LogHistogram().add(np.array(left)).merge(aggregate.LogHistogram().add(np.array(right)))
    np.testing.assert_array_equal(merged.counts, both.counts)
    assert (merged.minimum, merged.maximum, merged.n) == (both.minimum, both.maximum, both.n)


def test_ends_are_open_and_negative_values_are_counted():
    histogram = aggregate.LogHistogram().add(np.array([-5.0, 0.0, 1.0, 1e15, np.nan]))
    assert histogram.n == 4
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-1]) == (2, 1, 1)
    assert histogram.minimum == -5
    assert histogram.quantile(1.0) == 1e15
    assert np.isnan(aggregate.LogHistogram().quantile(0.5))


def test_foreign_buckets_are_refused():
    with pytest.raises(SchemaError, match="other buckets"):
        aggregate.LogHistogram(np.zeros(3))


def _tree(seed=1, arm="std", rps="0", **changes):
    run = make_run(arm=arm, configuration={"rps_cpus": rps, "gro": "off"})
    joined = None if arm == "untraced" else make_joined(200, seed=seed, **changes)
    return store.build(
        joined, run=run, host=make_host(), app_latency=make_app_logs(np.random.default_rng(seed).lognormal(9, 0.1, 300))
    )


def test_coverage_of_several_runs_is_that_of_their_packets():
    merged = aggregate.merged_coverage([_tree(lost_rows=[1, 2]), _tree(seed=2)])
    assert int(merged.expected.sel(stage="recvmsg")) == 400
    assert float(merged.fraction.sel(stage="recvmsg")) == pytest.approx(398 / 400)
    assert int(merged.missing.sel(stage="copy", cause="lost")) == 2
    assert merged.matched.attrs["long_name"] == schema.variable("coverage", "matched").long_name
    with pytest.raises(RxlabError, match="no run to merge"):
        aggregate.merged_coverage([])


def test_a_sweep_is_labelled_by_what_varied():
    trees = [
        _tree(1),
        _tree(2),
        _tree(3, rps="2", path_kind="backlog_rps"),
        _tree(4, arm="untraced"),
        _tree(5, arm="untraced", rps="2"),
    ]
    sweep = aggregate.combine(trees)
    assert dict(sweep.sizes) | {"bucket": 0} == {
        "rps_cpus": 2,
        "repetition": 2,
        "arm": 2,
        "hop": 24,
        "quantile": 3,
        "stage": 14,
        "bucket": 0,
    }
    assert str(sweep.gro.values) == "off"
    median = sweep.latency.sel(quantile=0.5, hop="total_latency", arm="std")
    assert not median.sel(rps_cpus="0").isnull().any()
    assert median.sel(rps_cpus="2").isnull().values.tolist() == [False, True]
    assert float(
        sweep.latency.sel(rps_cpus="2", arm="untraced", quantile=0.5, hop="one_way_latency")[0]
    ) == pytest.approx(np.exp(9), rel=0.05)
    merged = sweep["count"].sel(hop="total_latency", arm="std").sum("repetition")
    assert merged.sum("bucket").values.tolist() == [400, 200]
    for name in sweep.data_vars:
        assert sweep[name].attrs["units"] == schema.variable("sweep", str(name)).units


def test_a_sweep_opens_in_plain_xarray(tmp_path):
    sweep = aggregate.combine([_tree(1), _tree(2, rps="2")])
    sweep.to_netcdf(tmp_path / "sweep.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "sweep.nc") as opened:
        xr.testing.assert_equal(sweep, opened.load())


def test_curves_are_short_however_many_packets():
    values = np.random.default_rng(0).lognormal(9, 1, 300_000)
    latency, above = aggregate.tail_curve(values)
    assert len(latency) <= aggregate.CURVE_POINTS
    assert latency[-1] == values.max()
    assert (np.diff(latency) >= 0).all()
    exact = (values[:, None] >= latency[None, ::50]).mean(axis=0)
    np.testing.assert_allclose(above[::50], exact, rtol=1e-9)


def test_interrupts_of_a_queue_and_softirqs_per_hardirq():
    counters = make_counters()
    counters["difference"]["interrupts"]["25"] = {"label": "eth0-TxRx-0", "cpus": [100, 40]}
    run = make_run(arm="untraced")
    tree = store.build(None, run=run, host=make_host(), counters=counters, app_latency=make_app_logs(np.full(5, 9e3)))
    grid = aggregate.Grid({}, 1, ["untraced"], n_cpus=2, queues=[0, 3])
    found = aggregate.summarize(tree, grid, {0: 25})
    assert float(found["softirqs_per_hardirq"]) == (400 + 300) / 140
    np.testing.assert_array_equal(found["interrupts"], [[100, 40], [np.nan, np.nan]])
    assert grid.empty().interrupts.dims == ("repetition", "arm", "queue", "cpu")


def test_steering_is_told_of_the_packets_it_is_known_of():
    tree = plant_steering(_tree(), delivered=150, elsewhere=30, on_target=60, off_target=40)
    assert stats.steered(tree) == {"rfs_delivered": (150, 180), "on_rps_target": (60, 100)}
    untraced = _tree(arm="untraced", rps="2")
    sweep = aggregate.combine([tree, _tree(2, rps="1"), untraced])
    assert sweep["rfs_delivered"].dims == sweep["on_rps_target"].dims == ("rps_cpus", "repetition", "arm")
    run = {"rps_cpus": "0", "repetition": 0, "arm": "std"}
    assert float(sweep["rfs_delivered"].sel(run)) == 150 / 180
    assert float(sweep["on_rps_target"].sel(run)) == 0.6
    assert np.isnan(sweep["on_rps_target"].sel({**run, "rps_cpus": "1"}))  # RPS off: no target
    assert np.isnan(sweep["rfs_delivered"].sel({**run, "rps_cpus": "2", "arm": "untraced"}))


def test_every_variable_of_a_sweep_is_the_schemas():
    empty = aggregate.Grid({"rps": ["off", "on"]}, 2, ["untraced"], n_cpus=2, queues=[0]).empty()
    wanted = {spec.name: spec for spec in schema.SCHEMA if spec.group == "sweep"}
    assert set(empty.data_vars) == set(wanted)
    for name, spec in wanted.items():
        assert empty[name].dims == ("rps", *spec.dims[1:])
        assert empty[name].dtype == spec.dtype
        assert empty[name].attrs["long_name"] == spec.long_name


@pytest.mark.parametrize(
    ("labels", "kind"), [([0, 1], "i"), ([1, 2.5], "f"), (["off", 1], "U"), ([True, False], "U"), ([], "U")]
)
def test_labels_are_numbers_where_all_are(labels, kind):
    found = aggregate.label_array(labels)
    assert found.shape == (len(labels),)
    assert found.dtype.kind == kind or not labels
