"""Clocks of this machine: readings that repeat, recordings on another clock than MONOTONIC, and the envelope on a real floor.

The long part (``RXLAB_LONG=1``) records 20 s of its own and judges 200 random perturbations of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from rxlab.dataset.elsewhere import join_recordings
from rxlab.dataset.run import Run, open_run
from rxlab.follow.clockfit import NAT, fit_constant
from rxlab.follow.envelope import fit_envelope
from rxlab.host.clockread import read_clocks
from rxlab.host.journal import Transaction
from rxlab.record.capture import capture
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Workload
from rxlab.stages import STAGE_INDEX

SECOND = 10**9

MOVING_NS = 300


def record(folder: Path, testbed: Testbed, journal: Transaction, messages: int, clock: str = "CLOCK_MONOTONIC") -> Run:
    load = Workload(proto="udp", mode="open", rate=3_000.0, messages=messages)
    run = capture(folder, testbed=testbed, workload=load, transaction=journal, perf_clock=clock)
    return open_run(run.path)


def test_realtime_minus_monotonic_repeats_to_10_ns() -> None:
    readings = [read_clocks("during") for _ in range(400)]
    offsets = [fit_constant(readings[part::4]).offset_ns for part in range(4)]
    assert max(offsets) - min(offsets) <= 10


def test_recording_on_raw_is_converted_by_the_readings(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    """Judge: tcpdump's stamps, of another clock, lie inside netif_rx of their own packet; and the application's log."""
    run = record(tmp_path / "run", testbed, journal, 4_000, "CLOCK_MONOTONIC_RAW")
    assert run.perf.meta["clock"] == "CLOCK_MONOTONIC_RAW"
    joined = run.joined
    assert joined.clock.perf_clock == "CLOCK_MONOTONIC_RAW"
    assert joined.clock.stamp_evidence["bracket"] >= 0.99
    assert joined.clock.bound_ns <= 1_000
    result = run.verify()
    assert result["misjoined"] == 0
    assert result["checked"] >= 0.9 * result["data_packets"]
    # Without the conversion the two clocks are apart by the slewing since boot: nothing would match.
    raw = [reading["raw"] - reading["raw_before"] for reading in run.rundir.json("clock.json")["readings"]]
    if min(abs(offset) for offset in raw) > 1_000_000:
        first = run.perf.events["net:netif_receive_skb"]["time"][0]
        assert abs(int(first) - int(joined.time[joined.time != NAT].min())) > 100_000


def test_two_files_without_readings_give_the_same_pairs(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    """Judge: the run's own clock readings. perf.data and rx.pcap of ordinary UDP alone give the same frames, within the bound."""
    run = record(tmp_path / "run", testbed, journal, 6_000)
    alone = join_recordings(run.rundir.file("perf.data"), run.rundir.file("rx.pcap"), run.run["iface"])
    assert alone.clock.method == "brackets"
    assert alone.clock.stamp_position == "bracket"
    stack = STAGE_INDEX["netif_receive_skb"]
    frame = dict(zip(alone.time[:, stack].tolist(), alone.packets["pcap_frame"].tolist(), strict=True))
    true = dict(zip(run.joined.time[:, stack].tolist(), run.joined.packets["pcap_frame"].tolist(), strict=True))
    found = [at for at in true if true[at] > 0 and frame.get(at, 0) > 0]
    assert len(found) >= 0.99 * len(true)
    assert sum(frame[at] != true[at] for at in found) == 0
    stamp = run.joined.packets["pcap_time"][run.joined.packets["pcap_frame"] > 0]
    away = np.abs(alone.clock.to_monotonic(stamp) - run.joined.clock.to_monotonic(stamp))
    assert away.max() <= alone.clock.bound_ns + run.joined.clock.bound_ns
    assert alone.clock.bound_ns <= 2_000


@pytest.mark.skipif(os.environ.get("RXLAB_LONG") != "1", reason="on demand: RXLAB_LONG=1")
def test_bound_on_a_recording_nobody_has_seen(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    joined = record(tmp_path / "run", testbed, journal, 60_000).joined
    event = joined.time[:, STAGE_INDEX["softirq_raise"]]
    rows = np.flatnonzero((event != NAT) & (joined.packets["pcap_frame"] > 0))
    arrival, event = joined.clock.to_monotonic(joined.packets["pcap_time"][rows]), event[rows]
    # How fast the fastest packets are, second by second: busy neighbours of a guest shift it by hundreds of ns for seconds.
    second = (arrival - arrival[0]) // SECOND
    fastest = np.array([np.quantile((event - arrival)[second == at], 0.01) for at in np.unique(second)[:-1]])
    errors, bounds, within = [], [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        t = (arrival - arrival[0]).astype(np.float64)
        steered = rng.uniform(-100, 100) * 1e-6 * t + rng.choice([0.0, rng.uniform(0, 1_500)]) * np.sin(
            2 * np.pi * t / (20 * SECOND) + rng.uniform(0, 6.28)
        )
        steered += 0.5 * rng.choice([0.0, rng.uniform(-20, 20)]) * 1e-18 * t * t
        step = np.where(t > t[-1] / 2, rng.choice([0, 0, 37 * SECOND]), 0)
        true = arrival + int(rng.integers(-(10**13), 10**13)) + np.rint(steered).astype(np.int64) + step
        wrong = (rng.random(len(true)) < rng.choice([0.0, 0.0, 0.001, 0.01])) * rng.choice([-1, 1], len(true))
        quantum = int(rng.choice([1, 8, 64, 1_000]))
        stamp = (true + wrong * rng.integers(1_000, 50_000, len(true))) // quantum * quantum
        found = fit_envelope(stamp, event)
        if found.flags:
            continue
        error = found.to_event_clock(true, event) - arrival
        error = np.abs(error - np.median(error))
        errors.append(float(error.max()))
        bounds.append(found.typical_bound_ns)
        within.append(bool((error <= found.bound_at(true, event)).all()))
    print(f"the floor moved by {np.ptp(fastest):.0f} ns, {len(errors)} of 200 were not flagged")
    if np.ptp(fastest) > MOVING_NS:
        # What has shifted for seconds cannot be told from a clock that bends: it must be flagged.
        assert len(errors) <= 20
    if not errors:
        return
    print(
        f"{len(errors)} judged, every packet within in {np.mean(within):.4f}, median of the largest errors {np.median(errors):.0f}, "
        f"of the bounds {np.median(bounds):.0f} ns"
    )
    assert np.mean(within) >= 0.99
    # Both clocks of the guests this was written on go in steps of 10 ns: a smaller error is as good as none.
    # How many are not flagged is the machine's doing (none to 193 of 200 on one guest); that a still, dense floor is not is
    # test_envelope's.
    if len(errors) >= 20:
        assert np.median(bounds) <= 3 * max(np.median(errors), 10.0)
