"""A NIC's clock (PHC): comparing it with the system's, by the best ioctl its driver has.

Layouts: include/uapi/linux/ptp_clock.h. Each comparison brackets one reading of the NIC's clock between two of the system's, so
it is known to half the bracket's width; of many the narrowest is kept. Everything is int64 ns.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import time
from types import TracebackType
from typing import Any

from rxlab.errors import ClockError

# PTP_MAX_SAMPLES: brackets of one call. The narrowest of 25 costs the NIC 25 register reads, some 50 us.
MAX_SAMPLES = 25

_REAL, _RAW = time.CLOCK_REALTIME, time.CLOCK_MONOTONIC_RAW


class PtpClockTime(ctypes.Structure):
    """``struct ptp_clock_time``."""

    _fields_ = (("sec", ctypes.c_int64), ("nsec", ctypes.c_uint32), ("reserved", ctypes.c_uint32))

    @property
    def ns(self) -> int:
        """The instant as int nanoseconds."""
        return int(self.sec) * 10**9 + int(self.nsec)


class PtpClockCaps(ctypes.Structure):
    """``struct ptp_clock_caps``."""

    _fields_ = (
        ("max_adj", ctypes.c_int),
        ("n_alarm", ctypes.c_int),
        ("n_ext_ts", ctypes.c_int),
        ("n_per_out", ctypes.c_int),
        ("pps", ctypes.c_int),
        ("n_pins", ctypes.c_int),
        ("cross_timestamping", ctypes.c_int),
        ("adjust_phase", ctypes.c_int),
        ("max_phase_adj", ctypes.c_int),
        ("rsv", ctypes.c_int * 11),
    )


class PtpSysOffset(ctypes.Structure):
    """``struct ptp_sys_offset``: system, PHC, system, PHC, ..., system."""

    _fields_ = (
        ("n_samples", ctypes.c_uint),
        ("rsv", ctypes.c_uint * 3),
        ("ts", PtpClockTime * (2 * MAX_SAMPLES + 1)),
    )


class PtpSysOffsetExtended(ctypes.Structure):
    """``struct ptp_sys_offset_extended``: triples of system, PHC, system. ``clockid`` was reserved, so 0, before Linux 6.12."""

    _fields_ = (
        ("n_samples", ctypes.c_uint),
        ("clockid", ctypes.c_int),
        ("rsv", ctypes.c_uint * 2),
        ("ts", (PtpClockTime * 3) * MAX_SAMPLES),
    )


class PtpSysOffsetPrecise(ctypes.Structure):
    """``struct ptp_sys_offset_precise``: one instant on three clocks, latched by hardware."""

    _fields_ = (
        ("device", PtpClockTime),
        ("sys_realtime", PtpClockTime),
        ("sys_monoraw", PtpClockTime),
        ("rsv", ctypes.c_uint * 4),
    )


assert ctypes.sizeof(PtpClockTime) == 16
assert ctypes.sizeof(PtpClockCaps) == 80
assert ctypes.sizeof(PtpSysOffset) == 832
assert ctypes.sizeof(PtpSysOffsetExtended) == 1216
assert ctypes.sizeof(PtpSysOffsetPrecise) == 64


def _ioc(direction: int, number: int, struct: type[ctypes.Structure]) -> int:
    """Return an ioctl number of the PTP clock's magic '=' (asm-generic/ioctl.h: 1 write, 2 read, 3 both)."""
    return direction << 30 | ctypes.sizeof(struct) << 16 | ord("=") << 8 | number


PTP_CLOCK_GETCAPS = _ioc(2, 1, PtpClockCaps)
PTP_SYS_OFFSET = _ioc(1, 5, PtpSysOffset)
PTP_SYS_OFFSET_PRECISE = _ioc(3, 8, PtpSysOffsetPrecise)
PTP_SYS_OFFSET_EXTENDED = _ioc(3, 9, PtpSysOffsetExtended)

# What a driver or kernel without a method answers; anything else is a failure of a method that exists.
_LACKING = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL)


class PtpClock:
    """A NIC's clock, ``/dev/ptpN``, as a context manager.

    Attributes
    ----------
    method : {"precise", "extended", "plain"} or None
        The one :meth:`read` found the driver to have; None before the first reading.
    clock : {"raw", "real"} or None
        What it is compared with: CLOCK_MONOTONIC_RAW, which nothing slews, or CLOCK_REALTIME.

    Raises
    ------
    ClockError
        There is no such clock, or it may not be opened.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.method: str | None = None
        self.clock: str | None = None
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ClockError(
                "NIC clock cannot be opened",
                where=self.path,
                found=error.strerror,
                do="'ethtool -T IFACE' names the clock.",
            ) from None

    @property
    def path(self) -> str:
        """Path of the device."""
        return f"/dev/ptp{self.index}"

    def capabilities(self) -> dict[str, int]:
        """Return what the clock can do; ``cross_timestamping`` is the precise method."""
        caps = PtpClockCaps()
        fcntl.ioctl(self._file, PTP_CLOCK_GETCAPS, caps)
        return {name: int(getattr(caps, name)) for name, *_ in PtpClockCaps._fields_ if name != "rsv"}

    def read(self, when: str) -> dict[str, Any]:
        """Return one cross-stamp, the narrowest of up to 25 brackets, by the best method the driver has.

        Returns
        -------
        dict
            ``{"when", "phc": ns, "index", "method", "clock", "before", "after"}``; ``before`` and ``after`` bracket the
            reading in `clock` ("raw" or "real"), equal for the precise method.

        Raises
        ------
        ClockError
            The driver has none of the methods, or the one it had fails now.
        """
        ladder = (("precise", "raw"), ("extended", "raw"), ("extended", "real"), ("plain", "real"))
        steps = ladder if self.method is None or self.clock is None else ((self.method, self.clock),)
        refusal: OSError | None = None
        for method, clock in steps:
            try:
                before, phc, after = self._bracket(method, clock)
            except OSError as error:
                refusal = error
                if error.errno in _LACKING and self.method is None:
                    continue
                break
            self.method, self.clock = method, clock
            found = {"phc": phc, "index": self.index, "method": method, "clock": clock}
            return {"when": when, **found, "before": before, "after": after}
        assert refusal is not None
        raise ClockError(
            "NIC clock cannot be compared with the system's",
            where=self.path,
            found=refusal.strerror,
            expected="PTP_SYS_OFFSET_PRECISE, PTP_SYS_OFFSET_EXTENDED or PTP_SYS_OFFSET",
        )

    def _bracket(self, method: str, clock: str) -> tuple[int, int, int]:
        """Return the narrowest (before, PHC, after) of one call; OSError where the driver lacks the method."""
        if method == "precise":
            precise = PtpSysOffsetPrecise()
            fcntl.ioctl(self._file, PTP_SYS_OFFSET_PRECISE, precise)
            return precise.sys_monoraw.ns, precise.device.ns, precise.sys_monoraw.ns
        if method == "extended":
            extended = PtpSysOffsetExtended(n_samples=MAX_SAMPLES, clockid=_RAW if clock == "raw" else _REAL)
            fcntl.ioctl(self._file, PTP_SYS_OFFSET_EXTENDED, extended)
            samples = [tuple(stamp.ns for stamp in triple) for triple in extended.ts]
        else:
            plain = PtpSysOffset(n_samples=MAX_SAMPLES)
            fcntl.ioctl(self._file, PTP_SYS_OFFSET, plain)
            stamps = [stamp.ns for stamp in plain.ts]
            samples = list(zip(stamps[:-2:2], stamps[1::2], stamps[2::2], strict=True))
        before, phc, after = min(samples, key=lambda sample: sample[2] - sample[0])
        return before, phc, after

    def close(self) -> None:
        """Close the device."""
        os.close(self._file)

    def __enter__(self) -> PtpClock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
