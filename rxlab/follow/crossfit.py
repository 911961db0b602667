"""Readings of one clock between readings of another -> a piecewise line with its error bound.

Used for a NIC's clock (cross-stamps) and for CLOCK_MONOTONIC_RAW. Each reading y of one clock lies between two readings of the
other, ``before`` and ``after``, so at their middle the offset is known to half their distance: a hard bound, whatever the
bracket's two halves were (Linux 361800876f80, PTP_SYS_OFFSET_EXTENDED). Between two readings the offset is interpolated: a
clock that changes its frequency there once, by ds, is off its chord by at most ``|ds| * dt / 4``, and ds shows in the slopes of
the intervals around. A slope that stands out from both neighbours is no change of frequency but a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rxlab.errors import ClockError
from rxlab.follow.clockfit import NAT, ClockMap, fit_constant
from rxlab.read.columns import Columns

# A reading this much wider than the usual one (its thread was preempted inside) says less than its neighbours do.
WIDE = 3
# What an interval may stand out beyond its readings' widths before it holds a step; as for CLOCK_REALTIME (clockfit.py).
STEP_THRESHOLD_NS = 200
SECOND = 10**9
RAW_CLOCK = "CLOCK_MONOTONIC_RAW"


@dataclass(frozen=True)
class CrossMap:
    """Piecewise linear map from one clock to another.

    Attributes
    ----------
    x : int64 array, dims (knot,), nanoseconds of the clock converted from, ascending
    y : int64 array, dims (knot,), nanoseconds of the clock converted to
    bound : int64 array, dims (interval,), nanoseconds
        Largest possible error between knot k and knot k + 1: half width plus interpolation.
    is_step : bool array, dims (interval,)
        One of the clocks was stepped there: nothing is known in between.
    """

    x: np.ndarray
    y: np.ndarray
    bound: np.ndarray
    is_step: np.ndarray

    def __call__(self, at: np.ndarray) -> np.ndarray:
        """Convert int64 ns; before and after the readings the nearest slope continues. NaT stays NaT."""
        at = np.asarray(at, np.int64)
        left = np.clip(np.searchsorted(self.x, at, side="right") - 1, 0, len(self.x) - 2)
        # Not across a step: from there on, the nearest interval without one.
        usable = self._usable()[left]
        away = np.where(at == NAT, 0, at - self.x[left])
        offset = self.y[left] - self.x[left] + np.rint(away * self.slope[usable]).astype(np.int64)
        return np.where(at == NAT, NAT, at + offset)

    @property
    def slope(self) -> np.ndarray:
        """Change of the offset (y - x) per ns of x in each interval: the drift, float64."""
        return np.diff(self.y - self.x) / np.maximum(np.diff(self.x), 1)

    def _usable(self) -> np.ndarray:
        """Return for each interval the nearest one without a step (itself, where it has none)."""
        good = np.flatnonzero(~self.is_step)
        if not len(good):
            return np.arange(len(self.is_step))
        every = np.arange(len(self.is_step))
        right = np.minimum(np.searchsorted(good, every), len(good) - 1)
        left = np.maximum(right - 1, 0)
        return np.where(np.abs(good[left] - every) < np.abs(good[right] - every), good[left], good[right])


def fit_cross(
    before: np.ndarray, y: np.ndarray, after: np.ndarray, *, what: str, where: str = "clock.json"
) -> CrossMap:
    """Fit the map from clock y to the clock that brackets its readings.

    Parameters
    ----------
    before, after : int64 arrays, dims (reading,), nanoseconds of the clock converted to
    y : int64 array, dims (reading,), nanoseconds of the clock converted from
    what, where : str
        Named in errors.

    Raises
    ------
    ClockError
        There are fewer than two readings, or a bracket runs backwards.
    """
    if len(y) < 2:
        raise ClockError(f"too few readings of {what}", where=where, found=str(len(y)), expected="at least 2")
    width = after - before
    if width.min() < 0:
        raise ClockError(f"a bracket around {what} runs backwards", where=where, found=f"{width.min()} ns wide")
    # The first and last reading stay: they are all there is at the ends.
    keep = width <= WIDE * max(int(np.median(width)), 1)
    keep[[0, -1]] = True
    middle, x, half = (before + width // 2)[keep], y[keep], (width[keep] + 1) // 2
    order = np.argsort(middle, kind="stable")
    middle, x, half = middle[order], x[order], half[order]
    gap = np.diff(x)
    offset = middle - x
    rate = np.diff(offset) / np.maximum(np.diff(middle), 1)
    noise = half[:-1] + half[1:]
    is_step = _steps(rate, np.diff(middle), noise) | (gap <= 0)
    bound = np.maximum(half[:-1], half[1:]) + _interpolation(rate, np.diff(middle), is_step) + 1
    return CrossMap(x, middle, bound.astype(np.int64), is_step)


def _neighbours(rate: np.ndarray, is_step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rates of the intervals before and after each, its own side's where there is none or a step."""
    before, after = np.concatenate((rate[:1], rate[:-1])), np.concatenate((rate[1:], rate[-1:]))
    step_before = np.concatenate(([True], is_step[:-1]))
    step_after = np.concatenate((is_step[1:], [True]))
    return np.where(step_before, rate, before), np.where(step_after, rate, after)


def _steps(rate: np.ndarray, dt: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Tell which intervals hold a step: their rate lies outside their neighbours' by more than the readings can be off."""
    if len(rate) < 3:
        return np.zeros(len(rate), bool)
    before, after = np.concatenate((rate[1:2], rate[:-1])), np.concatenate((rate[1:], rate[-2:-1]))
    low, high = np.minimum(before, after), np.maximum(before, after)
    outside = np.maximum(low - rate, rate - high) * dt
    # The widths of three intervals' readings take part.
    slack = (
        STEP_THRESHOLD_NS + noise + np.concatenate((noise[1:2], noise[:-1])) + np.concatenate((noise[1:], noise[-2:-1]))
    )
    found = outside > slack
    # A step spoils its neighbours' comparison too: of adjacent ones the largest is the step.
    for at in np.flatnonzero(found):
        around = outside[max(at - 1, 0) : at + 2]
        found[at] = outside[at] >= around.max()
    return np.asarray(found)


def _interpolation(rate: np.ndarray, dt: np.ndarray, is_step: np.ndarray) -> np.ndarray:
    """Return how far a single change of frequency can move the clock off the chord of each interval, ns."""
    before, after = _neighbours(rate, is_step)
    change = np.maximum.reduce([np.abs(after - before), np.abs(rate - before), np.abs(after - rate)])
    # With one neighbour only part of the change shows: at a share a of the interval, (1 - a) of it is the error.
    is_end = np.zeros(len(rate), bool)
    is_end[[0, -1]] = True
    is_end[1:] |= is_step[:-1]
    is_end[:-1] |= is_step[1:]
    return np.where(is_step, 0, np.ceil(change * dt * np.where(is_end, 1.0, 0.25)))


def fit_raw(readings: Sequence[Mapping[str, int]], *, where: str = "clock.json") -> CrossMap:
    """Fit CLOCK_MONOTONIC_RAW -> CLOCK_MONOTONIC: a drift that adjtimex may change at any time.

    Raises
    ------
    ClockError
        The readings have no brackets around CLOCK_MONOTONIC_RAW.
    """
    try:
        before, raw, after = (
            np.array([reading[key] for reading in readings], np.int64) for key in ("raw_before", "raw", "raw_after")
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClockError(
            "no usable readings of CLOCK_MONOTONIC_RAW",
            where=where,
            found=str(error),
            expected="raw_before, raw, raw_after",
        ) from None
    return fit_cross(before, raw, after, what="CLOCK_MONOTONIC_RAW", where=where)


def fit_nic(
    cross_stamps: Sequence[Mapping[str, Any]], readings: Sequence[Mapping[str, int]], *, where: str = "clock.json"
) -> ClockMap:
    """Fit a NIC's clock to CLOCK_MONOTONIC by its cross-stamps.

    Parameters
    ----------
    cross_stamps : list of dict
        ``phc`` of clock.json.
    readings : list of dict
        ``readings`` of clock.json, which take CLOCK_MONOTONIC_RAW or CLOCK_REALTIME on to CLOCK_MONOTONIC.

    Returns
    -------
    ClockMap
        ``method`` "cross_stamps"; ``leap_s`` is how many whole seconds the NIC's clock is ahead of CLOCK_REALTIME (37: it
        runs on TAI), and ``nic_offset_ns`` the rest.

    Raises
    ------
    ClockError
        Readings are missing, malformed, or of more than one kind.
    """
    system = fit_constant([dict(reading) for reading in readings], where=where)
    try:
        before, phc, after = (
            np.array([stamp[key] for stamp in cross_stamps], np.int64) for key in ("before", "phc", "after")
        )
        kinds = {str(stamp["clock"]) for stamp in cross_stamps}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClockError("cross-stamp is malformed", where=where, found=str(error)) from None
    if len(kinds) != 1 or not kinds <= {"raw", "real"}:
        raise ClockError("cross-stamps are not of one clock", where=where, found=", ".join(sorted(kinds)) or "none")
    nic = fit_cross(before, phc, after, what="the NIC's clock", where=where)
    laid, uncertain = _compose(nic, fit_raw(readings, where=where)) if kinds == {"raw"} else _onto(nic, system)
    bound = int(laid.bound[~laid.is_step].max()) if (~laid.is_step).any() else np.iinfo(np.int64).max
    seconds, rest = _whole_seconds(laid, system)
    return ClockMap(
        _segments(laid),
        uncertain,
        bound,
        stamp_position="nic",
        method="cross_stamps",
        flags=("steps",) if laid.is_step.any() else (),
        axis_offset=system.offset_ns,
        leap_s=seconds,
        nic_offset_ns=rest,
    )


def _compose(nic: CrossMap, raw: CrossMap) -> tuple[CrossMap, np.ndarray]:
    """Lay NIC -> RAW -> MONOTONIC out as one map, with the knots of both."""
    inside = raw.x[(raw.x > nic.y[0]) & (raw.x < nic.y[-1])]
    # The NIC's time at each reading of RAW: the inverse of a map whose slope is nearly one.
    left = np.clip(np.searchsorted(nic.y, inside, side="right") - 1, 0, len(nic.x) - 2)
    usable = ~nic.is_step[left]
    inside, left = inside[usable], left[usable]
    scale = np.diff(nic.x)[left] / np.maximum(np.diff(nic.y)[left], 1)
    back = nic.x[left] + np.rint((inside - nic.y[left]) * scale).astype(np.int64)
    x = np.concatenate([nic.x, back])
    y = np.concatenate([nic.y, inside])
    # In the order of RAW, which nothing steps: the NIC's clock may have been.
    order = np.argsort(y, kind="stable")
    x, y = x[order], y[order]
    x, y = x[np.append(True, np.diff(y) > 0)], y[np.append(True, np.diff(y) > 0)]
    nic_at = np.clip(np.searchsorted(nic.y, y[:-1], side="right") - 1, 0, len(nic.bound) - 1)
    raw_at = np.clip(np.searchsorted(raw.x, y[:-1], side="right") - 1, 0, len(raw.bound) - 1)
    laid = CrossMap(x, raw(y), nic.bound[nic_at] + raw.bound[raw_at] + 1, nic.is_step[nic_at] | raw.is_step[raw_at])
    return laid, _uncertain(laid)


def _onto(nic: CrossMap, system: ClockMap) -> tuple[CrossMap, np.ndarray]:
    """Lay NIC -> REALTIME -> MONOTONIC out as one map: constants, with a step of CLOCK_REALTIME as one of the NIC's."""
    laid = CrossMap(nic.x, system.to_monotonic(nic.y), nic.bound + system.bound_ns, nic.is_step)
    return laid, _uncertain(laid)


def _uncertain(laid: CrossMap) -> np.ndarray:
    """Return the intervals of the NIC's clock that hold a step, dims (step, 2)."""
    at = np.flatnonzero(laid.is_step)
    return np.sort(np.stack([laid.x[at], laid.x[at + 1]], axis=1), axis=1).reshape(-1, 2)


def _segments(laid: CrossMap) -> Columns:
    """Return the map as segments of a ClockMap: offset of the NIC's clock, its anchor and slope."""
    if (np.diff(laid.x) < 0).any():
        raise ClockError(
            "the NIC's clock was stepped back, so its stamps are ambiguous",
            found=f"{int((np.diff(laid.x) < 0).sum())} steps back",
            do="Record again while nothing sets it (ptp4l, phc_ctl).",
        )
    usable = laid._usable()
    starts = laid.x[:-1].copy()
    starts[0] = NAT
    return Columns(
        {
            "start_real": starts,
            "offset": laid.x[:-1] - laid.y[:-1],
            "anchor": laid.x[:-1],
            "slope": -laid.slope[usable],
            "bound": laid.bound,
        }
    )


def _whole_seconds(laid: CrossMap, system: ClockMap) -> tuple[int, int]:
    """Return how far the NIC's clock is ahead of CLOCK_REALTIME at the end: whole seconds (TAI - UTC is 37 since 2017), rest."""
    ahead = int(laid.x[-1] - laid.y[-1]) - int(system.segments["offset"][-1])
    seconds = (ahead + SECOND // 2) // SECOND
    return seconds, ahead - seconds * SECOND
