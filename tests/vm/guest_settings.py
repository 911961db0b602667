"""Runs in the guest: settings of a real NIC driver (igb) set, killed in the middle, and put back.

Leaves ``settings.json`` in the folder that is its only argument: what the ``ethtool`` command showed before, during and after each
change, and the differences of ``rxlab host export`` after each change and after each kill. Judging is the host's.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rxlab.errors import HostSettingError
from rxlab.host.access import HostAccess
from rxlab.host.hostdiff import diff_snapshots
from rxlab.host.journal import apply
from rxlab.host.settings import parse_settings
from rxlab.host.topology import snapshot_host

CHANGES: list[dict[str, object]] = [
    {"channels": 2},
    {"channels": 1, "rps_cpus": "0-1", "irq_cpus": "2"},
    {"channels": 2, "rss-table": "equal 2"},
    {"rss-table": "3,2"},
    {"rx-ring": 512, "tx-ring": 512},
    {"gro": "off", "rxhash": "off", "tso": "off"},
    {"ntuple": "on"},
    {"irq_cpus": "2"},
    {"irq_cpus:1": "0"},
    {"rx-usecs": 100},
    {"rps_cpus": "0-3", "rps_flow_cnt": 256, "rps_sock_flow_entries": 1024},
    {"xps_cpus": "0-1"},
    {"xps_rxqs": "1"},
    {"threaded": "on", "napi_cpus": "1"},
    {"gro_flush_timeout": 20000, "napi_defer_hard_irqs": 2},
    {"cpu_dma_latency": 0},
]
# All at once, but for what goes against it: this NIC cannot steer flows, and has no queue 3 when it has two.
ALL = {
    key: value
    for change in CHANGES[1:]
    for key, value in change.items()
    if ":" not in key and key not in ("rss-table", "ntuple")
} | {"channels": 2}
OWNER = """
import json, sys
from rxlab.host.journal import apply
folder, iface, wanted = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
with apply(allow_system_changes=True, journal_dir=__import__("pathlib").Path(folder)) as transaction:
    from rxlab.host.settings import parse_settings
    print("ready", flush=True)
    while True:
        with transaction.change(parse_settings(wanted, iface), inexact="record"):
            pass
"""


def judge(iface: str) -> dict[str, str]:
    """Return what the ethtool command and the kernel's files say."""
    shown = {
        option: subprocess.run(["ethtool", option, iface], capture_output=True, text=True, check=False).stdout
        for option in ("-l", "-g", "-k", "-x", "-c")
    }
    queues = sorted(Path(f"/sys/class/net/{iface}/queues").glob("*/?ps_*"))
    for path in queues:
        try:
            shown[str(path)] = path.read_text()
        except OSError:
            continue
    for line in Path("/proc/interrupts").read_text().splitlines():
        name = line.split()[-1] if line.split() else ""
        if name.startswith(iface):
            irq = line.split(":")[0].strip()
            shown[f"irq {name}"] = Path(f"/proc/irq/{irq}/smp_affinity_list").read_text()
            shown[f"effective {name}"] = Path(f"/proc/irq/{irq}/effective_affinity_list").read_text()
    return shown


def prepare(iface: str) -> None:
    """Set the NIC as somebody may have left it, so that what a driver resets can be seen."""
    subprocess.run(["ip", "link", "set", iface, "up"], check=True)
    time.sleep(3)
    for number in range(4):
        Path(f"/sys/class/net/{iface}/queues/rx-{number}/rps_cpus").write_text("4")
        Path(f"/sys/class/net/{iface}/queues/rx-{number}/rps_flow_cnt").write_text("64")
        Path(f"/sys/class/net/{iface}/queues/tx-{number}/xps_cpus").write_text("8")
    for line in Path("/proc/interrupts").read_text().splitlines():
        name = line.split()[-1] if line.split() else ""
        if name.startswith(f"{iface}-") or name == iface:
            Path(f"/proc/irq/{line.split(':')[0].strip()}/smp_affinity_list").write_text("1,3")
    # An interrupt moves when it next comes, or when it is requested anew.
    subprocess.run(["ip", "link", "set", iface, "down"], check=True)
    subprocess.run(["ip", "link", "set", iface, "up"], check=True)
    time.sleep(3)


def changes(iface: str, folder: Path) -> list[dict[str, Any]]:
    """Make each change and say what was seen before, during and after."""
    rows = []
    for wanted in [*CHANGES, ALL]:
        before, shown, row = snapshot_host(None, everything=True), judge(iface), {"wanted": wanted}
        try:
            # The moderation timer of this NIC has steps of its own.
            with apply(
                wanted, iface=iface, allow_system_changes=True, inexact="record", journal_dir=folder / "journal"
            ) as done:
                row |= {"got": dict(done.got), "asked": dict(done.asked), "during": judge(iface)}
        except HostSettingError as error:
            row["error"] = str(error)
        row |= {"before": shown, "after": judge(iface), "report": done.report.lines() if "got" in row else []}
        row["difference"] = diff_snapshots(before, snapshot_host(None, everything=True))
        if "rss-table" in wanted:
            # igb's own table is not the kernel's default one: it comes back entry by entry, and counts as configured by somebody,
            # for which the kernel refuses fewer channels from now on.
            subprocess.run(["ethtool", "-X", iface, "default"], check=True)
        rows.append(row)
        print(wanted, "->", row.get("error") or row["difference"], flush=True)
    return rows


def kills(iface: str, folder: Path, number: int) -> list[dict[str, Any]]:
    """Kill an owner that changes everything in a loop, at random moments."""
    before, draw, rows = snapshot_host(None, everything=True), random.Random(7), []
    with HostAccess() as access:
        parse_settings(ALL, iface, access=access)
    for _ in range(number):
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(folder / "journal"), iface, json.dumps(ALL)], stdout=subprocess.PIPE
        )
        assert owner.stdout is not None
        ready, moment = owner.stdout.readline(), draw.uniform(0, 6)
        time.sleep(moment)
        alive = owner.poll() is None
        owner.kill()
        owner.wait()
        deadline = time.monotonic() + 60
        while list((folder / "journal").glob("*.journal")) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [path.name for path in (folder / "journal").glob("*.journal")]
        difference = diff_snapshots(before, snapshot_host(None, everything=True))
        rows.append({"moment": moment, "ready": bool(ready), "alive": alive, "left": left, "difference": difference})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Fill the folder."""
    folder, iface = Path(sys.argv[1]), os.environ["GUEST_NIC"]
    prepare(iface)
    # In the guest's memory: flock and fsync of the shared folder are the host's.
    local = Path("/run/rxlab-settings")
    local.mkdir()
    result: dict[str, Any] = {"kernel": os.uname().release, "changes": changes(iface, local)}
    (folder / "settings.json").write_text(json.dumps(result))
    result["kills"] = kills(iface, local, int(os.environ.get("SETTINGS_KILLS", "8")))
    (folder / "settings.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
