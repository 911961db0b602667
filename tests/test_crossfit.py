"""follow/crossfit.py: simulated clocks of known course, read as the kernel would read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rxlab.errors import ClockError
from rxlab.follow.clockfit import NAT
from rxlab.follow.crossfit import fit_cross, fit_nic, fit_raw

SECOND = 10**9
REAL = 1_790_000_000 * SECOND
MONO = 50_000 * SECOND
SPAN = 20 * SECOND


class World:
    """Clocks as functions of true time t (int64 ns from 0): RAW is true; MONOTONIC slews; the NIC's clock is free or steered."""

    def __init__(
        self, seed: int, *, slew: float = 0.0, nic_ppm: float = 20.0, steer: float = 0.0, step: int = 0
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.slew, self.nic_ppm, self.steer, self.step = slew, nic_ppm, steer, step
        # adjtimex changes the slope of MONOTONIC at instants nobody announces.
        self.kinks = np.sort(self.rng.uniform(0, SPAN, 3))
        self.rates = np.cumsum(self.rng.choice([-1.0, 1.0], 4)) * slew
        self.steps_at = 0.5 * SPAN + self.rng.uniform(0, 1) * 0.1 * SECOND

    def mono(self, t: np.ndarray) -> np.ndarray:
        edges = np.concatenate(([0.0], self.kinks, [4 * SPAN]))
        inside = np.clip(t[:, None] - edges[:-1], 0, np.diff(edges))
        return MONO + t + np.rint((inside * self.rates).sum(axis=1) * 1e-6).astype(np.int64)

    def real(self, t: np.ndarray) -> np.ndarray:
        return self.mono(t) + REAL

    def raw(self, t: np.ndarray) -> np.ndarray:
        return t + 1_000 * SECOND

    def nic(self, t: np.ndarray) -> np.ndarray:
        bend = self.steer * np.sin(2 * np.pi * t / (7 * SECOND))
        jump = np.where(t > self.steps_at, self.step, 0)
        return REAL + MONO + 37 * SECOND + t + np.rint(self.nic_ppm * 1e-6 * t + bend).astype(np.int64) + jump

    def bracket(self, outer: Any, inner: Any, every: int, width: int) -> tuple[np.ndarray, ...]:
        """Read `inner` between two readings of `outer`; where in the bracket it was read is anybody's guess."""
        t = np.arange(0, SPAN + every, every) + self.rng.integers(0, every // 10, SPAN // every + 1)
        wide = width + (self.rng.random(len(t)) < 0.05) * self.rng.integers(0, 20_000, len(t))
        at = (self.rng.random(len(t)) * wide).astype(np.int64)
        return outer(t), inner(t + at), outer(t + wide)

    def readings(self, every: int = SECOND // 50) -> list[dict[str, int]]:
        mono_before, real, mono_after = self.bracket(self.mono, self.real, every, 45)
        raw_before, raw, raw_after = self.bracket(self.mono, self.raw, every, 45)
        names = ("mono_before", "real", "mono_after", "raw_before", "raw", "raw_after")
        columns = (mono_before, real, mono_after, raw_before, raw, raw_after)
        return [dict(zip(names, map(int, row), strict=True)) for row in zip(*columns, strict=True)]

    def cross_stamps(self, clock: str, width: int) -> list[dict[str, Any]]:
        outer = self.raw if clock == "raw" else self.real
        rows = zip(*self.bracket(outer, self.nic, SECOND // 10, width), strict=True)
        return [{"before": int(a), "phc": int(b), "after": int(c), "clock": clock} for a, b, c in rows]


@pytest.mark.parametrize("clock", ["raw", "real"])
@pytest.mark.parametrize(
    "course", [{}, {"slew": 100.0}, {"nic_ppm": -100.0, "steer": 1_500.0}, {"slew": 50.0, "steer": 1_500.0}], ids=str
)
def test_cross_stamps_hold_their_bound(clock: str, course: dict) -> None:
    for seed in range(25):
        world = World(seed, **course)
        found = fit_nic(world.cross_stamps(clock, 100), world.readings())
        t = np.sort(world.rng.integers(0, SPAN, 5_000))
        error = np.abs(found.to_monotonic(world.nic(t)) - world.mono(t))
        segment = np.maximum(np.searchsorted(found.segments["start_real"], world.nic(t), side="right") - 1, 0)
        bound = found.segments["bound"][segment]
        # Two changes of frequency between two readings look like a step, and are flagged like one.
        known = ~found.inside_step(world.nic(t))
        assert known.mean() >= 0.98
        assert (error <= bound)[known].mean() >= 0.999, (seed, error.max(), bound.max())
        assert error[known].max() <= found.bound_ns
        if not course:
            assert np.median(bound) <= 170
            assert known.all()
        assert (found.method, found.stamp_position, found.leap_s) == ("cross_stamps", "nic", 37)
        assert abs(found.offset_ns - REAL) <= 50


@pytest.mark.parametrize("step", [5_000, 1_000_000, 37 * SECOND])
@pytest.mark.parametrize("clock", ["raw", "real"])
def test_a_step_of_the_nic_s_clock_is_found_at_its_place(clock: str, step: int) -> None:
    world = World(1, step=step)
    found = fit_nic(world.cross_stamps(clock, 100), world.readings())
    assert found.flags == ("steps",)
    t = np.sort(world.rng.integers(0, SPAN, 20_000))
    stamp = world.nic(t)
    flagged = found.inside_step(stamp)
    assert 0 < flagged.sum() <= 0.01 * len(t) + 150, "no more than the interval between two readings"
    error = np.abs(found.to_monotonic(stamp) - world.mono(t))
    assert (error[~flagged] <= found.bound_ns).all()


def test_a_step_back_is_refused() -> None:
    world = World(2, step=-SECOND)
    with pytest.raises(ClockError, match="stepped back"):
        fit_nic(world.cross_stamps("raw", 100), world.readings())


@pytest.mark.parametrize("slew", [0.0, 100.0])
def test_raw_recordings_are_converted_within_their_bound(slew: float) -> None:
    for seed in range(20):
        world = World(seed, slew=slew)
        raw = fit_raw(world.readings(SECOND // 10))
        t = np.sort(world.rng.integers(0, SPAN, 5_000))
        error = np.abs(raw(world.raw(t)) - world.mono(t))
        at = np.clip(np.searchsorted(raw.x, world.raw(t), side="right") - 1, 0, len(raw.bound) - 1)
        known = ~raw.is_step[at]
        assert known.mean() >= 0.98
        assert (error <= raw.bound[at])[known].mean() >= 0.999
        assert np.median(raw.bound) <= 100
    assert raw(np.array([NAT]))[0] == NAT


def test_an_interval_between_two_readings_is_straight() -> None:
    x = np.arange(6) * SECOND
    found = fit_cross(x * 2 - 20, x, x * 2 + 20, what="a clock")
    assert found(np.array([SECOND // 4, -SECOND, 7 * SECOND])).tolist() == [SECOND // 2, -2 * SECOND, 14 * SECOND]
    assert found.bound.tolist() == [21] * 5
    assert not found.is_step.any()


def test_malformed_readings_are_one_line() -> None:
    world = World(3)
    with pytest.raises(ClockError, match="too few readings of the NIC's clock"):
        fit_nic(world.cross_stamps("raw", 100)[:1], world.readings())
    with pytest.raises(ClockError, match="not of one clock"):
        fit_nic(world.cross_stamps("raw", 100) + world.cross_stamps("real", 100), world.readings())
    with pytest.raises(ClockError, match="malformed"):
        fit_nic([{"clock": "raw"}], world.readings())
    with pytest.raises(ClockError, match=r"no usable readings of CLOCK_MONOTONIC_RAW.*raw_before"):
        fit_raw([{"raw": 5}] * 3)
    with pytest.raises(ClockError, match="runs backwards"):
        fit_cross(np.array([5, 9]), np.array([1, 2]), np.array([4, 10]), what="a clock")
