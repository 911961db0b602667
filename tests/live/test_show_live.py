"""What ``rxlab show`` tells of a packet, against ``perf script``: the events of a hop, and in whose context they were raised."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rxlab.dataset.run import open_run
from rxlab.show.life import packet_hops
from rxlab.stages import STAGE_INDEX

DATA = Path(__file__).resolve().parents[2] / "data"
LINE = re.compile(r"^\s*(.+?)\s+(\d+)\s+\[(\d+)\]\s+(\d+)\.(\d{9}):\s+([\w:]+):")


@pytest.mark.parametrize("name", ["tcp-rps-on", "http"])
def test_events_and_tasks_of_every_hop_are_those_of_perf_script(name: str) -> None:
    done = subprocess.run(
        ["perf", "script", "--ns", "-i", DATA / name / "perf.data", "-F", "comm,tid,cpu,time,event"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = [match.groups() for match in map(LINE.match, done.stdout.splitlines()) if match]
    comm, event = ([row[at] for row in told] for at in (0, 5))
    tid, cpu = (np.array([int(row[at]) for row in told]) for at in (1, 2))
    time = np.array([int(row[3]) * 10**9 + int(row[4]) for row in told])
    run = open_run(DATA / name)
    tree = run.tree
    offset = int(tree["clocks"]["axis_offset"])
    packets = tree["packets"].to_dataset()
    rows = np.flatnonzero((packets["status"].values == 0) & packets["is_data"].values)[:20]
    assert len(rows)
    for row in rows.tolist():
        at = packets["time"].values[row].view(np.int64) - offset
        hops = packet_hops(tree, row, run.events)
        for before, hop in zip(hops, hops[1:], strict=False):
            start, end = at[STAGE_INDEX[before.stage]], at[STAGE_INDEX[hop.stage]]
            assert hop.events == ((time >= start) & (time < end) & np.isin(cpu, [before.cpu, hop.cpu])).sum()
            here = np.flatnonzero((time == end) & (cpu == hop.cpu))
            if hop.stage != "switch_in":  # perf script names the task that is switched out
                assert any(f"{comm[k]}/{tid[k]}" in hop.task for k in here), (hop, [(event[k], comm[k]) for k in here])
