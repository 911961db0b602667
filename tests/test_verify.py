"""The verifier against logs of known truth: it accepts the right join and catches each broken one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlab.errors import FormatError
from rxlab.follow.clockfit import NAT
from rxlab.follow.gates import distinct_bytes
from rxlab.follow.join import Joined, join
from rxlab.follow.verify import calls_of_packets, message_of_packets, read_app_log, verify_join
from rxlab.read.columns import Columns
from rxlab.rundir import APP_LOG_FIELDS, APP_LOG_STRUCT, MESSAGE_HEADER, MESSAGE_MAGIC
from rxlab.stages import STAGE_INDEX, STATUSES
from tests.simulate import READER, World, simulate

RECV = STAGE_INDEX["recvmsg"]


def app_log(world: World, proto: str) -> np.ndarray:
    """The log the simulated reader would have written: a row per receive call."""
    returned = world.truth["returned"]
    calls, first = np.unique(returned, return_index=True)
    log = np.zeros(len(calls), np.dtype(list(APP_LOG_FIELDS)))
    log["t0"], log["t1"], log["tid"] = calls - 600, calls + 500, READER
    log["seq"] = first
    log["ret"] = np.bincount(np.searchsorted(calls, returned), weights=world.truth["payload"]).astype(np.int32)
    log["proto"], log["local_port"], log["peer_port"] = (6 if proto == "tcp" else 17), 80, 5000
    return log


def joined_of(proto: str, **options: object) -> tuple[World, Joined]:
    world = simulate(proto=proto, mean_gap_ns=15_000, work_ns=20_000, **options)  # type: ignore[arg-type]
    return world, join(world.events, world.packets, world.clock, world.machine)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_right_join_is_accepted(proto: str) -> None:
    world, joined = joined_of(proto)
    result = verify_join(joined, app_log(world, proto), messages=np.arange(joined.packets.n))
    assert result["misjoined"] == 0
    assert result["checked"] == result["data_packets"] == joined.packets.n
    assert result["complete"] == 1.0
    assert result["byte_sums_equal"]
    assert result["t1_minus_exit_ns"]["p50"] == 500


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_packets_shifted_by_one_in_a_flow_are_caught(proto: str) -> None:
    world, joined = joined_of(proto)
    joined.time[:-1, RECV] = joined.time[1:, RECV].copy()
    result = verify_join(joined, app_log(world, proto), messages=np.arange(joined.packets.n))
    # Packets of one call share its return, so only those at the edge of a call move.
    moved = (joined.time[:, RECV] != world.truth["returned"]).sum()
    assert result["misjoined"] == moved > 20


def test_two_packets_swapped_are_caught() -> None:
    world, joined = joined_of("udp")
    joined.time[[10, 11], RECV] = joined.time[[11, 10], RECV]
    result = verify_join(joined, app_log(world, "udp"), messages=np.arange(joined.packets.n))
    assert result["misjoined"] == 2
    assert result["misjoined_frames"] == [11, 12]


def test_wrong_task_is_caught() -> None:
    world, joined = joined_of("tcp")
    joined.packets["tid"][7] += 1
    assert verify_join(joined, app_log(world, "tcp"))["misjoined"] == 1


def test_lost_byte_is_caught_by_the_sums() -> None:
    world, joined = joined_of("tcp")
    log = app_log(world, "tcp")
    log["ret"][-1] -= 1
    assert not verify_join(joined, log)["byte_sums_equal"]


def test_a_dropped_datagram_that_was_read_is_caught() -> None:
    world, joined = joined_of("udp")
    joined.packets["status"][5] = STATUSES.index("dropped")
    result = verify_join(joined, app_log(world, "udp"), messages=np.arange(joined.packets.n))
    assert (result["misjoined"], result["dropped_but_read"]) == (1, 1)
    assert result["verdict"] == "degraded"


def test_a_datagram_left_in_the_queue_of_a_closed_socket_is_in_no_log() -> None:
    world, joined = joined_of("udp")
    log = app_log(world, "udp")
    joined.packets["status"][-1] = STATUSES.index("no_reader")
    assert not verify_join(joined, log)["byte_sums_equal"]  # the log has it read
    log["ret"][-1] -= world.truth["payload"][-1]
    assert verify_join(joined, log)["byte_sums_equal"]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(2**33, 2**33 + 60), st.integers(0, 20)), max_size=30))
def test_bytes_of_streams_are_counted_once(segments: list[tuple[int, int, int]]) -> None:
    flow, position, length = (
        np.array(column, np.int64) for column in (zip(*segments, strict=True) if segments else ([],) * 3)
    )
    expected = [
        len({byte for f, start, size in segments if f == number for byte in range(start, start + size)})
        for number in range(4)
    ]
    assert distinct_bytes(flow, position, length, 4).tolist() == expected


def test_calls_of_many_connections_are_found_by_bytes_and_by_messages() -> None:
    """Against a walk through the log, connection by connection."""
    rng = np.random.default_rng(5)
    log = np.zeros(400, np.dtype(list(APP_LOG_FIELDS)))
    log["t0"] = rng.permutation(400)
    log["peer_port"], log["local_port"], log["proto"] = rng.integers(1, 20, 400), 80, 6
    log["ret"], log["seq"] = rng.integers(1, 9, 400), -1
    flows = Columns({"proto": np.full(25, 6, np.uint8), "sport": np.arange(25), "dport": np.full(25, 80)})
    flow = rng.integers(0, 25, 900)
    size = rng.integers(1, 30, 900)
    position = 10_000 * flow + rng.integers(0, 60, 900)
    columns = Columns(
        {
            "is_data": np.ones(900, bool),
            "flow": flow,
            "proto": np.full(900, 6),
            "position": position,
            "payload_len": size,
        }
    )
    found = calls_of_packets(SimpleNamespace(packets=columns, flows=flows), log, None)  # type: ignore[arg-type]
    for row in range(900):
        calls = sorted(np.flatnonzero(log["peer_port"] == flow[row]), key=lambda at: log["t0"][at])
        last = position[row] - position[flow == flow[row]].min() + size[row] - 1
        ends = np.cumsum([log["ret"][at] for at in calls])
        after = [at for at, end in zip(calls, ends, strict=True) if end > last]
        assert found[row] == (after[0] if after else -1)


def test_flagged_rows_are_not_counted_as_checked() -> None:
    world, joined = joined_of("tcp", blind=((0, 1_000_000, 1_400_000),))
    result = verify_join(joined, app_log(world, "tcp"))
    # The reader of some is certain all the same.
    trusted = joined.packets["trusted"]
    assert 0 < (~trusted).sum() < result["flagged"]
    assert result["checked"] == trusted.sum() == result["data_packets"] - (~trusted).sum()
    assert result["misjoined"] == 0


def test_counters_that_disagree_are_reported() -> None:
    _, joined = joined_of("tcp", rps=True)
    arrivals = joined.time[:, STAGE_INDEX["rps_ipi"]]
    n = len(np.unique(arrivals[arrivals != NAT]))
    processed = joined.packets.n
    for counted, ok in ((n, True), (n + 2, True), (n - 1, False), (3 * n, False)):
        rows = [
            {"cpu": 0, "processed": processed, "received_rps": 0},
            {"cpu": 1, "processed": 5, "received_rps": counted},
        ]
        assert verify_join(joined, None, counters={"softnet_stat": rows})["counters_agree"]["ok"] is ok


def test_packets_without_their_ipi_may_have_been_counted_while_perf_was_blind() -> None:
    _, joined = joined_of("tcp", rps=True)
    at = STAGE_INDEX["rps_ipi"]
    linked = np.flatnonzero(joined.time[:, at] != NAT)
    counted = len(np.unique(joined.time[linked, at]))
    joined.time[linked[:120], at] = NAT
    rows = [{"cpu": 1, "processed": joined.packets.n, "received_rps": counted}]
    agree = verify_join(joined, None, counters={"softnet_stat": rows})["counters_agree"]
    assert agree["received_rps"]["joined"] < counted - 64
    assert agree["ok"] is False
    stack = joined.time[:, STAGE_INDEX["netif_receive_skb"]]
    joined.gates["blind"]["window_ns"] = int(np.ptp(stack[stack != NAT])) // 2
    assert verify_join(joined, None, counters={"softnet_stat": rows})["counters_agree"]["ok"] is True
    rows[0]["received_rps"] = 3 * counted
    assert verify_join(joined, None, counters={"softnet_stat": rows})["counters_agree"]["ok"] is False


def test_more_events_than_the_kernel_counted_are_reported() -> None:
    world, joined = joined_of("tcp", rps=True)
    arrivals = joined.time[:, STAGE_INDEX["rps_ipi"]]
    softnet = [
        {"processed": joined.packets.n, "received_rps": len(np.unique(arrivals[arrivals != NAT]))},
        {"processed": 9, "received_rps": 0},
    ]
    cpus = np.bincount(world.events["irq:softirq_entry"]["cpu"], minlength=2)
    for more, ok in (([0, 0], True), ([4, 9], True), ([-1, 5], False), (cpus + 200, False)):
        counters = {"softnet_stat": softnet, "softirqs": {"NET_RX": (cpus + more).tolist()}}
        agree = verify_join(joined, None, counters=counters, events=world.events)["counters_agree"]
        assert agree["net_rx"]["events"] == cpus.sum()
        assert agree["ok"] is ok
    handled = Columns({"irq": np.array([7, 7, 7]), "cpu": np.zeros(3, int)})
    for counted, ok in ((3, True), (1, True), (0, False)):
        lines = {"7": {"label": "nic", "cpus": [counted, 0]}, "NMI": {"label": "", "cpus": [1, 1]}}
        counters = {"softnet_stat": softnet, "interrupts": lines}
        agree = verify_join(joined, None, counters=counters, events={"irq:irq_handler_entry": handled})[
            "counters_agree"
        ]
        assert agree["irqs"] == {"counter": counted, "events": 3}
        assert agree["ok"] is ok


def test_without_a_log_it_says_what_it_could_not_check() -> None:
    _, joined = joined_of("tcp")
    result = verify_join(joined, None)
    assert result["misjoined"] is None
    assert result["counters_agree"] is None
    assert result["complete"] == 1.0


def test_cut_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "app.log").write_bytes(bytes(APP_LOG_STRUCT.size + 7))
    with pytest.raises(FormatError, match="cut.*67 bytes"):
        read_app_log(tmp_path / "app.log")


def test_message_numbers_are_read_from_the_payload(tmp_path: Path) -> None:
    frames = [bytes(42) + MESSAGE_HEADER.pack(MESSAGE_MAGIC, 3, seq, 99) + bytes(8) for seq in (5, 6)] + [bytes(74)]
    pcap = tmp_path / "x.pcap"
    pcap.write_bytes(bytes(40) + b"".join(frames))
    offset = 40 + np.cumsum([0, *(len(frame) for frame in frames[:-1])])
    sizes = Columns({"caplen": np.array([74, 60, 74])})  # the second is cut inside its header
    found = message_of_packets(pcap, offset, np.full(3, 42), sizes["caplen"])
    assert found.tolist() == [5, -1, -1]
