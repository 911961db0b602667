"""One flow in N of real traffic: which flows the files hold, judged by tcpdump and perf script, and that they are joined."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from rxlab.dataset.run import open_run
from rxlab.follow.verify import read_app_log
from rxlab.host.journal import Transaction
from rxlab.record.capture import capture
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Workload
from rxlab.rundir import APP_LOG, PCAP, PERF_DATA

N = 4
FLOWS = 64


def is_taken(ports: tuple[int, int]) -> bool:
    """Say it in another way than the filters do: the bits above the lowest agree, as many as it takes for one flow in N."""
    return (ports[0] >> 1) % N == (ports[1] >> 1) % N


def printed(argv: list[str], pattern: str) -> set[tuple[int, int]]:
    """Return the pairs of ports in what a program prints."""
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return {(int(sport), int(dport)) for sport, dport in re.findall(pattern, text)}


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_sample_of_the_flows_is_recorded_whole_and_joined(
    proto: str, tmp_path: Path, testbed: Testbed, journal: Transaction
) -> None:
    load = Workload(proto=proto, flows=FLOWS, messages=40, mode="open", rate=4000.0, reply_size=0)
    run = capture(tmp_path / "run", testbed=testbed, workload=load, transaction=journal, flow_sample=N)
    assert run.run["status"] == "complete", run.run["problems"]
    tcpdump = ["tcpdump", "-n", "-q", "-r", str(run.file(PCAP))]
    captured = printed(tcpdump, r"IP \S+\.(\d+) > \S+\.(\d+):")
    assert 0 < len({frozenset(pair) for pair in captured}) < FLOWS
    assert all(map(is_taken, captured))
    if proto == "tcp":
        script = ["perf", "script", "-i", str(run.file(PERF_DATA)), "-F", "event,trace"]
        probed = printed(script, r"tcp_probe:.* src=\S+:(\d+) dest=\S+:(\d+) ")
        assert probed, "the event is recorded"
        assert all(map(is_taken, probed))
    # The log has every flow: those of the sample must have all their messages in the capture, each joined to its reader.
    result = open_run(run.path).verify()
    log = read_app_log(run.file(APP_LOG))
    sent = {frozenset((int(row["local_port"]), int(row["peer_port"]))) for row in log}
    assert {frozenset(pair) for pair in captured} == {pair for pair in sent if is_taken(tuple(pair))}
    assert result["misjoined"] == 0
    assert result["verdict"] == "trusted", result["reasons"]
    assert result["checked"] >= 0.97 * result["data_packets"] > 0
    print(f"CPU seconds: perf {run.run['perf']['cpu_seconds']:.2f}, tcpdump {run.run['tcpdump']['cpu_seconds']:.2f}")
