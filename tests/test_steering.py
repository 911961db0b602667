"""RPS by the kernel's rule, RFS behind a reader that moves: against worlds of known truth."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from rxlab.dataset.steering import delivered, predicted_cpus, rps_maps
from rxlab.follow.steering import reader_moves, rps_target
from rxlab.read.columns import Columns
from rxlab.show.facts import moves_text
from rxlab.stages import STAGE_INDEX, STAGES

RX = STAGE_INDEX["netif_receive_skb"]


def test_rps_scales_the_hash_to_the_map() -> None:
    # reciprocal_scale(): a third of the hashes for each of three CPUs, the map in ascending order whatever was written.
    hashes = np.array([0, 0x55555555, 0x55555556, 0xAAAAAAAA, 0xAAAAAAAB, 0xFFFFFFFF], np.int64)
    assert rps_target(hashes, (3, 0, 2)).tolist() == [0, 0, 2, 2, 3, 3]
    assert rps_target(hashes, [5]).tolist() == [5] * 6


def world(
    entered: list[tuple[int, int]], switches: list[tuple[int, int, int]]
) -> tuple[dict[str, Columns], SimpleNamespace]:
    """Packets of one flow as (time, CPU that processed it), switches as (time, CPU, task switched in); task 7 reads."""
    n = len(entered)
    time, cpu = np.full((n, len(STAGES)), np.iinfo(np.int64).min), np.full((n, len(STAGES)), -1)
    time[:, RX], cpu[:, RX] = zip(*entered, strict=True)
    packets = Columns({"is_data": np.ones(n, bool), "tid": np.full(n, 7), "flow": np.zeros(n, np.int32)})
    at, on, task = (np.array(column, np.int64) for column in zip(*switches, strict=True))
    switch = Columns({"time": at, "rank": np.arange(len(at)), "cpu": on, "next_pid": task})
    return {"sched:sched_switch": switch}, SimpleNamespace(packets=packets, time=time, cpu=cpu)


def test_the_lag_ends_with_the_first_packet_on_the_new_cpu() -> None:
    switches = [(5, 1, 7), (50, 3, 9), (100, 2, 7), (300, 1, 7)]
    entered = [(10, 1), (90, 1), (110, 1), (120, 1), (130, 2), (140, 2), (310, 2), (320, 2)]
    moves = reader_moves(*world(entered, switches))
    assert {name: moves[name].tolist() for name in moves} == {
        "time": [100, 300], "tid": [7, 7], "from_cpu": [1, 2], "to_cpu": [2, 1], "flow": [0, 0],
        "lag_packets": [2, 2], "lag_ns": [30, -1],
    }  # fmt: skip
    text = moves_text(moves, ["a > b"])
    assert "CPU 1 -> 2: 2 packets of a > b processed elsewhere, the first on CPU 2 0.0 us later" in text
    assert "CPU 2 -> 1: 2 packets of a > b processed elsewhere, until it moved again" in text


def test_a_reader_that_stays_has_no_moves() -> None:
    moves = reader_moves(*world([(10, 1), (20, 1)], [(5, 1, 7), (15, 1, 7)]))
    assert moves.n == 0
    assert moves_text(moves, []) == "no reader changed its CPU while packets came for it"


def test_rps_by_hash_is_predicted_where_the_hash_is_the_kernels_own() -> None:
    host = {
        "cpus": [{"cpu": cpu, "online": cpu != 3} for cpu in range(4)],
        "ifaces": {"eth0": {"queues": [{"queue": 0, "rps_cpus": "0,2-3"}, {"queue": 1, "rps_cpus": "1"}, {"queue": 2, "rps_cpus": "off"}]}},
    }  # fmt: skip
    maps = rps_maps(host, "eth0")
    assert maps == {0: [0, 2], 1: [1], 2: []}  # CPU 3 is offline: store_rps_map() leaves it out
    assert rps_maps(host, "eth1") == {}
    packets = Columns(
        {
            "rx_queue": np.array([0, 0, -1, 0, 1, 2, 0]),
            "skb_hash": np.array([0x7FFFFFFF, 0x80000000, 0x80000000, 0x80000000, -1, 5, 0x80000000]),
            "l4_hash": np.array([1, 1, 1, 0, -1, 1, 1]),
            "path_kind": np.array([3, 3, 3, 3, 3, 3, 0]),
        }
    )
    # Two CPUs share the hashes evenly; without l4_hash the kernel hashes anew; one CPU needs no hash; RPS off; no entry seen.
    assert predicted_cpus(packets, maps).tolist() == [0, 2, 2, -1, 1, -1, -1]


def test_delivered_is_where_the_socket_was_read_last() -> None:
    assert delivered(np.array([1, 1, -1, 0]), np.array([1, 0, 1, -1])).tolist() == [1, 0, -1, -1]
