"""tshark as the judge of packet columns: every field both know, packet by packet, taken from the outer headers."""

from __future__ import annotations

import subprocess
from ipaddress import ip_address
from pathlib import Path

import numpy as np

from rxlab.read.columns import Columns
from rxlab.read.pcapfile import NAT

# Wireshark field -> (the protocol whose packets it is compared for, how the column's value is spelt)
_FRAME = (
    "frame.number",
    "frame.time_epoch",
    "frame.cap_len",
    "frame.len",
    "frame.protocols",
    "eth.src",
    "eth.dst",
    "vlan.id",
)
_IP = ("ip.src", "ip.dst", "ip.ttl", "ip.id", "ip.proto", "ip.len", "ip.hdr_len", "ip.frag_offset", "ip.flags.mf")
_IPV6 = ("ipv6.src", "ipv6.dst", "ipv6.hlim", "ipv6.plen")
_TCP = (
    "tcp.srcport",
    "tcp.dstport",
    "tcp.seq_raw",
    "tcp.ack_raw",
    "tcp.flags",
    "tcp.window_size_value",
    "tcp.len",
    "tcp.options.timestamp.tsval",
    "tcp.options.timestamp.tsecr",
)
_UDP = ("udp.srcport", "udp.dstport", "udp.length")
FIELDS = (*_FRAME, *_IP, *_IPV6, *_TCP, *_UDP)
_PREFERENCES = (
    "ip.defragment:FALSE",
    "ipv6.defragment:FALSE",
    "tcp.desegment_tcp_streams:FALSE",
    "tcp.analyze_sequence_numbers:FALSE",
    "tcp.try_heuristic_first:FALSE",
)
_LINK = {"eth", "ethertype", "vlan", "ieee8021ad", "sll", "null", "raw", "loopback"}


def tshark_rows(path: Path) -> list[dict[str, list[str]]]:
    """Return per frame the values of each of `FIELDS`, all occurrences, outermost first."""
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", "-E", "occurrence=a", "-E", "aggregator=;"]
    command += [part for name in FIELDS for part in ("-e", name)]
    command += [part for preference in _PREFERENCES for part in ("-o", preference)]
    printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    rows = [line.split("\t") for line in printed.split("\n")[:-1]]
    return [{name: value.split(";") if value else [] for name, value in zip(FIELDS, row, strict=True)} for row in rows]


def epoch_ns(text: str) -> int:
    """Return int ns of tshark's decimal seconds."""
    seconds, _, fraction = text.partition(".")
    return int(seconds) * 10**9 + int(fraction)


def _mac(text: str) -> int:
    return int(text.replace(":", ""), 16)


def _address(packets: Columns, way: str, row: int) -> str:
    word = int(packets[f"{way}_hi"][row]) << 64 | int(packets[f"{way}_lo"][row])
    version = int(packets["ip_version"][row])
    return str(ip_address(word.to_bytes(4 if version == 4 else 16, "big")))


def differences(packets: Columns, rows: list[dict[str, list[str]]]) -> list[str]:
    """Return one line for each value of a column that is not what tshark printed."""
    by_frame = {int(row["frame.number"][0]): row for row in rows}
    found: list[str] = []
    for i in range(packets.n):
        frame = int(packets["frame"][i])
        if frame not in by_frame:
            found.append(f"frame {frame}: tshark has no such frame")
            continue
        pairs = _frame_pairs(packets, i, by_frame[frame]) + _network_pairs(packets, i, by_frame[frame])
        found += [f"frame {frame}: {name} is {ours}, tshark {theirs}" for name, ours, theirs in pairs if ours != theirs]
    return found


def _frame_pairs(packets: Columns, i: int, row: dict[str, list[str]]) -> list[tuple[str, object, object]]:
    pairs: list[tuple[str, object, object]] = [
        ("caplen", int(packets["caplen"][i]), int(row["frame.cap_len"][0])),
        ("wire_len", int(packets["wire_len"][i]), int(row["frame.len"][0])),
    ]
    time = int(packets["time"][i])
    pairs.append(("time", time, epoch_ns(row["frame.time_epoch"][0]) if row["frame.time_epoch"] else NAT))
    if packets["linktype"][i] == 1 and row["eth.src"] and row["frame.protocols"][0].startswith("eth"):
        pairs.append(("src_mac", int(packets["src_mac"][i]), _mac(row["eth.src"][0])))
        pairs.append(("dst_mac", int(packets["dst_mac"][i]), _mac(row["eth.dst"][0])))
        if "vlan" in row["frame.protocols"][0].split(":")[:3]:
            pairs.append(("vlan", int(packets["vlan"][i]), int(row["vlan.id"][0])))
    return pairs


def _network_pairs(packets: Columns, i: int, row: dict[str, list[str]]) -> list[tuple[str, object, object]]:
    protocols = row["frame.protocols"][0].split(":") if row["frame.protocols"] else []
    while protocols and protocols[0] in _LINK:
        protocols.pop(0)
    version = {"ip": 4, "ipv6": 6}.get(protocols[0] if protocols else "", 0)
    address = "ip.dst" if version == 4 else "ipv6.dst"
    if version and not row[address]:  # tshark names the protocol but the header does not fit the captured bytes
        version = 0
    pairs: list[tuple[str, object, object]] = [("ip_version", int(packets["ip_version"][i]), version)]
    if version == 0 or packets["ip_version"][i] != version:
        return pairs
    layer, limit = ("ip", "ttl") if version == 4 else ("ipv6", "hlim")
    for way in ("src", "dst"):
        pairs.append((way, _address(packets, way, i), str(ip_address(row[f"{layer}.{way}"][0]))))
    pairs.append(("ttl", int(packets["ttl"][i]), int(row[f"{layer}.{limit}"][0])))
    if version == 4:
        pairs.append(("proto", int(packets["proto"][i]), int(row["ip.proto"][0])))
        pairs.append(("ip_id", int(packets["ip_id"][i]), int(row["ip.id"][0], 16)))
        # tshark tells the offset as the header has it, in units of 8 bytes.
        offset, more = int(row["ip.frag_offset"][0]), row["ip.flags.mf"][0] in ("1", "True")
        pairs.append(("fragment", int(packets["fragment"][i]), offset * 2 + int(more)))
    rest = [name for name in protocols[1:] if not name.startswith("ipv6.")]
    if rest[:1] == ["tcp"]:
        pairs += _tcp_pairs(packets, i, row)
    elif rest[:1] in (["udp"], ["udplite"]):
        pairs += _udp_pairs(packets, i, row)
    return pairs


def _number(row: dict[str, list[str]], name: str) -> int | None:
    return int(row[name][0], 0) if row[name] else None


def _tcp_pairs(packets: Columns, i: int, row: dict[str, list[str]]) -> list[tuple[str, object, object]]:
    names = {
        "sport": "tcp.srcport",
        "dport": "tcp.dstport",
        "seq": "tcp.seq_raw",
        "ack": "tcp.ack_raw",
        "tcp_flags": "tcp.flags",
        "window": "tcp.window_size_value",
        "tsval": "tcp.options.timestamp.tsval",
        "tsecr": "tcp.options.timestamp.tsecr",
    }
    pairs = [(ours, int(packets[ours][i]), _number(row, theirs)) for ours, theirs in names.items()]
    return [(name, ours, theirs or 0) for name, ours, theirs in pairs] + _payload_pairs(
        packets, i, _number(row, "tcp.len")
    )


def _udp_pairs(packets: Columns, i: int, row: dict[str, list[str]]) -> list[tuple[str, object, object]]:
    pairs: list[tuple[str, object, object]] = []
    for ours, theirs in (("sport", "udp.srcport"), ("dport", "udp.dstport")):
        pairs.append((ours, int(packets[ours][i]), _number(row, theirs) or 0))
    length = _number(row, "udp.length")
    room = max((_number(row, "ip.len") or 0) - (_number(row, "ip.hdr_len") or 0), _number(row, "ipv6.plen") or 0)
    is_a_lie = length is None or length < 8 or length > room
    return pairs + _payload_pairs(packets, i, None if is_a_lie else length - 8)


def _payload_pairs(packets: Columns, i: int, theirs: int | None) -> list[tuple[str, object, object]]:
    """Compare the payload length where both mean the same.

    Not of fragments (tshark has the datagram's length, or none), nor where a length exceeds the frame as it was on the
    wire, nor where the UDP length exceeds the IP packet: rxlab then trusts the IP header, tshark shows the UDP header or
    trusts the frame.
    """
    ours, offset, wire_len = (int(packets[name][i]) for name in ("payload_len", "payload_offset", "wire_len"))
    if theirs is None or packets["fragment"][i] or max(ours, theirs) + offset > wire_len:
        return []
    return [("payload_len", ours, theirs)]


def assert_equal_to_tshark(packets: Columns, path: Path) -> None:
    """Fail with the first differences; every frame of tshark must be a packet here."""
    rows = tshark_rows(path)
    assert np.array_equal(packets["frame"], [int(row["frame.number"][0]) for row in rows])
    found = differences(packets, rows)
    assert not found, f"{len(found)} differences, first: " + " | ".join(found[:5])
