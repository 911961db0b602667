"""Since when a reader slept, how it reads and where it read last: the simulator's truth back, or nothing."""

from __future__ import annotations

import numpy as np
import pytest

from rxlab.follow.clockfit import NAT
from rxlab.follow.join import Joined, join
from rxlab.read.columns import Columns
from rxlab.stages import READER_KINDS, STAGE_INDEX
from tests.simulate import READER, World, simulate

DRIVER, RX, SWITCH = (STAGE_INDEX[name] for name in ("driver_rx", "netif_receive_skb", "switch_in"))


def run(world: World) -> Joined:
    return join(
        world.events, world.packets, world.clock, world.machine, lost=world.lost, lost_records=world.lost_records
    )


@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("mean_gap_ns", [5_000, 60_000])
def test_a_reader_slept_since_it_left_the_cpu(proto: str, mean_gap_ns: int) -> None:
    world = simulate(proto=proto, mean_gap_ns=mean_gap_ns, flows=3, sockets=3, readers=2)
    joined = run(world)
    asleep, ran = joined.packets["sleep_time"], joined.time[:, SWITCH] != NAT
    assert ran.sum() > 50
    assert (asleep[ran] == world.truth["slept"][ran]).all()
    assert (joined.packets["sleep_cpu"][ran] == 1 + joined.packets["tid"][ran] - READER).all()
    # One that was running did not sleep for this packet.
    assert (asleep[~ran] == NAT).all()


@pytest.mark.parametrize(
    "recipe", [{"lost_share": 0.2}, {"lost_share": 0.3, "lost_burst": 20}, {"blind": ((1, 2_360_000, 9_000_000),)}]
)
def test_where_switches_are_missing_no_sleep_is_made_up(recipe: dict) -> None:
    world = simulate(n=800, mean_gap_ns=20_000, **recipe)
    joined = run(world)
    told = (joined.packets["sleep_time"] != NAT) & joined.packets["trusted"]
    assert told.any()
    assert (joined.packets["sleep_time"][told] == world.truth["slept"][told]).all()


def test_a_preemption_is_no_sleep() -> None:
    """Every switch away from the reader was one of a task still runnable: prev_state says so."""
    world = simulate(mean_gap_ns=60_000)
    switch = world.events["sched:sched_switch"]
    world.events["sched:sched_switch"] = switch.with_columns(prev_state=np.where(switch["prev_state"] == 1, 0x100, 0))
    assert (run(world).packets["sleep_time"] == NAT).all()


def test_readers_by_io_uring_are_told_from_those_by_system_call() -> None:
    world = simulate(proto="udp", flows=6, sockets=3, readers=3, rings=1, mean_gap_ns=20_000)
    packets = run(world).packets
    by_ring = packets["tid"] == READER
    assert 0 < by_ring.sum() < packets.n
    assert (
        packets["reader_kind"] == np.where(by_ring, READER_KINDS.index("io_uring"), READER_KINDS.index("syscall"))
    ).all()
    del world.events["io_uring:io_uring_complete"]
    assert (run(world).packets["reader_kind"] == READER_KINDS.index("unknown")).all()


def test_a_completion_of_another_request_is_no_label() -> None:
    """The reader also writes files by a ring: those completions have another result."""
    world = simulate(rings=1, mean_gap_ns=60_000)
    done = world.events["io_uring:io_uring_complete"]
    world.events["io_uring:io_uring_complete"] = done.with_columns(res=np.full(done.n, 4096))
    kinds = run(world).packets["reader_kind"]
    assert (kinds == READER_KINDS.index("syscall")).all()


def shared_socket(steered: int) -> tuple[World, np.ndarray]:
    """A world of three readers, on CPUs of their own, of one socket; and the CPU of the call that returned last before each packet."""
    world = simulate(proto="udp", readers=3, shared=True, mean_gap_ns=20_000, work_ns=50_000, n=600)
    truth = world.truth
    order = np.argsort(truth["returned"])
    before = np.searchsorted(truth["returned"][order], truth["stages"][:, steered]) - 1
    return world, np.where(before >= 0, 1 + truth["tid"][order[before]] - READER, -1)


def test_rfs_aims_at_where_the_socket_was_read_last() -> None:
    world, expected = shared_socket(DRIVER)
    assert len(set(expected.tolist())) == 4
    assert (run(world).packets["last_read_cpu"] == expected).all()


def test_where_a_call_is_lost_the_one_before_is_not_taken_for_it() -> None:
    """As `--events min` records: without the driver's events the packet is steered when the stack gets it."""
    world, expected = shared_socket(RX)
    del world.events["net:netif_rx_entry"], world.events["net:netif_rx"]
    calls = world.events["sock:sock_recv_length"]
    # The last call before some packet, made on another CPU than the call before it.
    last = np.searchsorted(calls["time"], world.truth["received"]) - 1
    gone = int(last[np.flatnonzero((last > calls.n // 2) & (calls["cpu"][last] != calls["cpu"][last - 1]))[0]])
    time, cpu = int(calls["time"][gone]), int(calls["cpu"][gone])
    found_room = min(
        int(events["time"][(events["cpu"] == cpu) & (events["time"] > time)].min())
        for events in world.events.values()
        if ((events["cpu"] == cpu) & (events["time"] > time)).any()
    )
    world.events["sock:sock_recv_length"] = calls.take(np.delete(np.arange(calls.n), gone))
    world.lost = 1
    world.lost_records = Columns(
        {
            "time": np.array([found_room + 40]), "cpu": np.array([cpu], np.int32), "count": np.array([1]),
            "kind": np.array([b"LOST"], "S12"),
        }
    )  # fmt: skip
    said = run(world).packets["last_read_cpu"]
    known = said >= 0
    assert 0.9 * len(said) < known.sum() < (expected >= 0).sum()
    assert (said[known] == expected[known]).all()
