"""The join slab by slab: the rows of the whole join, bit by bit, wherever the recording is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rxlab.dataset import store
from rxlab.dataset.run import clock_of, machine_of, open_run
from rxlab.errors import UsageError
from rxlab.follow import carry, slabs
from rxlab.follow.join import Joined, join
from rxlab.follow.slabs import Reach, join_in_slabs
from rxlab.pipeline import analyze_run
from rxlab.stages import STATUSES
from tests.simulate import World, simulate
from tests.slab_builder import differences, slabs_of
from tests.test_handshake import connecting
from tests.test_join import run, worlds, wrong

DATA = Path(__file__).resolve().parent.parent / "data"
MS = 1_000_000
# A world lasts some tens of milliseconds: so short a reach cuts it in earnest.
SHORT = Reach(MS, MS, first=100)


def in_slabs(world: World, n: int, reach: Reach = SHORT) -> Joined:
    recording = slabs_of(
        world.events, world.packets, world.machine, n, lost=world.lost, lost_records=world.lost_records
    )
    return join_in_slabs(recording, world.clock, world.machine, reach)


@pytest.mark.parametrize(
    "recipe",
    [
        {"proto": "tcp"},
        {"proto": "udp"},
        # The reader is far behind: most packets wait across several slabs.
        {"proto": "tcp", "rps": True, "mean_gap_ns": 4_000, "work_ns": 25_000},
        {"proto": "udp", "rps": True, "mean_gap_ns": 4_000, "work_ns": 25_000},
        {"proto": "tcp", "merge_share": 0.3, "behind_ack": True, "gro": 4, "read_size": 10, "n": 50},
        {"proto": "tcp", "flows": 4, "readers": 2, "read_size": 700, "mean_gap_ns": 5_000},
        {
            "proto": "tcp",
            "swap_share": 0.1,
            "repeat_share": 0.05,
            "swap_depth": 3,
            "mean_gap_ns": 8_000,
            "work_ns": 25_000,
        },
        {"proto": "udp", "flows": 6, "sockets": 3, "readers": 3, "drop_share": 0.2, "mean_gap_ns": 5_000},
        {"proto": "udp", "polling": True, "peek": True, "mean_gap_ns": 8_000},
        {"proto": "udp", "flows": 6, "sockets": 3, "readers": 3, "closes": 75, "behind": True, "mean_gap_ns": 4_000},
        # What two readers contest, and nobody is known to have read, is still so when a slab tells of it again.
        {
            "proto": "udp",
            "readers": 2,
            "shared": True,
            "entries": True,
            "stall_share": 0.1,
            "mean_gap_ns": 8_000,
            "work_ns": 10_000,
            "n": 600,
        },
        # A slab may have no datagram of the flow with the highest number.
        {"proto": "udp", "flows": 40, "mean_gap_ns": 200_000, "n": 60},
    ],
)
def test_any_cut_gives_the_same_rows(recipe: dict[str, Any]) -> None:
    world = simulate(**{"n": 150, **recipe})
    whole = run(world)
    for n in (3, 17):
        assert differences(whole, in_slabs(world, n)) == {}


@given(recipe=worlds(), n=st.integers(2, 20), reach=st.sampled_from([MS, 5 * MS]))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_clean_world_is_the_same_in_slabs(recipe: dict[str, Any], n: int, reach: int) -> None:
    # A reader that is behind reads on long after the last packet; more of them would only take longer.
    world = simulate(**recipe)
    assert differences(run(world), in_slabs(world, n, Reach(reach, reach, first=60))) == {}


@pytest.mark.parametrize("busy", [False, True])
def test_handshakes_are_the_same_in_slabs(busy: bool) -> None:
    """SYNs wait for the ACK that shows their listener, accept() is told when all of them were seen."""
    world = connecting(busy=busy)
    whole = run(world)
    assert (whole.packets["accept_time"] > 0).any() != busy
    # The handshakes come first, so only many slabs cut between them, and a reach shorter than one handshake.
    assert differences(whole, in_slabs(world, 300, Reach(20_000, 20_000, first=2, patience=1))) == {}


@pytest.mark.parametrize("name", ["tcp-rps-on", "udp-rps-off", "http"])
def test_recorded_runs_are_the_same_in_slabs(name: str) -> None:
    whole = open_run(DATA / name)
    clock, machine = clock_of(whole.rundir), machine_of(whole.run, whole.host)
    for n in (9,):
        events = {event: whole.perf.events[event] for event in whole.perf.events}
        recording = slabs_of(events, whole.packets, machine, n, piece=97)
        joined = join_in_slabs(recording, clock, machine, Reach(20 * MS, 20 * MS, first=5))
        assert differences(whole.joined, joined) == {}


def test_a_capture_that_begins_late_is_the_same_in_slabs() -> None:
    """The first slabs have copies, and no packet."""
    whole = open_run(DATA / "tcp-rps-on")
    clock, machine = clock_of(whole.rundir), machine_of(whole.run, whole.host)
    events = {event: whole.perf.events[event] for event in whole.perf.events}
    late = whole.packets.take(np.arange(whole.packets.n * 3 // 4, whole.packets.n))
    joined = join_in_slabs(
        slabs_of(events, late, machine, 9, piece=97), clock, machine, Reach(5 * MS, 5 * MS, first=60, patience=1)
    )
    assert (joined.packets["status"] == STATUSES.index("complete")).any()
    assert differences(join(events, late, clock, machine), joined) == {}


def test_a_run_analysed_in_chunks_is_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from its files in pieces, judged by its log and the counters, written in blocks: nothing differs."""
    whole, chunked = open_run(DATA / "udp-rps-on"), open_run(DATA / "udp-rps-on", chunks=2_000)
    assert chunked.verify() == whole.verify()
    assert chunked.missing_stages() == whole.missing_stages()
    expected = whole.analyze()
    monkeypatch.setattr(store, "BLOCK", 97)
    written = chunked.analyze(tmp_path / "chunked.nc")
    assert written.equals(expected)
    assert all(written.attrs[name] == expected.attrs[name] for name in ("verdict", "reasons", "gates"))
    assert written["packets/comm"].attrs["flag_meanings"] == expected["packets/comm"].attrs["flag_meanings"]


def test_lost_events_leave_only_true_rows_in_slabs() -> None:
    """A slab knows less of what comes later, so fewer rows may be certain; none is wrong, and the run is never trusted."""
    for seed, proto, burst in ((0, "tcp", 1), (1, "udp", 30)):
        world = simulate(seed=seed, proto=proto, n=300, mean_gap_ns=8_000, lost_share=0.1, lost_burst=burst)
        whole, joined = run(world), in_slabs(world, 13)
        assert joined.verdict != "trusted"
        assert not wrong(joined, world).any()
        assert joined.packets["trusted"].sum() >= 0.9 * whole.packets["trusted"].sum()


def test_packets_that_are_forgotten_are_told() -> None:
    """With room for five waiting packets the rest is given up: said so, and nothing is joined wrong for it."""
    world = simulate(proto="udp", n=300, mean_gap_ns=4_000, work_ns=25_000)
    joined = in_slabs(world, 20, Reach(MS, MS, first=100, most=5))
    assert joined.verdict == "degraded"
    assert "waited for a reader longer" in joined.reasons[-1]
    assert not wrong(joined, world).any()
    assert joined.packets.n == world.packets.n


def test_chunks_that_cannot_be_meant_are_refused() -> None:
    for few in (0, 10, 999):
        with pytest.raises(UsageError, match=f"found {few}, expected at least 1,000"):
            open_run(DATA / "http", chunks=few)
    with pytest.raises(UsageError, match="aligned as a whole: no --chunks. Leave it out"):
        analyze_run(None, perf=DATA / "http" / "perf.data", pcap=DATA / "http" / "rx.pcap", chunks=1_000)


class TestMutations:
    """A join in slabs that forgets something must differ from the whole join."""

    WORLD: dict[str, Any] = {"n": 300, "rps": True, "mean_gap_ns": 4_000, "work_ns": 25_000, "read_size": 1_000}

    @pytest.mark.parametrize("proto", ["tcp", "udp"])
    def test_forgotten_open_packets_are_missed(self, monkeypatch: pytest.MonkeyPatch, proto: str) -> None:
        world = simulate(proto=proto, **self.WORLD)
        real = slabs.open_packets
        monkeypatch.setattr(slabs, "open_packets", lambda *args: np.zeros_like(real(*args)))
        assert "time" in differences(run(world), in_slabs(world, 11))

    def test_forgotten_merged_heads_are_missed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = simulate(
            merge_share=0.3, behind_ack=True, gro=4, read_size=10, n=100, mean_gap_ns=30_000, polling=True, stamp="tap"
        )
        monkeypatch.setattr(carry, "_stream_heads", lambda followed, told, is_open: np.zeros_like(told))
        assert "status" in differences(run(world), in_slabs(world, 40))

    def test_forgotten_wakes_are_missed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = simulate(proto="tcp", **self.WORLD)
        monkeypatch.setattr(slabs, "carried_events", lambda *args: {})
        assert differences(run(world), in_slabs(world, 11))
