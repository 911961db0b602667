"""Matching with unknown clocks: never a wrong pair, and a refusal where one would be a guess."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from simulate import MAC_LOCAL, OFFSET, simulate

from rxlab.errors import ClockError, UsageError
from rxlab.follow.align import align_recordings
from rxlab.follow.clockmatch import Pairs, match_sequences, match_tcp_keys
from rxlab.read.columns import Columns

SECOND = 10**9
N = 100_000


def poisson(seed: int, n: int = N, rate: int = 3_000) -> tuple[np.ndarray, np.ndarray]:
    """Return stamps and events of one-size packets: other epochs, 18 ppm and an oscillation of 1.5 us apart."""
    rng = np.random.default_rng(seed)
    arrival = 10**12 + np.cumsum(rng.exponential(SECOND / rate, n)).astype(np.int64)
    delay = 3_000 + rng.exponential(300, n) + rng.exponential(3_000, n) * (rng.random(n) < 0.5)
    t = arrival - arrival[0]
    clock = 37_000_123_456 + 18e-6 * t + 1_500 * np.sin(2 * np.pi * t / (20 * SECOND))
    return arrival + np.rint(clock).astype(np.int64), np.maximum.accumulate(arrival + delay.astype(np.int64))


def keep(case: str, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Return which packets and which events are left."""
    packets, events = np.ones(n, bool), np.ones(n, bool)
    rng = np.random.default_rng(77)
    if case == "packets lack a fifth":
        packets[int(0.3 * n) : int(0.5 * n)] = False
    elif case == "events lack the first fifth":
        events[: n // 5] = False
    elif case == "events lack a fifth":
        events[int(0.45 * n) : int(0.65 * n)] = False
    elif case == "1 % of the packets missing":
        packets = rng.random(n) > 0.01
    elif case == "1 % of the events missing":
        events = rng.random(n) > 0.01
    return packets, events


CASES = (
    "nothing missing",
    "packets lack a fifth",
    "events lack the first fifth",
    "events lack a fifth",
    "1 % of the packets missing",
    "1 % of the events missing",
)


def assert_right(pairs: Pairs, packets: np.ndarray, events: np.ndarray, least: float) -> None:
    true_packet, true_event = np.flatnonzero(packets)[pairs.packet], np.flatnonzero(events)[pairs.event]
    assert (true_packet != true_event).sum() == 0
    assert len(pairs.packet) >= least * (packets & events).sum()


@pytest.mark.parametrize("case", CASES)
def test_poisson_udp_has_no_wrong_pair(case: str) -> None:
    stamp, event = poisson(1)
    packets, events = keep(case)
    length = np.full(N, 100)
    pairs = match_sequences(stamp[packets], length[packets], event[events], length[events])
    assert_right(pairs, packets, events, 0.99)
    assert pairs.ratio >= 10
    assert pairs.envelope is not None
    error = pairs.envelope.to_event_clock(stamp) - (event - 3_000)
    assert np.median(error) == pytest.approx(0, abs=5_000), "the clock found on the way is right to the smallest delay"


@pytest.mark.parametrize("case", CASES)
def test_tcp_request_response_has_no_wrong_pair(case: str) -> None:
    """Eight connections of equal requests and replies; ACK numbers wrap."""
    rng = np.random.default_rng(3)
    connection = rng.integers(0, 8, N)
    turn = np.zeros(N, np.int64)
    for number in range(8):
        turn[connection == number] = np.arange((connection == number).sum())
    base = 2**32 - 300_000 + connection * 1_000
    una, ack = (base + 64 * turn) % 2**32, (base + 64 * (turn + 1)) % 2**32
    length = np.full(N, 200)
    local, remote = np.full(N, 80), 5_000 + connection
    packets, events = keep(case)
    pairs = match_tcp_keys(
        (local[packets], remote[packets]),
        ack[packets],
        length[packets],
        (local[events], remote[events]),
        una[events],
        length[events],
        event_nxt=ack[events],
    )
    assert_right(pairs, packets, events, 0.98)


def test_constant_rate_and_size_is_refused() -> None:
    rng = np.random.default_rng(5)
    arrival = 10**12 + np.arange(20_000) * 300_000
    event = np.maximum.accumulate(arrival + 3_000 + rng.exponential(1_000, len(arrival)).astype(np.int64))
    length = np.full(len(arrival), 100)
    with pytest.raises(ClockError, match=r"only .* times better than the next.*rxlab capture"):
        match_sequences(arrival[2_000:] + 37 * SECOND, length[2_000:], event, length)


def test_losses_at_random_on_both_sides_are_refused() -> None:
    stamp, event = poisson(7, 40_000)
    rng = np.random.default_rng(8)
    packets, events = rng.random(len(stamp)) > 0.02, rng.random(len(stamp)) > 0.02
    length = np.full(len(stamp), 100)
    with pytest.raises(ClockError, match="too many packets are missing|only .* times better"):
        match_sequences(stamp[packets], length[packets], event[events], length[events])


BEYOND = ("5 % of the packets", "5 % of the events", "1 % of both", "half of the packets in one piece")


@pytest.mark.parametrize("case", BEYOND)
def test_losses_at_random_beyond_what_is_proved_are_refused(case: str) -> None:
    stamp, event = poisson(12, 30_000)
    rng = np.random.default_rng(13)
    packets, events = np.ones(len(stamp), bool), np.ones(len(stamp), bool)
    share = 0.01 if case == "1 % of both" else 0.05
    if case != "5 % of the events":
        packets = rng.random(len(stamp)) > share
    if case in ("5 % of the events", "1 % of both"):
        events = rng.random(len(stamp)) > share
    if case == BEYOND[3]:
        packets = np.arange(len(stamp)) < len(stamp) // 2
    length = np.full(len(stamp), 100)
    if case != BEYOND[3]:
        with pytest.raises(ClockError, match=r"too many packets are missing.*rxlab capture|only .* times better"):
            match_sequences(stamp[packets], length[packets], event[events], length[events])
        return
    pairs = match_sequences(stamp[packets], length[packets], event[events], length[events])
    assert_right(pairs, packets, events, 0.99)


def test_delays_that_vary_more_than_the_packets_distance_are_refused() -> None:
    """Behind RPS a packet waits for tens of microseconds: neighbours of one size could change places unseen."""
    stamp, _ = poisson(14, 20_000)
    rng = np.random.default_rng(15)
    arrival = 10**12 + np.cumsum(np.random.default_rng(14).exponential(SECOND / 3_000, 20_000)).astype(np.int64)
    event = np.maximum.accumulate(arrival + 1_300 + rng.gamma(3.0, 12_000, len(arrival)).astype(np.int64))
    length = np.full(len(stamp), 100)
    with pytest.raises(ClockError, match=r"delays vary too much|only .* times better"):
        match_sequences(stamp, length, event, length)


def test_stamps_that_follow_their_events_are_refused_and_exchanged_sides_match() -> None:
    """Of a stalled packet the event lies before the window it is looked for in: a neighbour's would be taken."""
    stamp, event = poisson(16, 20_000)
    rng = np.random.default_rng(17)
    stall = rng.exponential(300, len(stamp)) + np.where(rng.random(len(stamp)) < 0.0005, 30_000, 0)
    event = np.maximum.accumulate(stamp - 37 * SECOND + 3_000 + stall.astype(np.int64))
    length = np.full(len(stamp), 100)
    assert_right(match_sequences(stamp, length, event, length), stamp > 0, event > 0, 0.99)
    with pytest.raises(ClockError, match="stamps follow the events"):
        match_sequences(event, length, stamp, length)


def test_captures_of_different_traffic_are_refused() -> None:
    length = np.full(20_000, 100)
    with pytest.raises(ClockError):
        match_sequences(poisson(9, 20_000)[0], length, poisson(10, 20_000)[1], length)


def test_captures_whose_lengths_agree_nowhere_are_refused_without_a_warning() -> None:
    stamp, event = poisson(9, 2_000)
    with pytest.raises(ClockError):
        match_sequences(stamp, np.full(2_000, 100), event, np.full(2_000, 200))


def test_a_handful_is_refused() -> None:
    few = np.arange(20) * 1_000
    with pytest.raises(ClockError, match="too few packets"):
        match_sequences(few, few, few, few)


def on_devices(events: Mapping[str, Columns], counts: Mapping[str, int]) -> dict[str, Columns]:
    """Return the events with the receptions of other devices behind those of eth0."""
    receive = events["net:netif_receive_skb"]
    rows = np.arange(receive.n)
    added = [rows[:count] for count in counts.values()]
    grown = receive.take(np.concatenate([rows, *added]))
    name = np.repeat(np.arange(len(counts) + 1), [receive.n, *counts.values()]).astype(receive["name"].dtype)
    grown = grown.with_columns(name=name)
    grown.attrs["categories"] = {**receive.attrs["categories"], "name": ["eth0", *counts]}
    return {**events, "net:netif_receive_skb": grown}


def test_several_devices_are_named_and_one_has_to_be_chosen() -> None:
    world = simulate(seed=11, n=300, proto="udp")
    several = on_devices(world.events, {"eth1": 290, "docker0": 3, "lo": 299})
    with pytest.raises(UsageError) as refused:
        align_recordings(several, world.packets)
    assert refused.value.line() == (
        "the recording holds several interfaces, and the capture does not say which one it is of: found "
        "eth0 (300 packets), lo (299 packets), eth1 (290 packets), docker0 (3 packets). Give --iface eth0 or --iface eth1."
    )
    with pytest.raises(UsageError, match=r"--iface eth7: no packet was received on this interface: found eth0 \(300"):
        align_recordings(several, world.packets, iface="eth7")


def test_the_device_that_a_pcapng_names_is_taken_and_so_is_the_only_one() -> None:
    world = simulate(seed=11, n=1_500, proto="udp", mean_gap_ns=200_000)
    several = on_devices(world.events, {"eth1": 290})
    packets = world.packets.with_columns(tcp_flags=np.zeros(world.packets.n, np.uint16))
    packets.attrs["interfaces"] = [{"id": 0, "linktype": 1, "name": "eth0"}]
    assert align_recordings(several, packets)[1] == "eth0"
    packets.attrs["interfaces"] = [{"id": 0, "linktype": 1}]
    assert align_recordings(on_devices(world.events, {"docker0": 63, "lo": 900}), packets)[1] == "eth0"


@pytest.mark.parametrize("stamp", ["tap", "bracket"])
@pytest.mark.parametrize("drift", [0.0, 40e-6])
def test_recordings_of_others_are_aligned_within_the_bound(stamp: str, drift: float) -> None:
    world = simulate(seed=11, n=1_500, proto="udp", stamp=stamp, mean_gap_ns=200_000)
    time = world.packets["time"]
    moved = time + 5 * 3_600 * SECOND + np.rint(drift * (time - time[0])).astype(np.int64)
    flags = np.zeros(len(time), np.uint16)
    clock, iface, macs = align_recordings(
        world.events,
        world.packets.with_columns(time=moved, tcp_flags=flags),
        perf_clock="" if drift else "CLOCK_MONOTONIC",
    )
    error = clock.to_monotonic(moved) - (time - OFFSET)
    assert (iface, macs) == ("eth0", {MAC_LOCAL})
    assert clock.method == "brackets"
    assert np.abs(error).max() <= clock.bound_ns
    assert clock.bound_ns <= 10_000
    # The simulator's delays are steady, so that a constant could hide which of two places the stamp has: then it is said.
    assert clock.stamp_position == stamp or "ambiguous_position" in clock.flags


def test_stamps_before_every_event_have_a_bound_per_segment() -> None:
    """As a NIC's are, before an interrupt that takes its time: events on one side only, so up to one constant."""
    world = simulate(seed=14, n=6_000, proto="udp", stamp="bracket", mean_gap_ns=1_000_000)
    time = world.packets["time"]
    t = (time - time[0]).astype(np.float64)
    rng = np.random.default_rng(15)
    before = rng.exponential(60, len(t)) + rng.exponential(4_000, len(t)) * (rng.random(len(t)) < 0.5)
    arrival = time - 9_000 - before.astype(np.int64)
    moved = arrival + np.rint(40e-6 * t + 700 * np.sin(2 * np.pi * t / (20 * SECOND))).astype(np.int64)
    flags = np.zeros(len(time), np.uint16)
    clock, _, _ = align_recordings(world.events, world.packets.with_columns(time=moved, tcp_flags=flags))
    assert (clock.method, clock.stamp_position) == ("envelope", "nic")
    bound = clock.segments["bound"]
    assert clock.segments.n == len(bound) >= 5
    assert bound.max() == clock.bound_ns > np.median(bound)
    error = clock.to_monotonic(moved) - (arrival - OFFSET)
    segment = np.maximum(np.searchsorted(clock.segments["start_real"], moved, side="right") - 1, 0)
    assert (np.abs(error - np.median(error)) <= bound[segment]).all()


def test_packets_on_loopback_are_aligned() -> None:
    """Both addresses are zero there, and what is sent is what is received."""
    world = simulate(seed=11, n=1_500, proto="udp", stamp="tap", mean_gap_ns=200_000)
    receive = world.events["net:netif_receive_skb"]
    receive.attrs["categories"] = {**receive.attrs["categories"], "name": ["lo"]}
    zero = np.zeros(world.packets.n, np.uint64)
    packets = world.packets.with_columns(src_mac=zero, dst_mac=zero, tcp_flags=zero.astype(np.uint16))
    clock, iface, macs = align_recordings(world.events, packets, perf_clock="CLOCK_MONOTONIC")
    error = clock.to_monotonic(packets["time"]) - (packets["time"] - OFFSET)
    assert (iface, macs) == ("lo", {0})
    assert np.abs(error).max() <= clock.bound_ns <= 10_000


def test_packets_that_stall_between_the_driver_and_their_stamp_are_aligned() -> None:
    """One in 200: with the driver's event taken for one that follows the stamp they look lost on both sides."""
    world = simulate(seed=12, n=4_000, proto="udp", stamp="bracket", mean_gap_ns=300_000)
    rng = np.random.default_rng(13)
    entry = world.events["net:netif_rx_entry"]
    stall = np.where(rng.random(entry.n) < 0.005, rng.integers(40_000, 150_000, entry.n), rng.integers(0, 900, entry.n))
    time, flags = world.packets["time"], np.zeros(world.packets.n, np.uint16)
    clock, _, _ = align_recordings(
        {**world.events, "net:netif_rx_entry": entry.with_columns(time=entry["time"] - stall)},
        world.packets.with_columns(time=time + 7 * SECOND, tcp_flags=flags),
        perf_clock="CLOCK_MONOTONIC",
    )
    error = clock.to_monotonic(time + 7 * SECOND) - (time - OFFSET)
    assert np.abs(error).max() <= clock.bound_ns <= 10_000
