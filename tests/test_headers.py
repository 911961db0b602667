"""Header columns of packets built field by field, and the RSS hash against Microsoft's verification suite."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
from capture_builder import MAC_A, MAC_B, classic, ethernet, ipv4, ipv6, tcp, udp

from rxlab.errors import UsageError
from rxlab.read.columns import Columns
from rxlab.read.flows import toeplitz_hash
from rxlab.read.pcap import read_pcap


@pytest.fixture
def decode(tmp_path: Path):
    """Return a function that reads packets back from a capture made of them."""

    def read(*packets: bytes, linktype: int = 1, wire_lens: list[int] | None = None) -> Columns:
        path = tmp_path / "packets.pcap"
        path.write_bytes(classic(packets, linktype=linktype, wire_lens=wire_lens))
        return read_pcap(path)

    return read


def row(packets: Columns, i: int = 0) -> dict[str, int]:
    return {name: int(packets[name][i]) for name in packets}


def test_tcp_over_ipv4(decode) -> None:
    options = bytes.fromhex("0101080a") + struct.pack(">II", 111, 222)
    segment = tcp(b"hello", 1234, 80, seq=7, ack=9, flags=0x1FF, window=77, options=options)
    got = row(decode(ethernet(ipv4(segment, 6, "1.2.3.4", "5.6.7.8", ident=99, ttl=3))))
    assert got["src_mac"] == int.from_bytes(MAC_A, "big")
    assert got["dst_mac"] == int.from_bytes(MAC_B, "big")
    assert (got["src_hi"], got["src_lo"]) == (0, int(ip_address("1.2.3.4")))
    assert (got["dst_hi"], got["dst_lo"]) == (0, int(ip_address("5.6.7.8")))
    expected = {"ip_version": 4, "proto": 6, "ttl": 3, "ip_id": 99, "ethertype": 0x0800, "vlan": -1, "fragment": 0}
    expected |= {"sport": 1234, "dport": 80, "seq": 7, "ack": 9, "tcp_flags": 0x1FF, "window": 77}
    expected |= {"tsval": 111, "tsecr": 222, "payload_len": 5, "payload_offset": 14 + 20 + 32, "tunnel": 0}
    assert {name: got[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "tsval"),
    [
        (bytes.fromhex("020405b40402080a0000000500000006 01030307".replace(" ", "")), 5),  # as in a SYN
        (bytes.fromhex("0800") + bytes(2), 0),  # a length of 0 must not loop
        (bytes.fromhex("01010101"), 0),
        (bytes.fromhex("00000000"), 0),
        (bytes.fromhex("080affff"), 0),  # says more than there is
    ],
)
def test_tcp_timestamps_wherever_they_are(decode, options: bytes, tsval: int) -> None:
    assert row(decode(ethernet(ipv4(tcp(options=options)))))["tsval"] == tsval


def test_ethernet_padding_is_not_payload(decode) -> None:
    short = ethernet(ipv4(tcp(b"")))
    got = row(decode(short + bytes(60 - len(short))))
    assert (got["caplen"], got["payload_len"]) == (60, 0)


def test_snap_length_cuts_the_payload_but_not_its_length(decode) -> None:
    whole = ethernet(ipv4(tcp(bytes(1000))))
    got = row(decode(whole[:60], wire_lens=[len(whole)]))
    assert (got["payload_len"], got["payload_offset"], got["wire_len"]) == (1000, 54, 1054)


def test_offloaded_segment_without_total_length(decode) -> None:
    whole = ethernet(ipv4(tcp(bytes(100)), total=0))
    got = row(decode(whole[:64], wire_lens=[14 + 40 + 90_000]))
    assert got["payload_len"] == 90_000


def test_vlan_and_qinq(decode) -> None:
    inner = ipv4(udp(b"abc"), 17)
    packets = decode(
        ethernet(inner, tags=[(0x8100, 0x2005)]),
        ethernet(inner, tags=[(0x88A8, 100), (0x8100, 4095)]),
        ethernet(inner),
    )
    assert packets["vlan"].tolist() == [5, 100, -1]
    assert packets["vlan2"].tolist() == [-1, 4095, -1]
    assert packets["ethertype"].tolist() == [0x0800] * 3
    assert packets["dport"].tolist() == [53] * 3


def test_ipv4_options_move_the_transport_header(decode) -> None:
    got = row(decode(ethernet(ipv4(udp(b"abcd"), 17, options=bytes.fromhex("9404000001010101")))))
    assert (got["sport"], got["dport"], got["payload_len"], got["payload_offset"]) == (40000, 53, 4, 14 + 28 + 8)


def test_fragments(decode) -> None:
    datagram = udp(bytes(100), length=500)
    packets = decode(
        ethernet(ipv4(datagram, 17, fragment=0x2000)),  # more fragments, offset 0
        ethernet(ipv4(bytes(40), 17, fragment=0x2001)),
        ethernet(ipv4(bytes(40), 17, fragment=0x0002)),  # the last
        ethernet(ipv4(datagram, 17, fragment=0x4000)),  # don't fragment: whole
    )
    assert packets["fragment"].tolist() == [1, 1 << 1 | 1, 2 << 1, 0]
    assert packets["dport"].tolist() == [53, 0, 0, 53]
    assert packets["payload_len"].tolist() == [100, 40, 40, 100]
    assert packets["flow"].tolist() == [0, -1, -1, 0]


def test_ipv6_extension_headers(decode) -> None:
    segment = tcp(b"xyz", 5, 6)
    hop_by_hop = bytes([60, 0]) + bytes(6)  # next: destination options
    destination = bytes([43, 1]) + bytes(14)  # 16 bytes, next: routing
    routing = bytes([6, 0]) + bytes(6)
    packets = decode(
        ethernet(ipv6(segment), 0x86DD),
        ethernet(ipv6(hop_by_hop + destination + routing + segment, 0), 0x86DD),
        ethernet(ipv6(bytes([6, 0]) + struct.pack(">HI", 0x0001, 777) + segment, 44), 0x86DD),  # first fragment
        ethernet(ipv6(bytes([6, 0]) + struct.pack(">HI", 0x0010, 777) + bytes(24), 44), 0x86DD),  # a later one
        ethernet(ipv6(bytes([6, 4]) + bytes(22) + segment, 51), 0x86DD),  # authentication header of 24 bytes
        ethernet(ipv6(b"", 59), 0x86DD),  # no next header
    )
    assert packets["ip_version"].tolist() == [6] * 6
    assert packets["proto"].tolist() == [6, 6, 6, 6, 6, 59]
    assert packets["sport"].tolist() == [5, 5, 5, 0, 5, 0]
    assert packets["payload_len"].tolist() == [3, 3, 3, 24, 3, -1]
    assert packets["fragment"].tolist() == [0, 0, 1, 2 << 1, 0, 0]
    assert packets["ip_id"].tolist() == [0, 0, 777, 777, 0, 0]
    address = int(ip_address("fd00::1"))
    assert (int(packets["src_hi"][0]) << 64 | int(packets["src_lo"][0])) == address


def test_ipv6_jumbo_payload_takes_the_wire_length(decode) -> None:
    packet = ethernet(ipv6(tcp(bytes(100)), length=0), 0x86DD)
    assert row(decode(packet, wire_lens=[14 + 40 + 20 + 200_000]))["payload_len"] == 200_000


@pytest.mark.parametrize(
    ("linktype", "head"),
    [
        (0, struct.pack("<I", 2)),
        (0, struct.pack(">I", 2)),
        (108, struct.pack(">I", 2)),
        (101, b""),
        (12, b""),
        (14, b""),
        (228, b""),
        (113, struct.pack(">HHH", 0, 1, 6) + MAC_A + bytes(2) + b"\x08\x00"),
        (276, b"\x08\x00" + bytes(2) + struct.pack(">IHBB", 3, 1, 0, 6) + MAC_A + bytes(2)),
    ],
)
def test_link_types(decode, linktype: int, head: bytes) -> None:
    got = row(decode(head + ipv4(tcp(b"12", 7, 8)), linktype=linktype))
    assert (got["ip_version"], got["sport"], got["dport"], got["payload_len"]) == (4, 7, 8, 2)
    assert got["payload_offset"] == len(head) + 40
    cooked = linktype in (113, 276)
    assert got["src_mac"] == (int.from_bytes(MAC_A, "big") if cooked else 0)
    assert got["direction"] == (0 if cooked else -1)


@pytest.mark.parametrize("family", [10, 24, 28, 30])
def test_loopback_ipv6_families(decode, family: int) -> None:
    assert row(decode(struct.pack("<I", family) + ipv6(tcp()), linktype=0))["ip_version"] == 6


def test_cooked_outgoing_packet_is_sent(decode) -> None:
    head = struct.pack(">HHH", 4, 1, 6) + MAC_A + bytes(2) + b"\x08\x00"
    assert row(decode(head + ipv4(tcp()), linktype=113))["direction"] == 1


def vxlan(frame: bytes, vni: int) -> bytes:
    return udp(struct.pack(">II", 0x08000000, vni << 8) + frame, 50000, 4789)


def geneve(frame: bytes, vni: int, options: bytes = b"") -> bytes:
    return udp(struct.pack(">BBHI", len(options) // 4, 0, 0x6558, vni << 8) + options + frame, 50000, 6081)


def test_tunnels(decode) -> None:
    inner_packet = ipv4(tcp(b"inside!", 11, 22, seq=33), 6, "192.168.0.1", "192.168.0.2")
    inner_frame = ethernet(inner_packet, tags=[(0x8100, 9)])
    gre_key = struct.pack(">HHII", 0xA000, 0x0800, 0, 0xDEADBEEF) + inner_packet  # checksum and key present
    packets = decode(
        ethernet(ipv4(vxlan(inner_frame, 4242), 17)),
        ethernet(ipv4(geneve(inner_frame, 7, bytes(8)), 17)),
        ethernet(ipv4(gre_key, 47)),
        ethernet(ipv4(struct.pack(">HH", 0, 0x6558) + inner_frame, 47)),
        ethernet(ipv4(inner_packet, 4)),
        ethernet(ipv4(ipv6(udp(b"six", 1, 2), 17), 41)),
        ethernet(ipv6(vxlan(inner_frame, 1), 17), 0x86DD),
    )
    assert packets["tunnel"].tolist() == [1, 2, 3, 3, 4, 4, 1]
    assert packets["vni"].tolist() == [4242, 7, 0xDEADBEEF, 0, 0, 0, 1]
    assert packets["inner_ip_version"].tolist() == [4, 4, 4, 4, 4, 6, 4]
    assert packets["inner_sport"].tolist() == [11, 11, 11, 11, 11, 1, 11]
    assert packets["inner_dport"].tolist() == [22, 22, 22, 22, 22, 2, 22]
    assert packets["inner_seq"].tolist() == [33, 33, 33, 33, 33, 0, 33]
    assert packets["inner_payload_len"].tolist() == [7, 7, 7, 7, 7, 3, 7]
    assert packets["inner_src_lo"][0] == int(ip_address("192.168.0.1"))
    # the outer columns stay the outer packet's
    assert packets["dport"].tolist() == [4789, 6081, 0, 0, 0, 0, 4789]
    # and so do the flows: a tunnel without ports is one, an outer 5-tuple seen again is the same
    assert packets["flow"].tolist() == [0, 1, 2, 2, 3, 4, 5]


def test_what_is_not_ip_keeps_its_packet_with_nulls(decode) -> None:
    snap = struct.pack(">H", 8) + bytes.fromhex("aaaa030000000800")  # 802.3 length, LLC/SNAP, IPv4
    packets = decode(
        ethernet(bytes(28), 0x0806),
        ethernet(bytes.fromhex("424203") + bytes(35), 38),  # spanning tree: 802.3 length and LLC
        MAC_B + MAC_A + snap + ipv4(tcp()),
        b"\x00" * 5,
        b"",
    )
    assert packets["ethertype"].tolist() == [0x0806, 0, 0x0800, 0, 0]
    assert packets["ip_version"].tolist() == [0, 0, 4, 0, 0]
    assert packets["payload_len"].tolist() == [-1, -1, 0, -1, -1]
    assert packets["flow"].tolist() == [-1, -1, 0, -1, -1]


def test_every_cut_of_a_packet_gives_a_prefix_of_its_columns(decode) -> None:
    whole = ethernet(ipv4(vxlan(ethernet(ipv6(tcp(b"payload", 3, 4)), 0x86DD), 5), 17), tags=[(0x88A8, 1), (0x8100, 2)])
    packets = decode(*(whole[:n] for n in range(len(whole) + 1)))
    for name in ("src_mac", "ip_version", "sport", "dport", "tunnel", "inner_ip_version", "inner_sport", "inner_seq"):
        values = packets[name]
        final = values[-1]
        assert final != 0
        known = values == final
        assert np.array_equal(known, np.arange(len(values)) >= np.argmax(known)), name
        assert not values[~known].any(), name


def test_flow_ids_are_dense_and_know_the_direction(decode) -> None:
    there = ethernet(ipv4(tcp(b"", 1, 2)))
    back = ethernet(ipv4(tcp(b"", 2, 1), 6, "10.0.0.2", "10.0.0.1"))
    other = ethernet(ipv4(udp(b"", 1, 2), 17))
    packets = decode(there, back, other, there)
    assert packets["flow"].tolist() == [0, 0, 1, 0]
    assert packets["flow_dir"].tolist() == [0, 1, 0, 0]
    assert packets.attrs["flows"] == 2


def test_many_flows_stay_apart(decode) -> None:
    """More flows than the table starts with; each twice, in both directions."""
    n = 5000
    there = [ethernet(ipv4(udp(b"", 1 + i % 60_000, 9), 17, "10.0.0.1", f"10.1.{i >> 8}.{i & 255}")) for i in range(n)]
    back = [ethernet(ipv4(udp(b"", 9, 1 + i % 60_000), 17, f"10.1.{i >> 8}.{i & 255}", "10.0.0.1")) for i in range(n)]
    packets = decode(*there, *back)
    assert packets["flow"].tolist() == [*range(n), *range(n)]
    assert packets["flow_dir"].tolist() == [0] * n + [1] * n


# "Verifying the RSS Hash Calculation", Microsoft: destination, source, hash of the addresses, hash with TCP ports.
VECTORS = [
    ("161.142.100.80:1766", "66.9.149.187:2794", 0x323E8FC2, 0x51CCC178),
    ("65.69.140.83:4739", "199.92.111.2:14230", 0xD718262A, 0xC626B0EA),
    ("12.22.207.184:38024", "24.19.198.95:12898", 0xD2D0A5DE, 0x5C2B394A),
    ("209.142.163.6:2217", "38.27.205.30:48228", 0x82989176, 0xAFC7327F),
    ("202.188.127.2:1303", "153.39.163.191:44251", 0x5D1809C5, 0x10E828A2),
    ("3ffe:2501:200:3::1:1766", "3ffe:2501:200:1fff::7:2794", 0x2CC18CD5, 0x40207D3D),
    ("ff02::1:4739", "3ffe:501:8::260:97ff:fe40:efab:14230", 0x0F0C461C, 0xDDE51BBF),
    ("fe80::200:f8ff:fe21:67cf:38024", "3ffe:1900:4545:3:200:f8ff:fe21:67cf:44251", 0x4B61E985, 0x02D1FEEF),
]


def test_toeplitz_hash_passes_the_verification_suite(decode) -> None:
    frames = []
    for to, origin, _, _ in VECTORS:
        (dst, dport), (src, sport) = to.rsplit(":", 1), origin.rsplit(":", 1)
        segment = tcp(b"", int(sport), int(dport))
        is_v4 = "." in dst
        frames.append(ethernet(ipv4(segment, 6, src, dst)) if is_v4 else ethernet(ipv6(segment, 6, src, dst), 0x86DD))
    packets = decode(*frames, ethernet(bytes(30), 0x0806))
    assert toeplitz_hash(packets).tolist() == [*(v[3] for v in VECTORS), 0]
    assert toeplitz_hash(packets, port_protocols=()).tolist() == [*(v[2] for v in VECTORS), 0]


def test_toeplitz_hash_of_fragments_and_udp_uses_addresses(decode) -> None:
    whole, fragment = ethernet(ipv4(udp(b"ab"), 17)), ethernet(ipv4(udp(b"ab"), 17, fragment=0x2000))
    packets = decode(whole, fragment)
    by_address = toeplitz_hash(packets)
    assert by_address[0] == by_address[1]
    with_ports = toeplitz_hash(packets, port_protocols=(6, 17))
    assert with_ports[0] != by_address[0]
    assert with_ports[1] == by_address[1]


def test_toeplitz_key_as_ethtool_prints_it(decode) -> None:
    packets = decode(ethernet(ipv4(tcp())))
    assert toeplitz_hash(packets, ":".join(["6d"] * 40)) == toeplitz_hash(packets, b"\x6d" * 40)
    with pytest.raises(UsageError, match="RSS key"):
        toeplitz_hash(packets, b"short")
