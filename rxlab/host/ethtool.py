"""The ethtool and time stamping ioctls: driver, features, coalescing, rings, channels, RSS, stamping, statistics of an interface.

In-process, because a command started by a process that is then killed would finish its change after the restore. Layouts:
include/uapi/linux/ethtool.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct

SIOCETHTOOL = 0x8946
# include/uapi/linux/sockios.h
SIOCSHWTSTAMP, SIOCGHWTSTAMP = 0x89B0, 0x89B1
GDRVINFO, GSTRINGS, GSTATS, GSSET_INFO = 0x03, 0x1B, 0x1D, 0x37
GFEATURES, SFEATURES, GET_TS_INFO = 0x3A, 0x3B, 0x41
GRXRINGS, GRSSH, SRSSH = 0x2D, 0x46, 0x47
RSS_NO_CHANGE, RSS_DEFAULT = 0xFFFFFFFF, 0  # ETH_RXFH_INDIR_NO_CHANGE; a size of 0 resets the table
SS_STATS, SS_FEATURES = 1, 4
STRING_LENGTH = 32

# struct ethtool_drvinfo
DRVINFO = struct.Struct("=I32s32s32s32s32s12x5I")
assert DRVINFO.size == 196
# struct ethtool_ts_info: so_timestamping, phc_index, tx_types, rx_filters
TS_INFO = struct.Struct("=IIiI12xI12x")
assert TS_INFO.size == 44

# struct ethtool_rxfh: cmd, rss_context, indir_size, key_size, hfunc, input_xfrm, rsvd8[2], rsvd32; then table (u32) and key
RXFH = struct.Struct("=IIIIBB2xI")
assert RXFH.size == 24
# struct ethtool_rxnfc, of which GRXRINGS fills the 64-bit data: cmd, flow_type, data, fs, rule_cnt
RXNFC_SIZE = 192

# Group -> (get command, set command, the u32 fields after cmd, in the words of the ethtool command).
# struct ethtool_coalesce, ethtool_ringparam, ethtool_channels
_GROUPS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "coalesce": (
        0x0E,
        0x0F,
        (
            *(f"{way}-{what}{irq}" for way in ("rx", "tx") for irq in ("", "-irq") for what in ("usecs", "frames")),
            "stats-block-usecs",
            "adaptive-rx",
            "adaptive-tx",
            "pkt-rate-low",
            *(f"{way}-{what}-low" for way in ("rx", "tx") for what in ("usecs", "frames")),
            "pkt-rate-high",
            *(f"{way}-{what}-high" for way in ("rx", "tx") for what in ("usecs", "frames")),
            "sample-interval",
        ),
    ),
    "rings": (
        0x10,
        0x11,
        ("rx-max", "rx-mini-max", "rx-jumbo-max", "tx-max", "rx", "rx-mini", "rx-jumbo", "tx"),
    ),
    "channels": (
        0x3C,
        0x3D,
        ("rx-max", "tx-max", "other-max", "combined-max", "rx", "tx", "other", "combined"),
    ),
}
assert [len(fields) for _, _, fields in _GROUPS.values()] == [22, 8, 8]

# enum hwtstamp_rx_filters and SOF_TIMESTAMPING_* bits, include/uapi/linux/net_tstamp.h
RX_FILTERS = [
    "none",
    "all",
    "some",
    "ptpv1-l4-event",
    "ptpv1-l4-sync",
    "ptpv1-l4-delay-req",
    "ptpv2-l4-event",
    "ptpv2-l4-sync",
    "ptpv2-l4-delay-req",
    "ptpv2-l2-event",
    "ptpv2-l2-sync",
    "ptpv2-l2-delay-req",
    "ptpv2-event",
    "ptpv2-sync",
    "ptpv2-delay-req",
    "ntp-all",
]
CAPABILITIES = [
    "hardware-transmit",
    "software-transmit",
    "hardware-receive",
    "software-receive",
    "software-system-clock",
    "hardware-legacy-clock",
    "hardware-raw-clock",
]

# struct hwtstamp_config, include/uapi/linux/net_tstamp.h: flags, tx_type, rx_filter
HWTSTAMP_CONFIG = struct.Struct("=iii")
assert HWTSTAMP_CONFIG.size == 12
TX_TYPES = ["off", "on", "onestep-sync", "onestep-p2p"]


class Ethtool:
    """The interfaces of the calling thread's network namespace. Every method raises OSError with the kernel's answer."""

    def _ioctl(self, iface: str, request: ctypes.Array[ctypes.c_char], number: int = SIOCETHTOOL) -> int:
        # struct ifreq: name[16], then a union whose pointer member holds the request
        ifreq = struct.pack("16sP16x", iface.encode(), ctypes.addressof(request))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            result = fcntl.ioctl(control, number, ifreq)
        return result if isinstance(result, int) else 0

    def driver(self, iface: str) -> dict[str, str]:
        """Return ``{"driver", "version", "firmware", "bus"}``."""
        request = ctypes.create_string_buffer(struct.pack("=I", GDRVINFO), DRVINFO.size)
        self._ioctl(iface, request)
        _, driver, version, firmware, bus, *_ = DRVINFO.unpack(request.raw)
        texts = (part.split(b"\0")[0].decode() for part in (driver, version, firmware, bus))
        return dict(zip(("driver", "version", "firmware", "bus"), texts, strict=True))

    def get(self, iface: str, group: str) -> dict[str, int]:
        """Return the values of "coalesce", "rings" or "channels" by the ethtool command's words."""
        command, _, fields = _GROUPS[group]
        request = ctypes.create_string_buffer(struct.pack("=I", command), 4 + 4 * len(fields))
        self._ioctl(iface, request)
        return dict(zip(fields, struct.unpack_from(f"={len(fields)}I", request.raw, 4), strict=True))

    def set(self, iface: str, group: str, name: str, value: int) -> None:
        """Change one value of "coalesce", "rings" or "channels", leaving the others as they are."""
        _, command, fields = _GROUPS[group]
        values = self.get(iface, group)
        values[name] = value
        request = ctypes.create_string_buffer(struct.pack(f"={1 + len(fields)}I", command, *values.values()))
        self._ioctl(iface, request)

    def _strings(self, iface: str, string_set: int) -> list[str]:
        request = ctypes.create_string_buffer(struct.pack("=IIQ", GSSET_INFO, 0, 1 << string_set), 20)
        self._ioctl(iface, request)
        if not struct.unpack_from("=Q", request.raw, 8)[0]:  # the kernel clears the mask bits of sets it does not have
            return []
        (count,) = struct.unpack_from("=I", request.raw, 16)
        request = ctypes.create_string_buffer(
            struct.pack("=III", GSTRINGS, string_set, count), 12 + count * STRING_LENGTH
        )
        self._ioctl(iface, request)
        names = (request.raw[12 + i * STRING_LENGTH : 12 + (i + 1) * STRING_LENGTH] for i in range(count))
        return [name.split(b"\0")[0].decode(errors="replace").strip() for name in names]

    def features(self, iface: str) -> dict[str, dict[str, bool]]:
        """Return ``{kernel feature name: {"active", "requested", "fixed"}}``."""
        names = self._strings(iface, SS_FEATURES)
        blocks = (len(names) + 31) // 32
        request = ctypes.create_string_buffer(struct.pack("=II", GFEATURES, blocks), 8 + 16 * blocks)
        self._ioctl(iface, request)
        words = struct.unpack_from(f"={4 * blocks}I", request.raw, 8)
        features = {}
        for index, name in enumerate(names):
            if not name:
                continue
            available, requested, active, never = (
                bool(word >> (index % 32) & 1) for word in words[4 * (index // 32) : 4 * (index // 32) + 4]
            )
            features[name] = {"active": active, "requested": requested, "fixed": never or not available}
        return features

    def set_feature(self, iface: str, name: str, on: bool) -> None:
        """Switch one feature; the driver may switch others with it."""
        names = self._strings(iface, SS_FEATURES)
        index, blocks = names.index(name), (len(names) + 31) // 32
        words = [0] * (2 * blocks)
        words[2 * (index // 32)] = 1 << (index % 32)
        words[2 * (index // 32) + 1] = (1 << (index % 32)) if on else 0
        request = ctypes.create_string_buffer(struct.pack(f"=II{2 * blocks}I", SFEATURES, blocks, *words))
        self._ioctl(iface, request)

    def rings_of_rss(self, iface: str) -> int:
        """Return how many receive queues RSS can spread over."""
        request = ctypes.create_string_buffer(struct.pack("=I", GRXRINGS), RXNFC_SIZE)
        self._ioctl(iface, request)
        return int(struct.unpack_from("=Q", request.raw, 8)[0])

    def rss(self, iface: str) -> tuple[list[int], bytes]:
        """Return the indirection table and the key of the default RSS context; empty where the driver has none."""
        request = ctypes.create_string_buffer(RXFH.pack(GRSSH, 0, 0, 0, 0, 0, 0), RXFH.size)
        self._ioctl(iface, request)
        _, _, n_table, n_key, *_ = RXFH.unpack(request.raw)
        size = RXFH.size + 4 * n_table + n_key
        request = ctypes.create_string_buffer(RXFH.pack(GRSSH, 0, n_table, n_key, 0, 0, 0), size)
        if size > RXFH.size:
            self._ioctl(iface, request)
        table = struct.unpack_from(f"={n_table}I", request.raw, RXFH.size)
        return list(table), request.raw[RXFH.size + 4 * n_table : size]

    def set_rss(self, iface: str, *, table: list[int] | None = None, key: bytes = b"") -> None:
        """Write the indirection table (an empty list resets it to the driver's own) or the key of the default RSS context."""
        size = RSS_NO_CHANGE if table is None else len(table) or RSS_DEFAULT
        body = struct.pack(f"={len(table or ())}I", *(table or ())) + key
        request = ctypes.create_string_buffer(
            RXFH.pack(SRSSH, 0, size, len(key), 0, 0, 0) + body, RXFH.size + len(body)
        )
        self._ioctl(iface, request)

    def timestamping(self, iface: str) -> dict[str, object]:
        """Return ``{"capabilities": [str], "phc": index or None, "tx_types": bits, "rx_filters": [str]}``."""
        request = ctypes.create_string_buffer(struct.pack("=I", GET_TS_INFO), TS_INFO.size)
        self._ioctl(iface, request)
        _, capabilities, phc, tx_types, filters = TS_INFO.unpack(request.raw)
        return {
            "capabilities": [name for bit, name in enumerate(CAPABILITIES) if capabilities >> bit & 1],
            "phc": phc if phc >= 0 else None,
            "tx_types": tx_types,
            "rx_filters": [name for bit, name in enumerate(RX_FILTERS) if filters >> bit & 1],
        }

    def stamping(self, iface: str) -> str:
        """Return what the NIC stamps now, ``RX/TX``: ``none/off``, ``all/on``."""
        request = ctypes.create_string_buffer(HWTSTAMP_CONFIG.size)
        self._ioctl(iface, request, SIOCGHWTSTAMP)
        _, tx_type, rx_filter = HWTSTAMP_CONFIG.unpack(request.raw)
        return f"{RX_FILTERS[rx_filter]}/{TX_TYPES[tx_type]}"

    def set_stamping(self, iface: str, text: str) -> None:
        """Have the NIC stamp as :meth:`stamping` spells it; the driver may stamp more than was asked."""
        rx_filter, _, tx_type = text.partition("/")
        request = ctypes.create_string_buffer(
            HWTSTAMP_CONFIG.pack(0, TX_TYPES.index(tx_type), RX_FILTERS.index(rx_filter)), HWTSTAMP_CONFIG.size
        )
        self._ioctl(iface, request, SIOCSHWTSTAMP)

    def statistics(self, iface: str) -> dict[str, int]:
        """Return the driver's own counters (``ethtool -S``); none where the driver has none."""
        try:
            names = self._strings(iface, SS_STATS)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return {}
            raise
        request = ctypes.create_string_buffer(struct.pack("=II", GSTATS, len(names)), 8 + 8 * len(names))
        if names:
            self._ioctl(iface, request)
        return dict(zip(names, struct.unpack_from(f"={len(names)}Q", request.raw, 8), strict=True))


class NoEthtool(Ethtool):
    """A made-up host without devices behind its interfaces."""

    def _ioctl(self, iface: str, request: ctypes.Array[ctypes.c_char], number: int = SIOCETHTOOL) -> int:
        raise OSError(errno.EOPNOTSUPP, "no device")
