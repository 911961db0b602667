"""Runs in the guest: one capture over ``ports:`` with the built-in workload; the folder to fill is the only argument.

Settings come by the environment: ``SPINE_WORKLOAD`` (JSON of :class:`rxlab.record.workload.Workload`), ``SPINE_EVENTS``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from rxlab.host.journal import apply
from rxlab.record import perfrecord
from rxlab.record.capture import capture
from rxlab.record.ports import open_testbed
from rxlab.record.workload import Workload

# perf opens its events on an emulated machine in 30 to 60 s.
perfrecord.ACK_TIMEOUT = 240.0
# In the guest's memory: each write to the shared file system is traced too, so that perf would record itself without end.
LOCAL = Path("/tmp")


def main() -> None:
    """Record ``run`` in the folder given."""
    folder = Path(sys.argv[1])
    wanted = json.loads(os.environ.get("SPINE_WORKLOAD", "{}"))
    sender, captured = os.environ["GUEST_PEER"], os.environ["GUEST_NIC"]
    with (
        apply(journal_dir=folder / "journal") as journal,
        open_testbed(f"ports:{sender},{captured}", registry=journal) as bed,
    ):
        Path(folder, "interrupts").write_text(Path("/proc/interrupts").read_text())
        run = capture(
            LOCAL / "run",
            testbed=bed,
            workload=Workload(**{"messages": 300, "timeout": 5.0, **wanted}),
            events=os.environ.get("SPINE_EVENTS", "std"),
            idle="off",
            pages=512,
            transaction=journal,
        )
        shutil.copytree(run.path, folder / "run")
        print(run.run["status"], run.run["problems"])


if __name__ == "__main__":
    main()
