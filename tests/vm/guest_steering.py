"""Runs in the guest: 64 flows over igb's four queues, as the host is, with an interrupt moved, with RPS, and queues changed.

Fills the folder given with a run per step, and ``seen.json`` with what the system's own tools say of each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rxlab.errors import RxlabError
from rxlab.host.access import HostAccess
from rxlab.host.interrupts import queue_irqs
from rxlab.host.journal import Transaction, apply
from rxlab.host.settings import parse_settings
from rxlab.record import perfrecord
from rxlab.record.capture import capture
from rxlab.record.ports import open_testbed
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Command

NIC = os.environ["GUEST_NIC"]
PORT = 47100
# perf opens its events on an emulated machine in 30 to 60 s.
perfrecord.ACK_TIMEOUT = 240.0
# In the guest's memory: each write to the shared file system is traced too, so that perf would record itself without end.
LOCAL = Path("/tmp")
FLOWS, ROUNDS = 64, 4
STEPS: dict[str, dict[str, str]] = {"default": {}, "steered": {"irq_cpus": "3", "rps_cpus": "1,2"}}
TRIALS: dict[str, dict[str, str]] = {
    "xps": {"xps_cpus": "0,1"},
    "threaded": {"threaded": "on"},
    "channels": {"channels": "2"},
    "coalescing": {"rx-usecs": "50"},
    "gro-off": {"gro": "off"},
    "rings": {"rx-ring": "512"},
}


def tool(*argv: str) -> str:
    """Return what a command prints."""
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


def steering() -> dict[str, Any]:
    """Return interrupts, their CPUs and the RSS table as the kernel and ethtool show them."""
    with HostAccess(None) as access:
        irqs = queue_irqs(access, NIC)
    folder = Path("/sys/class/net", NIC, "queues")
    return {
        "irqs": irqs,
        "affinity": {irq: Path(f"/proc/irq/{irq}/smp_affinity_list").read_text().strip() for irq in irqs.values()},
        "rps_cpus": {path.parent.name: path.read_text().strip() for path in sorted(folder.glob("rx-*/rps_cpus"))},
        "channels": tool("ethtool", "-l", NIC),
        "rss": tool("ethtool", "-x", NIC),
        "coalesce": tool("ethtool", "-c", NIC),
    }


def step(name: str, wanted: dict[str, str], folder: Path, journal: Transaction, bed: Testbed) -> dict[str, Any]:
    """Capture once under some settings."""
    script = Path(__file__).with_name("flows.py")
    words = [sys.executable, str(script)]
    place = [str(bed.dst.ipv4), str(PORT)]
    load = Command([*words, "send", *place, str(FLOWS), str(ROUNDS)], [*words, "serve", *place], PORT)
    with journal.change(parse_settings(wanted, NIC)):
        seen = steering()
        run = capture(
            LOCAL / name, testbed=bed, command=None, workload=load, duration=60, idle="off", pages=512,
            transaction=journal, configuration=wanted,
        )  # fmt: skip
    shutil.copytree(run.path, folder / name)
    return {**seen, "status": run.run["status"], "problems": run.run["problems"]}


def trial(wanted: dict[str, str], journal: Transaction) -> dict[str, Any]:
    """Apply settings, read them back, restore; say what the driver did to the steering meanwhile."""
    before = steering()
    try:
        with journal.change(parse_settings(wanted, NIC)):
            during = steering()
    except RxlabError as error:
        return {"error": error.line(), "restored": steering() == before}
    after = steering()
    return {"before": before, "during": during, "after": after, "restored": after == before}


def main() -> None:
    """Run all steps."""
    folder = Path(sys.argv[1])
    seen: dict[str, Any] = {}
    with (
        apply(journal_dir=folder / "journal", allow_system_changes=True, yes_this_nic=True) as journal,
        open_testbed(f"ports:{os.environ['GUEST_PEER']},{NIC}", registry=journal) as bed,
    ):
        for name, wanted in TRIALS.items():
            seen[name] = trial(wanted, journal)
            print(name, seen[name].get("error"), seen[name]["restored"], flush=True)
            (folder / "seen.json").write_text(json.dumps(seen, indent=1))
        for name, wanted in STEPS.items():
            seen[name] = step(name, wanted, folder, journal, bed)
            print(name, seen[name]["status"], seen[name]["problems"], flush=True)
            (folder / "seen.json").write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()
