"""One SCHED_IDLE loop per CPU, so that no CPU's idle task is ever current.

On some kernels perf silently drops every event raised while a CPU's idle task runs. A task of the class SCHED_IDLE gives way
to everything else at once, but it does keep the CPU out of its sleep states: that is a change of the experiment, and recorded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable

from rxlab.errors import CaptureError

LOOP = """
import os
os.sched_setaffinity(0, {{{cpu}}})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
print("ready", flush=True)
while True:
    pass
"""


def start_spinners(
    cpus: Iterable[int], start_process: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
) -> list[subprocess.Popen[bytes]]:
    """Start a spinner on each CPU and return when all spin."""
    spinners = [
        start_process(
            [sys.executable, "-I", "-S", "-c", LOOP.format(cpu=cpu)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for cpu in cpus
    ]
    for spinner in spinners:
        assert spinner.stdout is not None
        if spinner.stdout.readline() != b"ready\n":
            stop_spinners(spinners)
            raise CaptureError("an idle spinner did not start", do="Use --idle off.")
    return spinners


def stop_spinners(spinners: Iterable[subprocess.Popen[bytes]]) -> None:
    """End the spinners."""
    for spinner in spinners:
        spinner.kill()
        spinner.wait()
        if spinner.stdout is not None:
            spinner.stdout.close()


def all_cpus() -> list[int]:
    """Return the CPUs a spinner can be pinned to."""
    return sorted(os.sched_getaffinity(0))
