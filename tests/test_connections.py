"""Connections that use the same ports one after the other: flows of their own, as tshark numbers its streams."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from capture_builder import classic, ethernet, ipv4, tcp, udp

from rxlab import read_pcap
from rxlab.follow.received import FlowsSeen, Machine, received_packets
from rxlab.follow.verify import _connections

SYN, SYN_ACK, ACK, RST = 0x02, 0x12, 0x18, 0x04


def conversation(seed: int) -> list[bytes]:
    """Packets of a few clients that connect again and again from the same ports, SYNs sent twice, datagrams between."""
    draw, frames = random.Random(seed), []
    sequence: dict[int, int] = {}
    for _ in range(400):
        port = draw.choice((1001, 1002, 1003))
        kind = draw.random()
        if kind < 0.15 or port not in sequence:
            # The next connection's numbers lie over those of the one before.
            sequence[port] = (sequence.get(port, draw.randrange(2**32)) - draw.randrange(3000)) % 2**32
            syn = ethernet(ipv4(tcp(b"", port, 80, seq=sequence[port], ack=0, flags=SYN)))
            frames += [syn] * draw.choice((1, 1, 2))
            sequence[port] = (sequence[port] + 1) % 2**32
        elif kind < 0.2:
            frames.append(ethernet(ipv4(tcp(b"", port, 80, seq=sequence[port], flags=RST))))
        elif kind < 0.25:
            frames.append(ethernet(ipv4(udp(b"x", port, 80), proto=17)))
        else:
            frames.append(ethernet(ipv4(tcp(b"y" * 500, port, 80, seq=sequence[port], flags=ACK))))
            sequence[port] = (sequence[port] + 500) % 2**32
    return frames


def written(tmp_path: Path, frames: list[bytes]) -> Path:
    path = tmp_path / "again.pcap"
    path.write_bytes(classic(frames))
    return path


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is the judge")
@pytest.mark.parametrize("seed", range(4))
def test_tshark_numbers_the_same_streams(tmp_path: Path, seed: int) -> None:
    path = written(tmp_path, conversation(seed))
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", "-e", "tcp.stream", "-e", "udp.stream"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    received, flows = received_packets(read_pcap(path), Machine("eth0"))
    pairs = set(zip(printed, received["directed_flow"].tolist(), strict=True))
    assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}) == flows.n > 20
    assert len(set(flows.attrs["labels"])) == flows.n


@pytest.mark.parametrize("size", [1, 7, 50])
def test_pieces_of_a_capture_tell_the_same(tmp_path: Path, size: int) -> None:
    packets = read_pcap(written(tmp_path, conversation(9)))
    whole, again = FlowsSeen(), FlowsSeen()
    expected = whole.number(whole.take(packets, Machine("eth0")))
    pieces = [packets.take(np.arange(low, min(low + size, packets.n))) for low in range(0, packets.n, size)]
    numbered = [whole.number(again.take(piece, Machine("eth0"))) for piece in pieces]
    assert np.concatenate([piece["directed_flow"] for piece in numbered]).tolist() == expected["directed_flow"].tolist()
    assert again.flows().attrs["labels"] == whole.flows().attrs["labels"]


def test_a_connection_seen_from_its_middle_is_the_first(tmp_path: Path) -> None:
    frames = [
        ethernet(ipv4(tcp(b"z" * 10, 1001, 80, seq=7000))),
        ethernet(ipv4(tcp(b"", 1001, 80, seq=6000, flags=SYN))),
        ethernet(ipv4(tcp(b"", 1001, 80, seq=6000, flags=SYN))),
        ethernet(ipv4(tcp(b"z" * 10, 1001, 80, seq=6001))),
        # From the other side: the answer to the host's own SYN begins a stream as well.
        ethernet(ipv4(tcp(b"", 80, 1002, seq=500, flags=SYN_ACK), src="10.0.0.2", dst="10.0.0.1")),
        ethernet(ipv4(tcp(b"", 80, 1002, seq=400, flags=SYN_ACK), src="10.0.0.2", dst="10.0.0.1")),
    ]
    received, flows = received_packets(read_pcap(written(tmp_path, frames)), Machine("eth0"))
    assert received["directed_flow"].tolist() == [0, 1, 1, 1, 2, 3]
    assert [label.split()[-1] for label in flows.attrs["labels"]] == ["tcp", "#2", "tcp", "#2"]


def test_calls_of_a_log_are_on_the_connection_of_their_time() -> None:
    """Two connections of the same ports, the second flow of the capture begun first, and one call of ports that nobody captured."""
    flows = {"proto": np.array([6, 6]), "sport": np.array([1001, 1001]), "dport": np.array([80, 80])}
    packets = {"flow": np.array([1, 1, 0]), "pcap_time": np.array([100, 150, 300])}
    joined = SimpleNamespace(flows=flows, packets=packets, clock=SimpleNamespace(to_monotonic=lambda time: time))
    log = np.zeros(4, [("proto", "u1"), ("local_port", "u2"), ("peer_port", "u2"), ("t1", "i8")])
    log["proto"], log["local_port"], log["peer_port"], log["t1"] = 6, 80, [1001, 1001, 1001, 7], [120, 299, 301, 310]
    of_call, of_flow = _connections(joined, log)
    assert of_flow.tolist() == [0, 1]
    assert of_call[:3].tolist() == [1, 1, 0]
    assert of_call[3] not in of_flow
