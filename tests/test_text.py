"""The terminal's text about single packets: right, bounded, and one clear line for what cannot be shown."""

from __future__ import annotations

import numpy as np
import pytest
from joined_builder import NAT, make_app_logs, make_counters, make_host, make_joined, make_run

from rxlab.dataset import stats, store
from rxlab.errors import RxlabError, UsageError
from rxlab.show import plots, text
from rxlab.stages import STATUSES


@pytest.fixture(scope="module")
def tree():
    return store.build(make_joined(200), run=make_run(), host=make_host())


def test_a_run_without_trace_is_one_clear_error():
    run = make_run(arm="untraced", perf=None, tcpdump=None)
    tree = store.build(
        None, run=run, host=make_host(), counters=make_counters(), app_latency=make_app_logs(np.full(50, 1e4))
    )
    for show in (text.slowest_packets, text.packet_life, text.row_of_frame):
        with pytest.raises(RxlabError, match="recorded without trace"):
            show(tree, 1)


@pytest.mark.parametrize("n", [0, -1])
def test_a_number_of_packets_is_positive(tree, n):
    with pytest.raises(UsageError, match="--slowest"):
        text.slowest_packets(tree, n)


def test_the_slowest_packets_come_first_with_their_longest_hop(tree):
    packets = tree["packets"].to_dataset()
    total = tree["hops"].to_dataset()["latency"].sel(hop="total_latency").values
    lines = text.slowest_packets(tree, 5).split("\n")[1:]
    order = np.argsort(-np.where(stats.usable(packets), total, -np.inf), kind="stable")[:5]
    assert [int(line.split()[0]) for line in lines] == packets["pcap_frame"].values[order].tolist()
    for line, row in zip(lines, order.tolist(), strict=True):
        steps = plots.packet_steps(tree, row)
        index = max(range(len(steps)), key=lambda at: steps[at]["latency_ns"])
        worst = steps[index]
        assert line.endswith(
            f"{steps[index - 1]['stage']} -> {worst['stage']}: {plots.microseconds(worst['latency_ns'])} on cpu {worst['cpu']}"
        )


def test_more_packets_than_there_are_is_all_of_them(tree):
    assert len(text.slowest_packets(tree, 10**9).split("\n")) == 1 + int(
        stats.usable(tree["packets"].to_dataset()).sum()
    )


def test_a_packet_of_which_nothing_was_seen_is_shown_with_its_status():
    joined = make_joined(20)
    joined.time[3] = NAT
    joined.packets["t0_stage"][3] = -1
    joined.packets["status"][3] = STATUSES.index("unmatched")
    tree = store.build(joined, run=make_run(), host=make_host())
    frame = int(tree["packets"].to_dataset()["pcap_frame"].values[3])
    shown = text.packet_life(tree, frame)
    assert shown.startswith(f"frame {frame} ")
    assert "status unmatched" in shown
    assert "No stage of this packet was seen" in shown
