"""A small draw of every scenario, judged by the application's log, the counters, the stamps and bpftrace (long_draw.py: the million)."""

from __future__ import annotations

from pathlib import Path

import pytest
from judging import Row, draw
from scenarios import SCENARIOS, Scenario, record, witness_of
from witness import Seen, judge

from rxlab.dataset.run import open_run
from rxlab.host.journal import Transaction, apply

PACKETS = 1000
# What is joined must be right in every capture. How much can be joined depends on what else the machine runs: on some kernels
# perf delivers nothing while certain tasks are current (gates.blind_windows), and a datagram hidden from a socket with two
# readers leaves the rest of its queue in doubt. So completeness is asked of one capture out of three.
ATTEMPTS = 3
# Every scenario in one of its RPS states, by turns; the long draw takes them all.
TURNS = [
    (scenario, scenario.states[number % len(scenario.states)])
    for number, scenario in enumerate(SCENARIOS)
    if scenario.is_drawn_small
]
MAX_WRONG_OF_LOSSY = 0.01
LOSSY = [scenario for scenario in SCENARIOS if scenario.name in ("TCP ping-pong v4", "UDP ping-pong v4", "recv")]


@pytest.fixture
def host(tmp_path: Path) -> Transaction:
    """Transaction that may set rps_sock_flow_entries, which is the whole host's, and puts it back."""
    with apply(journal_dir=tmp_path / "journal", allow_system_changes=True) as transaction:
        yield transaction


def is_followed(row: Row, scenario: Scenario) -> bool:
    """Tell whether the judges could check nearly all packets that perf showed."""
    return row.packets > 0 and row.checked >= scenario.checked * (row.packets - row.hidden)


@pytest.mark.parametrize(("scenario", "state"), TURNS, ids=[f"{s.name}-{state}" for s, state in TURNS])
def test_packets_are_joined_to_what_read_them(
    host: Transaction, tmp_path: Path, scenario: Scenario, state: str
) -> None:
    seen = []
    for attempt in range(ATTEMPTS):
        row = draw(scenario, state, tmp_path / str(attempt), PACKETS, host)
        assert not row.failures, row
        seen.append(row)
        if is_followed(row, scenario):
            return
    pytest.fail(f"never joined {scenario.checked:.0%} of what perf showed: {seen}")


@pytest.mark.parametrize("scenario", LOSSY, ids=lambda scenario: scenario.name)
def test_a_recording_with_losses_is_never_trusted(host: Transaction, tmp_path: Path, scenario: Scenario) -> None:
    """Ring buffers of one page: the run says that it is not whole, and hardly anything it still claims is wrong."""
    row = draw(scenario, "on", tmp_path / "run", PACKETS, host, pages=1)
    assert row.lost_share > 0
    assert row.verdict != "trusted"
    assert row.misjoined <= MAX_WRONG_OF_LOSSY * row.checked


def test_packets_matched_to_their_neighbours_skb_are_caught_by_the_witness(host: Transaction, tmp_path: Path) -> None:
    """The join shifted by one packet: bpftrace read another number in each skb."""
    scenario = next(scenario for scenario in SCENARIOS if scenario.witness == "links")
    run = open_run(record(scenario, "off", tmp_path / "run", PACKETS, host).path)
    joined, seen = run.joined, Seen(witness_of(run.path))
    numbers = joined.packets["seq"].astype("int64")
    honest = judge(joined, run.perf.events, seen, numbers)
    assert honest["links_checked"] >= 0.9 * PACKETS
    assert honest["links_wrong"] == 0
    joined.packets["skb"][:-1] = joined.packets["skb"][1:].copy()
    joined.time[:-1] = joined.time[1:].copy()
    broken = judge(joined, run.perf.events, seen, numbers)
    assert broken["links_wrong"] >= 0.9 * broken["links_checked"] > 0
