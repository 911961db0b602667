"""``rxlab capture --functions`` during a curl over an igb: the function tracer's own text, complete and of this traffic."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from guest import Finished, run_scenario

from rxlab.dataset.run import open_run
from rxlab.rundir import FUNCTIONS_LOG

CALL = re.compile(r"^\s*\S.*-\d+\s+\[\d+\]\s+\S+\s+\d+\.\d+: (\w+)", re.MULTILINE)


@pytest.fixture(scope="module")
def done() -> Iterator[Finished]:
    with run_scenario("functions") as finished:
        yield finished


def test_the_log_holds_every_call_it_counts(done: Finished) -> None:
    run = open_run(done.folder / "curl-functions")
    told = run.run["functions"]
    called = CALL.findall(run.rundir.file(FUNCTIONS_LOG).read_text())
    assert len(called) == told["calls"] > 100
    assert told["lost"] == 0
    assert not told["missing_patterns"]
    assert {"tcp_v4_rcv", "tcp_rcv_established", "tcp_recvmsg", "tcp_v4_early_demux"} <= set(called)
    assert all(name.startswith(("tcp_", "ipv4_")) or "socket" in name for name in called)


def test_the_page_arrived_and_its_packets_are_joined(done: Finished) -> None:
    run = open_run(done.folder / "curl-functions")
    assert "One page, one request." in (done.folder / "curl-functions/command.log").read_text()
    result = run.verify()
    assert result["verdict"] == "trusted"
    assert result["byte_sums_equal"]
