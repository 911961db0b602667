"""Builds packets and capture files byte by byte, so that a test knows every field of what it reads."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import ip_address

MAC_A, MAC_B = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


def ethernet(payload: bytes, ethertype: int = 0x0800, tags: Sequence[tuple[int, int]] = ()) -> bytes:
    """Frame A -> B; `tags` are (TPID, TCI) from the outside in."""
    tagged = b"".join(struct.pack(">HH", tpid, tci) for tpid, tci in tags)
    return MAC_B + MAC_A + tagged + struct.pack(">H", ethertype) + payload


def ipv4(
    payload: bytes,
    proto: int = 6,
    src: str = "10.0.0.1",
    dst: str = "10.0.0.2",
    *,
    options: bytes = b"",
    fragment: int = 0,
    total: int | None = None,
    ident: int = 0x1234,
    ttl: int = 64,
) -> bytes:
    """IPv4 packet; `fragment` is the flags and offset word, `total` a total length that may lie."""
    header_len = 20 + len(options)
    total = header_len + len(payload) if total is None else total
    head = struct.pack(">BBHHHBBH", 0x40 | header_len // 4, 0, total, ident, fragment, ttl, proto, 0)
    return head + ip_address(src).packed + ip_address(dst).packed + options + payload


def ipv6(
    payload: bytes, next_header: int = 6, src: str = "fd00::1", dst: str = "fd00::2", *, length: int | None = None
) -> bytes:
    """IPv6 packet; extension headers are part of `payload`."""
    length = len(payload) if length is None else length
    head = struct.pack(">IHBB", 0x60000000, length, next_header, 63)
    return head + ip_address(src).packed + ip_address(dst).packed + payload


def tcp(
    payload: bytes = b"",
    sport: int = 40000,
    dport: int = 80,
    *,
    seq: int = 1000,
    ack: int = 2000,
    flags: int = 0x018,
    window: int = 512,
    options: bytes = b"",
) -> bytes:
    """TCP segment; `options` must be a multiple of four bytes."""
    offset_flags = ((20 + len(options)) // 4) << 12 | flags
    return struct.pack(">HHIIHHHH", sport, dport, seq, ack, offset_flags, window, 0, 0) + options + payload


def udp(payload: bytes = b"", sport: int = 40000, dport: int = 53, *, length: int | None = None) -> bytes:
    """UDP datagram; `length` may lie."""
    return struct.pack(">HHHH", sport, dport, 8 + len(payload) if length is None else length, 0) + payload


def classic(
    packets: Sequence[bytes],
    *,
    endian: str = "<",
    magic: int = 0xA1B2C3D4,
    linktype: int = 1,
    snaplen: int = 262144,
    start: int = 1_700_000_000,
    wire_lens: Sequence[int] | None = None,
) -> bytes:
    """Classic pcap; packet i is stamped `start` + i seconds and i ticks."""
    out = [struct.pack(endian + "IHHiIII", magic, 2, 4, 0, 0, snaplen, linktype)]
    for i, packet in enumerate(packets):
        wire_len = wire_lens[i] if wire_lens else len(packet)
        out.append(struct.pack(endian + "IIII", start + i, i, len(packet), wire_len))
        if magic == 0xA1B2CD34:  # ifindex, protocol, packet type (4: outgoing on odd packets), padding
            out.append(struct.pack(endian + "IHBB", 3, 0x0800, 4 if i % 2 else 0, 0))
        out.append(packet)
    return b"".join(out)


def _padded(value: bytes) -> bytes:
    return value + bytes(-len(value) % 4)


def option(code: int, value: bytes, endian: str = "<") -> bytes:
    """One pcapng option, padded."""
    return struct.pack(endian + "HH", code, len(value)) + _padded(value)


def block(kind: int, body: bytes, endian: str = "<") -> bytes:
    """One pcapng block around `body`, padded."""
    size = 12 + len(_padded(body))
    return struct.pack(endian + "II", kind, size) + _padded(body) + struct.pack(endian + "I", size)


def section(endian: str = "<", options: bytes = b"", major: int = 1) -> bytes:
    """Section header block of unknown length."""
    return block(0x0A0D0D0A, struct.pack(endian + "IHHq", 0x1A2B3C4D, major, 0, -1) + options, endian)


def interface(endian: str = "<", linktype: int = 1, snaplen: int = 262144, options: bytes = b"") -> bytes:
    """Interface description block."""
    return block(1, struct.pack(endian + "HHI", linktype, 0, snaplen) + options, endian)


def enhanced(
    packet: bytes, ticks: int, interface_id: int = 0, *, endian: str = "<", options: bytes = b"", wire_len: int = 0
) -> bytes:
    """Enhanced packet block with a 64-bit timestamp of `ticks`."""
    head = struct.pack(
        endian + "IIIII", interface_id, ticks >> 32, ticks & 0xFFFFFFFF, len(packet), wire_len or len(packet)
    )
    return block(6, head + _padded(packet) + options, endian)


def simple(packet: bytes, endian: str = "<", wire_len: int = 0) -> bytes:
    """Simple packet block."""
    return block(3, struct.pack(endian + "I", wire_len or len(packet)) + packet, endian)


def http_exchange(port: int = 80) -> list[bytes]:
    """Two requests and responses on one connection, without handshake; the second request stays unanswered."""
    first, second = b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /second HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = b"HTTP/1.1 204 No Content\r\n\r\n"
    there = {"src": "10.0.0.1", "dst": "10.0.0.2"}
    back = {"src": "10.0.0.2", "dst": "10.0.0.1"}
    return [
        ethernet(ipv4(tcp(first, 40000, port, seq=1, ack=1), **there)),
        ethernet(ipv4(tcp(answer, port, 40000, seq=1, ack=1 + len(first)), **back)),
        ethernet(ipv4(tcp(second, 40000, port, seq=1 + len(first), ack=1 + len(answer)), **there)),
    ]
