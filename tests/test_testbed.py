"""The testbed's description and its refusals; tests/live has the real one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from rxlab.errors import CaptureError, UsageError
from rxlab.record.ports import PortsTestbed, captured_port, open_testbed, parse_ports
from rxlab.record.testbed import Endpoint, Testbed, in_netns, run_checked


class Registered:
    """Stands in for the journal: notes the order of what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def register_namespace(self, name: str) -> None:
        self.told.append(name)

    def leave_namespaces(self) -> None:
        self.told.append("leave")

    def environment(self) -> dict[str, str]:
        return dict(os.environ)


def test_commands_run_inside_the_namespace_of_an_endpoint() -> None:
    end = Endpoint("rxlab-x-dst", "rxd-x", "10.77.0.2", None)
    assert end.command(["tcpdump", "-i", "x"]) == ["ip", "netns", "exec", "rxlab-x-dst", "tcpdump", "-i", "x"]
    assert in_netns("/run/netns/a", ["true"]) == ["ip", "netns", "exec", "a", "true"]
    assert in_netns(None, ["true"]) == ["true"]
    assert end.netns_path == "/run/netns/rxlab-x-dst"


def test_an_endpoint_without_the_address_family_says_so() -> None:
    end = Endpoint(None, "eth7", "192.0.2.1", None)
    assert end.address(4) == "192.0.2.1"
    with pytest.raises(CaptureError, match="eth7 has no IPv6 address"):
        end.address(6)


def test_two_testbeds_share_no_name() -> None:
    first, second = Testbed(), Testbed()
    names = [name for bed in (first, second) for end in (bed.src, bed.dst) for name in (end.netns, end.iface)]
    assert len(set(names)) == 8
    assert all(len(str(name)) <= 15 for name in names[1::2]), "IFNAMSIZ is 16 with the final zero"


def test_the_description_is_what_run_json_needs() -> None:
    bed = Testbed(gro=True, mtu=9000, identifier="abc")
    described = bed.describe()
    assert described["kind"] == "veth"
    assert (described["gro"], described["mtu"]) == (True, 9000)
    assert described["dst"] == {
        "netns": "rxlab-abc-dst", "iface": "rxd-abc", "ipv4": "10.77.0.2", "ipv6": "fd77::2",
    }  # fmt: skip


def test_an_ordinary_user_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(CaptureError) as refused, Testbed():
        pass
    assert "needs root" in refused.value.line()
    assert "\n" not in refused.value.line()


def test_a_missing_ip_command_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CaptureError, match="iproute2"), Testbed():
        pass


def test_namespaces_are_registered_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registered()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    commands: list[list[str]] = []

    def refuse(argv: list[str], **options: object) -> str:
        commands.append(argv)
        raise CaptureError("no namespaces here")

    monkeypatch.setattr("rxlab.record.testbed.run_checked", refuse)
    monkeypatch.setattr(shutil, "which", lambda name: "/sbin/ip")
    bed = Testbed(registry=registry)
    with pytest.raises(CaptureError, match="no namespaces"), bed:
        pass
    assert registry.told == [bed.src.netns]
    assert commands == [["ip", "netns", "add", bed.src.netns]]


def test_a_failing_command_is_quoted_with_its_complaint() -> None:
    script = "import sys; sys.stderr.write('no such thing'); sys.exit(3)"
    with pytest.raises(CaptureError, match="no such thing"):
        run_checked([sys.executable, "-c", script])
    assert run_checked([sys.executable, "-c", "print(input())"], stdin="hello\n") == "hello\n"


def test_ports_are_named_by_sender_and_captured_port() -> None:
    assert parse_ports("ports:eth0,eth1") == ("eth0", "eth1")
    bed = open_testbed("ports:eth0,eth1")
    assert isinstance(bed, PortsTestbed)
    assert (bed.src.iface, bed.dst.iface, bed.dst.netns) == ("eth0", "eth1", None)
    assert bed.describe()["kind"] == "ports"
    assert {open_testbed(spec).kind for spec in ("", "veth", True)} == {"veth"}
    assert captured_port("ports:eth0,eth1") == "eth1"
    assert captured_port(True) is captured_port("veth") is captured_port(False) is None


@pytest.mark.parametrize("text", ["ports:eth0", "ports:eth0,eth0", "ports:eth0,", "ports:a,b,c", "cable:a,b"])
def test_other_words_for_ports_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="ports:IF1,IF2"):
        open_testbed(text)


def test_gro_belongs_to_the_veth_testbed() -> None:
    with pytest.raises(UsageError, match="veth"):
        open_testbed("ports:eth0,eth1", gro=True)


class Ports:
    """Stands in for two ports of the host: their folders in sysfs and the commands they are told."""

    def __init__(self, sysfs: Path, *names: str) -> None:
        self.sysfs, self.commands = sysfs, list[list[str]]()
        self.addresses: list[dict[str, str]] = []
        for name in names:
            (sysfs / name).mkdir()
            (sysfs / name / "flags").write_text("0x1003\n" if name == "up0" else "0x1002\n")
            (sysfs / name / "mtu").write_text("9000\n")

    def run(self, argv: list[str], **options: object) -> str:
        self.commands.append(argv)
        if "-json" in argv:
            return json.dumps([{"addr_info": self.addresses}])
        return "<BROADCAST,UP,LOWER_UP>" if "show" in argv else ""


@pytest.fixture
def ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ports:
    """Ports ``up0`` and ``down0`` of a made-up host."""
    made = Ports(tmp_path, "up0", "down0")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: "/sbin/ip")
    monkeypatch.setattr("rxlab.record.testbed.run_checked", made.run)
    monkeypatch.setattr("rxlab.record.ports.SYS_NET", tmp_path)
    return made


def test_the_sending_port_moves_and_both_are_left_as_they_were(ports: Ports) -> None:
    registry = Registered()
    with PortsTestbed("up0", "down0", registry=registry) as bed:
        assert registry.told == [bed.src.netns]
        assert ["ip", "link", "set", "dev", "up0", "netns", bed.src.netns] in ports.commands
        assert not any("down0" in command and "netns" in command for command in ports.commands)
        assert bed.mtu == 9000
        ports.commands.clear()
    assert ports.commands[-4:] == [
        ["ip", "addr", "flush", "dev", "up0"],
        ["ip", "link", "set", "dev", "up0", "up"],
        ["ip", "addr", "flush", "dev", "down0"],
        ["ip", "link", "set", "dev", "down0", "down"],
    ]


def test_a_port_with_an_address_is_refused_and_left_alone(ports: Ports) -> None:
    ports.addresses = [{"local": "192.0.2.7", "scope": "global"}]
    with pytest.raises(CaptureError, match=r"192\.0\.2\.7"), PortsTestbed("up0", "down0"):
        pass
    assert [command for command in ports.commands if "-json" not in command] == []


def test_a_port_that_is_not_there_is_refused(ports: Ports) -> None:
    with pytest.raises(CaptureError, match="no such interface"), PortsTestbed("up0", "gone0"):
        pass
    assert not any("netns" in command for command in ports.commands)
