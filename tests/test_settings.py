"""host/settings.py on a made-up host: everything wrong is found before a write, values have one spelling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from host_builder import FakeHost, tree_bytes
from hypothesis import given
from hypothesis import strategies as st

from rxlab.errors import HostSettingError, WrongSettingError
from rxlab.host.kinds import KINDS, check_keys, format_pattern, parse_pattern
from rxlab.host.settings import Setting, collateral, expand, parse_settings, read_settings


def parse(host: FakeHost, wanted: dict[str, object], iface: str | None = "eth0") -> list[Setting]:
    with host.open() as access:
        return parse_settings(wanted, iface, access=access)


def test_a_key_means_every_queue(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    settings = parse(host, {"rps_cpus": "0-1"})
    assert [setting.label for setting in settings] == ["rps_cpus@eth0/rx-0", "rps_cpus@eth0/rx-1"]
    assert [setting.label for setting in parse(host, {"xps_cpus:1": "0"})] == ["xps_cpus@eth0/tx-1"]
    assert [setting.place for setting in parse(host, {"irq_cpus": "1"})] == [
        "irq:queue:0",
        "irq:queue:1",
    ]
    assert [setting.label for setting in parse(host, {"irq_cpus:1": "1"})] == ["irq_cpus@eth0/rx-1"]
    idle = [setting.label for setting in parse(host, {"idle_state:1": "off"})]
    assert idle == ["idle_state@cpu0/state1", "idle_state@cpu1/state1"]


def test_settings_come_in_writing_order(tmp_path: Path) -> None:
    keys = [s.key for s in parse(FakeHost(tmp_path), {"busy_poll": 50, "rps_cpus:0": "1", "gro": "off", "channels": 2})]
    assert keys == ["channels", "gro", "rps_cpus", "busy_poll"]


@pytest.mark.parametrize(
    ("key", "written", "canonical", "raw"),
    [
        ("rps_cpus", "0x3", "0-1", "3"),
        ("rps_cpus", "off", "off", "0"),
        ("rps_cpus", "1", "1", "2"),
        ("irq_cpus", "0x2", "1", "1"),
        ("gro", "OFF", "off", "0"),
        ("threaded", True, "on", "1"),
        ("busy_poll", "off", "0", "0"),
        ("rx_usecs", " 50 ", "50", "50"),
        ("governor", "performance", "performance", "performance"),
        ("idle_state", "off", "off", "1"),
        ("rss_table", "equal 2", "0-1", "0-1"),
        ("rss-table", "1,1,0", "1,1,0", "1,1,0"),
        ("rss-key", "AA" * 40, ":".join(["aa"] * 40), ":".join(["aa"] * 40)),
        ("xps_rxqs", "0-1", "0-1", "3"),
        ("cpu_dma_latency", "0", "0", "0"),
    ],
)
def test_values(tmp_path: Path, key: str, written: object, canonical: str, raw: str) -> None:
    setting = parse(FakeHost(tmp_path), {key: written})[0]
    assert setting.wanted == canonical
    assert setting.encode(canonical) == raw


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"rps_cpu": "1"}, "rps_cpu: unknown setting: expected one of irqbalance, channels, rx-channels"),
        ({"rps_cpus": "0,7"}, "found '0,7', expected CPUs that are online: 0-1"),
        ({"rps_cpus": "all"}, "expected CPUs as a list"),
        ({"irq_cpus": "off"}, "expected at least one CPU"),
        ({"busy_poll": "-1"}, "expected an integer from 0"),
        ({"busy_poll": "1e3"}, "expected an integer from 0"),
        ({"busy_poll": str(2**31)}, "expected an integer from 0"),
        ({"gro": "maybe"}, "expected on or off"),
        ({"governor": "a b"}, "expected one word"),
        ({"rss-table": "equal 0"}, "expected 'equal N', or queue numbers"),
        ({"rss-table": "1-0"}, "expected 'equal N', or queue numbers"),
        ({"rss-key": "abc"}, "expected bytes in hex"),
        ({"xps_rxqs": "x"}, "expected receive queues as a list"),
        ({"cpu_dma_latency": "off"}, "expected an integer from 0"),
        ({"idle_state:7": "off"}, "this host has no place"),
        ({"napi_cpus:0": "1", "threaded": "off"}, "this host has no place"),
        ({"rps_cpus:9": "1"}, "rps_cpus:9 of eth0: this host has no place"),
        ({"rps_cpus:x": "1"}, "not a queue number"),
        ({"ntuple": "on"}, "ntuple@eth0: cannot be read"),
        ({"netdev_max_backlog": "5"}, "netdev_max_backlog: cannot be read"),
        ({"rps_cpus@": "1"}, "unknown setting"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, wanted: dict[str, object], message: str) -> None:
    host = FakeHost(tmp_path)
    before = tree_bytes(tmp_path)
    with pytest.raises(HostSettingError) as caught:
        parse(host, {"threaded": "on", **wanted})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree_bytes(tmp_path) == before
    assert host.nic.writes == []


def test_an_interface_is_needed_and_must_exist(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    with pytest.raises(HostSettingError, match="belongs to an interface"):
        parse(host, {"rps_cpus": "1"}, None)
    with pytest.raises(HostSettingError, match="eth7: no such interface: found eth0, uplink"):
        parse(host, {"rps_cpus": "1"}, "eth7")
    assert len(parse(host, {"busy_poll": "1"}, None)) == 1


def test_keys_are_checked_without_a_host() -> None:
    check_keys({"rps_cpus": "5000", "rx-usecs": 3})
    with pytest.raises(HostSettingError, match="unknown setting"):
        check_keys({"rpscpus": "0"})


@pytest.mark.parametrize("wanted", [{"rps_cpus": "99"}, {"rps_cpus": "abc"}, {"bogus": "1"}, {"rps_cpus:x": "1"}])
def test_what_cannot_be_meant_is_a_usage_error(tmp_path: Path, wanted: dict[str, object]) -> None:
    with pytest.raises(WrongSettingError) as caught:
        parse(FakeHost(tmp_path), wanted)
    assert caught.value.exit_code == 2


def test_what_the_host_lacks_is_no_usage_error(tmp_path: Path) -> None:
    with pytest.raises(HostSettingError) as caught:
        parse(FakeHost(tmp_path), {"netdev_max_backlog": "5"})
    assert caught.value.exit_code == 1


def test_an_unknown_key_is_answered_with_all_keys() -> None:
    with pytest.raises(WrongSettingError) as caught:
        check_keys({"rpscpus": "0"})
    assert all(key in str(caught.value) for key in KINDS)
    assert str(caught.value).endswith("Is rps_cpus meant?")


def test_host_wide_settings_are_of_no_namespace(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    with host.open("lab") as access:
        settings = parse_settings({"busy_poll": 1, "tcp_early_demux": 0, "rps_cpus:0": 1}, "eth0", "lab", access=access)
    assert {setting.key: setting.netns for setting in settings} == {
        "busy_poll": None,
        "tcp_early_demux": "lab",
        "rps_cpus": "lab",
    }


@given(st.sets(st.integers(0, 130)))
def test_masks_are_written_as_the_kernel_reads_them(cpus: set[int]) -> None:
    setting = Setting("rps_cpus", "rps_cpus", "file:x", "mask", 6, None, None)
    raw = setting.encode(",".join(map(str, sorted(cpus))) or "off")
    words = raw.split(",")
    assert all(len(word) <= 8 for word in words)
    assert all(len(word) == 8 for word in words[1:])
    assert sum(int(word, 16) << 32 * index for index, word in enumerate(reversed(words))) == sum(
        1 << cpu for cpu in cpus
    )
    assert setting.encode(setting.canonical(raw)) == raw


def test_side_effects_are_remembered(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    channels = parse(host, {"channels": 1, "rps_cpus:0": "1"})
    labels = {setting.label for setting in collateral(channels, host.open)}
    queues = {"rps_cpus@eth0/rx-1", "rps_flow_cnt@eth0/rx-0", "xps_cpus@eth0/tx-1", "xps_rxqs@eth0/tx-0"}
    irqs = {"irq_cpus@eth0/rx-1", "irq_cpus@eth0/eth0"}
    assert queues | irqs | {"rss-table@eth0", "rss-key@eth0", "rx-usecs@eth0", "rx-ring@eth0", "gro@eth0"} <= labels
    assert "rps_cpus@eth0/rx-0" not in labels, "it is in the change itself"
    features = {setting.label for setting in collateral(parse(host, {"gro": "off"}), host.open)}
    assert {"lro@eth0", "rxhash@eth0", "tx-nocache-copy@eth0"} <= features
    assert collateral(parse(host, {"rps_cpus": "1"}), host.open) == []


def test_what_adaptive_moderation_moves_is_not_remembered(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    host.nic.groups["coalesce"]["adaptive-rx"] = 1
    labels = {setting.label for setting in collateral(parse(host, {"gro": "off"}), host.open)}
    assert "rx-usecs@eth0" not in labels
    assert {"tx-usecs@eth0", "adaptive-rx@eth0"} <= labels


def test_settings_survive_json(tmp_path: Path) -> None:
    for setting in parse(FakeHost(tmp_path), {"rps_cpus": "1", "gro": "off", "busy_poll": 3}):
        assert Setting.from_json(setting.to_json()) == setting


def test_all_kinds_can_be_laid_out(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    with host.open() as access:
        places = [setting.place for key in KINDS for setting in expand(key, "eth0", None, access)]
        values = read_settings("eth0", None, access)
    assert len(places) == len(set(places)), "two keys for one place could not both be restored"
    assert not any("{" in place for place in places)
    assert values["rps_cpus@eth0/rx-0"] == "off"
    assert values["channels@eth0"] == "2"
    assert values["gro@eth0"] == "on"
    assert "netdev_max_backlog" not in values
    assert values["irqbalance"] == "on"
    assert values["rss-table@eth0"] == "0-1"
    assert values["idle_state@cpu1/state1"] == "on"
    assert values["cpu_dma_latency"] == "2000000000"
    assert not any(label.startswith("napi_cpus") for label in values), "there are threads only while it is threaded"


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.integers(2, 4))
def test_rss_patterns_round_trip(pattern: list[int], repeats: int) -> None:
    """Judge: the table itself, however the pattern is written."""
    table = [pattern[entry % len(pattern)] for entry in range(repeats * len(pattern) + len(pattern) // 2)]
    shown = parse_pattern(format_pattern(table))
    assert [shown[entry % len(shown)] for entry in range(len(table))] == table
    assert len(shown) <= len(pattern)
    assert parse_pattern(format_pattern(pattern)) * len(pattern) == pattern * len(
        parse_pattern(format_pattern(pattern))
    )


def test_the_page_about_settings_names_every_key() -> None:
    page = (Path(__file__).parents[1] / "docs/settings.md").read_text()
    named = set(re.findall(r"`([a-z_-]+)`", page))
    named |= {key.replace("rx-", "tx-") for key in named if key in ("rx-usecs", "rx-frames")}
    named |= {f"{key}-irq" for key in named if key in ("rx-usecs", "rx-frames")}
    assert set(KINDS) <= named
