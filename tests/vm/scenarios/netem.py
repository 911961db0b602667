"""Loss, reordering, duplicates, VLAN and QinQ between the cabled ports, each a run of the built-in workload.      netem.py FOLDER

What netem and TCP count themselves is kept beside each run as ``NAME.json``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import guest_runs

from rxlab.host.journal import apply
from rxlab.record.capture import capture
from rxlab.record.ports import open_testbed
from rxlab.record.testbed import Endpoint, Testbed, run_checked
from rxlab.record.workload import Workload

REQUESTS: dict[str, Any] = {"messages": 150, "timeout": 20.0}
# Slow enough for an emulated reader: since 6.10 a datagram queued behind another has no sk_data_ready.
STREAM: dict[str, Any] = {"mode": "open", "messages": 150, "rate": 40.0, "reply_size": 0, "timeout": 20.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tcp-loss": ("loss 4%", {**REQUESTS, "proto": "tcp"}),
    "tcp-reorder": ("delay 60ms reorder 30% 50% duplicate 5%", {**STREAM, "proto": "tcp"}),
    "udp-loss": ("loss 4% duplicate 4%", {**STREAM, "proto": "udp"}),
    "udp-reorder": ("delay 60ms reorder 30% 50%", {**STREAM, "proto": "udp"}),
}
QDISC = ["tc", "qdisc"]
TAGS = {"vlan": ["802.1Q id 5"], "qinq": ["802.1ad id 7", "802.1Q id 8"]}


def counted(src: Endpoint) -> dict[str, Any]:
    """Return what the queueing discipline and TCP of the sending side count."""
    shown = run_checked(src.command(["tc", "-s", "-j", "qdisc", "show", "dev", src.iface]))
    stat = run_checked(src.command(["nstat", "-a", "-z", "-j", "-s"]))
    return {"qdisc": json.loads(shown), "nstat": json.loads(stat)["kernel"]}


def disturb(bed: Testbed, how: str) -> None:
    """Put netem on the sending port; anew, since a change keeps what is not said."""
    calm(bed)
    run_checked(bed.src.command([*QDISC, "add", "dev", bed.src.iface, "root", "netem", "limit", "10000", *how.split()]))


def calm(bed: Testbed) -> None:
    """Take netem off again; there is none the first time."""
    subprocess.run(
        bed.src.command([*QDISC, "del", "dev", bed.src.iface, "root"]), stderr=subprocess.DEVNULL, check=False
    )


def tag(bed: Testbed, tags: list[str], subnet: str) -> Testbed:
    """Give both ports an address behind one or two VLAN tags; the ports themselves stay what is captured."""
    for end, last in ((bed.src, 1), (bed.dst, 2)):
        below = end.iface
        for number, words in enumerate(tags):
            name = f"v{subnet.split('.')[1]}-{number}"
            add = ["ip", "link", "add", "link", below, "name", name, "type", "vlan", "proto", *words.split()]
            run_checked(end.command(add))
            run_checked(end.command(["ip", "link", "set", name, "up"]))
            below = name
        run_checked(end.command(["ip", "addr", "add", f"{subnet}.{last}/24", "dev", below]))
    bed.src, bed.dst = replace(bed.src, ipv4=f"{subnet}.1"), replace(bed.dst, ipv4=f"{subnet}.2")
    return bed


def main(folder: Path) -> None:
    """Record every case."""
    with (
        apply(journal_dir=guest_runs.LOCAL / "journal") as journal,
        open_testbed(guest_runs.PORTS, registry=journal) as bed,
    ):

        def record(name: str, load: Workload) -> None:
            before = counted(bed.src)
            run = capture(guest_runs.LOCAL / name, testbed=bed, workload=load, idle="off", transaction=journal)
            (folder / f"{name}.json").write_text(json.dumps({"before": before, "after": counted(bed.src)}))
            shutil.copytree(run.path, folder / name)
            print(name, run.run["status"], run.run["problems"], flush=True)

        for name, (how, load) in CASES.items():
            disturb(bed, how)
            record(name, Workload(**load))
        calm(bed)
        addresses = bed.src, bed.dst
        for number, (name, tags) in enumerate(TAGS.items()):
            tag(bed, tags, f"10.{80 + number}.0")
            record(name, Workload(messages=100, timeout=20.0))
            bed.src, bed.dst = addresses


if __name__ == "__main__":
    main(Path(sys.argv[1]))
