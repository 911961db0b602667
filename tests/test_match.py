"""Packets <-> events: order-preserving, windowed, never nearest."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rxlab.follow.match import classify_stamp, match_by_flow, match_packets


def windows(event_time: np.ndarray, before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    return event_time - before, event_time + after


def test_a_stall_does_not_shift_equal_packets() -> None:
    """Ten equal packets, all delivered 5 ms late together: nearest-in-time would pair them with their neighbours."""
    stamp = np.arange(10) * 1_000_000
    event = stamp + 5_000_000
    low, high = windows(event, 100_000_000, 0)
    matched = match_packets(stamp, np.full(10, 64), low, high, np.full(10, 64), event)
    assert matched.event.tolist() == list(range(10))


def test_disjoint_windows_survive_losses_on_both_sides() -> None:
    rng = np.random.default_rng(5)
    event = np.cumsum(rng.integers(3_000, 90_000, 2_000))
    stamp = event + rng.integers(300, 900, 2_000)
    keep_event, keep_packet = rng.random(2_000) > 0.1, rng.random(2_000) > 0.1
    length = np.full(2_000, 116)
    low, high = windows(event, 300, 2_000)
    matched = match_packets(
        stamp[keep_packet],
        length[keep_packet],
        low[keep_event],
        high[keep_event],
        length[keep_event],
        event[keep_event],
    )
    true_event = np.flatnonzero(keep_event)
    truth = np.flatnonzero(keep_packet)
    got = np.where(matched.event >= 0, true_event[np.maximum(matched.event, 0)], -1)
    assert (got == np.where(keep_event[truth], truth, -1)).all()


@given(seed=st.integers(0, 5_000), n=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_result_is_one_to_one_in_windows_with_equal_lengths(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    event = np.sort(rng.integers(0, 50_000, n))
    stamp = np.sort(rng.integers(0, 50_000, n + 3))
    event_len, stamp_len = rng.integers(60, 62, n), rng.integers(60, 62, n + 3)
    low, high = windows(event, 2_000, 2_000)
    matched = match_packets(stamp, stamp_len, low, high, event_len, event)
    rows = np.flatnonzero(matched.event >= 0)
    chosen = matched.event[rows]
    assert len(np.unique(chosen)) == len(chosen)
    assert (stamp_len[rows] == event_len[chosen]).all()
    assert ((low[chosen] <= stamp[rows]) & (stamp[rows] <= high[chosen])).all()
    assert (np.diff(chosen[np.argsort(stamp[rows], kind="stable")]) > 0).all()


def test_two_events_for_one_packet_are_ambiguous() -> None:
    event = np.array([1_000, 1_200])
    low, high = windows(event, 500, 500)
    matched = match_packets(np.array([1_100]), np.array([64]), low, high, np.array([64, 64]), event)
    assert matched.ambiguous.tolist() == [True]


def test_no_packets_and_no_events() -> None:
    empty = np.empty(0, np.int64)
    assert not len(match_packets(empty, empty, empty, empty, empty, empty).event)
    one = np.array([5])
    assert match_packets(one, one, empty, empty, empty, empty).event.tolist() == [-1]


def test_stamp_position_is_told_from_the_data() -> None:
    driver = np.arange(500) * 50_000
    receive = driver + 6_000
    length, span = np.full(500, 100), np.full(500, 900)

    def position(stamp: np.ndarray, receive: np.ndarray = receive) -> str:
        return classify_stamp(stamp, length, driver, span, length, receive, length)[0]

    assert position(driver + 400) == "bracket"
    assert position(receive + 750) == "tap"
    assert position(driver - 30_000) == "nic"
    # A quick softirq brings the tap's stamp close behind the driver's call, but not into it.
    quick = driver + 1_500
    assert position(quick + 700, quick) == "tap"
    # A filter took one packet in ten: the others have events and no stamps.
    few = slice(None, None, 10)
    for stamp, where in ((driver + 400, "bracket"), (receive + 750, "tap"), (driver - 30_000, "nic")):
        assert classify_stamp(stamp[few], length[few], driver, span, length, receive, length)[0] == where
    empty = driver[:0]
    assert classify_stamp(driver, length, empty, empty, empty, empty, empty)[0] == "unknown"


def test_packets_of_two_queues_keep_their_flows() -> None:
    """Two CPUs hand up equal packets; one is slow between stamp and event, so order alone gives its packet to the other flow."""
    stamp = np.arange(20) * 100_000
    flow = np.arange(20) % 2
    # Two packets of flow 0 enter the stack after flow 1's next.
    event = stamp + np.where(np.isin(np.arange(20), (4, 12)), 150_000, 3_000)
    low = stamp - 500_000
    hashes = np.where(flow == 0, 11, 22)
    sizes = np.full(20, 64)
    every = np.ones(20, bool)
    plain = match_packets(stamp, sizes, low, event, sizes, event, every)
    assert (plain.event != np.arange(20)).any(), "order alone does not do, so that this test can fail"
    matched = match_by_flow(stamp, sizes, low, event, sizes, event, every, flow, hashes)
    assert matched.event.tolist() == list(range(20))


def test_a_flow_whose_hash_changes_is_still_matched() -> None:
    stamp = np.arange(8) * 10_000
    hashes = np.array([5, 5, 5, 5, 5, 5, 9, 9])
    sizes = np.full(8, 64)
    matched = match_by_flow(stamp, sizes, stamp, stamp + 900, sizes, stamp + 900, None, np.zeros(8, int), hashes)
    assert matched.event.tolist() == list(range(8))
