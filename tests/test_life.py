"""The life of one packet: hops, tasks, what recording cost, and how a packet ended that nobody read."""

from __future__ import annotations

import numpy as np
import pytest
from joined_builder import NAT, OFFSET, make_app_logs, make_counters, make_host, make_joined, make_run

from rxlab.dataset import store
from rxlab.errors import RxlabError
from rxlab.read.columns import Columns
from rxlab.show.life import packet_hops, packet_life
from rxlab.show.tracecost import event_cost, events_between
from rxlab.stages import STAGE_INDEX, STAGES, STATUSES

READER, SENDER, COST = 4242, 77, 600


@pytest.fixture(scope="module")
def joined():
    return make_joined(400, spread=0.0, gap_ns=200_000)


def recording(joined) -> dict[str, Columns]:
    """One event per stage and packet, in the task that a kernel would have; between them others, `COST` ns apart at the closest."""
    events = {}
    for stage in STAGES:
        at = STAGE_INDEX[stage.name]
        rows = np.flatnonzero(joined.time[:, at] != NAT)
        if not stage.events or not len(rows):
            continue
        in_reader = stage.name in ("copy", "recvmsg")
        fields = {
            "time": joined.time[rows, at], "cpu": joined.cpu[rows, at].astype(np.int32),
            "tid": np.full(len(rows), READER if in_reader else SENDER), "rank": np.arange(len(rows)),
            "common_flags": np.full(len(rows), 0 if in_reader else 0x10),
        }  # fmt: skip
        if stage.name == "switch_in":
            fields |= {"next_pid": np.full(len(rows), READER), "next_comm": np.full(len(rows), b"rx server", "S16")}
        events[stage.events[-1]] = Columns(fields)
    softirq, returned = (joined.time[:, STAGE_INDEX[name]] for name in ("softirq", "recvmsg"))
    n, later = len(softirq), returned + 5_000
    extra = np.concatenate([softirq + COST, later, later + COST])
    events["irq:softirq_exit"] = Columns(
        {"time": extra, "cpu": np.zeros(3 * n, np.int32), "tid": np.full(3 * n, SENDER), "rank": np.arange(3 * n)}
    )
    return events


def test_the_closest_events_of_a_cpu_tell_the_cost(joined) -> None:
    """Events of two CPUs whose stamps nearly coincide say nothing."""
    events = recording(joined)
    assert event_cost(events) == COST
    twin = events["irq:softirq_exit"].with_columns(
        cpu=np.ones(1200, np.int32), time=events["irq:softirq_exit"]["time"] + 7
    )
    assert event_cost({**events, "other": twin}) == COST
    assert np.isnan(event_cost({"net:netif_rx": events["net:netif_rx"].take(np.arange(5))}))


def test_an_event_costs_the_hop_it_begins(joined) -> None:
    events = {"a": Columns({"time": np.array([10, 20, 20, 30]), "cpu": np.array([0, 0, 1, 0])})}
    assert events_between(events, 10, 20, {0}) == 1
    assert events_between(events, 10, 30, {0}) == 2
    assert events_between(events, 10, 30, {0, 1}) == 3
    assert events_between(events, 21, 30, {0, 1}) == 0


def test_every_hop_tells_cpu_task_and_cost(joined) -> None:
    tree = store.build(joined, run=make_run(), host=make_host())
    hops = {hop.stage: hop for hop in packet_hops(tree, 5, recording(joined))}
    assert list(hops) == joined.order
    for name, hop in hops.items():
        assert hop.latency_ns == joined.truth[5, STAGE_INDEX[name]]
        assert hop.cpu == joined.cpu[5, STAGE_INDEX[name]]
    assert hops["softirq"].task == f"tid {SENDER} (softirq)"
    assert hops["waking"].task == f"tid {SENDER} (softirq) wakes rx server/{READER}"
    assert hops["switch_in"].task == hops["copy"].task == f"rx server/{READER}"
    # softirq -> netif_receive_skb: the softirq's own event and the one in the middle.
    assert (hops["netif_receive_skb"].events, hops["tcp_rcv"].events) == (2, 1)
    assert hops["recvmsg"].events == 1
    shown = packet_life(tree, 6, recording(joined))
    line = next(line for line in shown.split("\n") if "netif_receive_skb" in line)
    assert "1.20 µs" in line
    assert "__netif_receive_skb_core (net/core/dev.c)" in line
    assert "events on these CPUs meanwhile, 600 ns each" in shown


def test_without_the_recording_the_life_is_told_as_far_as_the_dataset_goes(joined) -> None:
    shown = packet_life(store.build(joined, run=make_run(), host=make_host()), 6)
    assert "status complete, trusted" in shown
    assert "each an event that costs" in shown


def test_a_drop_is_told_with_its_last_stage_and_the_kernels_reason() -> None:
    joined = make_joined(20, lost_rows=[3])
    joined.packets["status"][3] = STATUSES.index("dropped")
    joined.packets["drop_reason"][3] = 1
    tree = store.build(joined, run=make_run(), host=make_host())
    shown = packet_life(tree, 4)
    assert "status dropped, not trusted" in shown
    told = "DROPPED after tcp_rcv: the kernel freed it and said SOCKET_RCVBUFF (kfree_skb, net/core/skbuff.c)"
    assert told in shown
    # Its skb's address is freed before, by an earlier packet, and after, by a later one.
    at, address = int(joined.time[3, STAGE_INDEX["tcp_rcv"]]), int(joined.packets["skb"][3])
    freed = Columns(
        {
            "time": at + np.array([-5_000, 700, 1_500, 9_000]), "cpu": np.array([1, 1, 0, 1], np.int32), "tid": np.array([5, 6, SENDER, 7]),
            "rank": np.arange(4), "skbaddr": np.array([address, address + 256, address, address], np.uint64),
        }
    )  # fmt: skip
    assert f"{told}, 1.50 µs later on cpu 0 in tid {SENDER}" in packet_life(tree, 4, {"skb:kfree_skb": freed})


def test_a_packet_of_which_nothing_was_seen_is_shown_with_its_status() -> None:
    joined = make_joined(20)
    joined.time[3] = NAT
    joined.packets["t0_stage"][3] = -1
    joined.packets["status"][3] = STATUSES.index("unmatched")
    shown = packet_life(store.build(joined, run=make_run(), host=make_host()), 4)
    assert shown.startswith("frame 4 ")
    assert "status unmatched" in shown
    assert "unmatched: in the pcap, no skb event found" in shown
    assert "No stage of this packet was seen" in shown


def test_a_run_without_trace_is_one_clear_error() -> None:
    run = make_run(arm="untraced", perf=None, tcpdump=None)
    logs = make_app_logs(np.full(50, 1e4))
    tree = store.build(None, run=run, host=make_host(), counters=make_counters(), app_latency=logs)
    with pytest.raises(RxlabError, match="recorded without trace"):
        packet_life(tree, 1)


def test_times_of_the_dataset_go_back_to_the_recordings_clock(joined) -> None:
    """The dataset's axis is CLOCK_REALTIME: events are found by CLOCK_MONOTONIC."""
    shifted = {name: columns.with_columns(time=columns["time"] + OFFSET) for name, columns in recording(joined).items()}
    tree = store.build(joined, run=make_run(), host=make_host())
    assert all(hop.task == "" for hop in packet_hops(tree, 5, shifted))
