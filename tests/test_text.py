"""The terminal's text about the slowest packets: right, bounded, and one clear line for what cannot be shown."""

from __future__ import annotations

import numpy as np
import pytest
from joined_builder import make_app_logs, make_counters, make_host, make_joined, make_run

from rxlab.dataset import stats, store
from rxlab.errors import RxlabError, UsageError
from rxlab.show import plots, text
from rxlab.stages import STAGE_INDEX


@pytest.fixture(scope="module")
def tree():
    return store.build(make_joined(200), run=make_run(), host=make_host())


def test_a_run_without_trace_is_one_clear_error():
    run = make_run(arm="untraced", perf=None, tcpdump=None)
    tree = store.build(
        None, run=run, host=make_host(), counters=make_counters(), app_latency=make_app_logs(np.full(50, 1e4))
    )
    for show in (text.slowest_packets, text.row_of_frame):
        with pytest.raises(RxlabError, match="recorded without trace"):
            show(tree, 1)


def test_a_frame_that_was_not_received_names_the_nearest(tree):
    frames = tree["packets"]["pcap_frame"].values
    with pytest.raises(UsageError, match=f"as {frames[-2]} and {frames[-1]}, up to {frames[-1]}"):
        text.row_of_frame(tree, int(frames[-1]) + 1)


@pytest.mark.parametrize("n", [0, -1])
def test_a_number_of_packets_is_positive(tree, n):
    with pytest.raises(UsageError, match="--slowest"):
        text.slowest_packets(tree, n)


def test_a_hop_is_compared_with_hops_from_the_same_stage():
    """Every other packet has no wake-up of its own: its hop to the switch-in begins at data_ready and is usually long."""
    joined = make_joined(100, steps={"waking": 20_000}, spread=0.01, gap_ns=1_000_000)
    odd = np.arange(1, 100, 2)
    joined.time[odd[:, None], [STAGE_INDEX["waking"], STAGE_INDEX["wakeup"]]] = np.iinfo(np.int64).min
    late = joined.order[joined.order.index("switch_in") :]
    joined.time[51, [STAGE_INDEX[name] for name in late]] += 30_000
    [line] = text.slowest_packets(store.build(joined, run=make_run(), host=make_host()), 1).split("\n")[1:]
    usual = joined.time[odd, STAGE_INDEX["switch_in"]] - joined.time[odd, STAGE_INDEX["data_ready"]]
    assert "data_ready -> switch_in" in line
    assert line.endswith(f"usually {plots.microseconds(float(np.median(usual)))}")


def test_the_slowest_packets_come_first_with_the_hop_that_made_them_slow():
    """Packets with a step lengthened by a known time; another step is always longer and made none of them slow."""
    planted = {17: ("wakeup", 40_000), 90: ("softirq", 70_000), 150: ("copy", 55_000)}
    joined = make_joined(200, steps={"switch_in": 90_000}, spread=0.01, gap_ns=1_000_000)
    for row, (stage, extra) in planted.items():
        later = joined.order[joined.order.index(stage) :]
        joined.time[row, [STAGE_INDEX[name] for name in later]] += extra
    lines = text.slowest_packets(store.build(joined, run=make_run(), host=make_host()), 3).split("\n")[1:]
    before = {name: joined.order[at - 1] for at, name in enumerate(joined.order)}
    for line, row in zip(lines, (90, 150, 17), strict=True):
        stage, _ = planted[row]
        step = plots.microseconds(float(np.diff(joined.time[row, [STAGE_INDEX[before[stage]], STAGE_INDEX[stage]]])[0]))
        assert int(line.split()[0]) == row + 1
        assert f"{before[stage]} -> {stage}: {step} on cpu" in line
        assert "usually" in line


def test_what_is_left_out_is_said():
    joined = make_joined(50, lost_rows=[3, 4])
    assert text.slowest_packets(store.build(joined, run=make_run(), host=make_host()), 2).endswith("left out: 2 lost")


def test_more_packets_than_there_are_is_all_of_them(tree):
    assert len(text.slowest_packets(tree, 10**9).split("\n")) == 1 + int(
        stats.usable(tree["packets"].to_dataset()).sum()
    )
