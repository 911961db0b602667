"""The stage table against the running kernel: its events exist and it takes their filters."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from rxlab.stages import EVENT_FILTERS, EVENT_PRESETS

TRACEFS = Path("/sys/kernel/tracing/events")

# Kernel from which an event must exist; those not named are older than any kernel rxlab meets. On an older one doctor
# names the stages that go.
SINCE = {
    "sock:sk_data_ready": (6, 3),
    "sock:sock_recv_length": (6, 3),
    "csd:csd_queue_cpu": (6, 6),
    "csd:csd_function_entry": (6, 6),
}


def kernel_has(event: str) -> bool:
    return (TRACEFS / event.replace(":", "/") / "format").is_file()


@pytest.mark.parametrize("preset", ["min", "std"])
def test_the_kernel_has_the_events_of_the_preset(preset: str) -> None:
    version = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    expected = [event for event in EVENT_PRESETS[preset] if version >= SINCE.get(event, (0, 0))]
    assert [event for event in expected if not kernel_has(event)] == []


def test_the_kernel_takes_every_filter(tmp_path: Path) -> None:
    command = ["perf", "record", "--quiet", "--output", str(tmp_path / "perf.data"), "--all-cpus"]
    for event, expression in EVENT_FILTERS.items():
        if kernel_has(event):
            command += ["--event", event, "--filter", expression]
    ended = subprocess.run([*command, "--", "true"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
