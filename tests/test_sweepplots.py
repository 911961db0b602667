"""Figures of sweeps and of CPUs around a packet show what was planted."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

import rxlab
from rxlab.dataset import effects, stats
from rxlab.errors import UsageError
from rxlab.show import packetplots, plots
from rxlab.show.style import GREEN, GREY
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
