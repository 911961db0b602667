"""The workload between real namespaces: a client on another 'host', pinning, schedules, losses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from rxlab import rundir
from rxlab.errors import CaptureError
from rxlab.host.journal import Transaction
from rxlab.record.capture import capture
from rxlab.record.testbed import Testbed, run_checked
from rxlab.record.workload import Workload
from rxlab.rundir import RunDir

APP = np.dtype(list(rundir.APP_LOG_FIELDS))
CLIENT = np.dtype(list(rundir.CLIENT_LOG_FIELDS))


def logs(run: RunDir) -> tuple[np.ndarray, np.ndarray]:
    return np.fromfile(run.file(rundir.APP_LOG), APP), np.fromfile(run.file(rundir.CLIENT_LOG), CLIENT)


@pytest.fixture
def other_host(testbed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in for ssh: 'box' is the sending namespace, with nothing of rxlab in its environment."""
    fake = tmp_path / "bin" / "ssh"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != box ]; do shift; done\n'
        "shift\ncd /\n"
        f'exec ip netns exec {testbed.src.netns} env -u PYTHONPATH sh -c "$*"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    return "ssh:box"


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_remote_client_starts_at_the_barrier_and_its_log_comes_back(
    proto: str, tmp_path: Path, testbed: Testbed, journal: Transaction, other_host: str
) -> None:
    # Without testbed=: to the capture this is an interface of its own, and the sender is somewhere else.
    run = capture(
        tmp_path / "run", iface=testbed.dst.iface, netns=testbed.dst.netns, events="pcap", transaction=journal,
        workload=Workload(proto=proto, remote=other_host, messages=2000),
    )  # fmt: skip
    assert run.run["status"] == "complete", run.run["problems"]
    received, sent = logs(run)
    np.testing.assert_array_equal(received["seq"][received["seq"] >= 0], np.arange(2000))
    np.testing.assert_array_equal(sent["seq"], np.arange(2000))
    assert run.run["tcpdump"]["captured"] == run.run["tcpdump"]["received"] >= 4000
    # Same machine, so one clock: no message left before tcpdump and perf were known to record.
    assert run.run["workload"]["remote"] == "ssh:box"
    assert (sent["replied"] > sent["sent"]).all()


def test_a_remote_client_that_dies_is_reported_and_nothing_hangs(
    tmp_path: Path, testbed: Testbed, journal: Transaction, other_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "ssh"
    fake.write_text("#!/bin/sh\nhead -c 1 > /dev/null\necho 'box: command not found: python3' >&2\nexit 127\n")
    with pytest.raises(CaptureError, match="command not found"):
        capture(
            tmp_path / "run", iface=testbed.dst.iface, netns=testbed.dst.netns, events="pcap", transaction=journal,
            workload=Workload(remote=other_host, messages=10),
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_both_ends_run_where_they_are_pinned(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    """The reader's CPU, as perf saw it in its receive calls."""
    cpu = max(os.sched_getaffinity(0))
    load = Workload(messages=300, server_cpu=cpu)
    run = capture(tmp_path / "run", testbed=testbed, workload=load, events="min", transaction=journal)
    tid = logs(run)[0]["tid"][0]
    argv = ["perf", "script", "-i", str(run.file(rundir.PERF_DATA)), "-F", "tid,cpu,event", "--tid", str(tid)]
    lines = [line.split() for line in run_checked(argv).splitlines() if "sock_recv_length" in line]
    assert len(lines) >= 300
    assert {line[1] for line in lines} == {f"[{cpu:03d}]"}


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_an_open_loop_of_several_flows_loses_nothing_at_a_bearable_rate(
    proto: str, tmp_path: Path, testbed: Testbed, journal: Transaction
) -> None:
    load = Workload(proto=proto, mode="open", arrivals="poisson", rate=2000, flows=4, messages=300)
    run = capture(tmp_path / "run", testbed=testbed, workload=load, events="none", transaction=journal)
    assert run.run["status"] == "complete", run.run["problems"]
    received, sent = logs(run)
    assert len(sent) == 1200
    for flow in range(4):
        own = sent[sent["flow"] == flow]
        np.testing.assert_array_equal(own["seq"], np.arange(300))
        assert (np.diff(own["intended"]) >= 0).all()
        assert (own["sent"] >= own["intended"]).all()
        assert (own["replied"] > own["sent"]).all()
        assert received["ret"][received["flow"] == flow].sum() >= 300 * load.size
    assert len(set(received["peer_port"])) == 4


def test_datagrams_the_reader_is_too_slow_for_are_counted_not_waited_for(
    tmp_path: Path, testbed: Testbed, journal: Transaction
) -> None:
    """UDP far beyond the receive buffer: the client ends, its log says which replies never came, the kernel counts drops."""
    load = Workload(
        proto="udp", mode="open", rate=1e6, messages=4000, size=1400, reply_size=0, server_cpu=0, client_cpu=0
    )
    run = capture(tmp_path / "run", testbed=testbed, workload=load, events="pcap", idle="off", transaction=journal)
    received, sent = logs(run)
    assert len(sent) == 4000
    n_received = int((received["seq"] >= 0).sum())
    nstat = run.json(rundir.COUNTERS_JSON)["difference"]["nstat"]
    # The END datagram may be dropped too, and is then sent again.
    assert 4000 <= n_received + nstat["UdpRcvbufErrors"] <= 4020
    assert run.run["tcpdump"]["captured"] == run.run["tcpdump"]["received"]
