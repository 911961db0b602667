"""The recorded runs: as their README says, and joined right by the workload's own log. Needs no root."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from rxlab.dataset.run import join_recordings, open_run
from rxlab.follow.clockfit import NAT
from rxlab.stages import STAGE_INDEX

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


@pytest.mark.parametrize("name", [name for name in TRACED if name != "http"])
def test_join_agrees_with_the_log(name: str) -> None:
    result = open_run(DATA / name).verify()
    assert result["verdict"] == "trusted", result["reasons"]
    assert result["misjoined"] == 0
    assert result["checked"] >= 398
    assert result["complete"] >= 0.995
    assert result["byte_sums_equal"]
    assert result["counters_agree"]["ok"]
    if name.startswith("udp"):
        assert result["scm_minus_pcap_ns"]["equal"] == result["scm_minus_pcap_ns"]["n"]


def test_http_request_is_followed_to_its_reader() -> None:
    run = open_run(DATA / "http")
    packets = run.tree["packets"].to_dataset()
    data = packets.isel(packet=packets["is_data"].values)
    assert data.sizes["packet"] >= 1
    seen = ~data["time"].isnull()
    for stage in ("driver_rx", "netif_receive_skb", "tcp_rcv", "data_ready", "copy", "recvmsg"):
        assert bool(seen.sel(stage=stage).all()), stage


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
