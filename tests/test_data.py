"""The recorded runs: as their README says, and joined right by the workload's own log. Needs no root."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rxlab.dataset import elsewhere
from rxlab.dataset.elsewhere import join_recordings
from rxlab.dataset.run import open_run, read_events
from rxlab.errors import ClockError, TruncatedFileError, UsageError
from rxlab.follow.clockfit import NAT
from rxlab.follow.sametime import SLACK_NS, refuse_other_times
from rxlab.follow.verify import calls_of_packets, read_app_log
from rxlab.read.pcap import read_pcap
from rxlab.rundir import APP_LOG_STRUCT
from rxlab.show.life import run_packet_life
from rxlab.stages import ATTRIBUTIONS, STAGE_INDEX

RECV = STAGE_INDEX["recvmsg"]
DATA = Path(__file__).resolve().parent.parent / "data"
RUNS = sorted(path.parent.name for path in DATA.glob("*/run.json"))
TRACED = [name for name in RUNS if (DATA / name / "perf.data").is_file()]


def test_readme_lists_every_file_with_its_hash() -> None:
    rows = re.findall(r"^\| ([^|`]+) \| (\d+) \| `([0-9a-f]{64})` \|$", (DATA / "README.md").read_text(), re.M)
    listed = {name: (int(size), digest) for name, size, digest in rows}
    files = {
        str(path.relative_to(DATA)): (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for run in RUNS
        for path in (DATA / run).iterdir()
    }
    assert listed == files


def test_the_runs_that_notebooks_name_are_there() -> None:
    assert {"tcp-rps-off", "tcp-rps-on", "udp-rps-off", "udp-rps-on", "http"} <= set(TRACED)
    assert len(RUNS) - len(TRACED) >= 6  # untraced repetitions of both configurations


@pytest.mark.parametrize("name", [name for name in TRACED if (DATA / name / "app.log").is_file()])
def test_join_agrees_with_the_log(name: str) -> None:
    result = open_run(DATA / name).verify()
    if name == "udp-clocks":
        # Its reader's CPU stood still for 11 ms, and nobody saw the reader come back.
        assert result["verdict"] == "degraded"
        assert result["reasons"][0].startswith("flagged")
        assert result["complete"] >= 0.985
    else:
        assert result["verdict"] == "trusted", result["reasons"]
        assert result["complete"] >= 0.995
    assert result["misjoined"] == 0
    assert result["checked"] >= 0.995 * result["data_packets"]
    assert result["data_packets"] >= (64 if name.startswith("igb") else 398)
    assert result["byte_sums_equal"]
    assert result["counters_agree"]["ok"]
    if name.startswith("udp"):
        assert result["scm_minus_pcap_ns"]["equal"] == result["scm_minus_pcap_ns"]["n"]


@pytest.mark.parametrize("name", ["tcp-rps-off", "tcp-rps-on", "udp-rps-off", "udp-rps-on"])
def test_the_reader_slept_inside_the_call_that_its_log_has(name: str) -> None:
    """The built-in server waits in its receive call: there it went to sleep, by its own clock readings around the call."""
    run = open_run(DATA / name)
    joined, log = run.joined, read_app_log(run.rundir.file("app.log"))
    call = calls_of_packets(joined, log, run._messages())
    woken = (joined.packets["attribution"] == ATTRIBUTIONS.index("own_wake")) & joined.packets["trusted"]
    rows = np.flatnonzero(woken & (call >= 0) & (joined.packets["sleep_time"] != NAT))
    assert len(rows) >= 0.9 * woken.sum() > 300
    asleep, truth = joined.packets["sleep_time"][rows], log[call[rows]]
    assert ((truth["t0"] <= asleep) & (asleep <= truth["t1"])).all()


def test_the_queues_of_a_nic_are_told_apart() -> None:
    """Judge: RSS gives a flow one queue, and the kernel says where each queue's interrupt comes."""
    run = open_run(DATA / "igb-queues")
    packets, data = run.joined.packets, run.joined.packets["is_data"].astype(bool)
    of_flow = set(zip(packets["flow"][data].tolist(), packets["rx_queue"][data].tolist(), strict=True))
    assert len(of_flow) == 16
    assert {queue for _, queue in of_flow} == {0, 1, 2, 3}
    comes = {queue["queue"]: int(queue["irq_effective"]) for queue in run.host["ifaces"][run.run["iface"]]["queues"]}
    cpu = run.joined.cpu[data, STAGE_INDEX["hardirq"]]
    expected = [comes[queue] for queue in packets["rx_queue"][data].tolist()]
    assert len(set(comes.values())) > 1
    assert (cpu == expected)[cpu >= 0].all()
    assert (cpu >= 0).mean() >= 0.95


def test_an_older_kernel_shows_fewer_stages_of_the_same_path() -> None:
    run = open_run(DATA / "igb-linux-6.1")
    seen = run.joined.time[run.joined.packets["is_data"].astype(bool)] != NAT
    assert not seen[:, [STAGE_INDEX["tcp_rcv"], STAGE_INDEX["data_ready"]]].any()
    for stage in ("hardirq", "softirq", "netif_receive_skb", "switch_in", "copy", "recvmsg"):
        assert seen[:, STAGE_INDEX[stage]].mean() >= 0.95, stage


def test_a_packets_life_is_the_same_where_only_its_slabs_are_read() -> None:
    whole, part = (open_run(DATA / "tcp-rps-on", chunks=chunks) for chunks in (None, 1500))
    rows = np.flatnonzero(whole.joined.packets["trusted"])[[3, 200, -3]]
    for frame in whole.joined.packets["pcap_frame"][rows].tolist():
        lines, told = (run_packet_life(run, frame).split("\n") for run in (whole, part))
        cut = next(line for line in told if "since first" in line).index("recording")
        # What an event costs is found from the events at hand: every other column is the same.
        assert [line[:cut] + line[cut + 9 :] for line in told[:-1]] == [
            line[:cut] + line[cut + 9 :] for line in lines[:-1]
        ]
        count = [line.split(" on these CPUs")[0] for line in (lines[-1], told[-1])]
        assert count[0] == count[1]
    time = whole.joined.time[rows[1]]
    near = part.events_around(int(time[time > 0].min()), int(time.max()))
    assert (
        0 < sum(columns.n for columns in near.values()) < sum(columns.n for columns in whole.perf.events.values()) / 3
    )


def test_http_request_is_followed_to_its_reader() -> None:
    run = open_run(DATA / "http")
    packets = run.tree["packets"].to_dataset()
    data = packets.isel(packet=packets["is_data"].values)
    assert data.sizes["packet"] >= 1
    seen = ~data["time"].isnull()
    for stage in ("driver_rx", "netif_receive_skb", "tcp_rcv", "data_ready", "copy", "recvmsg"):
        assert bool(seen.sel(stage=stage).all()), stage


def test_a_page_over_a_real_nic_driver() -> None:
    run = open_run(DATA / "curl-functions")
    assert run.verify()["verdict"] == "trusted"
    data = run.joined.packets["is_data"].astype(bool)
    seen = run.joined.time[data] != NAT
    for stage in ("hardirq", "softirq_raise", "softirq", "driver_rx", "tcp_rcv", "copy", "recvmsg"):
        assert seen[:, STAGE_INDEX[stage]].all(), stage
    log = run.rundir.file("functions.log").read_text()
    assert sum(": " in line for line in log.splitlines() if not line.startswith("#")) == run.run["functions"]["calls"]


def test_which_of_two_ports_was_captured_has_to_be_said() -> None:
    """Both ends of the cable are in this recording: 302 packets by perf script, 147 and 155."""
    with pytest.raises(UsageError, match=r"several interfaces.*eth1 \(155 packets\), eth0 \(147 packets\)"):
        join_recordings(DATA / "igb-queues" / "perf.data", DATA / "igb-queues" / "rx.pcap")


@pytest.mark.parametrize("name", ["udp-rps-off", "udp-rps-on", "tcp-rps-off", "tcp-rps-on"])
def test_recordings_without_clock_readings_are_joined_the_same(name: str) -> None:
    """perf.data and pcap alone, as somebody else's: the truth is the run's own clock readings and log."""
    run = open_run(DATA / name)
    joined = join_recordings(run.rundir.file("perf.data"), DATA / name / "rx.pcap", run.run["iface"])
    assert abs(joined.clock.offset_ns - run.joined.clock.offset_ns) <= joined.clock.bound_ns
    known = dict(zip(run.joined.packets["pcap_frame"].tolist(), run.joined.time[:, RECV].tolist(), strict=True))
    for frame, returned in zip(joined.packets["pcap_frame"].tolist(), joined.time[:, RECV].tolist(), strict=True):
        assert known.get(frame, returned) == returned
    assert (joined.time[:, RECV] != NAT).sum() >= 398


@pytest.mark.parametrize("iface", [None, "rxd-39a11b"])
def test_files_of_different_times_are_refused_as_such(iface: str | None) -> None:
    """Also before the question which device it is; perf wrote how its clock stood to the wall clock."""
    perf, pcap = DATA / "tcp-rps-on" / "perf.data", DATA / "udp-rps-on" / "rx.pcap"
    # By the runs' own readings of the clocks, and by tshark.
    run = open_run(DATA / "tcp-rps-on").run
    began, frames = datetime.fromtimestamp(run["start_ns"] / 1e9, UTC), read_pcap(pcap)["time"]
    with pytest.raises(ClockError) as refused:
        join_recordings(perf, pcap, iface)
    line = refused.value.line()
    assert "the two files are of different times" in line
    assert f"events {began:%Y-%m-%d %H:%M}:" in line
    assert f"packets {datetime.fromtimestamp(frames[0] / 1e9, UTC):%Y-%m-%d %H:%M:%S}-" in line


def test_files_whose_times_nobody_knows_are_refused_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wall clock in it a recording tells its time by its last change alone, and a copy by nothing."""
    stamp = read_pcap(DATA / "udp-rps-on" / "rx.pcap")
    meta = {"first_ns": 5, "last_ns": 9, "clock": "CLOCK_MONOTONIC", "clockid": 1}
    refuse_other_times(meta, int(stamp["time"].max()), stamp, "x")
    refuse_other_times(meta, int(stamp["time"].min()) - SLACK_NS // 2, stamp, "x")
    with pytest.raises(ClockError, match="different times: found perf.data written"):
        refuse_other_times(meta, int(stamp["time"].min()) - 2 * SLACK_NS, stamp, "x")
    during = {**meta, "clock": "CLOCK_REALTIME", "first_ns": int(stamp["time"][3]), "last_ns": int(stamp["time"][4])}
    refuse_other_times(during, 0, stamp, "x")
    before = {**during, "first_ns": 5, "last_ns": int(stamp["time"].min()) - 2 * SLACK_NS}
    with pytest.raises(ClockError, match="different times: found events 1970-01-01 00:00:00-20"):
        refuse_other_times(before, 0, stamp, "x")
    # What perf noted of another clock says nothing of this one.
    noted = {"clockid": 4, "wall_clock_ns": 0, "clockid_time_ns": 0}
    refuse_other_times({**meta, "clock_data": noted}, int(stamp["time"].max()), stamp, "x")


def test_the_device_that_was_found_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody says which one it is, and only one received packets: the other end's are taken out here."""
    run = open_run(DATA / "udp-rps-off")
    device = str(run.run["iface"])

    def of_one_device(path: Path) -> SimpleNamespace:
        perf = read_events(path)
        receive = perf.events["net:netif_receive_skb"]
        mine = np.flatnonzero(receive["name"] == receive.attrs["categories"]["name"].index(device))
        events = {**perf.events, "net:netif_receive_skb": receive.take(mine)}
        return SimpleNamespace(events=events, meta=perf.meta, lost=perf.lost)

    monkeypatch.setattr(elsewhere, "read_events", of_one_device)
    tree, joined = elsewhere.analyze_recordings(run.rundir.file("perf.data"), run.rundir.file("rx.pcap"))
    assert tree.attrs["iface"] == device
    assert joined.verdict == "trusted"


class TestDamage:
    """Files that were cut or overwritten never give a verdict of "trusted", and never a wrong row."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        copy = tmp_path / "run"
        shutil.copytree(DATA / "tcp-rps-on", copy)
        return copy

    @pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.7, 0.9, 0.99])
    def test_capture_cut_anywhere_joins_what_it_has_right(self, run: Path, share: float) -> None:
        whole = (DATA / "tcp-rps-on" / "rx.pcap").read_bytes()
        (run / "rx.pcap").write_bytes(whole[: int(share * len(whole))])
        result = open_run(run).verify()
        assert result["misjoined"] == 0
        assert result["checked"] > 0.9 * share * 400 - 10
        assert result["verdict"] == "degraded"
        assert any("cut after packet" in reason for reason in result["reasons"])

    @pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
    def test_recording_cut_before_its_formats_says_so(self, run: Path, share: float) -> None:
        whole = (DATA / "tcp-rps-on" / "perf.data").read_bytes()
        (run / "perf.data").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(TruncatedFileError, match="cut before its event formats"):
            open_run(run).verify()

    def test_recording_overwritten_in_the_middle_is_not_trusted(self, run: Path) -> None:
        content = bytearray((run / "perf.data").read_bytes())
        content[len(content) // 2 : len(content) // 2 + 5000] = random.Random(1).randbytes(5000)
        (run / "perf.data").write_bytes(content)
        result = open_run(run).verify()
        assert not result["misjoined"]
        assert result["verdict"] in ("degraded", "refused")
        assert any("damaged" in reason for reason in result["reasons"])

    def test_log_that_lost_a_call_contradicts_the_verdict(self, run: Path) -> None:
        log = (run / "app.log").read_bytes()
        (run / "app.log").write_bytes(log[: -2 * APP_LOG_STRUCT.size])
        result = open_run(run).verify()
        assert result["verdict"] == "degraded"
        assert "bytes read differ from bytes on the wire" in result["reasons"]
