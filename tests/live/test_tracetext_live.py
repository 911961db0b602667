"""perf script's text, read back, against the recording it was printed from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from rxlab.read.perfdata import read_perfdata
from rxlab.read.tracetext import read_tracetext

EVENTS = "sched:sched_switch,sched:sched_waking,sched:sched_wakeup,irq:softirq_entry,net:netif_rx"


def test_perf_script_text_equals_the_recording(tmp_path: Path) -> None:
    recording, printed = tmp_path / "perf.data", tmp_path / "script.txt"
    code = "import socket; s = socket.socket(type=2); s.bind(('127.0.0.1', 0)); [s.sendto(b'x', s.getsockname()) for _ in range(50)]"
    work = [sys.executable, "-c", code]
    command = ["perf", "record", "-q", "-a", "-e", EVENTS, "-o", str(recording), "--", *work]
    subprocess.run(command, check=True, capture_output=True)
    fields = ["--ns", "-F", "comm,pid,tid,cpu,time,event,trace", "-i", str(recording)]
    with printed.open("w") as out:
        subprocess.run(["perf", "script", *fields], stdout=out, stderr=subprocess.DEVNULL, check=True)
    binary, text = read_perfdata(recording), read_tracetext(printed)
    assert set(text.events) == {name for name in binary.events if binary.events[name].n}
    compared = 0
    for name, columns in text.events.items():
        recorded = binary.events[name]
        # perf prints in the order of time; both ranks are that order
        shown, order = np.argsort(columns["rank"]), np.argsort(recorded["rank"])
        for column in set(columns) & set(recorded) - {"rank", "comm", "text"}:
            if column not in columns.attrs["categories"] and recorded[column].dtype.kind in "iu":
                ours = columns[column][shown]
                assert np.array_equal(ours, recorded[column][order].astype(ours.dtype)), (name, column)
                compared += 1
    assert compared > 4 * len(text.events)
