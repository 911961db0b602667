"""Drivers that refuse, round and ignore, on a made-up host: every setting, every answer, at every moment; the host is as before.

The complete matrix: each key of :data:`SETTINGS` x EIO, EBUSY, EPERM x writing, restoring x once, always; then what Hypothesis
makes of several at a time, with an owner that dies between two writes.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from host_builder import EBUSY, EIO, EPERM, FakeHost
from hypothesis import given, settings
from hypothesis import strategies as st
from test_journal import ALL

from rxlab.errors import HostSettingError
from rxlab.host.access import HostAccess
from rxlab.host.journal import Transaction, apply
from rxlab.host.kinds import KINDS
from rxlab.host.recovery import undo
from rxlab.host.settings import Setting, collateral, parse_settings
from rxlab.host.undo import AccessCache, RestoreReport, restore_change

# Key -> where its writes end up: the end of a file name, or GROUP:NAME of the driver.
SETTINGS = {
    "irqbalance": "77/stat",
    "channels": "channels:combined",
    "rss-table": "rss:table",
    "rss-key": "rss:key",
    "rx-ring": "rings:rx",
    "gro": "features:rx-gro",
    "rx-usecs": "coalesce:rx-usecs",
    "gro_flush_timeout": "gro_flush_timeout",
    "threaded": "eth0/threaded",
    "napi_cpus": "89/status",
    "irq_cpus": "25/smp_affinity_list",
    "rps_cpus": "rx-1/rps_cpus",
    "rps_flow_cnt": "rx-1/rps_flow_cnt",
    "xps_cpus": "tx-1/xps_cpus",
    "xps_rxqs": "tx-1/xps_rxqs",
    "busy_poll": "core/busy_poll",
    "rps_sock_flow_entries": "rps_sock_flow_entries",
    "tcp_early_demux": "tcp_early_demux",
    "governor": "cpu1/cpufreq/scaling_governor",
    "idle_state:1": "cpu1/cpuidle/state1/disable",
    "cpu_dma_latency": "cpu_dma_latency",
}
CODES = [EIO, EBUSY, EPERM]
# Put back without a write: threads go when ``threaded`` does, a wish ends when its file is closed.
UNWRITTEN = {"napi_cpus", "cpu_dma_latency"}


def wanted_of(key: str) -> dict[str, object]:
    """Return a configuration that changes a key among others, of lower and of higher rank."""
    base = {"rx-usecs": 50, "rps_cpus:0": "0-1", "netdev_budget": 600}
    if key == "channels":
        return {**base, "channels": 1}
    if key == "napi_cpus":
        base["threaded"] = "on"
    if key == "irq_cpus":
        return {**base, "irqbalance": "off", key: "0"}
    return {**base, key: ALL[key]}


def break_down(host: FakeHost, place: str, code: int, *, once: bool) -> None:
    """Have writes to a place refused."""
    where = host.nic if ":" in place else host
    (where.once if once else where.errors)[place] = code


def mend(host: FakeHost) -> None:
    """Let every write through again."""
    for faults in (host.errors, host.once, host.rounds, host.nic.errors, host.nic.once, host.nic.rounds):
        faults.clear()


@pytest.fixture(autouse=True)
def _no_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody dies here; the watchdog has tests of its own, and starting one takes longer than all the rest."""
    monkeypatch.setattr(Transaction, "_start_watchdog", lambda self: None)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeHost]:
    """Host with queues and interrupts set as somebody may have left them."""
    host = FakeHost(tmp_path / "root")
    for queue in (0, 1):
        host.write(f"sys/class/net/eth0/queues/rx-{queue}/rps_cpus", "2")
        host.write(f"sys/class/net/eth0/queues/rx-{queue}/rps_flow_cnt", "64")
        host.write(f"proc/irq/{25 + queue}/effective_affinity_list", "1")
    return host


def change(host: FakeHost, key: str, **options):
    options = {"allow_system_changes": True, "journal_dir": host.root.parent / "journal", **options}
    transaction = apply(wanted_of(key), iface="eth0", open_access=host.open, **options)
    return transaction


def journals(host: FakeHost) -> list[Path]:
    return list((host.root.parent / "journal").glob("*.journal"))


def test_the_matrix_has_every_kind_of_setting() -> None:
    places = {KINDS[key.partition(":")[0]].place.partition(":")[0] for key in SETTINGS}
    assert places == {kind.place.partition(":")[0] for kind in KINDS.values()}
    ranks = {KINDS[key.partition(":")[0]].rank for key in SETTINGS}
    assert ranks == {kind.rank for kind in KINDS.values()}


@pytest.mark.parametrize("once", [True, False], ids=["once", "always"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("key", SETTINGS)
def test_a_refused_write_leaves_the_host_as_before(host: FakeHost, key: str, code: int, once: bool) -> None:
    before = host.state()
    break_down(host, SETTINGS[key], code, once=once)
    with pytest.raises(HostSettingError, match="refused the value"), change(host, key):
        pytest.fail("the block must not run")
    assert host.state() == before
    assert not journals(host)


@pytest.mark.parametrize("once", [True, False], ids=["once", "always"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("key", SETTINGS)
def test_a_refused_restore_is_said_and_done_later(host: FakeHost, key: str, code: int, once: bool) -> None:
    before = host.state()
    is_lasting = not once and key not in UNWRITTEN
    said = (
        pytest.raises(HostSettingError, match=f"{key.partition(':')[0]}.*rxlab restore")
        if is_lasting
        else nullcontext()
    )
    with said, change(host, key):
        assert host.state() != before
        break_down(host, SETTINGS[key], code, once=once)
    assert bool(journals(host)) == is_lasting
    mend(host)
    for path in journals(host):
        assert finish(host, path).ok
    assert host.state() == before


def finish(host: FakeHost, path: Path) -> RestoreReport:
    """Undo a journal as ``rxlab restore`` does, on the made-up host."""
    from rxlab.host import recovery
    from rxlab.host.journalfile import open_journal

    with pytest.MonkeyPatch.context() as patch, open_journal(path) as (records, is_free):
        assert is_free
        patch.setattr(recovery, "HostAccess", lambda netns, root: host.open(netns))
        patch.setattr(recovery, "stop_processes", lambda *_: [])  # none here
        return undo(records, path)


class Killed(BaseException):
    """The end of an owner between two system calls."""


def kill_in_restore(host: FakeHost, wanted: dict[str, object], *, writes: int, somebody: str = "") -> bool:
    """Kill an owner after so many writes of its restore; False where it made fewer."""
    write, left = Setting.write, [writes]

    def count_down(setting: Setting, access: HostAccess, raw: str) -> None:
        write(setting, access, raw)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    options = {"allow_system_changes": True, "journal_dir": host.root.parent / "journal", "open_access": host.open}
    with pytest.MonkeyPatch.context() as patch:
        try:
            with apply(wanted, iface="eth0", **options):
                if somebody:
                    host.write(somebody, "7")
                patch.setattr(Setting, "write", count_down)
                patch.setattr(Transaction, "close", lambda self: os.close(self._file))
        except Killed:
            return True
    return False


@pytest.mark.parametrize("somebody", ["", "proc/sys/net/core/netdev_budget"])
def test_an_owner_killed_in_the_middle_of_its_restore(tmp_path: Path, somebody: str) -> None:
    """What its own writes had the driver reset, to values that nobody had read back, is not taken for somebody else's."""
    wanted = {**wanted_of("channels"), "irq_cpus": "0", "irqbalance": "off", "rss-table": "0"}
    for writes in itertools.count(1):
        host = FakeHost(tmp_path / f"{writes}" / "root")
        for queue in (0, 1):
            host.write(f"sys/class/net/eth0/queues/rx-{queue}/rps_cpus", "2")
            host.write(f"proc/irq/{25 + queue}/smp_affinity_list", "1")
            host.write(f"proc/irq/{25 + queue}/effective_affinity_list", "1")
        before = host.state()
        if not kill_in_restore(host, wanted, writes=writes, somebody=somebody):
            break
        (path,) = journals(host)
        with open(path, "a") as stream:
            stream.write('{"kind": "restor')  # killed once more while it wrote
        report = finish(host, path)
        assert report.ok
        assert not journals(host)
        assert [line.partition(" ")[0] for line in report.foreign] == (["netdev_budget"] if somebody else [])
        if somebody:
            assert host.read(somebody) == "7"
            host.write(somebody, before[0][somebody].decode().strip())
        assert host.state() == before, writes
    assert writes > 10


ROUNDED = {key: place for key, place in SETTINGS.items() if KINDS[key.partition(":")[0]].value in ("int", "us")}


@pytest.mark.parametrize("driver", ["rounds", "ignores"])
@pytest.mark.parametrize("key", ROUNDED)
def test_a_driver_that_takes_another_value(host: FakeHost, key: str, driver: str) -> None:
    """An error, or recorded where that was asked for; put back either way."""
    before = host.state()
    with host.open() as access:
        setting = next(s for s in parse_settings(wanted_of(key), "eth0", access=access) if s.key == key)
        old = int(setting.read(access))
    taken = 2 if driver == "rounds" else old

    def answer(value: object) -> object:
        return value if int(str(value)) == old else type(value)(taken)

    (host.nic if ":" in ROUNDED[key] else host).rounds[ROUNDED[key]] = answer  # type: ignore[assignment]
    with (
        pytest.raises(HostSettingError, match=f"took another value: found {taken}, expected {setting.wanted}"),
        change(host, key),
    ):
        pytest.fail("the block must not run")
    assert host.state() == before
    with change(host, key, inexact="record") as transaction:
        got = {label: value for label, value in transaction.got.items() if label.startswith(f"{key}@") or label == key}
        assert str(taken) in got.values()
    assert host.state() == before
    assert not journals(host)


def test_fewer_channels_than_the_rss_table_uses(host: FakeHost) -> None:
    """The kernel refuses the channels until the table is changed, and on the way back the table until the channels are."""
    host.nic.table, host.nic.is_configured = [1, 0] * 8, True
    before = host.state()
    options = {"allow_system_changes": True, "journal_dir": host.root.parent / "journal", "open_access": host.open}
    with apply({"channels": 1, "rss-table": "0", "rps_cpus": "0"}, iface="eth0", **options):
        assert host.nic.groups["channels"]["combined"] == 1
        assert host.nic.table == [0] * 16
        assert host.read("sys/class/net/eth0/queues/rx-0/rps_cpus") == "1", "written again: new queues forget"
    assert host.state() == before


def test_a_driver_that_cannot_go_back_is_said(host: FakeHost) -> None:
    with pytest.raises(HostSettingError, match="rx-ring@eth0 is 512 and not 256"), change(host, "rx-ring"):
        host.nic.rounds["rings:rx"] = lambda value: 512
    assert journals(host)


def seen(setting: Setting, access: HostAccess) -> str | None:
    """Return what a journal holds of a setting: None for a thread that does not run yet."""
    return None if setting.key == "napi_cpus" else setting.read(access)


def asked(state: tuple[dict[str, bytes], object]) -> object:
    """Leave out where within its mask an interrupt is: it goes back with the mask, and no other write is tried for it."""
    return {name: text for name, text in state[0].items() if "effective" not in name}, state[1]


faults = st.lists(
    st.tuples(st.sampled_from(sorted(SETTINGS.values())), st.sampled_from(CODES), st.booleans()), max_size=4
)


@settings(max_examples=20)
@given(keys=st.sets(st.sampled_from(sorted(SETTINGS)), min_size=1), share=st.floats(0, 1), broken=faults)
def test_an_owner_that_dies_between_two_writes_of_a_broken_driver(
    keys: set[str], share: float, broken: list[tuple[str, int, bool]]
) -> None:
    """Whatever was written, and whatever refuses while restoring: said, and done when the driver works again."""
    with tempfile.TemporaryDirectory() as folder:
        host = FakeHost(Path(folder))
        before = host.state()
        wanted = {name: value for key in sorted(keys) for name, value in wanted_of(key).items()}
        accesses = AccessCache(host.open)
        access = accesses(None)
        chosen = parse_settings(wanted, "eth0", access=access)
        remembered = [*chosen, *collateral(chosen, accesses)]
        record = {"settings": [{**setting.to_json(), "before": seen(setting, access)} for setting in remembered]}
        for setting in chosen[: round(share * len(chosen))]:
            with suppress(HostSettingError):  # one queue, and a table that names the second
                setting.write(access, setting.encode(setting.wanted or ""))
        for place, code, once in broken:
            break_down(host, place, code, once=once)
        report = RestoreReport()
        restore_change(record, None, accesses, report)
        assert report.ok == (asked(host.state()) == asked(before))
        mend(host)
        last = RestoreReport()
        restore_change(record, None, accesses, last)
        assert last.ok, last.lines()
        assert host.state() == before
