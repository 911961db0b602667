"""host/clockread.py: the sandwiches and the sampler."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from rxlab.errors import ClockError
from rxlab.host import clockread
from rxlab.host.clockread import ClockSampler, read_clocks
from rxlab.host.phc import PtpClock


def test_a_reading_is_a_sandwich() -> None:
    outer_before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    reading = read_clocks("before")
    outer_after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert list(reading) == ["when", "mono_before", "real", "mono_after", "raw_before", "raw", "raw_after"]
    assert outer_before <= reading["mono_before"] <= reading["mono_after"] <= outer_after
    assert outer_before <= reading["raw_before"] <= reading["raw_after"] <= outer_after
    assert all(type(reading[name]) is int for name in list(reading)[1:])


def test_the_narrowest_sandwich_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # MONOTONIC, REALTIME, MONOTONIC, RAW, MONOTONIC; narrow around REALTIME in the third, around RAW in the fifth
    real_widths = [90, 80, 10, *[70] * 13]
    raw_widths = [60, 50, 40, 50, 20, *[40] * 11]
    times = iter(
        [
            t
            for n, (real, raw) in enumerate(zip(real_widths, raw_widths, strict=True))
            for t in (1000 * n, 5 * 10**18 + n, 1000 * n + real, 7000 + n, 1000 * n + real + raw)
        ]
    )
    monkeypatch.setattr(clockread.time, "clock_gettime_ns", lambda clock: next(times))
    assert read_clocks("during") == {
        "when": "during",
        "mono_before": 2000,
        "real": 5 * 10**18 + 2,
        "mono_after": 2010,
        "raw_before": 4070,
        "raw": 7004,
        "raw_after": 4090,
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


class FakePtp:
    """A PHC that fails from its `limit`-th reading on."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def read(self, when: str) -> dict[str, Any]:
        self.limit -= 1
        if self.limit < 0:
            raise ClockError("NIC clock cannot be compared with the system's", found="No such device")
        return {"when": when, "phc": self.limit}


def test_cross_stamps_are_taken_with_denser_sandwiches() -> None:
    with ClockSampler(interval_s=0.005, phc=cast(PtpClock, FakePtp(10**9))) as sampler:
        while len(sampler.cross_stamps) < 4:
            time.sleep(0.001)
    words = [stamp["when"] for stamp in sampler.cross_stamps]
    assert words == ["before", *["during"] * (len(words) - 2), "after"]
    assert len(sampler.readings) >= 5 * (len(words) - 2) + 2
    assert sampler.to_json() == {"readings": sampler.readings, "phc": sampler.cross_stamps}


def test_a_nic_that_goes_away_is_told_and_costs_no_reading() -> None:
    with ClockSampler(interval_s=0.005, phc=cast(PtpClock, FakePtp(2))) as sampler:
        while sampler.failure is None:
            time.sleep(0.001)
    assert "No such device" in str(sampler.failure)
    assert len(sampler.cross_stamps) == 2
    assert sampler.readings[-1]["when"] == "after"
