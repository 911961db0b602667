"""The scripts of tests/bench: what they compare is compared rightly. What they measure is not a test."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

LINES = """\
   77 [000]  10.000000001:   net:netif_rx: dev=lo skbaddr=0x1 len=100
   77 [000]  10.000000001:   net:netif_rx: dev=lo skbaddr=0x1 len=100
   77 [001]  10.000000001:   net:netif_rx: dev=lo skbaddr=0x1 len=100
   77 [000]  10.000000001:   sched:sched_waking: comm=a pid=5 prio=120 target_cpu=000
   77 [000]  10.000000002:   net:netif_rx: dev=lo skbaddr=0x1 len=100
"""
SUMS = {"net:netif_rx": {"len": 300}, "sched:sched_waking": {"field_pid": 5}}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    return importlib.import_module


def test_a_sample_that_perf_wrote_twice_is_no_difference(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "perf").write_text(f"#!/bin/sh\ncat <<'END'\n{LINES}END\n")
    (tmp_path / "perf").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    compare = script("large_perfdata").compare_sums
    told = compare(tmp_path / "x.data", SUMS, 1)
    assert told == [
        "duplicates left out: perf's text 1, rxlab 1: equal",
        "sum of net:netif_rx len: perf 300 (and 100 in samples it wrote twice), rxlab 300: equal",
        "sum of sched:sched_waking field_pid: perf 5, rxlab 5: equal",
    ]
    assert [line.endswith("DIFFERENT") for line in compare(tmp_path / "x.data", SUMS, 0)] == [True, False, False]
    wrong = {**SUMS, "net:netif_rx": {"len": 400}}
    assert [line.endswith("DIFFERENT") for line in compare(tmp_path / "x.data", wrong, 1)] == [False, True, False]


def test_a_peer_that_is_not_installed_says_how_to_have_it(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    absent = [sys.executable, "-c", "import no_such_peer"]
    assert script("large_pcap").best_of(absent, 1, len) is None
    told = capsys.readouterr().out
    assert "No module named 'no_such_peer'" in told
    assert told.rstrip().endswith("-m pip install --constraint constraints.txt --editable '.[bench]'")
