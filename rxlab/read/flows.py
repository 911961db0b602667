"""Flow keys of packets: dense flow ids, and the RSS Toeplitz hash a NIC spreads them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rxlab.errors import UsageError
from rxlab.read.compiler import njit
from rxlab.read.headers import TCP, HeaderColumns

_KEY_WORDS = 5  # src_hi, src_lo, dst_hi, dst_lo, proto<<32 | sport<<16 | dport


@njit(cache=True, nogil=True, forceinline=True)
def _symmetric_hash(src_hi, src_lo, dst_hi, dst_lo, proto, sport, dport):
    """Return a hash that both directions of a flow share; any fair mix does, it is never stored."""
    mixed = (src_lo + dst_lo) ^ ((src_hi + dst_hi) * np.uint64(0x9E3779B97F4A7C15))
    mixed ^= (np.uint64(sport) + np.uint64(dport)) * np.uint64(0xC2B2AE3D27D4EB4F) + (src_lo ^ dst_lo)
    mixed = (mixed ^ np.uint64(proto)) * np.uint64(0xFF51AFD7ED558CCD)
    return mixed ^ (mixed >> np.uint64(32))


@njit(cache=True, nogil=True, forceinline=True)
def _is_key(keys, number, src_hi, src_lo, dst_hi, dst_lo, ports):
    """Tell whether a flow's key is this one."""
    is_source = keys[number, 0] == src_hi and keys[number, 1] == src_lo
    return is_source and keys[number, 2] == dst_hi and keys[number, 3] == dst_lo and keys[number, 4] == ports


@njit(cache=True, nogil=True)
def _assign(headers, first, last, slots, keys, n_flows, flow, flow_dir):
    """Give rows `first` to `last` their flow; return (next row, number of flows): short of `last` when full."""
    mask = np.uint64(len(slots) - 1)
    # Unpacked once: read as headers.name in the loop, each access would count references.
    sports, dports, protos, fragments, tunnels = (
        headers.sport,
        headers.dport,
        headers.proto,
        headers.fragment,
        headers.tunnel,
    )
    src_his, src_los, dst_his, dst_los = headers.src_hi, headers.src_lo, headers.dst_hi, headers.dst_lo
    for row in range(first, last):
        sport, dport, proto = sports[row], dports[row], protos[row]
        # Without ports there is no flow, except for a tunnel that has none (GRE, IP in IP).
        if fragments[row] >= 2 or (sport == 0 and dport == 0 and tunnels[row] < 3):
            flow[row], flow_dir[row] = -1, -1
            continue
        src_hi, src_lo, dst_hi, dst_lo = src_his[row], src_los[row], dst_his[row], dst_los[row]
        upper = np.uint64(proto) << np.uint64(32)
        ports = upper | (np.uint64(sport) << np.uint64(16)) | np.uint64(dport)
        swapped = upper | (np.uint64(dport) << np.uint64(16)) | np.uint64(sport)
        slot = _symmetric_hash(src_hi, src_lo, dst_hi, dst_lo, proto, sport, dport) & mask
        while True:
            found = slots[slot]
            if found < 0:
                if n_flows >= len(keys):
                    return row, n_flows
                slots[slot] = n_flows
                keys[n_flows, 0], keys[n_flows, 1] = src_hi, src_lo
                keys[n_flows, 2], keys[n_flows, 3], keys[n_flows, 4] = dst_hi, dst_lo, ports
                flow[row], flow_dir[row] = n_flows, 0
                n_flows += 1
                break
            if _is_key(keys, found, src_hi, src_lo, dst_hi, dst_lo, ports):
                flow[row], flow_dir[row] = found, 0
                break
            if _is_key(keys, found, dst_hi, dst_lo, src_hi, src_lo, swapped):
                flow[row], flow_dir[row] = found, 1
                break
            slot = (slot + np.uint64(1)) & mask
    return last, n_flows


@njit(cache=True, nogil=True)
def _rehash(keys, n_flows, slots):
    mask = np.uint64(len(slots) - 1)
    for number in range(n_flows):
        key = keys[number]
        proto, sport = key[4] >> np.uint64(32), (key[4] >> np.uint64(16)) & np.uint64(0xFFFF)
        slot = _symmetric_hash(key[0], key[1], key[2], key[3], proto, sport, key[4] & np.uint64(0xFFFF)) & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = number


class FlowTable:
    """Dense ids of unordered 5-tuples (outer headers), in order of first appearance; grows as flows come."""

    def __init__(self) -> None:
        self._keys = np.zeros((1024, _KEY_WORDS), np.uint64)
        self._slots = np.full(4096, -1, np.int32)
        self.n = 0

    def assign(self, headers: HeaderColumns, first: int, last: int, flow: np.ndarray, flow_dir: np.ndarray) -> None:
        """Write the flow id and direction (0 as first seen, 1 reverse, -1 none) of rows `first` to `last`."""
        while first < last:
            first, self.n = _assign(headers, first, last, self._slots, self._keys, self.n, flow, flow_dir)
            if first < last:
                self._keys = np.concatenate((self._keys, np.zeros_like(self._keys)))
                self._slots = np.full(len(self._slots) * 2, -1, np.int32)
                _rehash(self._keys, self.n, self._slots)


# The key of Microsoft's RSS verification suite, the default of many drivers; `ethtool -x DEVICE` prints a NIC's own.
MICROSOFT_KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
_TUPLE_BYTES = 36  # two IPv6 addresses and two ports


def _key_tables(key: bytes) -> np.ndarray:
    """Return the hash of each value of each input byte, (byte position, value): the hash is their exclusive or."""
    bits = int.from_bytes(key, "big")
    windows = [bits >> (8 * len(key) - 32 - i) & 0xFFFFFFFF for i in range(8 * _TUPLE_BYTES)]
    tables = np.zeros((_TUPLE_BYTES, 256), np.uint32)
    values = np.arange(256)
    for position in range(_TUPLE_BYTES):
        for bit in range(8):
            is_set = (values >> (7 - bit) & 1).astype(bool)
            tables[position, is_set] ^= np.uint32(windows[8 * position + bit])
    return tables


@njit(cache=True, nogil=True, forceinline=True)
def _hash_word(tables, position, word, size):
    """Return the hash of the lowest `size` bytes of `word`, whose first byte is input byte `position`."""
    hashed = np.uint32(0)
    for k in range(size):
        hashed ^= tables[position + k, (word >> np.uint64(8 * (size - 1 - k))) & np.uint64(0xFF)]
    return hashed


@njit(cache=True, nogil=True)
def _toeplitz(tables, version, src_hi, src_lo, dst_hi, dst_lo, sport, dport, with_ports, out):
    for row in range(len(out)):
        if version[row] == 4:
            ports = 8
            out[row] = _hash_word(tables, 0, src_lo[row], 4) ^ _hash_word(tables, 4, dst_lo[row], 4)
        elif version[row] == 6:
            ports = 32
            out[row] = _hash_word(tables, 0, src_hi[row], 8) ^ _hash_word(tables, 8, src_lo[row], 8)
            out[row] ^= _hash_word(tables, 16, dst_hi[row], 8) ^ _hash_word(tables, 24, dst_lo[row], 8)
        else:
            continue
        if with_ports[row]:
            out[row] ^= _hash_word(tables, ports, np.uint64(sport[row]), 2)
            out[row] ^= _hash_word(tables, ports + 2, np.uint64(dport[row]), 2)


def toeplitz_hash(
    packets: Mapping[str, np.ndarray], key: bytes | str = MICROSOFT_KEY, *, port_protocols: Sequence[int] = (TCP,)
) -> np.ndarray:
    """Return the RSS hash a NIC computes of each packet's outer headers.

    Parameters
    ----------
    packets : mapping of columns, as `rxlab.read_pcap` returns
    key : bytes, or text as `ethtool -x` prints it ("6d:5a:...")
        At least 40 bytes.
    port_protocols : sequence of int
        IP protocols whose ports are hashed too; many NICs hash UDP by addresses only (``ethtool -n DEVICE rx-flow-hash
        udp4``). Fragments are hashed by addresses always.

    Returns
    -------
    uint32 array, dims (packet,); 0 for packets that are not IP.
    """
    raw = bytes.fromhex(key.replace(":", "")) if isinstance(key, str) else bytes(key)
    if len(raw) < _TUPLE_BYTES + 4:
        raise UsageError("RSS key is too short", found=f"{len(raw)} bytes", expected="40 bytes or more")
    with_ports = np.isin(packets["proto"], list(port_protocols)) & (packets["fragment"] == 0)
    out = np.zeros(len(with_ports), np.uint32)
    names = ("ip_version", "src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport")
    arguments = [_key_tables(raw), *(np.ascontiguousarray(packets[name]) for name in names), with_ports, out]
    _toeplitz(*arguments)
    return out
