"""What perf takes without a loss, and what recording costs: events at a chosen rate, counted by who raised them.

``RXLAB_LONG=1`` raises as many events as two CPUs can for ten seconds, with the min preset, and prints the rate: CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rxlab.read.perfdata import read_perfdata
from rxlab.record.perfrecord import DEFAULT_PAGES, PerfRecorder
from rxlab.stages import EVENT_PRESETS

FLOOD = Path(__file__).with_name("events_flood.py")
PEEK_EVENTS = ("skb:skb_copy_datagram_iovec", "sock:sock_recv_length")
IS_LONG = os.environ.get("RXLAB_LONG") == "1"
RATE, SECONDS = (1e6, 10.0) if IS_LONG else (5e4, 1.0)


def flood(
    path: Path, rate: float, seconds: float, pages: int = DEFAULT_PAGES
) -> tuple[dict, list[tuple[int, float]], set[int]]:
    """Record a flood on every CPU; return perf's account, what each process raised in how many seconds, and who they were."""
    recorder = PerfRecorder(path, list(EVENT_PRESETS["min"]), pages)
    recorder.start()
    try:
        argv = [sys.executable, "-I", str(FLOOD)]
        processes = [
            subprocess.Popen([*argv, str(cpu), str(rate), str(seconds)], stdout=subprocess.PIPE, text=True)
            for cpu in sorted(os.sched_getaffinity(0))
        ]
        answers = [process.communicate()[0].split() for process in processes]
    except BaseException:
        recorder.kill()
        raise
    raised = [(int(number), float(passed)) for number, passed in answers]
    return recorder.stop(), raised, {process.pid for process in processes}


def test_every_event_of_a_flood_is_recorded(tmp_path: Path) -> None:
    account, raised, pids = flood(tmp_path / "perf.data", RATE, SECONDS)
    rates = [number / passed for number, passed in raised]
    recording = read_perfdata(tmp_path / "perf.data")
    # Of a large file the recorder leaves counting its losses to the reader.
    lost = int(recording.lost["count"].sum()) if account["lost"] is None else account["lost"]
    print(f"events/s per CPU {[round(rate) for rate in rates]}, lost {lost}, perf's CPU {account['cpu_seconds']:.2f} s")
    assert lost == 0
    events = recording.events
    seen = sum(int(sum((events[name]["tid"] == pid).sum() for pid in pids)) for name in PEEK_EVENTS)
    assert seen == sum(number for number, _ in raised)


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    """The smallest ring under a flood: what is missing is what perf says it lost."""
    account, raised, pids = flood(tmp_path / "perf.data", 1e6, 1.0, pages=1)
    events = read_perfdata(tmp_path / "perf.data").events
    seen = sum(int(sum((events[name]["tid"] == pid).sum() for pid in pids)) for name in PEEK_EVENTS)
    missing = sum(number for number, _ in raised) - seen
    if account["lost"] == 0:
        pytest.skip("this machine empties a ring of one page in time")
    assert 0 < missing <= account["lost"]


def test_the_recorders_cpu_time_is_that_of_its_process(tmp_path: Path) -> None:
    recorder = PerfRecorder(tmp_path / "perf.data", list(EVENT_PRESETS["min"]), 64)
    recorder.start()
    assert recorder.process is not None
    fields = Path(f"/proc/{recorder.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks = os.sysconf("SC_CLK_TCK")
    before = (int(fields[11]) + int(fields[12])) / ticks
    cpu_seconds = recorder.stop()["cpu_seconds"]
    assert before - 2 / ticks <= cpu_seconds < before + 5
