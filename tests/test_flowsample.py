"""One flow in N: tcpdump's compiler and the kernel's filter language judge what the filters mean."""

from __future__ import annotations

import random
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from rxlab.errors import UsageError
from rxlab.record import flowsample

LINKTYPE_RAW = 101


def packet(sport: int, dport: int, proto: int, version: int) -> bytes:
    """Return an IP packet without payload."""
    layer4 = struct.pack(">HH", sport, dport) + bytes(16)
    if version == 4:
        return struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(layer4), 1, 0, 64, proto, 0, bytes(4), bytes(4)) + layer4
    return struct.pack(">IHBB16s16s", 6 << 28, len(layer4), proto, 64, bytes(16), bytes(16)) + layer4


def is_taken(sport: int, dport: int, n: int) -> bool:
    """Say it in another way than the filters do: bits 1 to log2(n) of both ports are equal."""
    return (sport >> 1) % n == (dport >> 1) % n


def value_of(expression: str, fields: dict[str, int]) -> bool:
    """Evaluate a tracepoint filter, in which ``field & number`` is true when they share a bit."""
    python = re.sub(r"(\w+) & (\d+)", r"bool(\1 & \2)", expression).replace("&&", " and ").replace("||", " or ")
    return bool(eval(re.sub(r"!(?!=)", " not ", python), {"bool": bool}, fields))


@pytest.mark.parametrize("n", [2, 8, 4096])
def test_the_event_filter_takes_the_same_flows_in_both_directions(n: int) -> None:
    draw = random.Random(n)
    expression = flowsample.event_filters(n, ["tcp:tcp_probe", "sched:sched_switch"])["tcp:tcp_probe"]
    for _ in range(2000):
        sport = draw.randrange(1, 1 << 16)
        dport = draw.choice([draw.randrange(1, 1 << 16), sport, sport ^ 1, sport ^ 2 * n])
        dport &= 0xFFFF
        expected = is_taken(sport, dport, n)
        assert value_of(expression, {"sport": sport, "dport": dport}) == expected
        assert value_of(expression, {"sport": dport, "dport": sport}) == expected


def test_only_events_that_know_the_ports_are_filtered() -> None:
    assert set(flowsample.event_filters(4, ["tcp:tcp_probe", "net:netif_receive_skb"])) == {"tcp:tcp_probe"}
    assert flowsample.event_filters(1, ["tcp:tcp_probe"]) == {}
    assert flowsample.packet_filter(1) is None
    assert flowsample.packet_filter(1, "tcp") == "tcp"


@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="tcpdump is not installed")
@pytest.mark.parametrize("n", [2, 16])
@pytest.mark.parametrize("extra", [None, "port 443"])
def test_tcpdump_takes_the_same_flows(n: int, extra: str | None, tmp_path: Path) -> None:
    draw = random.Random(n)
    flows = [
        (draw.randrange(1, 1 << 16), draw.choice([443, 47000, 8080]), draw.choice([6, 17]), draw.choice([4, 6]))
        for _ in range(400)
    ]
    packets = [packet(*flow) for flow in flows] + [packet(flow[1], flow[0], *flow[2:]) for flow in flows]
    header = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, LINKTYPE_RAW)
    records = [struct.pack("<IIII", 0, 0, len(p), len(p)) + p for p in packets]
    (tmp_path / "in.pcap").write_bytes(header + b"".join(records))
    expression = flowsample.packet_filter(n, extra)
    assert expression is not None
    argv = ["tcpdump", "-r", str(tmp_path / "in.pcap"), "-w", str(tmp_path / "out.pcap"), expression]
    subprocess.run(
        [*argv[:1], *(["-Z", "root"] if Path("/root").exists() else []), *argv[1:]], check=True, capture_output=True
    )
    taken = [is_taken(s, d, n) and (extra is None or 443 in (s, d)) for s, d, *_ in flows] * 2
    expected = header + b"".join(record for record, is_in in zip(records, taken, strict=True) if is_in)
    assert (tmp_path / "out.pcap").read_bytes()[24:] == expected[24:]
    assert 0 < sum(taken) < len(taken)


@pytest.mark.parametrize("text", ["1/3", "2/4", "1/0", "4", "1/8192", "1/-2", "1/x"])
def test_a_share_that_ports_cannot_give_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a share of the flows"):
        flowsample.parse_share(text)


def test_shares() -> None:
    assert (flowsample.parse_share(None), flowsample.parse_share("1/1"), flowsample.parse_share("1/4096")) == (
        1,
        1,
        4096,
    )
