"""Clock readings: CLOCK_REALTIME between two CLOCK_MONOTONIC readings; a NIC's clock between two readings of ours.

The offset of the two clocks is known to within half the width of the sandwich, so the narrowest of several is kept. Everything
is int64 ns.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import threading
import time
from types import TracebackType
from typing import Any

from rxlab.errors import ClockError

N_SANDWICHES = 16

_MONO, _REAL, _RAW = time.CLOCK_MONOTONIC, time.CLOCK_REALTIME, time.CLOCK_MONOTONIC_RAW


def read_clocks(when: str) -> dict[str, Any]:
    """Return one reading for clock.json: the narrowest of 16 sandwiches.

    Parameters
    ----------
    when : str
        "before", "during" or "after" the recording.

    Returns
    -------
    dict
        ``{"when", "mono_before", "real", "mono_after", "raw"}``: CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_MONOTONIC, and
        CLOCK_MONOTONIC_RAW read right after, ns.
    """
    gettime, clock_mono, clock_real, clock_raw = (
        time.clock_gettime_ns,
        _MONO,
        _REAL,
        _RAW,
    )  # locals: the sandwich is narrower
    best: tuple[int, int, int, int] | None = None
    for _ in range(N_SANDWICHES):
        mono_before = gettime(clock_mono)
        real = gettime(clock_real)
        mono_after = gettime(clock_mono)
        raw = gettime(clock_raw)
        if best is None or mono_after - mono_before < best[2] - best[0]:
            best = mono_before, real, mono_after, raw
    assert best is not None
    return {"when": when, **dict(zip(("mono_before", "real", "mono_after", "raw"), best, strict=True))}


class ClockSampler:
    """Reads the clocks before, ten times a second during, and after the ``with`` block, in a thread.

    Attributes
    ----------
    readings : list of dict
        As :func:`read_clocks` returns them, in time order.
    """

    def __init__(self, interval_s: float = 0.1) -> None:
        self.readings: list[dict[str, Any]] = []
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="clock-sampler", daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.readings.append(read_clocks("during"))

    def __enter__(self) -> ClockSampler:
        self.readings.append(read_clocks("before"))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.readings.append(read_clocks("after"))

    def to_json(self) -> dict[str, Any]:
        """Return the contents of clock.json."""
        return {"readings": self.readings}


# include/uapi/linux/ptp_clock.h; struct ptp_clock_time is s64 sec, u32 nsec, u32 reserved.
PTP_TIME = struct.Struct("=qII")
PTP_CAPS = struct.Struct("=9i44x")
PTP_OFFSET_SIZE = 16 + 51 * PTP_TIME.size
PTP_OFFSET_EXTENDED_SIZE = 16 + 25 * 3 * PTP_TIME.size
PTP_OFFSET_PRECISE_SIZE = 3 * PTP_TIME.size + 16
assert (PTP_TIME.size, PTP_CAPS.size) == (16, 80)
assert (PTP_OFFSET_SIZE, PTP_OFFSET_EXTENDED_SIZE, PTP_OFFSET_PRECISE_SIZE) == (832, 1216, 64)


def _ioc(direction: int, number: int, size: int) -> int:
    """Return an ioctl number of the PTP clock's magic '=' (asm-generic/ioctl.h: 1 write, 2 read, 3 both)."""
    return direction << 30 | size << 16 | ord("=") << 8 | number


PTP_CLOCK_GETCAPS = _ioc(2, 1, PTP_CAPS.size)
PTP_SYS_OFFSET = _ioc(1, 5, PTP_OFFSET_SIZE)
PTP_SYS_OFFSET_PRECISE = _ioc(3, 8, PTP_OFFSET_PRECISE_SIZE)
PTP_SYS_OFFSET_EXTENDED = _ioc(3, 9, PTP_OFFSET_EXTENDED_SIZE)


class PtpClock:
    """A NIC's clock, ``/dev/ptpN``.

    Raises
    ------
    ClockError
        There is no such clock, or it may not be opened.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        path = f"/dev/ptp{index}"
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ClockError(
                "NIC clock cannot be opened", where=path, found=error.strerror, do="'ethtool -T IFACE' names the clock."
            ) from None

    def _ioctl(self, request: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        fcntl.ioctl(self._file, request, buffer)

    def capabilities(self) -> dict[str, int]:
        """Return what the clock can do; ``cross_timestamping`` is the precise method."""
        buffer = ctypes.create_string_buffer(PTP_CAPS.size)
        self._ioctl(PTP_CLOCK_GETCAPS, buffer)
        names = "max_adj n_alarm n_ext_ts n_per_out pps n_pins cross_timestamping adjust_phase max_phase_adj"
        return dict(zip(names.split(), PTP_CAPS.unpack(buffer.raw), strict=True))

    def read(self, when: str) -> dict[str, Any]:
        """Return one cross-stamp by the best method the driver has.

        Returns
        -------
        dict
            ``{"when", "phc": ns, "index", "method", "clock", "before", "after"}``; ``before`` and ``after`` bracket the
            reading in `clock` ("raw" or "real"), equal for the precise method.
        """
        for method in (self._precise, self._extended, self._plain):
            try:
                return {"when": when, "index": self.index, **method()}
            except OSError:
                continue
        raise ClockError(
            "NIC clock cannot be compared with the system's",
            where=f"/dev/ptp{self.index}",
            expected="PTP_SYS_OFFSET_PRECISE, PTP_SYS_OFFSET_EXTENDED or PTP_SYS_OFFSET",
        )

    def _precise(self) -> dict[str, Any]:
        buffer = ctypes.create_string_buffer(PTP_OFFSET_PRECISE_SIZE)
        self._ioctl(PTP_SYS_OFFSET_PRECISE, buffer)
        device, _, raw = (_ns(buffer.raw, 16 * part) for part in range(3))
        return {"phc": device, "method": "precise", "clock": "raw", "before": raw, "after": raw}

    def _extended(self) -> dict[str, Any]:
        # clockid since Linux 6.12 (a reserved word before, which had to be 0 = CLOCK_REALTIME)
        for clock, name in ((_RAW, "raw"), (_REAL, "real")):
            buffer = ctypes.create_string_buffer(struct.pack("=II", 25, clock), PTP_OFFSET_EXTENDED_SIZE)
            try:
                self._ioctl(PTP_SYS_OFFSET_EXTENDED, buffer)
            except OSError:
                if clock == _REAL:
                    raise
                continue
            samples = [tuple(_ns(buffer.raw, 16 + 16 * (3 * row + part)) for part in range(3)) for row in range(25)]
            before, phc, after = min(samples, key=lambda sample: sample[2] - sample[0])
            return {"phc": phc, "method": "extended", "clock": name, "before": before, "after": after}
        raise AssertionError("unreachable")

    def _plain(self) -> dict[str, Any]:
        buffer = ctypes.create_string_buffer(struct.pack("=I", 25), PTP_OFFSET_SIZE)
        self._ioctl(PTP_SYS_OFFSET, buffer)
        stamps = [_ns(buffer.raw, 16 + 16 * row) for row in range(51)]
        before, phc, after = min(zip(stamps[::2], stamps[1::2], stamps[2::2], strict=False), key=lambda s: s[2] - s[0])
        return {"phc": phc, "method": "plain", "clock": "real", "before": before, "after": after}

    def close(self) -> None:
        """Close the device."""
        os.close(self._file)


def _ns(raw: bytes, offset: int) -> int:
    seconds, nanoseconds, _ = PTP_TIME.unpack_from(raw, offset)
    return int(seconds) * 10**9 + int(nanoseconds)
