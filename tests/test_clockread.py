"""host/clockread.py: the sandwiches, and the layouts of the PTP ioctls against the C compiler's numbers."""

from __future__ import annotations

import ctypes
import errno
import struct
import time
from pathlib import Path

import pytest

from rxlab.errors import ClockError
from rxlab.host import clockread
from rxlab.host.clockread import ClockSampler, PtpClock, read_clocks


def test_a_reading_is_a_sandwich() -> None:
    outer_before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    reading = read_clocks("before")
    outer_after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert list(reading) == ["when", "mono_before", "real", "mono_after", "raw"]
    assert outer_before <= reading["mono_before"] <= reading["mono_after"] <= outer_after
    assert all(type(reading[name]) is int for name in list(reading)[1:])


def test_the_narrowest_sandwich_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # MONOTONIC, REALTIME, MONOTONIC, RAW per sandwich; the third is the narrowest
    widths = [90, 80, 10, *[70] * 13]
    times = iter([t for n, width in enumerate(widths) for t in (1000 * n, 5 * 10**18 + n, 1000 * n + width, 7000 + n)])
    monkeypatch.setattr(clockread.time, "clock_gettime_ns", lambda clock: next(times))
    assert read_clocks("during") == {
        "when": "during",
        "mono_before": 2000,
        "real": 5 * 10**18 + 2,
        "mono_after": 2010,
        "raw": 7002,
    }


def test_readings_agree_on_the_offset() -> None:
    offsets = []
    bounds = []
    for _ in range(20):
        reading = read_clocks("before")
        offsets.append(reading["real"] - (reading["mono_before"] + reading["mono_after"]) // 2)
        bounds.append(reading["mono_after"] - reading["mono_before"])
    # REALTIME - MONOTONIC is constant unless somebody steps the clock, so two readings differ by no more than their widths.
    assert max(offsets) - min(offsets) <= 2 * max(bounds)


def test_the_sampler_reads_before_during_and_after() -> None:
    with ClockSampler(interval_s=0.001) as sampler:
        while len(sampler.readings) < 4:
            time.sleep(0.001)
    words = [reading["when"] for reading in sampler.readings]
    assert words[0] == "before"
    assert words[-1] == "after"
    assert set(words[1:-1]) == {"during"}
    times = [reading["mono_before"] for reading in sampler.readings]
    assert times == sorted(times)
    assert sampler.to_json() == {"readings": sampler.readings}
    n_readings = len(sampler.readings)
    assert not sampler._thread.is_alive()
    assert len(sampler.readings) == n_readings


def test_ioctl_numbers() -> None:
    # as a C compiler gives them for include/uapi/linux/ptp_clock.h
    assert clockread.PTP_CLOCK_GETCAPS == 0x80503D01
    assert clockread.PTP_SYS_OFFSET == 0x43403D05
    assert clockread.PTP_SYS_OFFSET_PRECISE == 0xC0403D08
    assert clockread.PTP_SYS_OFFSET_EXTENDED == 0xC4C03D09


def test_no_such_clock() -> None:
    with pytest.raises(ClockError, match=r"/dev/ptp9999: NIC clock cannot be opened: found No such file"):
        PtpClock(9999)


class FakeDriver:
    """Answers the ioctls of one made-up PHC; `has` names those it knows."""

    def __init__(self, has: set[str], raw_clock: bool = True) -> None:
        self.has, self.raw_clock = has, raw_clock

    def __call__(self, file: int, request: int, buffer: ctypes.Array) -> int:
        def stamp(index: int, ns: int) -> None:
            struct.pack_into("=qII", buffer, 16 + 16 * index, ns // 10**9, ns % 10**9, 0)

        if request == clockread.PTP_SYS_OFFSET_EXTENDED and "extended" in self.has:
            n_samples, clock = struct.unpack_from("=II", buffer)
            if clock != time.CLOCK_REALTIME and not self.raw_clock:
                raise OSError(errno.EINVAL, "reserved word")
            for row in range(n_samples):
                width = 500 if row != 7 else 100
                stamp(3 * row, 10**18 + 10**6 * row)
                stamp(3 * row + 1, 37 * 10**9 + 10**6 * row + width // 2)
                stamp(3 * row + 2, 10**18 + 10**6 * row + width)
        elif request == clockread.PTP_SYS_OFFSET and "plain" in self.has:
            n_samples = struct.unpack_from("=I", buffer)[0]
            for index in range(2 * n_samples + 1):
                stamp(index, 10**18 + 1000 * index - (900 if index == 6 else 0))
        elif request == clockread.PTP_SYS_OFFSET_PRECISE and "precise" in self.has:
            for index, ns in enumerate((37 * 10**9 + 1, 10**18 + 2, 10**9 + 3)):
                struct.pack_into("=qII", buffer, 16 * index, ns // 10**9, ns % 10**9, 0)
        else:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return 0


def ptp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: FakeDriver) -> PtpClock:
    monkeypatch.setattr(clockread.os, "open", lambda *args: 0)
    monkeypatch.setattr(clockread.fcntl, "ioctl", driver)
    return PtpClock(3)


def test_the_best_method_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = ptp(monkeypatch, tmp_path, FakeDriver({"precise", "extended", "plain"}))
    assert clock.read("before") == {
        "when": "before",
        "index": 3,
        "phc": 37 * 10**9 + 1,
        "method": "precise",
        "clock": "raw",
        "before": 10**9 + 3,
        "after": 10**9 + 3,
    }


@pytest.mark.parametrize(("raw_clock", "name"), [(True, "raw"), (False, "real")])
def test_extended_keeps_the_narrowest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raw_clock: bool, name: str
) -> None:
    reading = ptp(monkeypatch, tmp_path, FakeDriver({"extended"}, raw_clock)).read("during")
    assert (reading["method"], reading["clock"]) == ("extended", name)
    assert reading["before"] == 10**18 + 7 * 10**6
    assert reading["after"] - reading["before"] == 100
    assert reading["phc"] == 37 * 10**9 + 7 * 10**6 + 50


def test_plain_keeps_the_narrowest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reading = ptp(monkeypatch, tmp_path, FakeDriver({"plain"})).read("after")
    assert reading["method"] == "plain"
    assert (reading["before"], reading["phc"], reading["after"]) == (10**18 + 4000, 10**18 + 5000, 10**18 + 5100)


def test_a_clock_that_cannot_be_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ClockError, match="expected PTP_SYS_OFFSET_PRECISE"):
        ptp(monkeypatch, tmp_path, FakeDriver(set())).read("before")
