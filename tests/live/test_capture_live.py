"""Captures with real perf, tcpdump and namespaces; judged by perf script, tcpdump and the kernel's own counters."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rxlab import rundir, stages
from rxlab.errors import CaptureError
from rxlab.host.functiontrace import function_tracing_lack, tracefs_root
from rxlab.host.journal import Transaction
from rxlab.host.settings import parse_settings
from rxlab.read.tracetext import read_function_log
from rxlab.record.capture import capture
from rxlab.record.perfrecord import split_events
from rxlab.record.sweep import sweep
from rxlab.record.testbed import Testbed, run_checked
from rxlab.record.workload import Command, Workload
from rxlab.rundir import RunDir

APP = np.dtype(list(rundir.APP_LOG_FIELDS))
CLIENT = np.dtype(list(rundir.CLIENT_LOG_FIELDS))


def packets_in(run: RunDir, expression: str = "") -> list[str]:
    """Return tcpdump's own reading of the capture, a line per packet."""
    argv = ["tcpdump", "-n", "-tt", "--nano", "-r", str(run.file(rundir.PCAP))] + ([expression] if expression else [])
    read = subprocess.run(argv, capture_output=True, text=True, check=True)
    return read.stdout.splitlines()


def perf_times(run: RunDir, event: str) -> np.ndarray:
    """Return the times of an event in ns of CLOCK_MONOTONIC, as perf script prints them."""
    argv = ["perf", "script", "-i", str(run.file(rundir.PERF_DATA)), "--ns", "-F", "time,event"]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    found = re.findall(rf"^\s*(\d+)\.(\d{{9}}):\s+{event}:", printed, re.MULTILINE)
    return np.array([int(seconds) * 10**9 + int(rest) for seconds, rest in found], dtype=np.int64)


def assert_complete(run: RunDir) -> None:
    assert run.run["status"] == "complete", run.run["problems"]
    tcpdump = run.run["tcpdump"]
    assert tcpdump["captured"] == tcpdump["received"] > 0
    assert (tcpdump["dropped"], tcpdump["exit_code"]) == (0, 0)
    assert len(packets_in(run)) == tcpdump["captured"]


@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("family", [4, 6])
def test_nothing_is_missing_between_the_logs_the_pcap_and_perf(
    proto: str, family: int, tmp_path: Path, testbed: Testbed, journal: Transaction
) -> None:
    load = Workload(proto=proto, family=family, messages=2000)
    run = capture(tmp_path / "run", testbed=testbed, workload=load, transaction=journal)
    assert_complete(run)
    log, sent = np.fromfile(run.file(rundir.APP_LOG), APP), np.fromfile(run.file(rundir.CLIENT_LOG), CLIENT)
    np.testing.assert_array_equal(log["seq"][log["seq"] >= 0], np.arange(2000))
    arrived = packets_in(run, f"dst port {load.port} and greater 100")
    # 64 bytes of payload and the headers: every message, and with UDP the datagram that says END.
    assert len(arrived) == 2000 + (proto == "udp")
    # perf: enabled before the first message was sent, disabled after the last was read.
    switches = perf_times(run, "sched:sched_switch")
    assert switches[0] < sent["sent"][0]
    assert switches[-1] > log["t1"][-1]
    assert len(perf_times(run, "sock:sock_recv_length")) >= len(log) - (proto == "tcp")
    assert run.run["perf"]["lost"] == 0
    assert run.run["perf"]["missing_events"] == split_events(stages.EVENT_PRESETS["std"])[1]
    assert all(stat.S_IMODE(entry.stat().st_mode) == 0o600 for entry in run.path.iterdir())


def test_the_software_stamp_in_the_log_is_the_one_in_the_pcap(
    tmp_path: Path, testbed: Testbed, journal: Transaction
) -> None:
    """UDP: both read skb->tstamp, so they agree to the nanosecond; an exact identity of message and packet."""
    load = Workload(proto="udp", messages=500)
    run = capture(tmp_path / "run", testbed=testbed, workload=load, events="pcap", transaction=journal)
    log = np.fromfile(run.file(rundir.APP_LOG), APP)
    lines = packets_in(run, f"udp dst port {load.port}")
    stamps = [int(line.split()[0].replace(".", "")) for line in lines]
    np.testing.assert_array_equal(log["scm_time"], stamps)


def test_the_tail_of_a_burst_is_never_lost(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    """20 bursts of 200 datagrams, each ended right after its last: tcpdump loses them without its fence."""
    for attempt in range(20):
        load = Workload(proto="udp", mode="open", rate=1e6, messages=200, reply_size=0)
        run = capture(
            tmp_path / f"run{attempt}", testbed=testbed, workload=load, events="pcap", idle="off", transaction=journal
        )  # fmt: skip
        assert_complete(run)
        assert len(packets_in(run, f"udp dst port {load.port}")) == 201


def test_short_bursts_keep_the_end_of_their_events(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    for attempt in range(5):
        load = Workload(proto="udp", messages=50)
        run = capture(
            tmp_path / f"run{attempt}", testbed=testbed, workload=load, events="min", transaction=journal
        )  # fmt: skip
        assert_complete(run)
        log = np.fromfile(run.file(rundir.APP_LOG), APP)
        received = perf_times(run, "sock:sock_recv_length")
        inside = np.searchsorted(received, log["t1"]) - np.searchsorted(received, log["t0"])
        assert (inside >= 1).all(), "a receive call of the log has no event"


@pytest.mark.parametrize("arm", ["min", "std", "full", "pcap", "none"])
def test_each_arm_records_what_it_says(arm: str, tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    run = capture(
        tmp_path / "run", testbed=testbed, workload=Workload(messages=200), events=arm, transaction=journal
    )  # fmt: skip
    assert run.run["status"] == "complete", run.run["problems"]
    assert run.run["arm"] == ("untraced" if arm == "none" else arm)
    assert run.has(rundir.PCAP) is (arm != "none")
    assert run.has(rundir.PERF_DATA) is (arm in stages.EVENT_PRESETS)
    assert run.has(rundir.APP_LOG)
    assert run.json(rundir.COUNTERS_JSON)["difference"]["softnet_stat"]
    if arm in stages.EVENT_PRESETS:
        wanted = set(stages.EVENT_PRESETS[arm])
        perf = run.run["perf"]
        assert set(perf["events"]) | set(perf["missing_events"]) == wanted
        listed = run_checked(["perf", "evlist", "-i", str(run.file(rundir.PERF_DATA))]).split()
        assert set(perf["events"]) <= set(listed)


def test_filters_keep_other_softirqs_and_families_out(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    run = capture(
        tmp_path / "run", testbed=testbed, workload=Workload(messages=200), transaction=journal
    )  # fmt: skip
    printed = run_checked(["perf", "script", "-i", str(run.file(rundir.PERF_DATA)), "-F", "event,trace"])
    entries = re.findall(r"irq:softirq_entry:\s+vec=(\d+)", printed)
    assert set(entries) == {"3"}
    assert run.run["perf"]["filters"] == {
        event: text for event, text in stages.EVENT_FILTERS.items() if event in run.run["perf"]["events"]
    }


def test_rps_is_in_force_while_it_is_recorded_and_gone_afterwards(
    tmp_path: Path, testbed: Testbed, journal: Transaction
) -> None:
    if os.cpu_count() == 1:
        pytest.skip("RPS needs two CPUs")
    settings = parse_settings({"rps_cpus": "1"}, testbed.dst.iface, testbed.dst.netns)
    with journal.change(settings):
        run = capture(
            tmp_path / "run",
            testbed=testbed,
            workload=Workload(messages=500),
            configuration={"rps_cpus": "1"},
            transaction=journal,
        )
    assert_complete(run)
    received = [entry["received_rps"] for entry in run.json(rundir.COUNTERS_JSON)["difference"]["softnet_stat"]]
    assert sum(received) >= 500, "the kernel's own count of packets that RPS moved"
    assert run.run["got"]["settings"] == {f"rps_cpus@{testbed.dst.iface}/rx-0": "1"}
    queue = run.json(rundir.HOST_JSON)["ifaces"][testbed.dst.iface]["queues"][0]
    assert queue["rps_cpus"] == "1"
    after = run_checked(testbed.dst.command(["cat", f"/sys/class/net/{testbed.dst.iface}/queues/rx-0/rps_cpus"]))
    assert int(after.replace(",", ""), 16) == 0


def test_a_testbed_with_gro_polls_the_veth(tmp_path: Path, journal: Transaction) -> None:
    with Testbed(gro=True, registry=journal) as testbed:
        run = capture(
            tmp_path / "run", testbed=testbed, workload=Workload(messages=100), transaction=journal
        )  # fmt: skip
        assert_complete(run)
        assert len(perf_times(run, "net:napi_gro_receive_entry")) >= 100


def test_a_bpf_filter_keeps_the_rest_out(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    load = Workload(messages=100)
    run = capture(
        tmp_path / "run", testbed=testbed, workload=load, events="pcap", filter=f"tcp dst port {load.port}",
        transaction=journal,
    )  # fmt: skip
    assert_complete(run)
    assert len(packets_in(run)) == len(packets_in(run, f"tcp dst port {load.port}"))


def test_http_by_any_two_commands(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<p>hello</p>")
    python = shutil.which("python3") or "python3"
    fetch = "import os, urllib.request as u; print(u.urlopen(f\"http://{os.environ['RXLAB_SERVER_ADDRESS']}:8000/\").read())"
    load = Command(
        [python, "-c", fetch],
        [python, "-m", "http.server", "8000", "--bind", testbed.dst.address(4), "-d", str(tmp_path / "page")],
        8000,
    )
    run = capture(
        tmp_path / "run", testbed=testbed, workload=load, snaplen=0xFFFF, transaction=journal
    )  # fmt: skip
    assert_complete(run)
    assert "hello" in run.file("command.log").read_text()
    assert len(packets_in(run, "tcp[tcpflags] & tcp-syn != 0")) >= 2, "the handshake is inside the recording"


def test_passive_capture_sends_nothing(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    """On the testbed as if it were a machine's own interface: nobody talks, so nothing may be in the file."""
    run = capture(
        tmp_path / "run", iface=testbed.dst.iface, netns=testbed.dst.netns, attach=True, duration=1.0, filter="ip",
        transaction=journal,
    )  # fmt: skip
    assert run.run["status"] == "complete", run.run["problems"]
    assert run.run["workload"] is None
    assert (run.run["tcpdump"]["captured"], run.run["tcpdump"]["received"]) == (0, 0)
    assert not run.file(rundir.APP_LOG).exists()
    assert len(perf_times(run, "sched:sched_switch")) > 0


def test_passive_capture_of_live_traffic_keeps_up_with_it(
    tmp_path: Path, testbed: Testbed, journal: Transaction
) -> None:
    """The traffic goes on while tcpdump is stopped: what was received until the fence is in the file."""
    python = shutil.which("python3") or "python3"
    flood = "import socket, time\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nwhile True:\n s.sendto(b'x' * 99, ('{}', 9))\n time.sleep(0.0002)"
    sender = journal.start_process(testbed.src.command([python, "-c", flood.format(testbed.dst.ipv4)]))
    try:
        run = capture(
            tmp_path / "run", iface=testbed.dst.iface, netns=testbed.dst.netns, attach=True, duration=1.0,
            events="pcap", filter="udp", transaction=journal,
        )  # fmt: skip
        assert sender.poll() is None
    finally:
        sender.kill()
        sender.wait()
    assert run.run["status"] == "complete", run.run["problems"]
    fence = run.run["tcpdump"]["fence"]
    assert fence["captured"] >= fence["received"] > 100
    assert len(packets_in(run)) == run.run["tcpdump"]["captured"]


def test_a_sweep_restores_between_its_runs(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    def rps() -> str:
        return run_checked(testbed.dst.command(["cat", f"/sys/class/net/{testbed.dst.iface}/queues/rx-0/rps_cpus"]))

    before = rps()
    configurations = [{"rps_cpus": "off"}, {"rps_cpus": "0"}]
    in_force: dict[int, set[str]] = {0: set(), 1: set()}
    runs = sweep(
        tmp_path / "sweep", configurations, testbed=testbed, workload=Workload(messages=100), reps=2,
        arms=("untraced", "min"), transaction=journal,
    )  # fmt: skip
    for run in runs:
        assert run.run["status"] == "complete", run.run["problems"]
        index = configurations.index(run.run["configuration"])
        in_force[index].add(run.json(rundir.HOST_JSON)["ifaces"][testbed.dst.iface]["queues"][0]["rps_cpus"])
        assert rps() == before
    assert in_force == {0: {"off"}, 1: {"0"}}


# -- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 12 MB."""
    place = tmp_path / "small"
    place.mkdir()
    run_checked(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)])
    try:
        yield place
    finally:
        run_checked(["umount", str(place)])


def record_on_full_disk(place: Path, testbed: Testbed, journal: Transaction, min_free: int) -> Any:
    # How much a command will send is not known before: of a workload of that size the capture would not begin.
    flood = (
        "import os, socket, time\nend, s = time.time() + 60, socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "while time.time() < end: s.sendto(bytes(64), (os.environ['RXLAB_SERVER_ADDRESS'], 47901)); time.sleep(1e-4)"
    )
    return capture(
        place / "run", testbed=testbed, workload=Command([sys.executable, "-c", flood]), min_free=min_free, pages=128,
        transaction=journal,
    )  # fmt: skip


def test_a_disk_that_gets_full_ends_the_capture_early(small_disk: Path, testbed: Testbed, journal: Transaction) -> None:
    run = record_on_full_disk(small_disk, testbed, journal, min_free=5 << 20)
    assert run.run["status"] == "partial"
    assert "bytes left" in run.run["problems"][0]
    assert run.run["got"]["seconds"] < 50
    assert run.run["perf"]["exit_code"] == 0, "there was room to end in order"
    assert len(packets_in(run)) == run.run["tcpdump"]["captured"] == run.run["tcpdump"]["received"]
    assert len(perf_times(run, "sched:sched_switch")) > 0


def test_a_full_disk_is_marked_and_what_was_written_stays(
    small_disk: Path, testbed: Testbed, journal: Transaction
) -> None:
    run = record_on_full_disk(small_disk, testbed, journal, min_free=0)
    assert run.run["status"] == "partial"
    assert any("ended early" in problem for problem in run.run["problems"])
    assert run.run["got"]["seconds"] < 50
    assert run.has(rundir.PERF_DATA)
    assert run.has(rundir.PCAP)
    assert run.json(rundir.COUNTERS_JSON)["difference"]
    whole = subprocess.run(
        ["tcpdump", "-n", "-r", str(run.file(rundir.PCAP))], capture_output=True, text=True, check=False
    )
    assert len(whole.stdout.splitlines()) > 100


def test_a_function_log_is_recorded_or_refused_with_the_reason(
    tmp_path: Path, testbed: Testbed, journal: Transaction
) -> None:
    """Where the kernel refuses (lockdown, as on most secure-boot machines), nothing is left behind; tests/vm has one that does not."""
    instances = set((tracefs_root() or tmp_path).glob("instances/*"))
    options = {"testbed": testbed, "workload": Workload(messages=50), "transaction": journal}
    if lack := function_tracing_lack():
        with pytest.raises(CaptureError, match=re.escape(lack)):
            capture(tmp_path / "run", functions=["tcp_*"], **options)
        assert not (tmp_path / "run").exists()
    else:
        run = capture(tmp_path / "run", functions=["tcp_*"], **options)
        calls = read_function_log(run.file(rundir.FUNCTIONS_LOG))
        names = [calls.attrs["categories"]["function"][code] for code in calls["function"]]
        # the log's own judges: the kernel's count of entries, and one receive call per message of the server
        assert calls.n == run.run["functions"]["calls"]
        assert names.count("tcp_recvmsg") >= 50
    assert set((tracefs_root() or tmp_path).glob("instances/*")) == instances
