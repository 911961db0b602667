"""``.rx``: the same numbers as the functions and the planted truth."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from joined_builder import make_app_logs, make_host, make_joined, make_run
from matplotlib.figure import Figure

import rxlab
from rxlab.dataset import aggregate, run, stats, store
from rxlab.errors import RxlabError, UsageError
from rxlab.follow.clockfit import NAT
from rxlab.stages import STAGE_INDEX

assert run.accessor  # the import that registers it


@pytest.fixture(scope="module")
def joined():
    return make_joined(300, lost_rows=[7])


@pytest.fixture(scope="module")
def tree(joined):
    return store.build(joined, run=make_run(), host=make_host())


def sweep(ratio: float, reps: int):
    rng = np.random.default_rng(3)
    trees = []
    for index, (rps, gro) in enumerate((rps, gro) for rps in ("off", "1") for gro in ("off", "on")):
        for _ in range(reps):
            slower = ratio if rps == "1" else 1.0
            latency = (
                (10_000 + 1000 * index % 2) * slower * np.exp(rng.normal(0, 0.01) + 0.2 * rng.standard_normal(400))
            )
            about = make_run(arm="untraced", configuration={"rps_cpus": rps, "gro": gro}, perf=None, tcpdump=None)
            trees.append(store.build(None, run=about, host=make_host(), app_latency=make_app_logs(latency)))
    return aggregate.combine(trees)


def test_hops_and_locality_are_those_of_stats(tree):
    assert tree.rx.hops().equals(stats.quantile_table(tree))
    assert tree.rx.locality() == stats.locality(tree)


def test_slowest_are_the_planted_ones(tree, joined):
    found = tree.rx.slowest(5)
    planted = joined.truth.sum(axis=1).astype(float)
    planted[7] = -1  # lost: not complete
    rows = np.argsort(-planted, kind="stable")[:5]
    np.testing.assert_array_equal(found["row"], rows)
    np.testing.assert_array_equal(found["total_latency"], planted[rows])
    np.testing.assert_array_equal(found["frame"], joined.packets["pcap_frame"][rows])
    for at, row in enumerate(rows.tolist()):
        # The first stage of the path ends no step.
        steps = [STAGE_INDEX[name] for name in joined.order[1:]]
        usual = np.median(np.delete(joined.truth, 7, axis=0)[:, steps], axis=0)
        worst = steps[int((joined.truth[row, steps] - usual).argmax())]
        assert STAGE_INDEX[str(found["slowest_hop"].values[at])] == worst
        assert found["hop_latency"].values[at] == joined.truth[row, worst]
        assert found["cpu"].values[at] == joined.cpu[row, worst]
    assert set(found["comm"].values) == {"rx_server"}


def test_comparing_a_run_with_a_slower_one(tree):
    slower = store.build(make_joined(300, steps={"copy": 9000}, seed=2), run=make_run(), host=make_host())
    median = tree.rx.compare(slower, hop="copy")[0]
    assert median.ratio == pytest.approx(9000 / 2100, rel=0.05)
    assert median.verdict == stats.CANNOT_TELL  # one run of each


def test_a_planted_effect_is_found_in_a_sweep_at_every_held_setting():
    found = sweep(1.3, reps=5).rx.compare("rps_cpus")
    assert found.sizes == {"rps_cpus": 1, "gro": 2, "quantile": 3}
    assert found["rps_cpus"].values.tolist() == ["1"]
    assert found.attrs["baseline"] == "rps_cpus=off"
    np.testing.assert_allclose(found["ratio"].sel(quantile=0.5), 1.3, rtol=0.06)
    assert (found["verdict"].sel(quantile=0.5) == stats.WORSE).all()
    assert ((found["ratio_low"] < found["ratio"]) & (found["ratio"] < found["ratio_high"])).all()


def test_no_effect_and_one_repetition_decide_nothing():
    assert (sweep(1.0, reps=5).rx.compare("rps_cpus")["verdict"] == stats.CANNOT_TELL).all()
    single = sweep(1.3, reps=1).rx.compare("rps_cpus")
    assert (single["verdict"] == stats.CANNOT_TELL).all()
    assert single["ratio_low"].isnull().all()


def test_a_step_that_one_packet_alone_has_is_not_its_own_measure() -> None:
    """Its wake-up was not seen, so the time to its switch-in counts from data_ready: a millisecond more than of the others."""
    joined = make_joined(20)
    for name in ("waking", "wakeup"):
        joined.time[7, STAGE_INDEX[name]] = NAT
    joined.time[7, STAGE_INDEX["switch_in"] :] += 1_000_000
    found = store.build(joined, run=make_run(), host=make_host()).rx.slowest(1)
    others = np.delete(joined.time[:, STAGE_INDEX["switch_in"]] - joined.time[:, STAGE_INDEX["data_ready"]], 7)
    assert (found["hop_from"].item(), found["slowest_hop"].item()) == ("data_ready", "switch_in")
    assert abs(found["usual_latency"].item() - np.median(others)) < 2_000


def test_the_sweeps_hops_and_slowest_configurations():
    dataset = sweep(2.0, reps=3)
    hops = dataset.rx.hops()
    assert set(hops.dims) == {"rps_cpus", "gro", "hop", "quantile"}
    slowest = dataset.rx.slowest(2)
    assert set(slowest["rps_cpus"].values) == {"1"}
    assert slowest.values[0] >= slowest.values[1]


def test_a_sweep_is_summed_up():
    dataset = sweep(1.3, reps=5)
    best = dataset.rx.best()
    assert "rps_cpus=off" in best.rank.label
    assert best.rank.first == 1
    assert "rps_cpus=off" in best.runner_up.label
    assert best.rivals == (best.runner_up.label,)
    assert all("rps_cpus=1" in label for label in (one.label for one in dataset.rx.rank()[2:]))
    by_words = {effect.words: effect for effect in dataset.rx.effects()}
    assert by_words["rps_cpus=1 against off"].ratio == pytest.approx(1.3, rel=0.05)
    assert by_words["rps_cpus=1 against off"].is_known
    assert not by_words["gro=on with rps_cpus=1"].is_known


def test_the_best_configuration_has_its_cost():
    dataset = sweep(1.3, reps=5).copy()
    dims = (*dataset["latency"].dims[:4], "cpu_mode", "cpu")
    cost = np.full((*dataset["latency"].shape[:4], 3, 2), 100.0)
    cost[:, 1] *= 1.5  # dims: gro, rps_cpus
    dataset["cpu_time_per_packet"] = (dims, cost * np.random.default_rng(1).normal(1, 0.001, cost.shape))
    dataset = dataset.assign_coords(cpu_mode=["system", "irq", "softirq"])
    best = dataset.rx.best()
    assert best.cost.value == pytest.approx(600, rel=0.01)
    assert best.cost_against_runner_up.ratio == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("name", ["effects", "ranks"])
def test_every_plot_of_a_sweep_draws(name):
    assert isinstance(getattr(sweep(1.3, reps=3).rx.plot, name)(), Figure)


def test_a_heat_map_of_a_sweep_has_the_settings_asked_for():
    axes = sweep(1.3, reps=3).rx.plot.heatmap("gro", "rps_cpus").axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("gro", "rps_cpus")


def test_a_difference_is_split_from_the_accessor(tree):
    slower = store.build(make_joined(300, steps={"copy": 9000}, seed=2), run=make_run(), host=make_host())
    found = tree.rx.explain(slower, by="cpu")
    assert int(found["cpu"].values[np.argmax(found["difference"].values)]) == 1


def test_mistakes_are_told(tree):
    with pytest.raises(UsageError, match="expected .*rps_cpus"):
        sweep(1.0, reps=2).rx.compare("rps")
    with pytest.raises(UsageError, match="no such arm"):
        sweep(1.0, reps=2).rx.compare("rps_cpus", arm="std")
    with pytest.raises(RxlabError, match="not a sweep"):
        tree["hops"].to_dataset().rx.hops()
    with pytest.raises(RxlabError, match="no packets"):
        store.build(None, run=make_run(arm="untraced"), host=make_host()).rx.hops()


@pytest.mark.parametrize("name", ["packet", "stages", "ecdf", "steering", "coverage", "clock"])
def test_every_plot_draws(tree, name):
    assert isinstance(getattr(tree.rx.plot, name)(), Figure)


def test_it_is_there_on_a_recorded_run_and_not_before_rxlab_is_imported(repo):
    tree = rxlab.open_run(repo / "data" / "tcp-rps-on").tree
    assert tree.rx.slowest(3).sizes["packet"] == 3
    code = "import xarray as xr; assert not hasattr(xr.DataTree, 'rx'); import rxlab.dataset.run; assert hasattr(xr.DataTree, 'rx')"
    subprocess.run([sys.executable, "-c", code], check=True)
