"""The journal against the kernel: real namespaces and settings, an owner killed at any moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rxlab.errors import HostSettingError
from rxlab.host.access import HostAccess
from rxlab.host.hostdiff import diff_snapshots
from rxlab.host.journal import Transaction, apply
from rxlab.host.recovery import restore
from rxlab.host.settings import parse_settings, read_settings
from rxlab.host.undo import TAG
from rxlab.record.capture import capture
from rxlab.record.testbed import Testbed

N_KILLS = 24
SECONDS = 5.0

# Sets up a testbed of its own, starts helpers, and changes settings both inside it and in a namespace that is not its own.
OWNER = """
import subprocess, sys
from pathlib import Path
from rxlab.host.journal import Transaction, apply
from rxlab.host.settings import parse_settings
folder, outside, own = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with apply(testbed=own, journal_dir=folder, allow_system_changes=True) as transaction:
    transaction.register_namespace(own)
    def ip(*arguments):
        subprocess.run(["ip", *arguments], env=transaction.environment(), check=True)
    print("begin", flush=True)
    ip("netns", "add", own)
    ip("-n", own, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    transaction.start_process(["sleep", "60"])
    transaction.start_process(["ip", "netns", "exec", own, "sh", "-c", "sleep 61 & sleep 62"])
    while True:
        inside = parse_settings({"rps_cpus": "0", "gro": "on", "tcp_early_demux": "off"}, "v0", own)
        there = parse_settings({"rps_cpus": "0", "gro": "on", "rps_flow_cnt": 64, "tcp_early_demux": "off"}, "v0", outside)
        with transaction.change([*inside, *there]):
            pass
"""


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[str]:
    """Return a namespace with a veth pair that belongs to nobody's transaction."""
    name = f"rxlab-out-{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        yield name
    finally:
        ip("netns", "delete", name)


def state(netns: str) -> dict[str, object]:
    """Return everything rxlab could have set, and what else could have changed with it."""
    with HostAccess(netns) as access:
        features = access.call(access.ethtool.features, "v0")
        raw = access.read("sys/class/net/v0/queues/rx-0/rps_cpus")
        return {"settings": read_settings("v0", netns, access), "features": features, "raw": raw}


def helpers_of(transaction: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if f"{TAG}={transaction}".encode() in environment:
            found.append(int(entry.name))
    return found


def watchdog_of(folder: Path) -> int | None:
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if str(folder).encode() in command and b"watchdog" in command.split(b"\0"):
            return int(entry.name)
    return None


def wait_clean(folder: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while list(folder.glob("*.journal")):
        assert time.monotonic() < deadline, f"not restored within {SECONDS} s"
        time.sleep(0.02)


def test_killed_at_any_moment(tmp_path: Path, outside: str) -> None:
    before = state(outside)
    moments = random.Random(20)  # the kernel's timing differs from run to run anyway
    for round_number in range(N_KILLS):
        own = f"rxlab-own-{os.getpid()}-{round_number}"
        command = [sys.executable, "-c", OWNER, str(tmp_path), outside, own]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"begin\n"
            time.sleep(moments.uniform(0, 0.25))
            watchdog = watchdog_of(tmp_path)
            assert watchdog is not None
            (journal,) = tmp_path.glob("*.journal")
            if round_number % 4 == 3:
                os.kill(watchdog, signal.SIGKILL)
                owner.kill()
                owner.wait()
                assert restore(tmp_path).ok
            else:
                owner.kill()
                owner.wait()
                wait_clean(tmp_path)
        assert own not in ip("netns", "list").split()
        assert not diff_snapshots(before, state(outside))
        assert helpers_of(journal.stem) == []
        assert not (tmp_path / "watchdog.log").exists()


def test_interrupt_restores_and_ends(tmp_path: Path, outside: str) -> None:
    before = state(outside)
    own = f"rxlab-int-{os.getpid()}"
    command = [sys.executable, "-c", OWNER, str(tmp_path), outside, own]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"begin\n"
        time.sleep(0.2)
        owner.send_signal(signal.SIGINT)
        try:
            assert owner.wait(20) != 0
        finally:
            owner.kill()
    wait_clean(tmp_path)
    assert own not in ip("netns", "list").split()
    assert state(outside) == before


def test_settings_are_the_namespaces_own(tmp_path: Path, outside: str) -> None:
    settings = parse_settings({"rps_cpus": "0", "gro": "on", "tcp_early_demux": "off"}, "v0", outside)
    ours = Path("/proc/sys/net/ipv4/tcp_early_demux").read_text()

    def inside(*command: str) -> str:
        return ip("netns", "exec", outside, *command)

    with apply(settings, allow_system_changes=True, journal_dir=tmp_path):
        assert inside("cat", "/sys/class/net/v0/queues/rx-0/rps_cpus") == "1\n"
        assert inside("cat", "/proc/sys/net/ipv4/tcp_early_demux") == "0\n"
        assert "generic-receive-offload: on" in inside("ethtool", "-k", "v0")
        assert Path("/proc/sys/net/ipv4/tcp_early_demux").read_text() == ours
    assert inside("cat", "/sys/class/net/v0/queues/rx-0/rps_cpus") == "0\n"
    assert inside("cat", "/proc/sys/net/ipv4/tcp_early_demux") == "1\n"


def test_the_kernel_rounds_and_refuses(tmp_path: Path, outside: str) -> None:
    before = state(outside)
    options = {"netns": outside, "iface": "v0", "allow_system_changes": True, "journal_dir": tmp_path}
    with pytest.raises(HostSettingError, match="found 128, expected 100"), apply({"rps_flow_cnt": 100}, **options):
        pytest.fail("the block must not run")
    # veth has no NAPI while it is down and GRO is off
    with pytest.raises(HostSettingError, match="threaded@v0"), apply({"rps_cpus": "0", "threaded": "on"}, **options):
        pytest.fail("the block must not run")
    with pytest.raises(HostSettingError, match="rx-usecs@v0.*cannot be read"), apply({"rx-usecs": 5}, **options):
        pytest.fail("the block must not run")
    assert state(outside) == before


def test_queues_recreated_by_the_kernel(tmp_path: Path) -> None:
    """A veth with two queues: fewer channels drop a queue and its RPS mask, the restore brings both back."""
    own = f"rxlab-chan-{os.getpid()}"
    with apply(testbed=own, journal_dir=tmp_path) as transaction:
        transaction.register_namespace(own)
        ip("netns", "add", own)
        ip("-n", own, "link", "add", "v0", "numrxqueues", "2", "numtxqueues", "2", "type", "veth", "peer", "name", "v1")
        with HostAccess(own) as access:
            access.call(access.ethtool.set, "v0", "channels", "rx", 2)
        with transaction.change(parse_settings({"rps_cpus": "0"}, "v0", own)):
            before = state(own)
            with transaction.change(parse_settings({"rx-channels": 1}, "v0", own)):
                after = state(own)["settings"]
                assert isinstance(after, dict)
                assert "rps_cpus@v0/rx-1" not in after
            assert state(own) == before
    assert own not in ip("netns", "list").split()


def test_a_registered_namespace_must_be_new(tmp_path: Path, outside: str) -> None:
    with (
        pytest.raises(HostSettingError, match="exists already"),
        apply(testbed="x", journal_dir=tmp_path) as transaction,
    ):
        transaction.register_namespace(outside)
    assert outside in ip("netns", "list").split(), "somebody else's namespace stays"


def test_threads_of_napi_and_where_they_run(tmp_path: Path, outside: str) -> None:
    """Judge: ps and taskset, which know the thread by its name."""
    for name in ("v0", "v1"):
        ip("-n", outside, "link", "set", name, "up")
    before = state(outside)
    wanted = {"gro": "on", "threaded": "on", "napi_cpus": "1"}
    with apply(wanted, iface="v0", netns=outside, allow_system_changes=True, journal_dir=tmp_path):
        listed = subprocess.run(["ps", "-eo", "pid,comm"], capture_output=True, text=True, check=True).stdout
        (pid,) = [line.split()[0] for line in listed.splitlines() if "napi/v0-" in line]
        mask = subprocess.run(["taskset", "-p", pid], capture_output=True, text=True, check=True).stdout
        assert mask.split()[-1] == "2"
    # GRO off takes NAPI away, and threaded NAPI cannot be left after that: the order of restoring matters.
    assert not diff_snapshots(before, state(outside))


def test_idle_states_and_the_latency_wish(tmp_path: Path) -> None:
    """Judge: the kernel's own files."""
    disable = Path("/sys/devices/system/cpu/cpu0/cpuidle/state1/disable")
    wanted: dict[str, object] = {"cpu_dma_latency": 7, **({"idle_state:1": "off"} if disable.exists() else {})}

    def seen() -> tuple[int, str]:
        with open("/dev/cpu_dma_latency", "rb") as stream:
            return struct.unpack("=i", stream.read(4))[0], disable.read_text() if disable.exists() else ""

    before = seen()
    assert before[0] > 7
    with apply(wanted, allow_system_changes=True, journal_dir=tmp_path):
        assert seen()[0] == 7
        assert seen()[1] in ("1\n", "")
    assert seen() == before


def state_of(pid: int) -> str:
    return subprocess.run(["ps", "-o", "stat=", str(pid)], capture_output=True, text=True, check=True).stdout


def test_irqbalance_is_paused_and_goes_on(tmp_path: Path) -> None:
    """Judge: ps. The daemon is played by a process of that name, with a pid, arguments and a state to keep."""
    daemon = tmp_path / "irqbalance"
    shutil.copy("/bin/sleep", daemon)
    with subprocess.Popen([str(daemon), "60"]) as process:
        try:
            with apply({"irqbalance": "off"}, allow_system_changes=True, journal_dir=tmp_path / "journal"):
                assert state_of(process.pid).startswith("T")
            assert state_of(process.pid).startswith("S")
        finally:
            process.kill()


def test_a_setting_changed_during_a_run_is_drift(tmp_path: Path, testbed: Testbed, journal: Transaction) -> None:
    end, changed = testbed.dst, []

    def somebody(seconds: float) -> None:
        if not changed:
            changed.append(
                ip(
                    "netns",
                    "exec",
                    str(end.netns),
                    "sh",
                    "-c",
                    f"echo 1 > /sys/class/net/{end.iface}/queues/rx-0/rps_cpus",
                )
            )

    options = {"testbed": testbed, "duration": 1.0, "events": "none", "idle": "off", "transaction": journal}
    quiet = capture(tmp_path / "quiet", **options)
    assert quiet.run["got"]["drift"] == {}
    assert quiet.run["status"] == "complete"
    run = capture(tmp_path / "run", progress=somebody, **options).run
    label = f"rps_cpus@{end.iface}/rx-0"
    assert run["got"]["drift"] == {label: ["off", "0"]}
    assert run["status"] == "partial"
    assert run["problems"] == [f"{label} was off at the start and is 0 at the end: somebody else changed it"]
