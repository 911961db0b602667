"""Packets that may leave the lab: pseudonyms for their addresses, no payload, checksums that stay right.

A checksum is updated by the difference (RFC 1624, equation 3): right before means right after, whether or not the packet was
cut by the snap length, and a wrong one stays wrong. So does one that the sending host left to its NIC to fill in (checksum
offload: packets this host sent, and all over a veth). Wireshark verifies a TCP or UDP checksum only where the packet is whole.
Everything behind the outermost headers is payload: what a tunnel carries, ICMP beyond its first eight bytes, IPv6 extension
headers, fragments after the first.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import numpy as np

from rxlab.read.compiler import njit
from rxlab.read.headers import (
    ETH_IPV4,
    ETH_IPV6,
    LINKTYPE_ETHERNET,
    LINKTYPE_SLL,
    LINKTYPE_SLL2,
    TCP,
    UDP,
    UDPLITE,
)
from rxlab.read.headers import _link_layer as link_layer
from rxlab.show.redact import Redactor

ICMP, ICMPV6, ETH_ARP = 1, 58, 0x0806
_SOLICITED = int(ipaddress.IPv6Address("ff02::1:ff00:0"))  # /104: its last 24 bits are those of a unicast address


class Places(NamedTuple):
    """Where things are in each frame, int64 positions in the buffer, -1 none; dims (packet, ...)."""

    mac: np.ndarray  # (packet, 4): link layer, ARP
    ip4: np.ndarray  # (packet, 2)
    ip6: np.ndarray  # (packet, 2)
    ip_sum: np.ndarray  # IPv4 header checksum
    l4_sum: np.ndarray  # checksum that covers the addresses
    kept: np.ndarray  # bytes to keep
    ip_change: np.ndarray  # sum of what replaced options add to the header's one's complement sum
    l4_change: np.ndarray

    @classmethod
    def empty(cls, n: int) -> Places:
        """Return places for `n` packets, nothing found yet."""
        none = [np.full(shape, -1, np.int64) for shape in ((n, 4), (n, 2), (n, 2), n, n)]
        return cls(*none, *(np.zeros(n, np.int64) for _ in range(3)))


@njit(cache=True, nogil=True)
def _word(frames, pos):
    return np.int64(frames[pos]) << 8 | np.int64(frames[pos + 1])


@njit(cache=True, nogil=True)
def _blank(frames, first, last, base):
    """Overwrite [first, last) with NOP options; return what that adds to the sum of 16-bit words counted from `base`."""
    change = np.int64(0)
    for pos in range(first, last):
        shift = 0 if (pos - base) & 1 else 8
        change += (1 - np.int64(frames[pos])) << shift
        frames[pos] = 1
    return change


@njit(cache=True, nogil=True)
def _blank_tcp_options(frames, pos, stop, base):
    """Blank TCP options other than the common ones (MPTCP's carry addresses, MD5's a secret's digest); return the change."""
    change = np.int64(0)
    while pos < stop:
        kind = frames[pos]
        if kind == 0:
            return change + _blank(frames, pos + 1, stop, base)
        if kind == 1:
            pos += 1
            continue
        size = np.int64(frames[pos + 1]) if pos + 1 < stop else 0
        if size < 2 or pos + size > stop:
            return change + _blank(frames, pos, stop, base)
        if kind not in (2, 3, 4, 5, 8):  # MSS, window scale, SACK permitted, SACK, timestamps
            change += _blank(frames, pos, pos + size, base)
        pos += size
    return change


@njit(cache=True, nogil=True)
def _transport(frames, pos, end, proto, version, row, places):
    """Find the checksum of the header at `pos` and return where what is kept ends."""
    if proto == TCP and pos + 20 <= end:
        stop = min(pos + max(np.int64(frames[pos + 12] >> 4) * 4, 20), end)
        places.l4_sum[row] = pos + 16
        places.l4_change[row] = _blank_tcp_options(frames, pos + 20, stop, pos)
        return stop
    if proto in (UDP, UDPLITE) and pos + 8 <= end:
        # A UDP checksum of zero means none.
        if proto == UDPLITE or _word(frames, pos + 6):
            places.l4_sum[row] = pos + 6
        return pos + 8
    if proto == ICMPV6 and version == 6 and pos + 4 <= end:
        places.l4_sum[row] = pos + 2
    return min(pos + 8, end) if proto in (ICMP, ICMPV6, TCP, UDP, UDPLITE) else pos


@njit(cache=True, nogil=True)
def _network(frames, pos, end, ethertype, row, places):
    """Find addresses and checksums of the layer 3 header at `pos` and return where what is kept ends."""
    if ethertype == ETH_IPV4 and pos + 20 <= end and frames[pos] >> 4 == 4:
        stop = min(pos + max(np.int64(frames[pos] & 15) * 4, 20), end)
        places.ip4[row, 0], places.ip4[row, 1], places.ip_sum[row] = pos + 12, pos + 16, pos + 10
        places.ip_change[row] = _blank(frames, pos + 20, stop, pos)  # options: recorded routes are addresses
        is_later_fragment = _word(frames, pos + 6) & 0x1FFF != 0
        return stop if is_later_fragment else _transport(frames, stop, end, frames[pos + 9], 4, row, places)
    if ethertype == ETH_IPV6 and pos + 40 <= end and frames[pos] >> 4 == 6:
        places.ip6[row, 0], places.ip6[row, 1] = pos + 8, pos + 24
        return _transport(frames, pos + 40, end, frames[pos + 6], 6, row, places)
    # Ethernet and IPv4 addresses only: RFC 826's fields of 6 and 4 bytes.
    if ethertype == ETH_ARP and pos + 28 <= end and frames[pos + 4] == 6 and frames[pos + 5] == 4:
        places.mac[row, 2], places.ip4[row, 0] = pos + 8, pos + 14
        places.mac[row, 3], places.ip4[row, 1] = pos + 18, pos + 24
        return pos + 28
    return pos


@njit(cache=True, nogil=True)
def find_places(frames, start, caplen, linktype, places):
    """Find what identifies in each frame, and blank the options that do; `frames` is written to."""
    for row in range(len(start)):
        base = start[row]
        end = base + np.int64(caplen[row])
        ethertype, pos, _, _, _, _, _ = link_layer(frames, base, end, np.int64(linktype[row]))
        is_cut = False
        if linktype[row] == LINKTYPE_ETHERNET:
            is_cut = base + 14 > end
            if not is_cut:
                places.mac[row, 0], places.mac[row, 1] = base, base + 6
        elif linktype[row] in (LINKTYPE_SLL, LINKTYPE_SLL2):
            address = base + 6 if linktype[row] == LINKTYPE_SLL else base + 12
            is_cut = address + 10 > end
            if not is_cut and (frames[address - 1] == 6):  # both keep the length's low byte just before the address
                places.mac[row, 0] = address
            elif not is_cut:
                frames[address : address + 8] = 0
        # A link header that is not whole tells nothing that could be kept safely.
        if is_cut or pos > end:
            places.kept[row] = 0
        else:
            places.kept[row] = min(_network(frames, pos, end, ethertype, row, places), end) - base


class Pseudonyms:
    """Replaces addresses in raw frames, the same one always by the same pseudonym."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._known: dict[bytes, bytes] = {}

    def hide(self, frames: np.ndarray, start: np.ndarray, caplen: np.ndarray, linktype: np.ndarray) -> np.ndarray:
        """Replace the addresses of each frame in place; return the bytes of each that may be shown.

        Parameters
        ----------
        frames : uint8 array, dims (byte,)
        start, caplen, linktype : int arrays, dims (packet,)

        Returns
        -------
        int64 array, dims (packet,)
        """
        places = Places.empty(len(start))
        find_places(frames, start, caplen, linktype, places)
        ip_change, l4_change = places.ip_change, places.l4_change
        for positions, size in ((places.mac, 6), (places.ip4, 4), (places.ip6, 16)):
            for at in positions.T:
                rows = np.flatnonzero(at >= 0)
                if not len(rows):
                    continue
                index = at[rows, None] + np.arange(size)
                old = frames[index]
                new = self._replace(old)
                frames[index] = new
                if size != 6:  # MACs are in no checksum
                    change = _sums(new) - _sums(old)
                    l4_change[rows] += change
                    ip_change[rows] += change if size == 4 else 0
        _update(frames, places.ip_sum, ip_change, zero_is_none=False)
        _update(frames, places.l4_sum, l4_change, zero_is_none=True)
        return places.kept

    def _replace(self, old: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(old, axis=0, return_inverse=True)
        new = np.empty_like(unique)
        for index, address in enumerate(unique):
            raw = address.tobytes()
            if raw not in self._known:
                self._known[raw] = self._pseudonym(raw)
            new[index] = np.frombuffer(self._known[raw], np.uint8)
        return new[inverse.reshape(-1)]

    def _pseudonym(self, raw: bytes) -> bytes:
        if len(raw) == 6:
            if raw[:3] == b"\x33\x33\xff":
                return raw[:3] + self._tail(raw[3:])
            return bytes.fromhex(self._redactor.mac(raw.hex(":")).replace(":", ""))
        if len(raw) == 16 and int.from_bytes(raw, "big") >> 24 == _SOLICITED >> 24:
            return raw[:13] + self._tail(raw[13:])
        return ipaddress.ip_address(self._redactor.address(str(ipaddress.ip_address(raw)))).packed

    def _tail(self, tail: bytes) -> bytes:
        """Return a pseudonym for the last 24 bits of a unicast address, which a solicited-node group repeats."""
        return ipaddress.ip_address(
            self._redactor.address(str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(11) + tail)))
        ).packed[13:]


def _sums(addresses: np.ndarray) -> np.ndarray:
    """Return the sum of the big-endian 16-bit words of each address."""
    words = addresses.astype(np.int64)
    return (words[:, 0::2] << 8).sum(axis=1) + words[:, 1::2].sum(axis=1)


def _update(frames: np.ndarray, at: np.ndarray, change: np.ndarray, *, zero_is_none: bool) -> None:
    """Add `change` to the sums whose complements stand at the positions: HC' = ~(~HC + ~m + m')."""
    rows = np.flatnonzero((at >= 0) & (change != 0))
    place = at[rows]
    held = frames[place].astype(np.int64) << 8 | frames[place + 1]
    total = (held ^ 0xFFFF) + change[rows]
    # One's complement arithmetic is arithmetic modulo 2^16 - 1; of its two zeros a sum of real words gives 0xFFFF.
    total = (total - 1) % 0xFFFF + 1
    new = total ^ 0xFFFF
    if zero_is_none:
        new[new == 0] = 0xFFFF
    frames[place], frames[place + 1] = new >> 8, new & 0xFF
