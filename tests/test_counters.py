"""host/counters.py: known text of /proc, and nstat as the judge on the running machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from host_builder import build_tree

from rxlab.host.counters import (
    counters_json,
    difference,
    parse_cpu_times,
    parse_protocol_table,
    parse_softirqs,
    parse_softnet_stat,
    read_counters,
)

SOFTIRQS = """\
                    CPU0       CPU1
          HI:          0          1
      NET_RX:       2000        123
"""

# processed dropped time_squeeze 0 0 0 0 0 cpu_collision received_rps flow_limit backlog_len cpu input_qlen process_qlen
SOFTNET = """\
00001f68 00000001 00000002 00000000 00000000 00000000 00000000 00000000 00000003 0000000a 00000004 00000000 00000000 00000000 00000000
fffffff0 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000001 00000003 00000001 00000000
"""

STAT = """\
cpu  30 0 40 1000 5 0 7 1 0 0
cpu0 10 0 20 500 5 0 3 1 0 0
cpu3 20 0 20 500 0 0 4 0 0 0
intr 12345 0
ctxt 99
"""

SNMP = "Ip: Forwarding InReceives\nIp: 1 12\nTcp: CurrEstab InSegs\nTcp: 3 7\n"


def test_softirqs() -> None:
    assert parse_softirqs(SOFTIRQS) == {"HI": [0, 1], "NET_RX": [2000, 123]}


def test_softnet_stat() -> None:
    first, second = parse_softnet_stat(SOFTNET)
    assert first == {
        "cpu": 0,
        "processed": 0x1F68,
        "dropped": 1,
        "time_squeeze": 2,
        "cpu_collision": 3,
        "received_rps": 10,
        "flow_limit_count": 4,
    }
    assert second["cpu"] == 3, "the CPU is a column of its own where some are offline"
    old_kernel = parse_softnet_stat("00000001 00000002 00000003 0 0 0 0 0 4 5 6")
    assert old_kernel[0]["received_rps"] == 5
    assert old_kernel[0]["cpu"] == 0


def test_cpu_times_are_ns() -> None:
    tick_ns = 10**9 // os.sysconf("SC_CLK_TCK")
    first, second = parse_cpu_times(STAT)
    assert first["user"] == 10 * tick_ns
    assert first["steal"] == tick_ns
    assert second["cpu"] == 3
    assert second["softirq"] == 4 * tick_ns


def test_protocol_table() -> None:
    assert parse_protocol_table(SNMP) == {"IpForwarding": 1, "IpInReceives": 12, "TcpCurrEstab": 3, "TcpInSegs": 7}


def snapshot(processed: int, established: int, irqs: dict[str, list[int]]) -> dict:
    return {
        "interrupts": {irq: {"label": "PCI-MSI eth0-TxRx-0", "cpus": cpus} for irq, cpus in irqs.items()},
        "softirqs": {"NET_RX": [10, processed % 100]},
        "softnet_stat": [{"cpu": 1, "processed": processed, "received_rps": 0}],
        "cpu_time_ns": [{"cpu": 1, "user": 10**9 + processed}],
        "nstat": {"TcpCurrEstab": established},
        "ethtool": {"eth0": {"rx_packets": processed}},
        "interfaces": {"eth0": {"rx_packets": processed}},
    }


def test_difference() -> None:
    before = snapshot(5, 9, {"25": [100, 7]})
    after = snapshot(12, 4, {"25": [101, 7, 3], "26": [2, 2]})
    change = difference(before, after)
    assert change["interrupts"]["25"] == {"label": "PCI-MSI eth0-TxRx-0", "cpus": [1, 0, 3]}, "a CPU came online"
    assert change["interrupts"]["26"]["cpus"] == [2, 2], "an interrupt that is new counts from 0"
    assert change["softirqs"] == {"NET_RX": [0, 7]}
    assert change["softnet_stat"] == [{"cpu": 1, "processed": 7, "received_rps": 0}]
    assert change["cpu_time_ns"] == [{"cpu": 1, "user": 7}]
    assert change["nstat"] == {"TcpCurrEstab": -5}, "a gauge may fall"
    assert change["ethtool"] == change["interfaces"] == {"eth0": {"rx_packets": 7}}


def test_softnet_counts_wrap() -> None:
    change = difference(snapshot(2**32 - 3, 0, {}), snapshot(4, 0, {}))
    assert change["softnet_stat"][0]["processed"] == 7


def test_counters_of_a_tree(tmp_path: Path) -> None:
    root = build_tree(tmp_path)
    (root / "proc/net").mkdir()
    (root / "proc/net/softnet_stat").write_text(SOFTNET)
    (root / "proc/softirqs").write_text(SOFTIRQS)
    (root / "proc/stat").write_text(STAT)
    (root / "proc/thread-self/net/snmp").write_text(SNMP)
    (root / "proc/thread-self/net/snmp6").write_text("Ip6InReceives                   \t5\n")
    counters = read_counters(["eth0"], root=root)
    assert counters["interrupts"]["26"] == {"label": "PCI-MSI 1048578-edge eth0-TxRx-1", "cpus": [8, 200]}
    assert counters["nstat"]["Ip6InReceives"] == 5
    assert counters["softnet_stat"][1]["processed"] == 0xFFFFFFF0
    assert counters["ethtool"] == {"eth0": {}}, "a made-up interface has no driver"
    content = counters_json(counters, counters)
    assert json.loads(json.dumps(content)) == content
    assert set(content) == {"before", "after", "difference"}


@pytest.mark.skipif(shutil.which("nstat") is None, reason="nstat is not installed")
def test_nstat_agrees() -> None:
    before = read_counters(["lo"])
    done = subprocess.run(
        ["nstat", "--json", "--zeros", "--ignore", "--noupdate"], capture_output=True, text=True, check=True
    )
    judge = next(iter(json.loads(done.stdout).values()))
    after = read_counters(["lo"])
    common = set(judge) & set(before["nstat"])
    assert len(common) > 100
    assert set(judge) <= set(before["nstat"]), "names are nstat's"
    # Other traffic may move a counter between the three readings, never out of their order. nstat itself shows the 64-bit
    # octet counters modulo 2**32.
    moved = {name: (judge[name] - before["nstat"][name]) % 2**32 for name in common}
    window = {name: after["nstat"][name] - before["nstat"][name] for name in common}
    gauges = {name for name in common if window[name] < 0 or "Curr" in name}
    assert [name for name in common - gauges if moved[name] > window[name]] == []


def test_loopback_is_counted() -> None:
    import socket

    before = read_counters(["lo"])
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        for _ in range(50):
            sender.sendto(b"x", receiver.getsockname())
            receiver.recv(10)
    change = difference(before, read_counters(["lo"]))
    assert change["interfaces"]["lo"]["rx_packets"] >= 50
    assert change["nstat"]["UdpInDatagrams"] >= 50
    assert sum(row["processed"] for row in change["softnet_stat"]) >= 50
    assert sum(change["softirqs"]["NET_RX"]) >= 1
