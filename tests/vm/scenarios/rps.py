"""RPS over an igb and over a veth, RFS with a reader that changes its CPU.      rps.py FOLDER

The igb's hash is of layer 3 to the driver (PKT_HASH_TYPE_L3), so the kernel hashes again, with a secret of its own, before it
chooses a CPU. A probe on ``enqueue_to_backlog()`` says what it had: ``probed.txt``.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import guest_runs

from rxlab.host.journal import apply
from rxlab.host.settings import parse_settings
from rxlab.record.capture import capture
from rxlab.record.ports import open_testbed
from rxlab.record.workload import Command

TRACING = Path("/sys/kernel/tracing")
FLOWS = [sys.executable, str(Path(__file__).with_name("flows.py"))]
PORT = "47100"


@contextmanager
def probed(out: Path) -> Iterator[None]:
    """Write each packet put on a backlog, with its hash and the CPU chosen, as a trace instance of its own says it."""
    instance = TRACING / "instances" / "guest"
    (TRACING / "kprobe_events").write_text("p:guest/enqueue enqueue_to_backlog skb hash=skb->hash:u32 cpu=cpu:s32\n")
    instance.mkdir()
    (instance / "trace_clock").write_text("mono")
    (instance / "events/guest/enqueue/enable").write_text("1")
    try:
        yield
    finally:
        (instance / "events/guest/enqueue/enable").write_text("0")
        out.write_text((instance / "trace").read_text())
        instance.rmdir()
        (TRACING / "kprobe_events").write_text("")


def record(
    folder: Path, name: str, testbed: str, settings: Mapping[str, str], server: list[str], client: list[str]
) -> None:
    """Record one command with settings in force."""
    with (
        apply(journal_dir=guest_runs.LOCAL / "journal", allow_system_changes=True) as journal,
        open_testbed(testbed, registry=journal) as bed,
        journal.change(parse_settings(settings, bed.dst.iface, bed.dst.netns)),
        probed(folder / f"{name}.probed"),
    ):
        load = Command([*FLOWS, *client], [*FLOWS, *server], int(PORT))
        run = capture(
            guest_runs.LOCAL / name, testbed=bed, workload=load, idle="off", transaction=journal, configuration=settings
        )
    shutil.copytree(run.path, folder / name)
    print(name, run.run["status"], run.run["problems"], flush=True)


def main(folder: Path) -> None:
    """Record every case."""
    address = "10.77.0.2"
    many = ["send", address, PORT, os.environ["GUEST_NIC"], str(folder / "unused.json"), "6", "32"]
    serve = ["serve", address, PORT]
    record(folder, "igb", guest_runs.PORTS, {"rps_cpus": "0,2-3"}, serve, many)
    record(folder, "veth", "veth", {"rps_cpus": "1-3"}, serve, many)
    rfs = {"rps_cpus": "0-3", "rps_sock_flow_entries": "1024", "rps_flow_cnt": "256"}
    migrate = ["migrate", address, PORT, str(folder / "moves.json"), "1", "3", "2"]
    record(folder, "rfs", guest_runs.PORTS, rfs, migrate, ["stream", address, PORT])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
