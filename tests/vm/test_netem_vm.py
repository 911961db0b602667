"""Loss, reordering, duplicates, VLAN and QinQ over an igb: nothing joined wrongly, and every packet accounted for.

Judges: the workload's log (by ``verify``), tshark, and what netem and TCP counted themselves.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from guest import Finished, run_scenario

from rxlab.dataset.run import Run, open_run
from rxlab.rundir import PCAP
from rxlab.stages import STATUSES

NAMES = ("tcp-loss", "tcp-reorder", "udp-loss", "udp-reorder", "vlan", "qinq")


@pytest.fixture(scope="module")
def done() -> Iterator[Finished]:
    with run_scenario("netem.py", seconds=600) as finished:
        yield finished


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, done: Finished) -> Run:
    return open_run(done.folder / request.param)


def counted(done: Finished, name: str, key: str) -> int:
    """Return by how much a counter of the sending side rose: of netem (``drops``), or of nstat."""
    seen = json.loads((done.folder / f"{name}.json").read_text())

    def value(when: dict[str, Any]) -> int:
        [root] = [row for row in when["qdisc"] if row.get("root")]
        return int(root[key] if key in root else when["nstat"][key])

    return value(seen["after"]) - value(seen["before"])


def statuses(run: Run) -> Counter[str]:
    """Return how many data packets have each status."""
    packets = run.joined.packets
    return Counter(STATUSES[code] for code in packets["status"][packets["is_data"].astype(bool)].tolist())


def tshark(run: Run, wanted: str, *fields: str) -> list[list[str]]:
    """Return fields of the captured packets that a display filter names."""
    argv = [
        "tshark",
        "-r",
        str(run.rundir.file(PCAP)),
        "-Y",
        wanted,
        "-T",
        "fields",
        *(word for name in fields for word in ("-e", name)),
    ]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True)
    return [line.split("\t") for line in shown.stdout.splitlines()]


def test_nothing_is_joined_to_another_message(run: Run) -> None:
    result = run.verify()
    assert result["misjoined"] == 0
    assert result["verdict"] == "trusted" or run.run["workload"]["proto"] == "udp", result["reasons"]
    if run.run["workload"]["proto"] == "tcp":
        assert result["byte_sums_equal"]
        assert result["complete"] >= 0.98


def test_every_packet_of_the_capture_has_its_interrupt_and_softirq(run: Run) -> None:
    """Kernel side: loss before the NIC takes nothing from those that arrive, tags do not hide them."""
    packets = run.joined.packets
    found = ~np.isin(packets["status"], [STATUSES.index(name) for name in ("unmatched", "ambiguous", "outside_window")])
    data = packets["is_data"].astype(bool)
    assert found[data].mean() >= 0.98


def test_bytes_sent_twice_are_consumed_once(done: Finished) -> None:
    """Judge: tshark, which follows sequence numbers by itself."""
    run = open_run(done.folder / "tcp-reorder")
    packets = run.joined.packets
    again = {
        int(frame)
        for [frame] in tshark(
            run,
            f"tcp.analysis.retransmission && tcp.len > 0 && tcp.dstport == {run.run['workload']['port']}",
            "frame.number",
        )
    }
    mine = set(packets["pcap_frame"][packets["status"] == STATUSES.index("duplicate")].tolist())
    assert mine, "the scenario repeats packets"
    # tshark calls a segment that fills a gap late 'out of order' or 'retransmission' by its timing; what had come before is ours.
    # A segment that waits out of order is freed when one that covers it comes (TCP_OFOMERGE): then the later one is the owner.
    seen: set[tuple[int, int]] = set()
    repeated = set()
    rows = np.flatnonzero(packets["is_data"].astype(bool))
    for row in rows[np.argsort(packets["pcap_frame"][rows])].tolist():
        key = int(packets["seq"][row]), int(packets["payload_len"][row])
        if key in seen:
            repeated.add(int(packets["pcap_frame"][row]))
        if STATUSES[packets["status"][row]] != "dropped":
            seen.add(key)
    told = {int(frame): STATUSES[packets["status"][row]] for row, frame in enumerate(packets["pcap_frame"].tolist())}
    assert repeated <= mine, {frame: told[frame] for frame in repeated - mine}
    assert mine <= again | repeated


def test_lost_packets_are_those_that_netem_dropped(done: Finished) -> None:
    run = open_run(done.folder / "tcp-loss")
    drops, sent_again = counted(done, "tcp-loss", "drops"), counted(done, "tcp-loss", "TcpRetransSegs")
    assert drops > 0
    assert sent_again > 0
    kinds = statuses(run)
    # What was dropped was never captured: each message arrives once, by its first copy or a later one.
    assert kinds["complete"] == run.run["workload"]["messages"]
    assert kinds["complete"] + kinds["duplicate"] == sum(kinds.values())
    assert kinds["duplicate"] <= sent_again


@pytest.mark.parametrize("name", ["tcp-loss", "udp-loss"])
def test_what_netem_let_go_is_what_was_captured(done: Finished, name: str) -> None:
    run = open_run(done.folder / name)
    assert counted(done, name, "drops") > 0
    assert counted(done, name, "packets") == run.joined.packets.n, "copies counted, lost ones not"


def test_the_tags_are_in_the_capture(done: Finished) -> None:
    for name, tags in (("vlan", "5"), ("qinq", "7,8")):
        run = open_run(done.folder / name)
        port = run.run["workload"]["port"]
        seen = tshark(run, f"tcp.dstport == {port}", "vlan.id")
        outer = tshark(run, f"tcp.dstport == {port}", "ieee8021ad.id")
        assert {",".join(filter(None, (outer[row][0], seen[row][0]))) for row in range(len(seen))} == {tags}
