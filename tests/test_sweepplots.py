"""Figures of sweeps and of CPUs around a packet show what was planted."""

from __future__ import annotations

import itertools

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

import rxlab
from rxlab.dataset import effects, stats
from rxlab.errors import UsageError
from rxlab.show import packetplots, plots
from rxlab.show.style import GREEN, GREY, keep_ticks_apart, new_axes, ratio_ticks
from rxlab.stages import STAGE_INDEX


def _values(reps=5) -> xr.DataArray:
    """rps=on halves the latency; load does nothing; one configuration was never run."""
    logs = np.log(20_000) + np.random.default_rng(1).normal(0, 0.01, (2, 3, reps))
    logs[1] -= np.log(2)
    logs[1, 2] = np.nan
    coords = {"rps": ["off", "on"], "load": [1000, 4000, 8000]}
    return xr.DataArray(np.exp(logs), dims=("rps", "load", "repetition"), coords=coords)


def _texts(figure) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(mpl.text.Text)]


def test_a_heat_map_has_value_interval_and_gaps():
    values = _values()
    figure = plots.plot_heatmap(values)
    words = _texts(figure)
    assert words.count("no run") == 1
    cell = stats.over_repetitions(values[0, 0].values)
    assert f"{plots.microseconds(cell.value)}\n{cell.low / 1e3:.1f} – {plots.microseconds(cell.high)}" in words
    assert {"rps", "load", "off", "on", "1000", "latency (µs)"} <= set(words)
    colours = figure.axes[0].images[0].get_array()
    assert (colours[0] > colours[1, 0]).all()


def test_noise_does_not_fill_a_heat_maps_colours():
    equal = _values().copy(
        data=np.full((2, 3, 5), 10_000.0) * np.exp(np.random.default_rng(2).normal(0, 1e-3, (2, 3, 5)))
    )
    low, high = plots.plot_heatmap(equal).axes[0].images[0].get_clim()
    assert high - low >= np.log10(1.1) - 1e-9


def test_a_heat_map_is_over_two_settings():
    with pytest.raises(UsageError, match="two settings"):
        plots.plot_heatmap(_values().isel(load=0))


def _collisions(figure) -> list[tuple[str, str]]:
    """Labels of an axis that touch each other, and texts that reach out of the figure."""
    figure.draw_without_rendering()
    (axes, *_) = figure.axes
    found = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        labels = [
            label for at, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True) if low <= at <= high
        ]
        assert labels
        boxes = [(label.get_text(), label.get_window_extent()) for label in labels if label.get_text()]
        found += [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]
    whole = figure.bbox
    for text in (axes.xaxis.label, *axes.get_yticklabels()):
        box = text.get_window_extent()
        if box.x0 < whole.x0 or box.x1 > whole.x1:
            found.append((text.get_text(), "out of the figure"))
    return found


@pytest.mark.parametrize("n", [2, 8, 20])
@pytest.mark.parametrize("spread", [0.0001, 30.0])
def test_labels_of_forest_plots_never_touch(n, spread):
    draw = np.random.default_rng(3).standard_normal
    names = [
        f"rps_cpus={i},{i + 1},{i + 2}, rfs={'on' if i % 2 else 'off'}, irq_cpus={i}, app_cpu={i}, flows={i}, rx-usecs={10 * i}"
        for i in range(n)
    ]
    runs = {
        name: 1_234_567 * (1 + spread * i / n) * (1 + 0.1 * spread * draw(5)).clip(0.5) for i, name in enumerate(names)
    }
    ranks = effects.rank(runs, quantile=0.5)
    assert _collisions(plots.plot_ranks(ranks)) == []
    found = [
        effects.Effect(
            (f"irq_cpus_of_queue_{i}", "app_cpu")[: 1 + i % 2], ("same-core", "other-node")[: 1 + i % 2], ("off", "off")[: 1 + i % 2],
            one.estimate.value / 1.3e6, 1 - 0.001, 1 + spread, 0.01, 0.03, 4,
        )
        for i, one in enumerate(ranks)
    ]  # fmt: skip
    assert _collisions(plots.plot_effects(found)) == []
    sides = [[value * (1 + 0.2 * np.abs(draw(200))) for value in runs[name]] for name in names[:2]]
    assert _collisions(plots.plot_comparison(stats.compare(*sides), a=names[0], b=names[1])) == []


def test_no_change_keeps_its_label_however_little_room_there_is():
    figure, axes = new_axes(1.6, 1.0)
    ratio_ticks(axes, 1.6)
    assert len(axes.get_xticks()) == 7
    keep_ticks_apart(figure, axes)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert "same" in labels
    assert len(labels) < 7
    assert _collisions(figure) == []


def test_ranks_are_coloured_by_whether_they_may_be_first():
    values = _values()
    groups = {f"{rps} {load}": values.sel(rps=rps, load=load).values for rps in ("off", "on") for load in (1000, 4000)}
    figure = plots.plot_ranks(effects.rank(groups))
    points = [to_hex(line.get_color()).upper() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert points == [GREEN, GREEN, GREY, GREY]
    assert sum("rank 1 to 2" in text for text in _texts(figure)) == 2


def test_effects_are_drawn_with_their_size():
    found = effects.find_effects(_values())
    words = _texts(plots.plot_effects(found))
    assert "rps=on against off" in words
    assert any(word.startswith("\N{MINUS SIGN}50") or word.startswith("\N{MINUS SIGN}49") for word in words)


@pytest.fixture(scope="module")
def recorded(repo):
    return rxlab.open_run(repo / "data" / "tcp-rps-on")


def test_what_a_cpu_did_is_the_recordings(recorded):
    """The CPUs' tasks fill the window without gap or overlap; the reader's wakeup and run are the packet's own stages."""
    tree, row = recorded.tree, plots.typical_packet(recorded.tree)
    time = tree["packets"]["time"].values[row].view(np.int64) - int(tree["clocks"]["axis_offset"])
    start, stop = int(time[STAGE_INDEX["driver_rx"]]), int(time[STAGE_INDEX["recvmsg"]])
    did = packetplots.cpu_activity(recorded.perf.events, start, stop)
    assert set(did) == {0, 1}
    for activity in did.values():
        tasks = activity["tasks"]
        assert (tasks[0][0], tasks[-1][1]) == (start, stop)
        assert all(one[1] == other[0] for one, other in zip(tasks, tasks[1:], strict=False))
    reader = int(tree["packets"]["tid"].values[row])
    of_reader = [task for task in did[1]["tasks"] if task[3] == reader]
    assert of_reader[-1][0] == time[STAGE_INDEX["switch_in"]]
    (wakeup,) = [one for activity in did.values() for one in activity["wakeups"] if one[1] == reader]
    assert wakeup[0] == time[STAGE_INDEX["waking"]]
    begin, end = did[1]["softirqs"][-1]
    assert begin <= time[STAGE_INDEX["netif_receive_skb"]] < time[STAGE_INDEX["data_ready"]] <= end


def test_a_timeline_names_every_stage_of_the_packet(recorded):
    figure = plots.plot_timeline(recorded.tree, recorded.perf.events)
    words = "\n".join(_texts(figure))
    for stage in ("driver_rx", "rps_ipi", "waking", "recvmsg", "CPU 0", "CPU 1", "µs"):
        assert stage in words
