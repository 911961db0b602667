"""The kernel of Debian stable, 6.1: doctor says what it lacks, and what is called complete is joined rightly."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from guest import Finished, run_scenario

from rxlab.dataset.run import open_run
from rxlab.follow.clockfit import NAT
from rxlab.stages import ATTRIBUTIONS, STAGE_INDEX, STATUSES, SUBSTITUTES

GONE = {"sock:sk_data_ready", "sock:sock_recv_length", "csd:csd_queue_cpu", "csd:csd_function_entry"}


@pytest.fixture(scope="module")
def done() -> Iterator[Finished]:
    with run_scenario("older", series="6.1") as finished:
        yield finished


def test_doctor_names_what_goes(done: Finished) -> None:
    doctor = json.loads((done.folder / "doctor.json").read_text())
    assert doctor["ok"], "it can record"
    checks = {check["name"]: check for check in doctor["checks"]}
    told = checks["tracepoints"]["found"]
    assert checks["tracepoints"]["status"] == "warn"
    assert all(event in told for event in GONE)
    assert "tcp:tcp_probe without skbaddr" in told
    assert {"rps_ipi", "tcp_rcv", "data_ready"} <= set(told.rpartition("cannot be seen: ")[2].split(", "))


def test_what_is_complete_is_right(done: Finished) -> None:
    """Judge: the workload's log."""
    run = open_run(done.folder / "tcp")
    assert set(run.run["perf"]["missing_events"]) == GONE
    assert set(SUBSTITUTES["sock:sock_recv_length"]) <= set(run.run["perf"]["events"])
    result = run.verify()
    assert result["misjoined"] == 0
    assert result["checked"] >= 0.99 * result["data_packets"] > 0
    assert result["complete"] >= 0.99
    assert result["byte_sums_equal"]
    joined = run.joined
    seen = joined.time[joined.packets["is_data"].astype(bool)] != NAT
    for stage in ("hardirq", "softirq", "netif_receive_skb", "copy", "recvmsg"):
        assert seen[:, STAGE_INDEX[stage]].mean() >= 0.95, stage
    # A reader that runs already when a packet comes is not switched in for it.
    runs_already = joined.packets["attribution"][joined.packets["is_data"].astype(bool)] == ATTRIBUTIONS.index(
        "running"
    )
    assert runs_already.mean() <= 0.2
    assert seen[~runs_already, STAGE_INDEX["switch_in"]].mean() >= 0.99
    assert not seen[:, [STAGE_INDEX["tcp_rcv"], STAGE_INDEX["data_ready"]]].any()


def test_a_reader_that_cannot_be_seen_is_not_claimed(done: Finished) -> None:
    """A UDP copy has no event and no receive call here: the kernel's half is all there is, and no row says complete."""
    run = open_run(done.folder / "udp")
    packets = run.joined.packets
    data = packets["is_data"].astype(bool)
    assert set(packets["status"][data].tolist()) == {STATUSES.index("incomplete")}
    assert run.joined.verdict == "degraded"
    assert (run.joined.time[data, STAGE_INDEX["driver_rx"]] != NAT).mean() >= 0.99
