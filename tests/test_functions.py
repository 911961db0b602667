"""A function log shown: text, figure and command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rxlab.errors import FormatError, MissingEventError
from rxlab.pipeline import function_phases
from rxlab.show.functions import COLOURS, phases_text, plot_phases
from tests.test_functionphases import LOG


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "trace.txt"
    path.write_text(LOG)
    return path


def test_a_line_for_each_phase_with_when_how_long_and_who(log: Path) -> None:
    lines = phases_text(function_phases(log)).splitlines()
    assert lines[2].split() == [
        "10.0",
        "µs",
        "11.0",
        "µs",
        "7.00",
        "µs",
        "3",
        "connect",
        "curl",
        "(10)",
        "security_socket_connect",
    ]
    assert lines[3].split() == [
        "20.0",
        "µs",
        "40.0",
        "µs",
        "-",
        "2",
        "receive",
        "interrupts,",
        "CPU",
        "0",
        "tcp_v4_rcv",
    ]
    assert lines[6].split()[:6] == ["500", "ms", "0", "ns", "500", "ms"]


def test_lanes_bars_and_cut_gaps(log: Path) -> None:
    figure = plot_phases(function_phases(log))
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["curl (10)", "interrupts, CPU 0", "nginx (20)"]
    bars = [bar for bar in axes.patches if bar.get_width() > 0]
    assert len(bars) == 6
    # 60 µs of calls; the half second in between is cut out, and said.
    assert max(bar.get_x() + bar.get_width() for bar in bars) < 70
    assert "500 ms" in [text.get_text() for text in axes.texts]
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_the_command_takes_a_text_file(log: Path) -> None:
    argv = [sys.executable, "-m", "rxlab", "show", str(log), "--functions"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.count("curl (10)") == 4


def test_runs_and_files_without_such_a_log_are_one_line(tmp_path: Path, repo: Path) -> None:
    with pytest.raises(FormatError, match="no function log in this run"):
        function_phases(repo / "data/http")
    events = tmp_path / "trace.txt"
    events.write_text("a-1 [000] 1.000001: netif_rx: len=1\n")
    with pytest.raises(MissingEventError, match="no function call"):
        function_phases(events)


def test_text_of_an_empty_gap_column_has_no_minus_one(log: Path) -> None:
    spans = function_phases(log)
    assert (spans["gap"] >= -1).all()
    assert "-1" not in phases_text(spans.take(np.array([0])))
