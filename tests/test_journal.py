"""host/journal.py and undo.py on a made-up host: whatever goes wrong, the tree is afterwards byte for byte what it was."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from host_builder import EBUSY, EIO, EPERM, FakeHost, tree_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from rxlab import doctor
from rxlab.errors import HostSettingError
from rxlab.host import journalfile
from rxlab.host.access import HostAccess
from rxlab.host.journal import Transaction, apply
from rxlab.host.recovery import restore
from rxlab.host.settings import Setting, collateral, parse_settings
from rxlab.host.undo import AccessCache, RestoreReport, process_start, restore_change

ALL = {
    "irqbalance": "off",
    "rps_cpus": "0-1",
    "rps_flow_cnt": 128,
    "xps_cpus": "1",
    "xps_rxqs": "0-1",
    "irq_cpus": "1",
    "rss-table": "1",
    "rss-key": "aa" * 40,
    "gro": "off",
    "rx-usecs": 50,
    "rx-ring": 512,
    "gro_flush_timeout": 20000,
    "threaded": "on",
    "napi_cpus": "1",
    "busy_poll": 50,
    "rps_sock_flow_entries": 4096,
    "tcp_early_demux": "off",
    "governor": "performance",
    "idle_state:1": "off",
    "cpu_dma_latency": 0,
}


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path / "root")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "journal"
    yield folder
    assert not list(folder.glob("*.journal")), "a journal was left behind"


def change(host: FakeHost, folder: Path, wanted: dict[str, object], **options):
    options = {"allow_system_changes": True, **options}
    return apply(wanted, iface="eth0", journal_dir=folder, open_access=host.open, **options)


def nic_state(host: FakeHost) -> object:
    return host.nic.state()


def test_everything_is_set_and_put_back(host: FakeHost, folder: Path) -> None:
    before, nic = tree_bytes(host.root), nic_state(host)
    with change(host, folder, ALL) as transaction:
        assert host.read("sys/class/net/eth0/queues/rx-1/rps_cpus") == "3"
        assert host.read("proc/irq/26/smp_affinity_list") == "1"
        assert host.read("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor") == "performance"
        assert host.nic.groups["coalesce"]["rx-usecs"] == 50
        assert not host.nic.switches["rx-gro"]
        assert transaction.got["rps_cpus@eth0/rx-0"] == "0-1"
        assert transaction.got == transaction.asked
        with transaction.change([]):
            assert len(transaction.got) > 10
    assert transaction.got == {}, "nothing is in force any more"
    assert tree_bytes(host.root) == before
    assert nic_state(host) == nic, "a feature the driver switched as a side effect is back too"


def test_the_snapshot_is_on_disk_before_the_first_write(host: FakeHost, folder: Path) -> None:
    seen: list[dict] = []

    def look(text: str) -> str:
        if not seen:
            (journal,) = folder.glob("*.journal")
            seen.extend(json.loads(line) for line in journal.read_text().splitlines())
        return text

    host.rounds[""] = look
    with change(host, folder, {"rps_cpus": "1", "busy_poll": 3}):
        pass
    record = seen[-1]
    assert record["kind"] == "change"
    assert {s["label"]: s["before"] for s in record["settings"]} == {
        "rps_cpus@eth0/rx-0": "00000000,00000000",
        "rps_cpus@eth0/rx-1": "00000000,00000000",
        "busy_poll": "0",
    }


def test_an_exception_in_the_block_restores(host: FakeHost, folder: Path) -> None:
    before = tree_bytes(host.root)
    with pytest.raises(KeyboardInterrupt), change(host, folder, ALL):
        raise KeyboardInterrupt
    assert tree_bytes(host.root) == before


def test_an_interrupt_while_restoring_waits_and_is_not_lost(host: FakeHost, folder: Path) -> None:
    before = tree_bytes(host.root)

    def interrupt(text: str) -> str:
        if text == "0":
            signal.raise_signal(signal.SIGINT)
        return text

    host.rounds["busy_poll"] = interrupt
    with pytest.raises(KeyboardInterrupt), change(host, folder, {"busy_poll": 50, "netdev_budget": 600}):
        pass
    assert tree_bytes(host.root) == before


@pytest.mark.parametrize("code", [EIO, EBUSY, EPERM])
@pytest.mark.parametrize(
    "end", ["rx-1/rps_cpus", "irq/25/smp_affinity_list", "busy_poll", "cpu1/cpufreq/scaling_governor"]
)
def test_a_refused_write_takes_back_the_others(host: FakeHost, folder: Path, end: str, code: int) -> None:
    before, nic = tree_bytes(host.root), nic_state(host)
    host.once[end] = code
    with pytest.raises(HostSettingError, match="refused the value"), change(host, folder, ALL):
        pytest.fail("the block must not run")
    assert tree_bytes(host.root) == before
    assert nic_state(host) == nic


def test_a_rounded_value_is_an_error_or_recorded(host: FakeHost, folder: Path) -> None:
    before = tree_bytes(host.root)
    host.rounds["rps_flow_cnt"] = lambda text: str(1 << (int(text) - 1).bit_length()) if int(text) else "0"
    with (
        pytest.raises(HostSettingError, match="the host took another value: found 128, expected 100"),
        change(host, folder, {"rps_flow_cnt": 100}),
    ):
        pytest.fail("the block must not run")
    assert tree_bytes(host.root) == before
    with change(host, folder, {"rps_flow_cnt:0": 100}, inexact="record") as transaction:
        assert transaction.asked == {"rps_flow_cnt@eth0/rx-0": "100"}
        assert transaction.got == {"rps_flow_cnt@eth0/rx-0": "128"}
    assert tree_bytes(host.root) == before


def test_an_ignored_value_is_an_error(host: FakeHost, folder: Path) -> None:
    host.rounds["threaded"] = lambda text: "0"
    with pytest.raises(HostSettingError, match="found off, expected on"), change(host, folder, {"threaded": "on"}):
        pytest.fail("the block must not run")


def test_queues_recreated_by_the_driver_get_their_settings_back(host: FakeHost, folder: Path) -> None:
    for queue in (0, 1):
        host.write(f"sys/class/net/eth0/queues/rx-{queue}/rps_cpus", "2")
    host.write("sys/class/net/eth0/queues/rx-1/rps_flow_cnt", "64")
    with change(host, folder, {"channels": 1, "rps_cpus": "0"}):
        assert not (host.root / "sys/class/net/eth0/queues/rx-1").exists()
        assert host.read("sys/class/net/eth0/queues/rx-0/rps_cpus") == "1"
    values = {queue: host.read(f"sys/class/net/eth0/queues/rx-{queue}/rps_cpus") for queue in (0, 1)}
    assert values == {0: "2", 1: "2"}
    assert host.read("sys/class/net/eth0/queues/rx-1/rps_flow_cnt") == "64"
    assert host.nic.groups["channels"]["combined"] == 2


def test_a_value_changed_by_somebody_else_is_left(host: FakeHost, folder: Path) -> None:
    with change(host, folder, {"busy_poll": 50, "netdev_budget": 600, "gro": "off"}) as transaction:
        host.write("proc/sys/net/core/busy_poll", "99")
        host.nic.switches["rx-hashing"] = False  # remembered with gro, but not ours to put back
    assert host.read("proc/sys/net/core/busy_poll") == "99"
    assert host.read("proc/sys/net/core/netdev_budget") == "300"
    assert host.nic.switches["rx-gro"]
    assert not host.nic.switches["rx-hashing"]
    assert len(transaction.report.foreign) == 2
    assert "busy_poll is 99, we had left it at 50" in transaction.report.foreign


def test_a_restore_that_fails_keeps_the_journal(host: FakeHost, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    before = tree_bytes(host.root)
    with (
        pytest.raises(HostSettingError, match="not everything could be restored: found busy_poll.*rxlab restore"),
        change(host, folder, {"busy_poll": 50, "netdev_budget": 600}),
    ):
        host.errors["busy_poll"] = EIO
    assert host.read("proc/sys/net/core/netdev_budget") == "300", "the others are back"
    assert len(list(folder.glob("*.journal"))) == 1
    report = restore(folder)  # by now the file takes writes again
    assert report.ok
    assert report.restored == ["busy_poll"]
    assert tree_bytes(host.root) == before
    assert restore(folder).lines() == ["nothing to restore"]


def test_a_busy_driver_is_asked_again_when_restoring(host: FakeHost, folder: Path) -> None:
    before = tree_bytes(host.root)
    with change(host, folder, {"busy_poll": 50}):
        host.once["busy_poll"] = EBUSY
    assert tree_bytes(host.root) == before


def test_nothing_outside_a_testbed_without_permission(host: FakeHost, folder: Path) -> None:
    before = tree_bytes(host.root)
    with (
        pytest.raises(HostSettingError, match="--allow-system-changes"),
        change(host, folder, {"busy_poll": 50}, allow_system_changes=False),
    ):
        pytest.fail("the block must not run")
    assert tree_bytes(host.root) == before


def test_the_default_route_needs_more(host: FakeHost, folder: Path) -> None:
    options = {"journal_dir": folder, "open_access": host.open, "allow_system_changes": True}
    with (
        pytest.raises(HostSettingError, match="carries the default route.*--yes-this-nic"),
        apply({"rps_cpus": "1"}, iface="uplink", **options),
    ):
        pytest.fail("the block must not run")
    with apply({"rps_cpus": "1"}, iface="uplink", yes_this_nic=True, **options):
        assert host.read("sys/class/net/uplink/queues/rx-0/rps_cpus") == "2"


def test_a_testbeds_own_namespace_needs_no_permission(host: FakeHost, folder: Path) -> None:
    netns = f"rxlab-test-{os.getpid()}"
    with apply(testbed="t", journal_dir=folder, open_access=host.open) as transaction:
        transaction.register_namespace(netns)
        with host.open(netns) as access:
            chosen = parse_settings({"rps_cpus": "1", "busy_poll": 3}, "eth0", netns, access=access)
        with transaction.change([setting for setting in chosen if setting.netns]):
            assert host.read("sys/class/net/eth0/queues/rx-0/rps_cpus") == "2"
        with (
            pytest.raises(HostSettingError, match="busy_poll: the setting is the host's"),
            transaction.change(chosen),
        ):
            pytest.fail("the block must not run")


def test_two_runs_cannot_have_one_host_or_testbed(host: FakeHost, folder: Path) -> None:
    with change(host, folder, {"busy_poll": 1}):
        taken = pytest.raises(HostSettingError, match=f"in use by another run.*process {os.getpid()}")
        with taken, change(host, folder, {"netdev_budget": 2}):
            pytest.fail("the block must not run")
        assert host.read("proc/sys/net/core/busy_poll") == "1"
    with apply(testbed="a", journal_dir=folder, open_access=host.open):
        with apply(testbed="b", journal_dir=folder, open_access=host.open):
            pass
        with pytest.raises(HostSettingError, match="testbed a"), apply(testbed="a", journal_dir=folder):
            pytest.fail("the block must not run")


def test_a_live_run_is_not_restored(host: FakeHost, folder: Path) -> None:
    with change(host, folder, {"busy_poll": 7}):
        report = restore(folder)
        assert f"process {os.getpid()} is running, left alone" in report.messages[0]
        assert host.read("proc/sys/net/core/busy_poll") == "7"


def seen(setting: Setting, access: HostAccess) -> str | None:
    """Return the value a journal would hold: None for a thread that the change is about to start."""
    return None if setting.key == "napi_cpus" else setting.read(access)


@settings(max_examples=40)
@given(
    keys=st.sets(st.sampled_from(sorted([*ALL, "channels"])), min_size=1),
    share=st.floats(0, 1),
    somebody=st.sampled_from([None, "proc/sys/net/core/netdev_budget"]),
)
def test_whatever_was_written_when_it_died_is_undone(keys: set[str], share: float, somebody: str | None) -> None:
    """Restoring the snapshot is the identity, wherever the writes stopped, and when done twice."""
    with tempfile.TemporaryDirectory() as folder:
        host = FakeHost(Path(folder))
        for queue in (0, 1):
            host.write(f"sys/class/net/eth0/queues/rx-{queue}/rps_cpus", "2")
        if somebody:
            host.write(somebody, "1234")
        before, nic = tree_bytes(host.root), nic_state(host)
        wanted = {key: ALL.get(key, 1) for key in keys | ({"threaded"} if "napi_cpus" in keys else set())}
        with host.open() as access:
            chosen = parse_settings(wanted, "eth0", access=access)
            remembered = [*chosen, *collateral(chosen, host.open)]
            record = {"settings": [{**setting.to_json(), "before": seen(setting, access)} for setting in remembered]}
            for setting in chosen[: round(share * len(chosen))]:
                with suppress(HostSettingError):  # one queue, and a table that names the second
                    setting.write(access, setting.encode(setting.wanted or ""))
        for _ in range(2):
            report = RestoreReport()
            restore_change(record, None, AccessCache(host.open), report)
            assert report.ok
            assert not report.gone
            assert tree_bytes(host.root) == before
            assert nic_state(host) == nic


# -- owners that die. The children use a made-up tree, so no root is needed.

CHILD = """
import os, signal, sys
from pathlib import Path
from rxlab.host.access import HostAccess
from rxlab.host.journal import Transaction, apply
root, folder, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
class Stopping(HostAccess):
    def write(self, name, text):
        super().write(name, text)
        if stop and name.endswith(stop):
            os.kill(os.getpid(), signal.SIGKILL)
wanted = {"rps_cpus": "0-1", "threaded": "on", "busy_poll": 50}
options = {"allow_system_changes": True, "journal_dir": folder, "open_access": lambda ns: Stopping(ns, root)}
with apply(wanted, iface="eth0", **options) as transaction:
    transaction.start_process(["sleep", "60"])
    print("set", flush=True)
    sys.stdin.read()
"""


def child(host: FakeHost, folder: Path, stop: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(host.root), str(folder), stop]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_until_restored(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while list(folder.glob("*.journal")):
        assert time.monotonic() < deadline, "the watchdog did not restore"
        time.sleep(0.02)


def helper_of(folder: Path) -> tuple[int, int]:
    (journal,) = folder.glob("*.journal")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    (record,) = [record for record in records if record["kind"] == "process"]
    return record["pid"], record["start"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_watchdog_restores_when_its_parent_dies(host: FakeHost, folder: Path, number: int) -> None:
    before = tree_bytes(host.root)
    with child(host, folder) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "set\n"
        assert tree_bytes(host.root) != before
        pid, start = helper_of(folder)
        process.send_signal(number)
        process.wait()
        wait_until_restored(folder)
    assert tree_bytes(host.root) == before
    assert process_start(pid) != start, "the helper was stopped"


@pytest.mark.parametrize("stop", ["threaded", "rx-0/rps_cpus", "rx-1/rps_cpus", "busy_poll"])
def test_death_between_two_writes(host: FakeHost, folder: Path, stop: str) -> None:
    before = tree_bytes(host.root)
    with child(host, folder, stop) as process:
        process.wait()
        wait_until_restored(folder)
    assert tree_bytes(host.root) == before


def kill_with_watchdog(host: FakeHost, folder: Path) -> None:
    """Kill an owner in the middle of its run, and the watchdog before it can act."""
    with child(host, folder) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "set\n"
        watchdogs = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and str(folder).encode() in _cmdline(entry) and b"watchdog" in _cmdline(entry)
        ]
        assert len(watchdogs) == 1
        os.kill(watchdogs[0], signal.SIGKILL)
        process.kill()
        process.wait()


def _cmdline(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def test_restore_after_the_watchdog_died_too(host: FakeHost, folder: Path) -> None:
    before = tree_bytes(host.root)
    kill_with_watchdog(host, folder)
    pid, start = helper_of(folder)
    assert tree_bytes(host.root) != before
    report = restore(folder)
    assert report.ok
    assert set(report.restored) == {"threaded@eth0", "rps_cpus@eth0/rx-0", "rps_cpus@eth0/rx-1", "busy_poll"}
    assert report.processes == [pid]
    assert process_start(pid) != start
    assert tree_bytes(host.root) == before


def test_the_next_run_restores_a_dead_one_first(host: FakeHost, folder: Path) -> None:
    before = tree_bytes(host.root)
    kill_with_watchdog(host, folder)
    with change(host, folder, {"netdev_budget": 7}):
        assert host.read("proc/sys/net/core/busy_poll") == "0"
    assert tree_bytes(host.root) == before


def test_journals_of_an_earlier_boot_are_dropped(host: FakeHost, folder: Path) -> None:
    kill_with_watchdog(host, folder)
    (journal,) = folder.glob("*.journal")
    pid, start = helper_of(folder)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    journal.write_text(journal.read_text().replace(boot, "another boot"))
    after_boot = tree_bytes(host.root)
    report = restore(folder)
    assert report.messages == [f"{journal.name}: from before the last boot, dropped"]
    assert tree_bytes(host.root) == after_boot
    assert process_start(pid) == start, "a pid of another boot is somebody else's"
    os.kill(pid, signal.SIGKILL)


def test_doctor_tells_a_run_that_is_alive_from_one_that_died(host: FakeHost, folder: Path) -> None:
    with change(host, folder, {"netdev_budget": 7}):
        (alive,) = doctor._check_journals(folder)
    assert (alive.name, alive.status, alive.do) == ("in use", "ok", None)
    assert f"pid {os.getpid()}:" in alive.found
    assert doctor._check_journals(folder) == []
    kill_with_watchdog(host, folder)
    (dead,) = doctor._check_journals(folder)
    assert (dead.name, dead.status, dead.do) == ("left over", "warn", "rxlab restore")
    assert next(folder.glob("*.journal")).name in dead.found
    assert restore(folder).ok, "looking took no lock"


def test_a_line_cut_short_is_an_action_that_never_began(host: FakeHost, folder: Path) -> None:
    before = tree_bytes(host.root)
    kill_with_watchdog(host, folder)
    (journal,) = folder.glob("*.journal")
    with open(journal, "a") as stream:
        stream.write('{"kind": "change", "change": 2, "sett')
    assert restore(folder).ok
    assert tree_bytes(host.root) == before


def test_what_no_longer_exists_is_reported_and_no_failure(host: FakeHost, folder: Path) -> None:
    kill_with_watchdog(host, folder)
    (host.root / "sys/class/net/eth0/threaded").unlink()
    report = restore(folder)
    assert report.ok
    assert len(report.gone) == 1
    assert "threaded@eth0" in report.gone[0]


def test_no_journal_no_change(host: FakeHost, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    before = tree_bytes(host.root)
    with (
        pytest.raises(HostSettingError, match="no journal can be written"),
        change(host, blocked / "x", {"busy_poll": 1}),
    ):
        pytest.fail("the block must not run")
    assert tree_bytes(host.root) == before


def test_a_journal_has_no_name_before_there_is_a_watchdog(
    host: FakeHost, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner killed before that leaves nothing: nobody would take the journal away."""
    start, seen = Transaction._start_watchdog, list[str]()

    def look(self: Transaction) -> None:
        seen.extend(path.name for path in folder.iterdir())
        start(self)

    monkeypatch.setattr(Transaction, "_start_watchdog", look)
    with change(host, folder, {"busy_poll": 1}):
        assert seen == []
        assert len(list(folder.glob("*.journal"))) == 1


def test_a_file_system_without_nameless_files(host: FakeHost, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def plain(path: object, flags: int, *rest: int, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opened(path, flags, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(journalfile.os, "open", plain)
    with change(host, folder, {"busy_poll": 1}):
        assert [path.suffix for path in folder.iterdir() if path.name != "lock"] == [".journal"]
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_full_disk_stops_before_the_first_write(
    host: FakeHost, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = tree_bytes(host.root), os.write

    def full(file: int, text: bytes) -> int:
        return write(file, text[:10]) if b'"change"' in text else write(file, text)

    with apply(allow_system_changes=True, journal_dir=folder, open_access=host.open) as transaction:
        with host.open() as access:
            chosen = parse_settings({"busy_poll": 1}, access=access)
        with monkeypatch.context() as patch:
            patch.setattr(journalfile.os, "write", full)
            with pytest.raises(HostSettingError, match="journal cannot be written"), transaction.change(chosen):
                pytest.fail("the block must not run")
        assert tree_bytes(host.root) == before
        (journal,) = folder.glob("*.journal")
        assert [json.loads(line)["kind"] for line in journal.read_text().splitlines()] == ["header", "claim"]
        with transaction.change(chosen):
            assert host.read("proc/sys/net/core/busy_poll") == "1"
    assert tree_bytes(host.root) == before


def test_helpers_end_with_the_transaction(host: FakeHost, folder: Path) -> None:
    with apply(journal_dir=folder, open_access=host.open) as transaction:
        process = transaction.start_process(["sleep", "60"])
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert f"RXLAB_TRANSACTION={transaction.id}".encode() in environment
    assert process.wait() == -signal.SIGTERM


def test_a_real_host_access_reads_files() -> None:
    with HostAccess() as access:
        assert access.read("proc/sys/kernel/ostype") == "Linux"
        assert access.list("proc/no/such/directory") == []
