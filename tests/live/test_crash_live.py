"""A sweep on the testbed, killed or interrupted at random moments: nothing of it may be left.

Eight moments each by default; ``RXLAB_LONG=1`` tries a hundred kills and fifty interrupts. "Nothing" is judged by all that
``rxlab host export`` gives of the host and of a namespace that is not the victim's, by the processes that inherited a mark, and
by the namespaces and journals there are. ``RXLAB_SLICE=2/4`` takes the second quarter of the moments.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rxlab.host.hostdiff import diff_lines, diff_snapshots
from rxlab.host.journal import Transaction
from rxlab.host.recovery import restore
from rxlab.host.topology import snapshot_host
from rxlab.record.testbed import NETNS_FOLDER, Endpoint, Testbed

IS_LONG = os.environ.get("RXLAB_LONG") == "1"
N_KILLS, N_INTERRUPTS = (100, 50) if IS_LONG else (5, 4)
PART, PARTS = (int(word) for word in os.environ.get("RXLAB_SLICE", "1/1").split("/"))
MARK = "RXLAB_CRASH_TEST"
# A second or two on an idle machine.
WATCHDOG_SECONDS = 20.0
# From the start of Python to the second run of the sweep on a slow machine; later moments meet more of the same.
LAST_MOMENT = 7.0

# Settings of every kind that a machine without a NIC has: of an interface, of a queue, of NAPI threads, of the host, of CPUs.
OTHER = {
    "gro": "on", "threaded": "on", "napi_cpus": "1", "gro_flush_timeout": 20000, "napi_defer_hard_irqs": 2, "rps_cpus": "0",
    "rps_flow_cnt": 64, "rps_sock_flow_entries": 1024, "netdev_budget": 299, "tcp_early_demux": "off", "cpu_dma_latency": 0,
}  # fmt: skip

# Changes settings of a machine that is not its own (permitted), makes a testbed, and records with everything running.
VICTIM = """
import json, sys
from pathlib import Path
from rxlab.host.journal import apply
from rxlab.record.sweep import sweep
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Workload
folder, identifier, iface, netns, other = sys.argv[1:]
options = {"allow_system_changes": True, "journal_dir": Path(folder) / "journal"}
with apply(json.loads(other), iface=iface, netns=netns, **options) as tx:
    with Testbed(registry=tx, identifier=identifier) as bed:
        for run in sweep(Path(folder) / "sweep", [{"rps_cpus": "off"}, {"rps_cpus": "0"}], testbed=bed, transaction=tx, reps=9,
                         arms=("std", "untraced"), idle="spin", workload=Workload(messages=3000)):
            pass
"""


@pytest.fixture
def machine(testbed: Testbed) -> Endpoint:
    """An interface that stands for the machine's own: made by the test, outlives the victim."""
    return testbed.dst


class Before:
    """Everything that can be looked at, before a victim runs; knows what a victim is called and what it leaves."""

    def __init__(self, folder: Path, end: Endpoint, identifier: str, mark: str) -> None:
        self.folder, self.end, self.identifier, self.mark = folder, end, identifier, mark
        self.exports = self.look()

    def look(self) -> dict[str, object]:
        """Return what ``rxlab host export`` gives of this host and of the other machine, as bytes."""
        return {
            str(netns): json.loads(json.dumps(snapshot_host(None, netns, everything=True)))
            for netns in (None, self.end.netns)
        }

    def left(self) -> list[str]:
        """Return what is still there of the victim."""
        left = [f"process {pid}: {command}" for pid, command in marked(self.mark).items()]
        left += [f"namespace {entry.name}" for entry in NETNS_FOLDER.iterdir() if self.identifier in entry.name]
        left += [path.name for path in self.folder.glob("journal/*.journal")]
        return left or diff_lines(diff_snapshots(self.exports, self.look()))

    def wait(self, seconds: float) -> list[str]:
        """Return what is still there when nothing more goes, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not left:
            assert json.dumps(self.exports) == json.dumps(self.look())
        return left


def marked(mark: str) -> dict[int, str]:
    """Return the running processes that inherited the mark, by pid."""
    needle, found = f"{MARK}={mark}".encode(), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark of the test's own; whatever still carries it afterwards is ended."""
    made = secrets.token_hex(8)
    yield made
    for pid in marked(made):
        os.kill(pid, signal.SIGKILL)


def moments(seed: int, number: int) -> list[float]:
    """Return random moments, one in each equal part of the time so that early and late ones are all met."""
    draw = random.Random(seed)
    drawn = [(part + draw.random()) * LAST_MOMENT / number for part in range(number)]
    return drawn[PART - 1 :: PARTS]


def start(before: Before) -> subprocess.Popen[bytes]:
    """Start a victim."""
    argv = [sys.executable, "-c", VICTIM, str(before.folder), before.identifier]
    argv += [before.end.iface, str(before.end.netns), json.dumps(OTHER)]
    environment = {**os.environ, MARK: before.mark}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def strike(before: Before, moment: float, number: signal.Signals) -> None:
    """Start a victim and send it the signal after `moment` seconds."""
    victim = start(before)
    try:
        victim.wait(moment)
        pytest.fail(f"the victim ended by itself with status {victim.returncode}")
    except subprocess.TimeoutExpired:
        victim.send_signal(number)
    try:
        victim.wait(30)
    except subprocess.TimeoutExpired:
        victim.kill()
        victim.wait()
        pytest.fail(f"the victim did not end after signal {number.name} at {moment:.3f} s")


@pytest.mark.parametrize("moment", moments(1, N_KILLS), ids=lambda moment: f"{moment:.3f}s")
def test_a_kill_leaves_nothing(
    moment: float, tmp_path: Path, machine: Endpoint, mark: str, journal: Transaction
) -> None:
    before = Before(tmp_path / "victim", machine, "k" + secrets.token_hex(3), mark)
    strike(before, moment, signal.SIGKILL)
    left = before.wait(WATCHDOG_SECONDS)
    if left:
        report = restore(tmp_path / "victim" / "journal")
        assert not (still := before.wait(2.0)), f"not even 'rxlab restore' removed: {still}; {report.lines()}"
        pytest.fail(f"the watchdog left, and only 'rxlab restore' removed: {left}")


@pytest.mark.parametrize("moment", moments(2, N_INTERRUPTS), ids=lambda moment: f"{moment:.3f}s")
def test_an_interrupt_leaves_nothing_and_no_run_half_said(
    moment: float, tmp_path: Path, machine: Endpoint, mark: str, journal: Transaction
) -> None:
    before = Before(tmp_path / "victim", machine, "i" + secrets.token_hex(3), mark)
    strike(before, moment, signal.SIGINT)
    assert not before.wait(WATCHDOG_SECONDS)
    for path in (tmp_path / "victim").glob("sweep/*/run.json"):
        run = json.loads(path.read_text())
        assert run["status"] in ("complete", "partial", "failed"), path
        if run["status"] != "complete":
            assert "nterrupt" in run["problems"][0], run["problems"]


def test_a_watchdog_that_was_killed_too_leaves_it_to_restore(
    tmp_path: Path, machine: Endpoint, mark: str, journal: Transaction
) -> None:
    before = Before(tmp_path / "victim", machine, "w" + secrets.token_hex(3), mark)
    victim = start(before)
    deadline = time.monotonic() + 60
    while not any("perf record" in command for command in marked(mark).values()):
        assert time.monotonic() < deadline
        assert victim.poll() is None
        time.sleep(0.02)
    changed = diff_snapshots(before.exports, before.look())
    for pid, command in marked(mark).items():
        if "recovery watchdog" in command:
            os.kill(pid, signal.SIGKILL)
    victim.kill()
    victim.wait()
    assert len(changed) >= len(OTHER), "the test changed nothing that an export shows"
    report = restore(before.folder / "journal")
    assert report.ok, report.lines()
    assert not before.wait(2.0)
