"""Packet bytes -> header columns: link layer, IPv4/IPv6, TCP/UDP and one level of tunnel, in one compiled pass.

The kernel reads each packet once and writes typed columns. Every load is preceded by a comparison with the captured
end, so a packet cut by the snap length, or one that lies about its lengths, gets nulls (0, or -1 where 0 is a value)
from the first header that does not fit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rxlab.read.compiler import njit
from rxlab.read.words import be16, be32, be48, be64

# Link types, https://www.tcpdump.org/linktypes.html
LINKTYPE_NULL, LINKTYPE_ETHERNET, LINKTYPE_LOOP, LINKTYPE_SLL, LINKTYPE_SLL2 = 0, 1, 108, 113, 276
LINKTYPE_RAW, LINKTYPE_IPV4, LINKTYPE_IPV6 = 101, 228, 229
# DLT_RAW was written into files as it was on the capturing system: 12, or 14 on OpenBSD.
DLT_RAW, DLT_RAW_OPENBSD = 12, 14

ETH_IPV4, ETH_IPV6, ETH_BRIDGED = 0x0800, 0x86DD, 0x6558
TCP, UDP, DCCP, IPV4_IN_IP, IPV6_IN_IP, GRE, AH, SCTP, UDPLITE = 6, 17, 33, 4, 41, 47, 51, 132, 136
PORT_VXLAN, PORT_VXLAN_LINUX, PORT_GENEVE = 4789, 8472, 6081

TUNNELS = ("", "vxlan", "geneve", "gre", "ipip")


class HeaderColumns(NamedTuple):
    """One array per decoded header field, all of one length; see `HEADER_FIELDS` for what each holds."""

    src_mac: np.ndarray
    dst_mac: np.ndarray
    vlan: np.ndarray
    vlan2: np.ndarray
    ethertype: np.ndarray
    direction: np.ndarray
    ip_version: np.ndarray
    src_hi: np.ndarray
    src_lo: np.ndarray
    dst_hi: np.ndarray
    dst_lo: np.ndarray
    proto: np.ndarray
    ttl: np.ndarray
    ip_id: np.ndarray
    fragment: np.ndarray
    sport: np.ndarray
    dport: np.ndarray
    seq: np.ndarray
    ack: np.ndarray
    tcp_flags: np.ndarray
    window: np.ndarray
    tsval: np.ndarray
    tsecr: np.ndarray
    payload_len: np.ndarray
    payload_offset: np.ndarray
    tunnel: np.ndarray
    vni: np.ndarray
    inner_offset: np.ndarray
    inner_ethertype: np.ndarray
    inner_ip_version: np.ndarray
    inner_src_hi: np.ndarray
    inner_src_lo: np.ndarray
    inner_dst_hi: np.ndarray
    inner_dst_lo: np.ndarray
    inner_proto: np.ndarray
    inner_sport: np.ndarray
    inner_dport: np.ndarray
    inner_seq: np.ndarray
    inner_payload_len: np.ndarray


# dtype of each column. ``fragment``: offset in units of 8 bytes << 1 | more follow, so 0 is a whole packet and 1 the first of several;
# ``payload_len`` of a later one is all it carries. The null is 0 unless the kernel writes -1 (vlan, vlan2, direction, payload_*).
HEADER_FIELDS = {
    "src_mac": np.uint64,
    "dst_mac": np.uint64,
    "vlan": np.int32,
    "vlan2": np.int16,
    "ethertype": np.uint16,
    "direction": np.int8,
    "ip_version": np.uint8,
    "src_hi": np.uint64,
    "src_lo": np.uint64,
    "dst_hi": np.uint64,
    "dst_lo": np.uint64,
    "proto": np.uint8,
    "ttl": np.uint8,
    "ip_id": np.uint32,
    "fragment": np.uint16,
    "sport": np.uint16,
    "dport": np.uint16,
    "seq": np.uint32,
    "ack": np.uint32,
    "tcp_flags": np.uint16,
    "window": np.uint16,
    "tsval": np.uint32,
    "tsecr": np.uint32,
    "payload_len": np.int32,
    "payload_offset": np.int32,
    "tunnel": np.uint8,
    "vni": np.uint32,
    "inner_offset": np.int32,
    "inner_ethertype": np.uint16,
    "inner_ip_version": np.uint8,
    "inner_src_hi": np.uint64,
    "inner_src_lo": np.uint64,
    "inner_dst_hi": np.uint64,
    "inner_dst_lo": np.uint64,
    "inner_proto": np.uint8,
    "inner_sport": np.uint16,
    "inner_dport": np.uint16,
    "inner_seq": np.uint32,
    "inner_payload_len": np.int32,
}


def empty_headers(n: int) -> HeaderColumns:
    """Return zeroed header columns for `n` packets.

    Zeroed and not merely allocated: the kernel leaves a 0 where the packet has no such field, so columns that no packet
    of a capture fills (tunnels, often) never become resident memory.
    """
    return HeaderColumns(**{name: np.zeros(n, dtype) for name, dtype in HEADER_FIELDS.items()})


@njit(cache=True, nogil=True, forceinline=True)
def _by_version_nibble(buf, pos, end):
    if pos >= end:
        return 0
    version = buf[pos] >> 4
    if version == 4:
        return ETH_IPV4
    return ETH_IPV6 if version == 6 else 0


@njit(cache=True, nogil=True, forceinline=True)
def _ethertype_after_length(buf, pos, end):
    """Return (ethertype, position) of an 802.3 frame whose LLC header starts at `pos`: RFC 1042 SNAP or nothing."""
    # AA AA 03, organisation 00 00 00, then an EtherType
    if pos + 8 <= end and be32(buf, pos) == 0xAAAA0300 and be16(buf, pos + 4) == 0:
        return np.int64(be16(buf, pos + 6)), pos + 8
    return np.int64(0), pos


@njit(cache=True, nogil=True, forceinline=True)
def _strip_tags(buf, pos, end, ethertype):
    """Return (ethertype, position, outer VLAN id, second VLAN id) after any 802.1Q/802.1ad tags."""
    vlan = vlan2 = np.int64(-1)
    while ethertype in (0x8100, 0x88A8, 0x9100) and pos + 4 <= end:
        tag = np.int64(be16(buf, pos)) & 0xFFF
        if vlan < 0:
            vlan = tag
        elif vlan2 < 0:
            vlan2 = tag
        ethertype = np.int64(be16(buf, pos + 2))
        pos += 4
    if 0 < ethertype < 0x600:
        ethertype, pos = _ethertype_after_length(buf, pos, end)
    return ethertype, pos, vlan, vlan2


@njit(cache=True, nogil=True, forceinline=True)
def _family_ethertype(buf, pos, end, linktype):
    """Return the ethertype of a NULL/LOOP packet from its address family word."""
    if pos + 4 > end:
        return 0
    family = np.int64(be32(buf, pos))
    # NULL is in the capturing machine's byte order: families are small numbers, so the larger reading is the wrong one.
    if linktype == LINKTYPE_NULL and family > 0xFFFF:
        family = ((family >> 24) & 0xFF) | ((family >> 8) & 0xFF00)
    # Some writers put an EtherType into the word's second half.
    if family == 2 or be16(buf, pos + 2) == ETH_IPV4:
        return ETH_IPV4
    # AF_INET6: Linux 10, NetBSD/OpenBSD 24, FreeBSD 28, macOS 30
    return ETH_IPV6 if family in (10, 24, 28, 30) else 0


@njit(cache=True, nogil=True, forceinline=True)
def _cooked(buf, pos, end, linktype):
    """Return (ethertype, position, source MAC, direction) of a Linux cooked header, SLL or SLL2."""
    size = 16 if linktype == LINKTYPE_SLL else 20
    if pos + size > end:
        return np.int64(0), end, np.uint64(0), np.int64(-1)
    if linktype == LINKTYPE_SLL:
        packet_type, arphrd, addr_len = np.int64(be16(buf, pos)), be16(buf, pos + 2), np.int64(be16(buf, pos + 4))
        addr, ethertype = pos + 6, np.int64(be16(buf, pos + 14))
    else:
        packet_type, arphrd, addr_len = np.int64(buf[pos + 10]), be16(buf, pos + 8), np.int64(buf[pos + 11])
        addr, ethertype = pos + 12, np.int64(be16(buf, pos))
    mac = be48(buf, addr) if addr_len == 6 else np.uint64(0)
    if arphrd == 824 or ethertype < 0x600:  # ARPHRD_NETLINK: the word is a netlink family
        ethertype = np.int64(0)
    # if_packet.h: 4 is PACKET_OUTGOING
    return ethertype, pos + size, mac, np.int64(1) if packet_type == 4 else np.int64(0)


@njit(cache=True, nogil=True, forceinline=True)
def _link_layer(buf, pos, end, linktype):
    """Return (ethertype, L3 position, destination MAC, source MAC, vlan, vlan2, direction)."""
    dst = src = np.uint64(0)
    direction = vlan = vlan2 = np.int64(-1)
    ethertype = np.int64(0)
    if linktype == LINKTYPE_ETHERNET:
        if pos + 14 <= end:
            dst, src, ethertype = be48(buf, pos), be48(buf, pos + 6), np.int64(be16(buf, pos + 12))
            ethertype, pos, vlan, vlan2 = _strip_tags(buf, pos + 14, end, ethertype)
    elif linktype in (LINKTYPE_SLL, LINKTYPE_SLL2):
        ethertype, pos, src, direction = _cooked(buf, pos, end, linktype)
        ethertype, pos, vlan, vlan2 = _strip_tags(buf, pos, end, ethertype)
    elif linktype in (LINKTYPE_NULL, LINKTYPE_LOOP):
        ethertype = np.int64(_family_ethertype(buf, pos, end, linktype))
        pos += 4
    elif linktype == LINKTYPE_IPV4:
        ethertype = np.int64(ETH_IPV4)
    elif linktype == LINKTYPE_IPV6:
        ethertype = np.int64(ETH_IPV6)
    elif linktype in (LINKTYPE_RAW, DLT_RAW, DLT_RAW_OPENBSD):
        ethertype = np.int64(_by_version_nibble(buf, pos, end))
    return ethertype, pos, dst, src, vlan, vlan2, direction


@njit(cache=True, nogil=True, forceinline=True)
def _ipv4(buf, pos, end, wire_end):
    """Return (ok, proto, L4 position, L4 length, fragment, id); RFC 791. `wire_end` is where the frame ended."""
    if pos + 20 > end or buf[pos] >> 4 != 4:
        return False, np.int64(0), pos, np.int64(-1), np.int64(0), np.uint64(0)
    header = np.int64(buf[pos] & 15) * 4
    total = np.int64(be16(buf, pos + 2))
    if total == 0:  # segmentation offload: the kernel had a packet longer than 16 bits can say
        total = wire_end - pos
    word = np.int64(be16(buf, pos + 6))
    fragment = (word & 0x1FFF) << 1 | (word >> 13 & 1)
    is_sound = header >= 20 and total >= header
    return is_sound, np.int64(buf[pos + 9]), pos + header, total - header, fragment, be16(buf, pos + 4)


@njit(cache=True, nogil=True, forceinline=True)
def _ipv6(buf, pos, end, wire_end):
    """Return (ok, proto, L4 position, L4 length, fragment, id) after the extension headers; RFC 8200."""
    fragment, ident = np.int64(0), np.uint64(0)
    if pos + 40 > end or buf[pos] >> 4 != 6:
        return False, np.int64(0), pos, np.int64(-1), fragment, ident
    proto, length = np.int64(buf[pos + 6]), np.int64(be16(buf, pos + 4))
    stop = wire_end if length == 0 else pos + 40 + length  # 0: jumbo payload, or BIG TCP
    pos += 40
    # hop-by-hop, routing, fragment, AH, destination options, mobility, HIP, shim6
    while proto in (0, 43, 44, AH, 60, 135, 139, 140) and pos + 8 <= end and fragment < 2:
        size = np.int64(buf[pos + 1]) * 8 + 8
        if proto == AH:
            size = np.int64(buf[pos + 1]) * 4 + 8
        elif proto == 44:
            size, ident = np.int64(8), be32(buf, pos + 4)
            word = np.int64(be16(buf, pos + 2))
            fragment = (word & 0xFFF8) >> 2 | (word & 1)
        proto = np.int64(buf[pos])
        pos += size
    return True, proto, pos, max(stop - pos, np.int64(-1)), fragment, ident


@njit(cache=True, nogil=True, forceinline=True)
def _network_layer(buf, pos, end, wire_end, ethertype):
    """Return (IP version or 0, proto, L4 position, L4 length, fragment, id)."""
    if ethertype == ETH_IPV4:
        ok, proto, l4, l4_len, fragment, ident = _ipv4(buf, pos, end, wire_end)
        return np.int64(4) if ok else np.int64(0), proto, l4, l4_len, fragment, ident
    if ethertype == ETH_IPV6:
        ok, proto, l4, l4_len, fragment, ident = _ipv6(buf, pos, end, wire_end)
        return np.int64(6) if ok else np.int64(0), proto, l4, l4_len, fragment, ident
    return np.int64(0), np.int64(0), pos, np.int64(-1), np.int64(0), np.uint64(0)


@njit(cache=True, nogil=True, forceinline=True)
def _payload(buf, pos, end, proto, l4_len, fragment):
    """Return (payload position or -1, payload length or -1) of a TCP or UDP header at `pos`."""
    if l4_len < 0:
        return np.int64(-1), np.int64(-1)
    if proto == TCP and pos + 13 <= end:
        header = np.int64(buf[pos + 12] >> 4) * 4
        if header >= 20 and l4_len >= header:
            return pos + header, l4_len - header
    elif proto in (UDP, UDPLITE) and pos + 8 <= end and l4_len >= 8:
        said = np.int64(be16(buf, pos + 4))
        # The datagram's own length, unless it is a fragment's, a jumbogram's (0), UDP-Lite's coverage, or a lie.
        if proto == UDP and fragment == 0 and 8 <= said <= l4_len:
            return pos + 8, said - 8
        return pos + 8, l4_len - 8
    return np.int64(-1), np.int64(-1)


@njit(cache=True, nogil=True, forceinline=True)
def _tcp_timestamps(buf, pos, stop):
    """Return (TSval, TSecr) from the options in [pos, stop), 0 without; RFC 7323."""
    if pos + 12 <= stop and be32(buf, pos) == 0x0101080A:  # as Linux writes them: NOP NOP timestamps
        return be32(buf, pos + 4), be32(buf, pos + 8)
    while pos + 1 < stop:
        kind = buf[pos]
        if kind == 0:
            break
        if kind == 1:
            pos += 1
            continue
        size = np.int64(buf[pos + 1])
        if size < 2 or pos + size > stop:
            break
        if kind == 8 and size == 10:
            return be32(buf, pos + 2), be32(buf, pos + 6)
        pos += size
    return np.uint64(0), np.uint64(0)


@njit(cache=True, nogil=True, forceinline=True)
def _has_ports(proto):
    return proto in (TCP, UDP, UDPLITE, SCTP, DCCP)


@njit(cache=True, nogil=True, forceinline=True)
def _udp_tunnel(buf, payload, end, dport):
    """Return (tunnel, ethertype, inner position, VNI) of the UDP payload; RFC 7348 and RFC 8926."""
    if dport in (PORT_VXLAN, PORT_VXLAN_LINUX) and payload + 8 <= end and buf[payload] & 0x08:
        return np.int64(1), np.int64(ETH_BRIDGED), payload + 8, be32(buf, payload + 4) >> np.uint64(8)
    if dport == PORT_GENEVE and payload + 8 <= end and buf[payload] >> 6 == 0:
        inner = payload + 8 + np.int64(buf[payload] & 0x3F) * 4
        return np.int64(2), np.int64(be16(buf, payload + 2)), inner, be32(buf, payload + 4) >> np.uint64(8)
    return np.int64(0), np.int64(0), payload, np.uint64(0)


@njit(cache=True, nogil=True, forceinline=True)
def _ip_tunnel(buf, l4, end, proto):
    """Return (tunnel, ethertype, inner position, key) of GRE (RFC 2784, 2890) or IP in IP (RFC 2003, 4213)."""
    if proto == GRE and l4 + 4 <= end:
        flags = np.int64(be16(buf, l4))
        inner, key = l4 + 4, np.uint64(0)
        if flags & 0x4007:  # routing present, or version 1 (PPTP): not followed
            return np.int64(3), np.int64(0), inner, key
        inner += 4 if flags & 0x8000 else 0  # checksum
        if flags & 0x2000:
            key = be32(buf, inner) if inner + 4 <= end else key
            inner += 4
        inner += 4 if flags & 0x1000 else 0  # sequence number
        return np.int64(3), np.int64(be16(buf, l4 + 2)), inner, key
    if proto == IPV4_IN_IP:
        return np.int64(4), np.int64(ETH_IPV4), l4, np.uint64(0)
    if proto == IPV6_IN_IP:
        return np.int64(4), np.int64(ETH_IPV6), l4, np.uint64(0)
    return np.int64(0), np.int64(0), l4, np.uint64(0)


@njit(cache=True, nogil=True, forceinline=True)
def _tcp_fields(buf, pos, end):
    """Return (seq, ack, flags, window, TSval, TSecr) of the TCP header at `pos`, zeros if it is cut."""
    zero = np.uint64(0)
    if pos + 20 > end:
        return zero, zero, zero, zero, zero, zero
    tsval = tsecr = zero
    stop = min(pos + np.int64(buf[pos + 12] >> 4) * 4, end)
    if stop > pos + 20:
        tsval, tsecr = _tcp_timestamps(buf, pos + 20, stop)
    flags = be16(buf, pos + 12) & np.uint64(0xFFF)
    return be32(buf, pos + 4), be32(buf, pos + 8), flags, be16(buf, pos + 14), tsval, tsecr


@njit(cache=True, nogil=True, forceinline=True)
def _tunnel(buf, l4, payload, end, proto, dport):
    """Return (tunnel, ethertype, inner position, VNI or key) of a packet that is no fragment."""
    if proto == UDP:
        if payload >= 0:
            return _udp_tunnel(buf, payload, end, dport)
        return np.int64(0), np.int64(0), l4, np.uint64(0)
    return _ip_tunnel(buf, l4, end, proto)


@njit(cache=True, nogil=True)
def decode_headers(buf, positions, caplens, wire_lens, linktypes, first, last, out):
    """Decode packets `first` to `last` (excluded) into the same rows of `out`.

    Parameters
    ----------
    buf : uint8 array, dims (byte,), read-only
    positions : int64 array, dims (packet,), first byte of each packet in `buf`
    caplens, wire_lens : uint32 arrays, dims (packet,), bytes; positions + caplens must lie inside `buf`
    linktypes : uint16 array, dims (packet,)
    out : HeaderColumns of at least `last` rows, zeroed

    Returns
    -------
    int
        How many of the packets are tunnelled, for `decode_inner`.
    """
    # Unpacked once: read as out.name in the loop, each access would count references (20 times slower).
    (src_macs, dst_macs, vlans, vlan2s, ethertypes, directions) = out[0:6]
    (versions, src_his, src_los, dst_his, dst_los, protos, ttls, ids, fragments, sports, dports) = out[6:17]
    (seqs, acks, flags, windows, tsvals, tsecrs, payload_lens, payload_offsets, tunnels, vnis) = out[17:27]
    (inner_offsets, inner_ethertypes) = out[27:29]
    n_tunnelled = 0
    for row in range(first, last):
        base = positions[row]
        end = base + np.int64(caplens[row])
        wire_end = base + np.int64(wire_lens[row])
        ethertype, pos, dst, src, vlan, vlan2, direction = _link_layer(buf, base, end, np.int64(linktypes[row]))
        dst_macs[row], src_macs[row], ethertypes[row] = dst, src, ethertype
        vlans[row], vlan2s[row] = vlan, vlan2
        if direction >= 0:
            directions[row] = direction
        payload_lens[row] = payload_offsets[row] = -1
        version, proto, l4, l4_len, fragment, ident = _network_layer(buf, pos, end, wire_end, ethertype)
        if version == 0:
            continue
        versions[row], protos[row] = version, proto
        fragments[row], ids[row] = fragment, ident
        if version == 4:
            ttls[row] = buf[pos + 8]
            src_los[row], dst_los[row] = be32(buf, pos + 12), be32(buf, pos + 16)
        else:
            ttls[row] = buf[pos + 7]
            src_his[row], src_los[row] = be64(buf, pos + 8), be64(buf, pos + 16)
            dst_his[row], dst_los[row] = be64(buf, pos + 24), be64(buf, pos + 32)
        if l4_len < 0:
            continue
        if fragment >= 2:
            payload_lens[row] = l4_len
            continue
        payload, dport = np.int64(-1), np.int64(0)
        if _has_ports(proto) and l4 + 4 <= end:
            dport = np.int64(be16(buf, l4 + 2))
            sports[row], dports[row] = be16(buf, l4), dport
            payload, payload_len = _payload(buf, l4, end, proto, l4_len, fragment)
            if payload >= 0:
                payload_lens[row], payload_offsets[row] = payload_len, payload - base
            if proto == TCP:
                (seqs[row], acks[row], flags[row], windows[row], tsvals[row], tsecrs[row]) = _tcp_fields(buf, l4, end)
                continue
        if fragment == 0:
            tunnel, inner_ethertype, inner, vni = _tunnel(buf, l4, payload, end, proto, dport)
            if tunnel:
                n_tunnelled += 1
                tunnels[row], vnis[row] = tunnel, vni
                inner_offsets[row], inner_ethertypes[row] = inner - base, inner_ethertype
    return n_tunnelled


@njit(cache=True, nogil=True)
def decode_inner(buf, positions, caplens, wire_lens, first, last, out):
    """Decode what the tunnelled packets among `first` to `last` carry; parameters as `decode_headers`."""
    (tunnels, vnis, offsets, ethertypes) = out[25:29]
    (versions, src_his, src_los, dst_his, dst_los, protos, sports, dports, seqs, payload_lens) = out[29:39]
    for row in range(first, last):
        if tunnels[row] == 0:
            continue
        payload_lens[row] = -1
        pos, ethertype = positions[row] + offsets[row], np.int64(ethertypes[row])
        end = positions[row] + np.int64(caplens[row])
        wire_end = positions[row] + np.int64(wire_lens[row])
        if ethertype == ETH_BRIDGED:
            ethertype, pos, _, _, _, _, _ = _link_layer(buf, pos, end, np.int64(LINKTYPE_ETHERNET))
        version, proto, l4, l4_len, fragment, _ = _network_layer(buf, pos, end, wire_end, ethertype)
        if version == 0:
            continue
        versions[row], protos[row] = version, proto
        if version == 4:
            src_los[row], dst_los[row] = be32(buf, pos + 12), be32(buf, pos + 16)
        else:
            src_his[row], src_los[row] = be64(buf, pos + 8), be64(buf, pos + 16)
            dst_his[row], dst_los[row] = be64(buf, pos + 24), be64(buf, pos + 32)
        if fragment >= 2 or not _has_ports(proto) or l4 + 4 > end:
            continue
        sports[row], dports[row] = be16(buf, l4), be16(buf, l4 + 2)
        if proto == TCP and l4 + 8 <= end:
            seqs[row] = be32(buf, l4 + 4)
        payload_lens[row] = _payload(buf, l4, end, proto, l4_len, fragment)[1]
