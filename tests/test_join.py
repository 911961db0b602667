"""The join on simulated worlds: the truth back, exactly, or a row that says it cannot be known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rxlab.errors import MissingEventError
from rxlab.follow import queues
from rxlab.follow.clockfit import NAT
from rxlab.follow.join import Joined, join
from rxlab.follow.status import FLAGGED
from rxlab.stages import ATTRIBUTIONS, STAGE_INDEX, STATUSES
from tests.simulate import World, simulate

RX, COPY, RECV = (STAGE_INDEX[name] for name in ("netif_receive_skb", "copy", "recvmsg"))


def run(world: World) -> Joined:
    return join(world.events, world.packets, world.clock, world.machine, lost=world.lost)


def names(joined: Joined) -> np.ndarray:
    return np.asarray(STATUSES)[joined.packets["status"]]


def wrong(joined: Joined, world: World) -> np.ndarray:
    """Rows that claim a receive call, or a copy, that is not the true one."""
    believed = ~np.isin(names(joined), FLAGGED)
    claims = believed & (joined.time[:, RECV] != NAT)
    bad = claims & (joined.time[:, RECV] != world.truth["returned"])
    copies = believed & (joined.time[:, COPY] != NAT)
    return bad | (copies & (joined.time[:, COPY] != world.truth["copied"]))


@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("rps", [False, True])
@pytest.mark.parametrize("stamp", ["tap", "bracket"])
@pytest.mark.parametrize("mean_gap_ns", [4_000, 60_000])
def test_clean_world_comes_back_exactly(proto: str, rps: bool, stamp: str, mean_gap_ns: int) -> None:
    world = simulate(proto=proto, rps=rps, stamp=stamp, mean_gap_ns=mean_gap_ns)
    joined = run(world)
    assert joined.clock.stamp_position == stamp
    assert (joined.time[:, RX] == world.truth["received"]).all()
    assert (joined.time[:, RECV] == world.truth["returned"]).all()
    if proto == "tcp":
        assert (joined.time[:, COPY] == world.truth["copied"]).all()
    assert set(names(joined)) == {"complete"}
    assert joined.verdict == "trusted"
    moved = joined.packets["rps_cpu"] >= 0
    assert moved.all() if rps else not moved.any()


@given(
    seed=st.integers(0, 10_000),
    proto=st.sampled_from(["tcp", "udp"]),
    rps=st.booleans(),
    gap=st.sampled_from([2_000, 8_000, 30_000]),
    read_size=st.sampled_from([10, 700, 65_536]),
    work=st.sampled_from([1_500, 25_000]),
    merge=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_clean_world_has_no_wrong_row(
    seed: int, proto: str, rps: bool, gap: int, read_size: int, work: int, merge: float
) -> None:
    """Small reads, large reads, merged skbs and reused addresses: nothing is joined wrongly."""
    # A UDP read smaller than its datagram discards the rest: the simulator models whole datagrams only.
    size = 65_536 if proto == "udp" else read_size
    world = simulate(
        seed=seed, n=120, proto=proto, rps=rps, mean_gap_ns=gap, read_size=size, merge_share=merge, work_ns=work
    )
    joined = run(world)
    assert not wrong(joined, world).any()
    assert (names(joined) == "complete").mean() > 0.97


@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("cpu", [0, 1])
def test_blind_window_is_flagged_and_nothing_after_it_is_shifted(proto: str, cpu: int) -> None:
    world = simulate(proto=proto, rps=True, n=400, mean_gap_ns=40_000, blind=((cpu, 4_000_000, 4_700_000),))
    joined = run(world)
    assert not wrong(joined, world).any()
    time = joined.clock.to_monotonic(joined.packets["pcap_time"]) - 5_000_000_000
    after = time > 7_000_000
    assert after.sum() > 100
    assert (names(joined)[after] == "complete").all()
    assert (names(joined) != "complete").sum() > 3


@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_lost_events_degrade_the_verdict(proto: str, share: float, seed: int) -> None:
    world = simulate(seed=seed, proto=proto, n=400, mean_gap_ns=30_000, lost_share=share)
    joined = run(world)
    assert joined.verdict != "trusted"
    assert wrong(joined, world).mean() <= 0.01


def test_few_addresses_are_told_apart_by_generation() -> None:
    """Every address carries a packet of every third: only generations keep them apart."""
    world = simulate(n_addresses=3, mean_gap_ns=60_000)
    assert not wrong(run(world), world).any()


def test_attribution_follows_the_load() -> None:
    quiet = run(simulate(mean_gap_ns=200_000))
    busy = run(simulate(mean_gap_ns=2_000, work_ns=20_000))
    share = {
        label: (joined.packets["attribution"] == ATTRIBUTIONS.index("own_wake")).mean()
        for label, joined in (("quiet", quiet), ("busy", busy))
    }
    assert share["quiet"] > 0.95
    assert share["busy"] < 0.2


def test_shuffled_packet_order_changes_nothing() -> None:
    world = simulate(proto="udp", mean_gap_ns=50_000)
    order = np.random.default_rng(3).permutation(world.packets.n)
    shuffled = join(world.events, world.packets.take(order), world.clock, world.machine)
    back = np.argsort(shuffled.packets["pcap_frame"])
    assert (shuffled.time[back] == run(world).time).all()


def test_missing_event_is_named() -> None:
    world = simulate(n=20)
    del world.events["net:netif_receive_skb"]
    with pytest.raises(MissingEventError, match="netif_receive_skb"):
        run(world)


@pytest.mark.parametrize(
    ("gone", "stage"),
    [("sched:sched_waking", "waking"), ("net:netif_rx_entry", "driver_rx"), ("irq:softirq_entry", "softirq")],
)
def test_missing_optional_event_costs_its_stage_only(gone: str, stage: str) -> None:
    world = simulate(n=100)
    del world.events[gone]
    world.events.pop("net:netif_rx", None)
    joined = run(world)
    assert (joined.time[:, STAGE_INDEX[stage]] == NAT).all()
    assert not wrong(joined, world).any()
    assert (joined.time[:, RECV] == world.truth["returned"]).all()


class TestMutations:
    """A join broken on purpose must be caught by a judge that does not know how it was broken."""

    def test_shifted_receive_is_caught(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = simulate(proto="udp", mean_gap_ns=60_000)
        real = queues._consume_queue

        def shifted(result, packets, ready_rank, payload_len, calls, woken):  # type: ignore[no-untyped-def]
            real(result, packets, ready_rank, payload_len, calls, np.where(woken >= 0, woken + 1, woken))

        monkeypatch.setattr(queues, "_consume_queue", shifted)
        joined = run(world)
        assert wrong(joined, world).any() or joined.verdict != "trusted"

    def test_ignored_generations_are_caught(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Links that reach into an address's next life run against the stage order, which the gate counts."""
        from rxlab.follow import kernelpath

        world = simulate(n_addresses=3, mean_gap_ns=60_000, lost_share=0.2)
        honest = run(world).gates["order"]["violations"]
        monkeypatch.setattr(
            kernelpath, "_end_of_life", lambda receive, events: np.full(receive.n, np.iinfo(np.int64).max)
        )
        broken = run(world)
        assert broken.gates["order"]["violations"] >= honest + 20
        assert broken.verdict != "trusted"
