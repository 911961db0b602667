"""host/topology.py, interrupts.py, cpulist.py on a made-up tree, and against the machine's own tools."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from host_builder import FakeHost, build_tree
from hypothesis import given
from hypothesis import strategies as st

from rxlab.errors import HostSettingError
from rxlab.host.access import HostAccess
from rxlab.host.cpulist import format_cpus, mask_to_cpus, parse_cpus
from rxlab.host.interrupts import parse_interrupts, queue_irqs
from rxlab.host.topology import cpu_meant, local_identity, read_cpus, read_queues, resolve_intents, snapshot_host


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0,2-3", [0, 2, 3]), ("0x5", [0, 2]), ("off", []), ("", []), ("3", [3]), (" 1 , 0 ", [0, 1]), ("0X10", [4])],
)
def test_parse_cpus(text: str, cpus: list[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["x", "3-1", "1,", "-1", "0xg", "1;2", "٣"])
def test_parse_cpus_refuses(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- int() and the list parser word it differently
        parse_cpus(text)


@given(st.sets(st.integers(0, 300)))
def test_cpu_lists_and_masks_round_trip(cpus: set[int]) -> None:
    assert parse_cpus(format_cpus(cpus)) == sorted(cpus)
    digits = f"{sum(1 << cpu for cpu in cpus):096x}"
    sysfs = ",".join(digits[start : start + 8] for start in range(0, 96, 8))
    assert mask_to_cpus(sysfs) == format_cpus(cpus)


def test_cpus_of_a_tree(tmp_path: Path) -> None:
    with HostAccess(root=build_tree(tmp_path)) as access:
        cpus = read_cpus(access)
    assert [cpu["online"] for cpu in cpus] == [True, True, False]
    assert [cpu["node"] for cpu in cpus] == [0, 1, None]
    assert [(cpu["core"], cpu["llc"]) for cpu in cpus[:2]] == [(0, 0), (0, 0)], "siblings share core and cache"
    assert cpus[2]["core"] is None


def test_queue_interrupts_by_name(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    with host.open() as access:
        # 24 is the link interrupt of the same device, 27 belongs to eth01
        assert queue_irqs(access, "eth0") == {0: 25, 1: 26}
        assert queue_irqs(access, "uplink") == {}


@pytest.mark.parametrize(
    ("actions", "queues"),
    [
        (["virtio0-config", "virtio0-input.0", "virtio0-output.0", "virtio0-input.1"], {0: 101, 1: 103}),
        (["virtio0-config", "virtio0-rx", "virtio0-tx"], {0: 101}),
        (
            ["mlx5_async0@pci:0000:03:00.0", "mlx5_comp0@pci:0000:03:00.0", "mlx5_comp1@pci:0000:03:00.0"],
            {0: 101, 1: 102},
        ),
        (["i40e-0000:03:00.0:misc", "i40e-eth0-TxRx-0", "i40e-eth0-TxRx-1"], {0: 101, 1: 102}),
        (["eth0-tx-0", "eth0-rx-0"], {0: 101}),
        (["eth0-Tx-Rx-0", "eth0-Tx-Rx-1"], {0: 100, 1: 101}),
        (["eth0"], {0: 100}),
    ],
)
def test_interrupt_names_of_drivers(tmp_path: Path, actions: list[str], queues: dict[int, int]) -> None:
    lines = ["            CPU0       CPU1"]
    lines += [f"{100 + n}:   1  2   PCI-MSI {n}-edge      {action}" for n, action in enumerate(actions)]
    msi = tmp_path / "sys/class/net/eth0/device/msi_irqs"
    msi.mkdir(parents=True)
    for number in range(len(actions)):
        (msi / str(100 + number)).touch()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/interrupts").write_text("\n".join(lines))
    with HostAccess(root=tmp_path) as access:
        assert queue_irqs(access, "eth0") == queues


def test_interrupt_table() -> None:
    text = "      CPU0  CPU1\n 25:  100   7   PCI-MSI 1-edge  eth0-rx, other\nERR:  3\n"
    table = parse_interrupts(text)
    assert table["25"] == {"label": "PCI-MSI 1-edge eth0-rx, other", "cpus": [100, 7]}
    assert table["ERR"]["cpus"] == [3, 0]


def test_queues_of_a_tree(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    with host.open() as access:
        queues = read_queues(access, "eth0")
    assert queues[1] == {
        "queue": 1,
        "irq": 26,
        "irq_cpus": "0-1",
        "irq_effective": "1",
        "rps_cpus": "off",
        "rps_flow_cnt": 0,
        "xps_cpus": "0",
    }


def test_snapshot_of_a_tree_is_json(tmp_path: Path) -> None:
    snapshot = json.loads(json.dumps(snapshot_host("eth0", root=build_tree(tmp_path))))
    assert snapshot["kernel"] == "6.1.0-fake"
    assert snapshot["irqbalance"] is True
    assert snapshot["governor"] == "powersave"
    assert snapshot["tcp_early_demux"] == "1"
    assert snapshot["sysctls"]["net.core.netdev_budget"] == "300"
    assert [queue["irq"] for queue in snapshot["ifaces"]["eth0"]["queues"]] == [25, 26]
    assert snapshot["ifaces"]["eth0"]["settings"]["rps_cpus@eth0/rx-0"] == "off"


def test_snapshot_of_an_unknown_interface_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(HostSettingError, match=r"wlan7: no such interface: found eth0, uplink"):
        snapshot_host("wlan7", root=build_tree(tmp_path))


def test_unknown_namespace() -> None:
    with pytest.raises(HostSettingError, match="network namespace cannot be entered"):
        HostAccess("rxlab-no-such-namespace")


def test_this_machine_agrees_with_its_tools() -> None:
    snapshot = snapshot_host("lo")
    assert sum(cpu["online"] for cpu in snapshot["cpus"]) == os.sysconf("SC_NPROCESSORS_ONLN")
    assert (
        snapshot["kernel"] == subprocess.run(["uname", "-r"], capture_output=True, text=True, check=True).stdout.strip()
    )
    features = subprocess.run(["ethtool", "-k", "lo"], capture_output=True, text=True, check=False).stdout
    if features:
        shown = {line.split(":")[0].strip(): line.split(":")[1].split()[0] for line in features.splitlines()[1:]}
        ours = snapshot["ifaces"]["lo"]["features"]
        assert shown["generic-receive-offload"] == ("on" if ours["rx-gro"] else "off")
        # names that the command leaves as the kernel has them
        common = set(shown) & set(ours)
        assert len(common) > 10
        assert {name: shown[name] for name in common} == {name: "on" if ours[name] else "off" for name in common}


def test_identity_of_loopback() -> None:
    macs, addresses = local_identity("lo")
    assert macs == ["00:00:00:00:00:00"]
    assert "127.0.0.1" in addresses


def machine(nodes: int, cores: int, threads: int) -> list[dict[str, object]]:
    """Return CPUs numbered as x86 does it: first threads of all cores, then the second ones; one cache per node."""
    total = nodes * cores
    return [
        {"cpu": cpu, "core": cpu % total, "llc": cpu % total // cores * cores, "node": cpu % total // cores, "online": True}
        for cpu in range(total * threads)
    ]  # fmt: skip


def test_intents_mean_the_cpu_a_person_would_point_at() -> None:
    cpus = machine(nodes=2, cores=4, threads=2)
    meant = {
        near: [cpu_meant(intent, near, cpus) for intent in ("same-core", "sibling", "same-llc", "other-node")]
        for near in (1, 6, 14)
    }
    assert meant == {1: [1, 9, 0, 4], 6: [6, 14, 4, 0], 14: [14, 6, 4, 0]}
    cpus[9]["online"] = False
    with pytest.raises(HostSettingError, match="second hardware thread"):
        cpu_meant("sibling", 1, cpus)


@pytest.mark.parametrize(
    ("intent", "lacking"),
    [("sibling", "second hardware thread"), ("same-llc", "other core"), ("other-node", "other NUMA node")],
)
def test_a_machine_without_such_a_cpu_says_so(intent: str, lacking: str) -> None:
    with pytest.raises(HostSettingError, match=lacking):
        cpu_meant(intent, 0, machine(nodes=1, cores=1, threads=1))
    assert cpu_meant("same-core", 0, machine(nodes=1, cores=1, threads=1)) == 0


def test_intents_are_resolved_only_where_cpus_are_meant(tmp_path: Path) -> None:
    with FakeHost(tmp_path).open() as access:
        wanted = {"irq_cpus": "sibling", "rps_cpus:1": "same-core", "xps_cpus": "0-1", "governor": "powersave"}
        assert resolve_intents(wanted, 1, access) == {
            "irq_cpus": "0", "rps_cpus:1": "1", "xps_cpus": "0-1", "governor": "powersave",
        }  # fmt: skip
        assert resolve_intents({"rps_cpus": "off"}, None, access) == {"rps_cpus": "off"}
        with pytest.raises(HostSettingError, match="which CPU the application reads on"):
            resolve_intents({"rps_cpus": "sibling"}, None, access)
        with pytest.raises(HostSettingError, match="no such CPU online"):
            resolve_intents({"rps_cpus": "sibling"}, 7, access)
