"""host/hostdiff.py and the guards, on a made-up host: what differs is named, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from host_builder import FakeHost
from typer.testing import CliRunner

from rxlab.__main__ import app
from rxlab.errors import FormatError, HostSettingError, UsageError
from rxlab.host import guard
from rxlab.host.guard import check_allowed, lifeline_ifaces, ssh_connection
from rxlab.host.hostdiff import diff_lines, diff_snapshots, read_snapshot, settings_drift
from rxlab.host.journal import apply
from rxlab.host.settings import parse_settings
from rxlab.host.topology import snapshot_host
from rxlab.rundir import write_json


def test_two_looks_at_one_host_are_equal_and_a_change_is_named(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "root")
    before = snapshot_host(None, None, host.root, everything=True)
    assert diff_snapshots(before, snapshot_host(None, None, host.root, everything=True)) == {}
    host.write("sys/class/net/eth0/queues/rx-1/rps_cpus", "3")
    host.write("proc/irq/24/smp_affinity_list", "0")
    host.write("proc/sys/net/core/netdev_budget", "600")
    after = snapshot_host(None, None, host.root, everything=True)
    assert diff_snapshots(before, after) == {
        "ifaces.eth0.settings.rps_cpus@eth0/rx-1": ("off", "0-1"),
        "settings.netdev_budget": ("300", "600"),
        "sysctls.net.core.netdev_budget": ("300", "600"),
        "irqs.24.cpus": ("0-1", "0"),
        "network.net.core.netdev_budget": ("300", "600"),
    }


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gone", "nothing there"),
        ("empty", "a folder without host.json"),
        ("other.json", "JSON with schema_version, status"),
    ],
)
def test_what_is_no_look_at_a_host_is_told_what_would_be(name: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "other.json", {"status": "complete"})
    with pytest.raises(FormatError) as refused:
        read_snapshot(tmp_path / name)
    assert refused.value.line() == (
        f"{tmp_path / name}: not a look at a host: found {found}, "
        "expected a file that 'rxlab host export -o FILE' wrote, or a run directory with its host.json"
    )


def test_an_export_is_not_overwritten_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rxlab.host.topology.snapshot_host", lambda *_, **__: {"settings": {}})
    before = tmp_path / "before.json"
    before.write_text("how it was")
    refused = CliRunner().invoke(app, ["host", "export", "-o", str(before)])
    assert isinstance(refused.exception, UsageError)
    assert "--force" in str(refused.exception)
    assert before.read_text() == "how it was"
    assert CliRunner().invoke(app, ["host", "export", "-o", str(before), "--force"]).exit_code == 0
    assert read_snapshot(before)["settings"] == {}


def test_what_came_or_went_is_said_and_what_only_one_looked_at_is_not(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "root")
    small, large = snapshot_host("eth0", None, host.root), snapshot_host(None, None, host.root, everything=True)
    assert diff_snapshots(small, large) == {}
    (host.root / "proc/sys/net/core/busy_poll").unlink()
    differences = diff_snapshots(small, snapshot_host("eth0", None, host.root))
    assert "settings.busy_poll: 0 -> not there" in diff_lines(differences)


def test_a_snapshot_is_a_file_or_a_run(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "root")
    snapshot = snapshot_host("eth0", None, host.root)
    write_json(tmp_path / "host.json", snapshot)
    assert diff_snapshots(read_snapshot(tmp_path), read_snapshot(tmp_path / "host.json")) == {}
    assert diff_snapshots(read_snapshot(tmp_path), snapshot) == {}


def test_secrets_are_not_exported(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "root")
    host.write("proc/sys/net/ipv4/tcp_fastopen_key", "00112233-44556677-8899aabb-ccddeeff")
    assert "00112233" not in json.dumps(snapshot_host(None, None, host.root, everything=True))


def test_drift_names_settings_and_moved_interrupts(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "root")
    snapshot = snapshot_host("eth0", None, host.root)
    assert settings_drift(snapshot, "eth0", None, host.root) == {}
    host.write("proc/irq/26/smp_affinity_list", "0")
    host.write("proc/irq/26/effective_affinity_list", "0")
    host.write("proc/sys/net/core/busy_poll", "9")
    assert settings_drift(snapshot, "eth0", None, host.root) == {
        "busy_poll": ("0", "9"),
        "irq_cpus@eth0/rx-1": ("0-1", "0"),
        "irq_effective@eth0/rx-1": ("1", "0"),
    }


def test_an_interrupt_that_moved_late_is_no_drift(tmp_path: Path) -> None:
    """Where it was sent before the run began, it comes from its next interrupt on."""
    host = FakeHost(tmp_path / "root")
    host.write("proc/irq/26/smp_affinity_list", "0")
    snapshot = snapshot_host("eth0", None, host.root)
    host.write("proc/irq/26/effective_affinity_list", "0")
    assert settings_drift(snapshot, "eth0", None, host.root) == {}
    host.write("proc/irq/26/smp_affinity_list", "1")
    host.write("proc/irq/26/effective_affinity_list", "1")
    assert settings_drift(snapshot, "eth0", None, host.root) == {"irq_cpus@eth0/rx-1": ("0", "1")}


def test_drift_of_settings_in_force(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "root")
    options = {"allow_system_changes": True, "journal_dir": tmp_path / "journal", "open_access": host.open}
    with apply({"busy_poll": 50, "netdev_budget": 600}, **options) as transaction:
        assert transaction.drift() == {}
        host.write("proc/sys/net/core/busy_poll", "99")
        assert transaction.drift() == {"busy_poll": ("50", "99")}


def test_what_takes_the_link_down_is_named_before_it_is_written(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "root")
    options = {"allow_system_changes": True, "journal_dir": tmp_path / "journal", "open_access": host.open}
    said: list[tuple[str, int]] = []
    with apply(**options) as transaction:
        transaction.say = lambda text: said.append((text, len(host.nic.writes)))
        with host.open() as access:
            chosen = parse_settings({"rx-ring": 512, "gro": "off", "rx-usecs": 9}, "eth0", access=access)
        for _ in range(2):
            with transaction.change(chosen):
                pass
    text, writes_before = said[0]
    assert text == "the link of eth0 may go down for a moment: rx-ring@eth0 (and again to restore)"
    assert writes_before == 0
    assert len(said) == 1, "once is enough"


def test_a_value_that_is_there_is_not_written(tmp_path: Path) -> None:
    """Rings of the size they have would cost the link."""
    host = FakeHost(tmp_path / "root")
    options = {"allow_system_changes": True, "journal_dir": tmp_path / "journal", "open_access": host.open}
    with apply({"rx-ring": 256, "rss-table": "equal 2"}, iface="eth0", **options) as transaction:
        assert transaction.got["rx-ring@eth0"] == "256"
    assert host.nic.writes == []
    assert not host.nic.is_configured


# -- guards


def test_a_running_irqbalance_needs_a_word(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "root")
    with host.open() as access:
        moved = parse_settings({"irq_cpus": "1"}, "eth0", access=access)
        with pytest.raises(HostSettingError, match=r"irqbalance is running.*found process 77.*irqbalance=off"):
            check_allowed(moved, True, False, access)
        for value in ("off", "on"):
            check_allowed(
                parse_settings({"irq_cpus": "1", "irqbalance": value}, "eth0", access=access), True, False, access
            )
        host.write("proc/77/stat", "77 (irqbalance) T 1 77 77")
        check_allowed(moved, True, False, access)


def test_irqbalance_that_does_not_run_cannot_be_switched_on(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "root")
    host.write("proc/77/comm", "other")
    options = {"allow_system_changes": True, "journal_dir": tmp_path / "journal", "open_access": host.open}
    with apply({"irqbalance": "off", "irq_cpus": "1"}, iface="eth0", **options):
        assert host.read("proc/77/stat").split()[2] == "S", "another process is nobody's business"
    with pytest.raises(HostSettingError, match="irqbalance is not running"), apply({"irqbalance": "on"}, **options):
        pytest.fail("the block must not run")


def test_what_carries_a_lifeline_is_one_too(tmp_path: Path) -> None:
    """Ports of a bond below a VLAN that has the default route."""
    host = FakeHost(tmp_path / "root")
    net = host.root / "sys/class/net"
    for upper, lower in (("uplink", "bond0"), ("bond0", "eth0"), ("bond0", "eth1")):
        (net / upper).mkdir(exist_ok=True)
        (net / upper / f"lower_{lower}").symlink_to(net / lower)
    with host.open() as access:
        assert lifeline_ifaces(access) == {
            "uplink": "the default route",
            "bond0": "the default route of uplink",
            "eth0": "the default route of uplink of bond0",
            "eth1": "the default route of uplink of bond0",
        }


def test_the_ssh_session_is_found_through_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge: a process whose parent has the variable and whose own environment was emptied, as sudo leaves it."""
    session = "192.0.2.1 50000 192.0.2.2 22"
    code = "from rxlab.host.access import HostAccess; from rxlab.host.guard import ssh_connection; print(ssh_connection(HostAccess()))"
    path = str(Path(guard.__file__).parents[2])
    command = ["env", "-u", "SSH_CONNECTION", f"PYTHONPATH={path}", sys.executable, "-c", code]
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]  # a parent that stays
    done = subprocess.run(
        shell, env={"SSH_CONNECTION": session, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == session
    monkeypatch.setenv("SSH_CONNECTION", "a b c d")
    assert ssh_connection(FakeHost) == "a b c d"  # type: ignore[arg-type]


def test_export_and_diff_on_the_command_line(tmp_path: Path) -> None:
    def rxlab(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rxlab", "host", *words], capture_output=True, text=True, check=False
        )

    done = rxlab("export", "--iface", "lo", "-o", str(tmp_path / "a.json"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "b.json").write_text(text.replace('"rps_cpus@lo/rx-0": "off"', '"rps_cpus@lo/rx-0": "0"'))
    assert json.loads(text)["ifaces"]["lo"]["settings"]["rps_cpus@lo/rx-0"] == "off"
    done = rxlab("diff", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert (done.returncode, done.stdout) == (3, "ifaces.lo.settings.rps_cpus@lo/rx-0: off -> 0\n")
    assert rxlab("diff", str(tmp_path / "a.json"), str(tmp_path / "a.json")).stdout == "no difference\n"
