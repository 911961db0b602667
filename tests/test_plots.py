"""Each figure shows what was planted, says its units, and touches no global state."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from joined_builder import NAT, make_app_logs, make_host, make_joined, make_run
from matplotlib.figure import Figure

from rxlab.dataset import explain, stats, store
from rxlab.errors import RxlabError
from rxlab.show import plots
from rxlab.show.style import told_apart
from rxlab.stages import STAGE_INDEX, STAGE_NAMES


def _tree(seed=1, n=600, **changes):
    return store.build(
        make_joined(n, seed=seed, **changes),
        run=make_run(),
        host=make_host(),
        app_latency=make_app_logs(np.random.default_rng(seed).lognormal(9, 0.2, n)),
    )


@pytest.fixture(scope="module")
def trees():
    return {
        "rps_cpus=0": [_tree(1), _tree(2)],
        "rps_cpus=2": [_tree(3, path_kind="backlog_rps"), _tree(4, path_kind="backlog_rps", lost_rows=range(30))],
    }


def _texts(figure: Figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(mpl.text.Text))


def _is_drawn(figure: Figure) -> bool:
    """Tell whether the rendered figure has ink beyond its frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return bool((np.asarray(canvas.buffer_rgba())[..., :3].min(axis=2) < 200).mean() > 0.005)


def test_every_figure_is_drawn_with_units(trees):
    a, b = trees.values()
    comparisons = stats.compare(*[[stats.hop_values(tree, "total_latency") for tree in side] for side in (a, b)])
    latencies = {label: [stats.hop_values(tree, "total_latency") for tree in side] for label, side in trees.items()}
    figures = {
        "packet": plots.plot_packet(b[0]),
        "bars": plots.plot_stage_bars(trees),
        "difference": plots.plot_difference(explain.explain(a, b)),
        "ecdf": plots.plot_ecdf(latencies),
        "comparison": plots.plot_comparison(comparisons),
        "steering": plots.plot_steering(b[0]),
        "coverage": plots.plot_coverage(b[1]["coverage"].to_dataset()),
        "clock": plots.plot_clock(a[0]),
        "arms": plots.plot_arms({"off": {"untraced": latencies["rps_cpus=0"], "std": latencies["rps_cpus=2"]}}),
    }
    for name, figure in figures.items():
        assert _is_drawn(figure), name
        words = _texts(figure)
        assert any(unit in words for unit in ("µs", "ns", "%")), name


def test_packet_steps_are_the_planted_ones_in_path_order():
    joined = make_joined(10, path_kind="backlog_rps")
    tree = store.build(joined, run=make_run(), host=make_host())
    steps = plots.packet_steps(tree, 7)
    assert [step["stage"] for step in steps] == joined.order
    assert [step["latency_ns"] for step in steps[1:]] == [
        joined.truth[7, STAGE_INDEX[name]] for name in joined.order[1:]
    ]
    assert [step["cpu"] for step in steps] == [joined.cpu[7, STAGE_INDEX[name]] for name in joined.order]
    assert steps[0]["start_ns"] == 0


def test_waterfall_names_every_seen_stage_and_no_other():
    joined = make_joined(30)
    joined.time[:, STAGE_INDEX["wakeup"]] = NAT
    words = _texts(plots.plot_packet(store.build(joined, run=make_run(), host=make_host()), 5)).split("\n")
    assert set(words) & set(STAGE_NAMES) == set(joined.order) - {"wakeup"}


def test_typical_packet_is_the_median_one():
    tree = _tree(n=501)
    totals = tree["hops"].to_dataset()["latency"].sel(hop="total_latency").values
    assert totals[plots.typical_packet(tree)] == np.median(totals)


def test_nothing_to_draw_is_one_clear_error():
    tree = _tree(lost_rows=range(600))
    with pytest.raises(RxlabError, match="no complete packet"):
        plots.plot_packet(tree)


def test_stage_bars_end_at_the_median(trees):
    figure = plots.plot_stage_bars(trees)
    for line, side in enumerate(trees.values()):
        ends = [
            bar.get_x() + bar.get_width()
            for bar in figure.axes[0].patches
            if round(bar.get_y() + bar.get_height() / 2) == line
        ]
        expected = (
            np.mean([stats.quantile_interval(stats.hop_values(tree, "total_latency"), 0.5).value for tree in side])
            / 1e3
        )
        assert max(ends) == pytest.approx(expected, rel=1e-6)


def test_styles_do_not_leak(trees):
    before = dict(mpl.rcParams)
    plots.plot_packet(trees["rps_cpus=0"][0])
    assert dict(mpl.rcParams) == before


def test_pyplot_is_not_imported():
    code = "import sys, rxlab.show.plots, rxlab.show.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (999.4, "999 ns"),
        (999.6, "1.00 µs"),
        (12_345, "12.3 µs"),
        (999_960, "1.00 ms"),
        (4.56e6, "4.56 ms"),
        (2e9, "2.00 s"),
        (-1500, "-1.50 µs"),
        (np.nan, "-"),
    ],
)
def test_durations_read_well(ns, text):
    assert plots.microseconds(ns) == text


def test_durations_that_are_compared_read_unequal_where_they_are() -> None:
    assert told_apart([23_012, 23_049.6, 41_000]) == ["23.01 µs", "23.05 µs", "41.00 µs"]
    assert told_apart([23_012, 24_049, 41_000]) == ["23.0 µs", "24.0 µs", "41.0 µs"]
    # The same is the same, and what differs by less than a nanosecond is not worth more digits.
    assert told_apart([23_012, 23_012, float("nan")]) == ["23.0 µs", "23.0 µs", "-"]
    assert told_apart([850.2, 850.4]) == ["850 ns", "850 ns"]


def test_a_large_ratio_is_on_the_axis_and_an_unknown_interval_is_not_drawn():
    rng = np.random.default_rng(5)
    a, b = ([rng.lognormal(np.log(level), 0.1, 200) for _ in range(2)] for level in (1.84e6, 49.8e3))
    comparisons = stats.compare(a, b)
    axes = plots.plot_comparison(comparisons).axes[0]
    low, high = axes.get_xlim()
    assert all(low < comparison.ratio < high for comparison in comparisons)
    assert not axes.collections


def test_an_interval_that_leaves_the_axis_ends_in_an_arrow():
    (found, *_) = stats.compare(*[[np.random.default_rng(6).lognormal(9, 0.1, 200)] * 3] * 2)
    axes = plots.plot_comparison([replace(found, ratio=1.5, ratio_low=0.9, ratio_high=60.0)]).axes[0]
    assert [line.get_marker() for line in axes.lines if line.get_marker() in "<>"] == [">"]


def test_clock_peaks_are_not_under_the_legend(trees):
    figure = plots.plot_clock(trees["rps_cpus=0"][0])
    axes = figure.axes[0]
    assert axes.get_legend() is None
    assert figure.legends
