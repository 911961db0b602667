"""UDP datagrams in IP fragments: which one completes its datagram, as tshark puts them together."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from capture_builder import classic, ethernet, ipv4, ipv6, tcp, udp

from rxlab import read_pcap
from rxlab.follow.received import FlowsSeen, Machine
from rxlab.read.columns import Columns

HOST = Machine("eth0")


def fragments(version: int, ident: int, size: int, port: int, cut: int = 240) -> list[bytes]:
    """Return the frames of one datagram of `size` bytes."""
    datagram, frames = udp(bytes(size), port, 53), []
    for offset in range(0, len(datagram), cut):
        piece, more = datagram[offset : offset + cut], offset + cut < len(datagram)
        if version == 4:
            frames.append(ethernet(ipv4(piece, 17, fragment=offset // 8 | (0x2000 if more else 0), ident=ident)))
        else:
            header = bytes([17, 0]) + struct.pack(">HI", offset | more, ident)
            frames.append(ethernet(ipv6(header + piece, 44), 0x86DD))
    return frames


def traffic(seed: int) -> list[bytes]:
    """Datagrams whole and in fragments, these out of order, mixed with each other, some never whole; segments between."""
    draw, frames = random.Random(seed), []
    for ident in range(120):
        pieces = fragments(draw.choice((4, 6)), ident + 1, draw.randrange(1, 1200), 1000 + ident % 5)
        if draw.random() < 0.3:
            draw.shuffle(pieces)
        if draw.random() < 0.1 and len(pieces) > 1:
            pieces.pop(draw.randrange(len(pieces)))
        frames.append(pieces)
    mixed: list[bytes] = []
    while frames:
        # Up to three datagrams under way at a time.
        chosen = frames[draw.randrange(min(3, len(frames)))]
        mixed.append(chosen.pop(0))
        frames = [pieces for pieces in frames if pieces]
        if draw.random() < 0.2:
            mixed.append(ethernet(ipv4(tcp(b"x" * 9, 5, 6))))
    return mixed


def captured(tmp_path: Path, frames: list[bytes]) -> Path:
    path = tmp_path / "fragments.pcap"
    path.write_bytes(classic(frames))
    return path


def as_received(packets: Columns) -> Columns:
    return FlowsSeen().take(packets, HOST)


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is the judge")
@pytest.mark.parametrize("seed", range(3))
def test_tshark_completes_the_same_datagrams(tmp_path: Path, seed: int) -> None:
    path = captured(tmp_path, traffic(seed))
    names = ("udp.length", "udp.srcport", "ip.fragment", "ipv6.fragment", "frame.protocols")
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", *(part for name in names for part in ("-e", name))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in printed]
    received = as_received(read_pcap(path))
    ours = [
        (int(length) + 8, int(port)) if proto == 17 and length > 0 else None
        for length, port, proto in zip(received["payload_len"], received["sport"], received["proto"], strict=True)
    ]
    theirs = [(int(row["udp.length"]), int(row["udp.srcport"])) if row["udp.length"] else None for row in rows]
    assert ours == theirs
    # Where the datagram begins: the first of the fragments that tshark lists, which it sorts by offset.
    begins = [row["ip.fragment"] or row["ipv6.fragment"] for row in rows]
    heads = {row: int(text.split(",")[0]) for row, text in enumerate(begins) if text}
    assert len(heads) > 50
    assert {row: int(received["head_frame"][row]) for row in heads} == heads


@pytest.mark.parametrize("size", [1, 5, 64])
def test_pieces_of_a_capture_tell_the_same(tmp_path: Path, size: int) -> None:
    packets = read_pcap(captured(tmp_path, traffic(7)))
    whole, seen = as_received(packets), FlowsSeen()
    pieces = [
        seen.take(packets.take(np.arange(low, min(low + size, packets.n))), HOST) for low in range(0, packets.n, size)
    ]
    for name in ("payload_len", "head_frame", "sport", "dport", "flow", "key", "is_fragment"):
        assert np.concatenate([piece[name] for piece in pieces]).tolist() == whole[name].tolist(), name


def test_an_id_used_again_is_another_datagram(tmp_path: Path) -> None:
    first, second = fragments(4, 7, 600, 1001), fragments(4, 7, 500, 1002)
    # The first one's end was lost; thirty seconds later (here: the pcap's stamps are one second apart) the kernel forgets it too.
    packets = read_pcap(captured(tmp_path, [*first[:-1], *second, *first]))
    lengths = as_received(packets)["payload_len"].tolist()
    assert [length for length in lengths if length] == [500, 600]
    gap = [ethernet(ipv4(tcp(b"", 5, 6)))] * 31
    packets = read_pcap(captured(tmp_path, [first[0], *gap, *first[1:]]))
    assert not as_received(packets)["payload_len"].any()


def test_what_is_no_datagram_has_no_bytes(tmp_path: Path) -> None:
    segment = tcp(bytes(300), 5, 6)
    frames = [
        ethernet(ipv4(segment[:160], 6, fragment=0x2000, ident=9)),
        ethernet(ipv4(segment[160:], 6, fragment=20, ident=9)),
    ]
    received = as_received(read_pcap(captured(tmp_path, frames)))
    assert received["payload_len"].tolist() == [140, 0]
    assert received["is_fragment"].all()
