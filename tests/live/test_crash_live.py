"""A sweep on the testbed, killed or interrupted at random moments: nothing of it may be left.

Eight moments each by default; ``RXLAB_LONG=1`` tries fifty.
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

from rxlab.host.journal import Transaction
from rxlab.host.recovery import restore
from rxlab.record.testbed import NETNS_FOLDER, Endpoint, Testbed, run_checked

N_MOMENTS = 50 if os.environ.get("RXLAB_LONG") == "1" else 8
MARK = "RXLAB_CRASH_TEST"
WATCHDOG_SECONDS = 5.0
# From the start of Python to the second run of the sweep on a slow machine; later moments meet more of the same.
LAST_MOMENT = 7.0

# Changes a setting of a machine that is not its own (permitted), makes a testbed, and records with everything running.
VICTIM = """
import sys
from pathlib import Path
from rxlab.host.journal import apply
from rxlab.record.sweep import sweep
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Workload
folder, identifier, iface, netns = sys.argv[1:]
with apply({"rps_cpus": "0"}, iface=iface, netns=netns, allow_system_changes=True, journal_dir=Path(folder) / "journal") as tx:
    with Testbed(registry=tx, identifier=identifier) as bed:
        for run in sweep(Path(folder) / "sweep", [{"rps_cpus": "off"}, {"rps_cpus": "0"}], testbed=bed, transaction=tx, reps=9,
                         arms=("std", "untraced"), idle="spin", workload=Workload(messages=3000)):
            pass
"""


@pytest.fixture
def machine(testbed: Testbed) -> Endpoint:
    """An interface that stands for the machine's own: made by the test, outlives the victim."""
    return testbed.dst


def rps_cpus(end: Endpoint) -> int:
    text = run_checked(end.command(["cat", f"/sys/class/net/{end.iface}/queues/rx-0/rps_cpus"]))
    return int(text.replace(",", ""), 16)


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


def leftovers(mark: str, identifier: str, end: Endpoint) -> list[str]:
    left = [f"process {pid}: {command}" for pid, command in marked(mark).items()]
    left += [f"namespace {entry.name}" for entry in NETNS_FOLDER.iterdir() if identifier in entry.name]
    return left + ([] if rps_cpus(end) == 0 else [f"rps_cpus {rps_cpus(end)}"])


def wait_clean(mark: str, identifier: str, end: Endpoint, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := leftovers(mark, identifier, end)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark of the test's own; whatever still carries it afterwards is ended."""
    made = secrets.token_hex(8)
    yield made
    for pid in marked(made):
        os.kill(pid, signal.SIGKILL)


def moments(seed: int) -> list[float]:
    """Return random moments, one in each equal part of the time so that early and late ones are all met."""
    draw = random.Random(seed)
    return [(part + draw.random()) * LAST_MOMENT / N_MOMENTS for part in range(N_MOMENTS)]


def strike(folder: Path, mark: str, identifier: str, end: Endpoint, moment: float, number: signal.Signals) -> None:
    """Start a victim and send it the signal after `moment` seconds."""
    argv = [sys.executable, "-c", VICTIM, str(folder), identifier, end.iface, str(end.netns)]
    victim = subprocess.Popen(
        argv, env={**os.environ, MARK: mark}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
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


@pytest.mark.parametrize("moment", moments(1), ids=lambda moment: f"{moment:.3f}s")
def test_a_kill_leaves_nothing(
    moment: float, tmp_path: Path, machine: Endpoint, mark: str, journal: Transaction
) -> None:
    identifier = "k" + secrets.token_hex(3)
    strike(tmp_path / "victim", mark, identifier, machine, moment, signal.SIGKILL)
    left = wait_clean(mark, identifier, machine, WATCHDOG_SECONDS)
    if left:
        restore(tmp_path / "victim" / "journal")
        assert not (still := wait_clean(mark, identifier, machine, 2.0)), f"not even 'rxlab restore' removed: {still}"
        pytest.fail(f"the watchdog left, and only 'rxlab restore' removed: {left}")


@pytest.mark.parametrize("moment", moments(2), ids=lambda moment: f"{moment:.3f}s")
def test_an_interrupt_leaves_nothing_and_no_run_half_said(
    moment: float, tmp_path: Path, machine: Endpoint, mark: str, journal: Transaction
) -> None:
    identifier = "i" + secrets.token_hex(3)
    strike(tmp_path / "victim", mark, identifier, machine, moment, signal.SIGINT)
    left = wait_clean(mark, identifier, machine, WATCHDOG_SECONDS)
    assert not left
    for path in (tmp_path / "victim").glob("sweep/*/run.json"):
        run = json.loads(path.read_text())
        assert run["status"] in ("complete", "partial", "failed"), path
        if run["status"] != "complete":
            assert "nterrupt" in run["problems"][0], run["problems"]


def test_a_watchdog_that_was_killed_too_leaves_it_to_restore(
    tmp_path: Path, machine: Endpoint, mark: str, journal: Transaction
) -> None:
    identifier = "w" + secrets.token_hex(3)
    folder = tmp_path / "victim"
    argv = [sys.executable, "-c", VICTIM, str(folder), identifier, machine.iface, str(machine.netns)]
    victim = subprocess.Popen(
        argv, env={**os.environ, MARK: mark}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any("perf record" in command for command in marked(mark).values()):
        assert time.monotonic() < deadline
        assert victim.poll() is None
        time.sleep(0.02)
    for pid, command in marked(mark).items():
        if "recovery watchdog" in command:
            os.kill(pid, signal.SIGKILL)
    victim.kill()
    victim.wait()
    assert leftovers(mark, identifier, machine), "the test killed nothing that mattered"
    report = restore(folder / "journal")
    assert report.ok, report.lines()
    assert not wait_clean(mark, identifier, machine, 2.0)
