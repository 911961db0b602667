"""Since when a reader slept, how it reads and where it read last: the simulator's truth back, or nothing."""

from __future__ import annotations

import numpy as np
import pytest

from rxlab.follow.clockfit import NAT
from rxlab.follow.join import Joined, join
from rxlab.stages import READER_KINDS, STAGE_INDEX
from tests.simulate import READER, World, simulate

DRIVER, SWITCH = STAGE_INDEX["driver_rx"], STAGE_INDEX["switch_in"]


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


@pytest.mark.parametrize("lost_share", [0.0, 0.2])
def test_rfs_aims_at_where_the_socket_was_read_last(lost_share: float) -> None:
    """Each socket has its own reader on a CPU of its own: that CPU, once one of the socket's packets was read."""
    world = simulate(proto="udp", flows=6, sockets=3, readers=3, mean_gap_ns=20_000, n=600, lost_share=lost_share)
    joined = run(world)
    packets, truth = joined.packets, world.truth
    said = packets["last_read_cpu"]
    socket = world.packets["flow"] % 3
    read = said >= 0
    assert read.any()
    assert (said[read] == 1 + socket[read]).all()
    if not lost_share:
        for number in range(3):
            mine = np.flatnonzero(socket == number)
            first = truth["returned"][mine].min()
            assert (read[mine] == (joined.time[mine, DRIVER] > first)).all()
