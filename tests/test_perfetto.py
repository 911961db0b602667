"""The Perfetto trace, read by Perfetto's own protobufs."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from joined_builder import NAT, make_host, make_joined, make_run
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

import rxlab
from rxlab.dataset import store
from rxlab.errors import RxlabError
from rxlab.show import perfetto
from rxlab.stages import STAGE_INDEX, STATUSES

BEGIN, END, INSTANT = TrackEvent.TYPE_SLICE_BEGIN, TrackEvent.TYPE_SLICE_END, TrackEvent.TYPE_INSTANT


def written(tree, tmp_path) -> Trace:
    trace = Trace()
    trace.ParseFromString(perfetto.to_perfetto(tree, tmp_path / "run.pftrace").read_bytes())
    return trace


@pytest.fixture(scope="module", params=["backlog", "backlog_rps", "napi"])
def planted(request, tmp_path_factory):
    joined = make_joined(300, path_kind=request.param, lost_rows=[3, 4], gap_ns=7000)  # closer than they take: overlaps
    tree = store.build(joined, run=make_run(), host=make_host())
    return joined, tree, written(tree, tmp_path_factory.mktemp("perfetto"))


def test_one_flow_per_complete_packet_from_its_first_stage_to_recvmsg(planted):
    joined, tree, trace = planted
    status = tree["packets"]["status"].values
    begun, ended = {}, {}
    for packet in trace.packet:
        for flow in packet.track_event.flow_ids:
            assert flow not in begun
            begun[flow] = packet
        for flow in packet.track_event.terminating_flow_ids:
            assert flow not in ended
            ended[flow] = packet
    complete = np.flatnonzero(status == STATUSES.index("complete"))
    assert set(begun) == set(ended) == set((complete + 1).tolist())
    for row in complete.tolist():
        times = joined.time[row]
        assert begun[row + 1].timestamp == times[times != NAT].min()
        assert ended[row + 1].track_event.name == "recvmsg"
        assert begun[row + 1].track_event.track_uuid != ended[row + 1].track_event.track_uuid


def test_every_slice_has_the_planted_length(planted):
    joined, _, trace = planted
    open_slice: dict[int, tuple[str, int, int]] = {}
    seen = Counter()
    for packet in trace.packet:
        event = packet.track_event
        if event.type == BEGIN:
            frame = next(note.int_value for note in event.debug_annotations if note.name == "frame")
            open_slice[event.track_uuid] = (event.name, frame, packet.timestamp)
        elif event.type == END:
            name, frame, start = open_slice.pop(event.track_uuid)
            row = int(np.flatnonzero(joined.packets["pcap_frame"] == frame)[0])
            assert packet.timestamp == joined.time[row, STAGE_INDEX[name]]
            assert packet.timestamp - start == joined.truth[row, STAGE_INDEX[name]]
            seen[name] += 1
    assert not open_slice
    assert seen["copy"] == 298


def test_slices_of_one_row_do_not_overlap_and_rows_are_cpus_and_tasks(planted):
    _, _, trace = planted
    names = {p.track_descriptor.uuid: p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")}
    groups = {names[d.parent_uuid].name: set() for d in names.values() if d.parent_uuid}
    for descriptor in names.values():
        if descriptor.parent_uuid:
            groups[names[descriptor.parent_uuid].name].add(descriptor.name)
    assert groups["CPUs"] <= {"CPU 0", "CPU 1"}
    assert all(name.startswith("rx_server ") for name in groups["Tasks"])
    last = defaultdict(int)
    for packet in trace.packet:
        if packet.HasField("track_event"):
            assert packet.track_event.track_uuid in names
            assert packet.timestamp >= last[packet.track_event.track_uuid]
            last[packet.track_event.track_uuid] = packet.timestamp


def test_times_are_monotonic_and_the_snapshot_gives_the_wall_clock(planted):
    _, tree, trace = planted
    assert {p.timestamp_clock_id for p in trace.packet if p.HasField("track_event")} == {3}
    clocks = {clock.clock_id: clock.timestamp for clock in trace.packet[0].clock_snapshot.clocks}
    assert clocks[1] - clocks[3] == int(tree["clocks"]["axis_offset"])
    assert trace.packet[0].clock_snapshot.primary_trace_clock == 3


def test_a_stage_back_on_the_first_cpu_is_drawn_once():
    time = np.array([[10, 20, 30]])
    found = perfetto.find_segments(time, np.array([[0, 1, 2]]), np.array([[0, 1, 0]]))
    assert [column.tolist() for column in found] == [[0, 0], [0, 1], [10, 10], [30, 20]]


@pytest.mark.parametrize("name", ["tcp-rps-on", "udp-rps-off", "http"])
def test_recorded_runs_have_as_many_flows_as_complete_packets(repo, tmp_path, name):
    tree = rxlab.open_run(repo / "data" / name).tree
    trace = written(tree, tmp_path)
    complete = int((tree["packets"]["status"].values == STATUSES.index("complete")).sum())
    assert complete
    assert sum(len(packet.track_event.flow_ids) for packet in trace.packet) == complete
    assert sum(len(packet.track_event.terminating_flow_ids) for packet in trace.packet) == complete


def test_a_run_without_trace_is_refused(tmp_path):
    with pytest.raises(RxlabError, match="without trace"):
        perfetto.to_perfetto(store.build(None, run=make_run(arm="untraced"), host=make_host()), tmp_path / "x")
