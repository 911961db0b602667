"""Two clocks without cross-stamps: the lower envelope of (event - stamp) over matched packets.

A packet's event comes after its stamp, so every difference lies above clock offset + smallest delay. The curve that runs
closest below all of them is the offset up to that unknown smallest delay: times are *excess over the fastest packet*, never
absolute. A rigid clock is a line below the convex hull (Moon 1999, Zhang 2002); a steered one bends, and gets a continuous
piecewise linear curve found by linear programming. Stamps that are too late would pull the curve down; they are cut first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxlab.errors import ClockError
from rxlab.follow.floorbound import KNOT_NS, NEAR_NS, curve_bound, judge_floor, widened, without_packets
from rxlab.follow.lowercurve import curve_below

# Weight of one ppb of unrest against one ns of mean gap. Unrest is a change of bend from knot to knot: a steered clock bends
# steadily, a floor that shifts for some seconds does not.
PENALTY = 0.5
# The envelope must come this much closer to the packets than a straight line to be believed.
MIN_GAIN_NS = 10.0
# Steps are searched in minima of blocks of this many packets.
BLOCK = 32
# Outliers are judged in windows this long, but of so many packets: few enough that two outliers are seldom as good as equal.
WINDOW_NS = 250_000_000
MIN_WINDOW, MAX_WINDOW = 32, 512
# A packet that has this many others of its window within NEAR_NS above it is no outlier.
COMPANY = 2
# Among so many of the lowest packets of a window most are no outliers, at 1 % of them.
MAX_OUTLYING = 9
# What alone keeps the curve down by this many usual spacings is taken away, and the curve fitted again, so many times at most.
LONE, MIN_LONE_NS, TOUCHING_NS, MAX_LOOKS = 8.0, 20.0, 1.0, 4
# A change of level is a step of a clock when no drift and no stall explains it.
MIN_STEP_NS = 100_000
MAX_DRIFT = 500e-6
STEP_WINDOW_NS = 500_000_000
MIN_PACKETS = 64


@dataclass(frozen=True)
class Envelope:
    """The event's clock minus the stamp's clock, plus the smallest delay, as a continuous curve per segment.

    Attributes
    ----------
    knots : int64 array, dims (knot,), nanoseconds of the stamp's clock
    offset : float64 array, dims (knot,), nanoseconds above `origin`
        Value of the curve at each knot; straight in between.
    segment : int64 array, dims (knot,)
        Which segment a knot belongs to; a new one starts where a clock was stepped.
    start_event : int64 array, dims (segment,), nanoseconds of the event's clock
        First event of each segment.
    origin : int
        Constant part of the offset, kept apart because float64 cannot hold nanoseconds since 1970.
    bound : float64 array, dims (knot,), nanoseconds
        From each knot to the next the curve follows the true offset to within this, up to one unknown constant (the smallest
        delay); the last knot of a segment repeats the one before.
    bound_ns : float
        The largest of them.
    typical_bound_ns : float
        The median of them over the packets.
    method : {"hull", "envelope"}
    flags : tuple of str
        ``sparse_floor``: too few fast packets to carry the curve, or none can be told from outliers. ``moving_floor``: how
        fast the fastest packets are changes so much that the curve may have followed them instead of the clock. ``short``: a
        segment has too few packets for a drift.
    uncertain : int64 array, dims (step, 2), nanoseconds of the stamp's clock
        Where a step happened.
    quantum_ns : int
        Resolution of the stamps.
    n_outliers, n_packets : int
    gain_ns : float
        By how much the envelope lowers the mean gap of a straight line.
    support : int64 array, dims (knot interval,)
        Packets within `NEAR_NS` of the curve.
    """

    knots: np.ndarray
    offset: np.ndarray
    segment: np.ndarray
    start_event: np.ndarray
    origin: int
    bound: np.ndarray
    bound_ns: float
    typical_bound_ns: float
    method: str
    flags: tuple[str, ...]
    uncertain: np.ndarray
    quantum_ns: int
    n_outliers: int
    n_packets: int
    gain_ns: float
    support: np.ndarray

    def offset_at(self, stamp: np.ndarray, event: np.ndarray | None = None) -> np.ndarray:
        """Return the curve at stamps, in whole nanoseconds (int64); beyond the ends the last slopes continue.

        After a step backwards the same stamps occur twice: `event`, if only roughly when, tells which was meant.
        """
        heads, which = self._segment_of(stamp, event)
        result = np.empty(len(stamp), np.int64)
        for number in range(len(heads)):
            rows = np.flatnonzero(which == number)
            inside = self.segment == number
            x = self.knots[inside] - self.knots[heads[number]]
            at = stamp[rows] - self.knots[heads[number]]
            result[rows] = np.rint(_interpolate(at.astype(np.float64), x.astype(np.float64), self.offset[inside]))
        return result + self.origin

    def bound_at(self, stamp: np.ndarray, event: np.ndarray | None = None) -> np.ndarray:
        """Return to within how many nanoseconds the curve is right at stamps, float64; `event` as in :meth:`offset_at`."""
        heads, which = self._segment_of(stamp, event)
        result = np.empty(len(stamp))
        for number in range(len(heads)):
            rows, inside = np.flatnonzero(which == number), self.segment == number
            at = np.searchsorted(self.knots[inside], stamp[rows], side="right") - 1
            result[rows] = self.bound[inside][np.maximum(at, 0)]
        return result

    def _segment_of(self, stamp: np.ndarray, event: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the first knot of each segment, and the segment of each stamp."""
        heads = np.flatnonzero(np.diff(self.segment, prepend=-1))
        if event is not None:
            return heads, np.maximum(np.searchsorted(self.start_event, event, side="right") - 1, 0)
        starts = self.knots[heads].copy()
        starts[0] = np.iinfo(np.int64).min
        return heads, np.searchsorted(np.maximum.accumulate(starts), stamp, side="right") - 1

    def to_event_clock(self, stamp: np.ndarray, event: np.ndarray | None = None) -> np.ndarray:
        """Return when the event of the fastest possible packet with each stamp would come, int64 ns of the event's clock."""
        return stamp + self.offset_at(stamp, event)

    def excess(self, stamp: np.ndarray, event: np.ndarray) -> np.ndarray:
        """Return each packet's delay in excess of the fastest packet's, int64 ns."""
        return event - self.to_event_clock(stamp, event)


def _interpolate(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate linearly, and extrapolate with the first and last slopes."""
    if len(x) < 2:
        return np.full(len(at), y[0])
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    return y[left] + (at - x[left]) * ((y[left + 1] - y[left]) / (x[left + 1] - x[left]))


def fit_envelope(
    stamp: np.ndarray,
    event: np.ndarray,
    *,
    knot_ns: int = KNOT_NS,
    penalty: float = PENALTY,
    method: str = "auto",
) -> Envelope:
    """Fit the offset between two clocks to matched packets, from below.

    Parameters
    ----------
    stamp : int64 array, dims (packet,), nanoseconds of one clock
    event : int64 array, dims (packet,), nanoseconds of another
        An event that follows the stamp: the receiving CPU's earliest, never one after RPS.
    knot_ns : int
        Distance of the knots of the curve.
    penalty : float
        Price of unrest.
    method : {"auto", "hull", "envelope"}
        "auto" takes the envelope where it is closer to the packets than a straight line by `MIN_GAIN_NS`.

    Raises
    ------
    ClockError
        There are fewer than `MIN_PACKETS` packets.
    """
    if len(stamp) < MIN_PACKETS:
        raise ClockError(
            "too few matched packets to fit two clocks", found=str(len(stamp)), expected=f"at least {MIN_PACKETS}"
        )
    order = np.argsort(event, kind="stable") if (np.diff(event) < 0).any() else slice(None)
    stamp, event = np.asarray(stamp[order], np.int64), np.asarray(event[order], np.int64)
    delay = event - stamp
    # Never float64 of absolute nanoseconds: 256 ns are lost on a clock that counts from 1970.
    origin = int(delay[0])
    relative = (delay - origin).astype(np.float64)
    edges = _find_steps(event, relative)
    quantum = int(np.gcd.reduce(np.diff(stamp))) if len(stamp) > 1 else 1
    parts = [
        _fit_segment(stamp[low:high], relative[low:high], knot_ns, penalty, method, max(quantum, 1))
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    bound = _joint_bound(parts)
    by_size = np.argsort(bound)
    covered = np.cumsum(np.concatenate([part.n_packets for part in parts])[by_size])
    uncertain = np.array([np.sort(stamp[[edge - 1, edge]]) for edge in edges[1:-1]], np.int64).reshape(-1, 2)
    return Envelope(
        knots=np.concatenate([part.knots for part in parts]),
        offset=np.concatenate([part.offset for part in parts]),
        segment=np.repeat(np.arange(len(parts)), [len(part.knots) for part in parts]),
        start_event=event[edges[:-1]],
        origin=origin,
        bound=bound,
        bound_ns=float(bound.max()),
        typical_bound_ns=float(bound[by_size[np.searchsorted(covered, covered[-1] / 2)]]),
        method="envelope" if any(part.is_bent for part in parts) else "hull",
        flags=tuple(sorted({flag for part in parts for flag in part.flags})),
        uncertain=uncertain,
        quantum_ns=max(quantum, 1),
        n_outliers=sum(part.n_outliers for part in parts),
        n_packets=len(stamp),
        gain_ns=max(part.gain for part in parts),
        support=np.concatenate([part.support for part in parts]),
    )


def _joint_bound(parts: list[_Part]) -> np.ndarray:
    """Return the bound from each knot of all segments: each has a level of its own, and they share one constant."""
    result = []
    for part in parts:
        others = max((float(np.median(other.bound)) for other in parts if other is not part), default=0.0) / 4
        bound = widened(part.bound + others)
        result.append(np.append(bound, bound[-1:])[: len(part.knots)])
    return np.concatenate(result)


def _find_steps(event: np.ndarray, delay: np.ndarray) -> list[int]:
    """Return the edges of the segments between clock steps: [0, first packet after a step, ..., n].

    Minima over `STEP_WINDOW_NS` before and after are compared: a stall lifts some packets and ends; a step does not.
    """
    from scipy.ndimage import minimum_filter1d

    n = len(delay)
    n_blocks = n // BLOCK
    reach = max(8, int(n_blocks * STEP_WINDOW_NS / max(int(event[-1] - event[0]), 1)))
    if n_blocks < 2 * reach:
        # A capture this short is searched packet by packet for what nothing but a step can be.
        jumps = np.flatnonzero(np.abs(np.diff(delay)) > 1e9)
        return [0, *(jumps + 1).tolist(), n]
    minima = delay[: n_blocks * BLOCK].reshape(n_blocks, BLOCK).min(axis=1)
    # lows[k]: lowest of blocks k .. k + reach - 1
    lows = minimum_filter1d(minima, reach, origin=-(reach // 2))[: n_blocks - reach + 1]
    begin = event[: n_blocks * BLOCK : BLOCK]
    change = lows[reach:] - lows[:-reach]
    # Between the ends of the two windows a drifting clock may move this much.
    span = begin[2 * reach - 1 :] - begin[: n_blocks - 2 * reach + 1]
    excess = np.abs(change) - MIN_STEP_NS - MAX_DRIFT * span.astype(np.float64)
    edges, at = [0], 0
    while at < len(excess):
        if excess[at] <= 0:
            at += 1
            continue
        stop = at
        while stop < len(excess) and excess[stop] > 0:
            stop += 1
        peak = at + int(np.argmax(excess[at:stop]))
        low, high = max(edges[-1], at * BLOCK), min(n, (stop + 2 * reach) * BLOCK)
        middle = lows[peak] + change[peak] / 2
        # The split that leaves fewest packets on the wrong side of the middle.
        side = np.where((delay[low:high] > middle) == (change[peak] > 0), 1, -1)
        split = low + int(np.argmin(np.concatenate(([0], np.cumsum(side)))))
        if split - edges[-1] > 0 and split < n:
            edges.append(split)
        at = stop + 1
    return [*edges, n]


@dataclass(frozen=True)
class _Part:
    """The fit of one segment."""

    knots: np.ndarray
    offset: np.ndarray
    bound: np.ndarray
    is_bent: bool
    flags: tuple[str, ...]
    n_outliers: int
    gain: float
    support: np.ndarray
    n_packets: np.ndarray


def _fit_segment(
    stamp: np.ndarray, delay: np.ndarray, knot_ns: int, penalty: float, method: str, quantum: int
) -> _Part:
    """Fit one segment between steps."""
    order = np.argsort(stamp, kind="stable")
    start, span = int(stamp[order[0]]), int(stamp[order[-1]] - stamp[order[0]])
    if len(stamp) < MIN_PACKETS or span == 0:
        level = float(delay.min())
        return _Part(
            np.array([start]), np.array([level]), np.array([np.ptp(delay)]), False, ("short", "sparse_floor"), 0, 0.0,
            np.zeros(1, np.int64), np.array([len(stamp)]),
        )  # fmt: skip
    x = (stamp[order] - start).astype(np.float64)
    slope = _coarse_slope(x, delay[order])
    # Without the drift and a step of 37 s before it every number is small: the hulls are exact in float64, and the solver does not
    # take a constraint of 4e10 for one that cannot be met.
    level = float(np.median(delay))
    y = delay[order] - level - slope * x
    keep, leftover = _cut_outliers(x, y, quantum)
    cut = x[~keep]
    n_outliers = len(cut)
    x, y = x[keep], y[keep]
    # As far as there are packets, though the last ones may have been cut.
    knots = np.linspace(0.0, span, max(1, round(span / knot_ns)) + 1)
    for _ in range(MAX_LOOKS):
        curve, gain, is_bent = _fit_curve(x, y, knots, penalty, method)
        lone = _lone_supports(x, y - np.interp(x, knots, curve))
        if not len(lone):
            break
        x, y = np.delete(x, lone), np.delete(y, lone)
        n_outliers += len(lone)
    bound = curve_bound(x, y, knots, curve) + leftover
    flags, support = judge_floor(x, y - np.interp(x, knots, curve), cut, knots, float(bound.max()), quantum)
    whole = np.rint(knots)
    return _Part(
        start + whole.astype(np.int64),
        curve + level + slope * whole,
        without_packets(x, knots, curve, bound),
        is_bent,
        flags,
        n_outliers,
        gain,
        support,
        # How many packets lie from each knot to the next.
        np.diff(np.searchsorted(x, knots[1:-1]), prepend=0, append=[len(x), len(x)]),
    )


def _fit_curve(
    x: np.ndarray, y: np.ndarray, knots: np.ndarray, penalty: float, method: str
) -> tuple[np.ndarray, float, bool]:
    """Return the line or curve at the knots, how much closer a curve is than the line, and whether the curve was taken."""
    ends = knots[[0, -1]]
    line = np.interp(knots, ends, curve_below(x, y, ends, 0.0))
    if len(knots) == 2 or method == "hull":
        return line, 0.0, False
    bent = curve_below(x, y, knots, penalty)
    gain = float(np.mean(np.interp(x, knots, bent) - np.interp(x, knots, line)))
    is_bent = method == "envelope" or gain > MIN_GAIN_NS
    return bent if is_bent else line, gain, is_bent


def _coarse_slope(x: np.ndarray, delay: np.ndarray) -> float:
    """Return the median slope between low quantiles of up to 100 equal groups of packets (Theil)."""
    size = max(16, len(x) // 100)
    n = len(x) // size
    rank = size // 5
    low = np.partition(delay[: n * size].reshape(n, size), rank, axis=1)[:, rank]
    middle = x[: n * size].reshape(n, size).mean(axis=1)
    first, second = np.triu_indices(n, 1)
    distance = middle[second] - middle[first]
    apart = distance > 0
    if not apart.any():
        return 0.0
    return float(np.median((low[second] - low[first])[apart] / distance[apart]))


def _cut_outliers(x: np.ndarray, y: np.ndarray, quantum: int) -> tuple[np.ndarray, float]:
    """Tell which packets are not alone below the floor, and how far outliers among them may pull the curve down.

    In each window the lowest packet that has company is the floor's level. Isolated packets below it are
    outliers: nothing else tells a late stamp from a fast packet.
    """
    size = int(np.clip(len(x) * WINDOW_NS / max(x[-1], 1.0), MIN_WINDOW, MAX_WINDOW))
    everything = np.ones(len(y), bool), 0.0
    # By several of the lowest packets, for the lowest ones are outliers.
    rough = _floor_levels(x, y, size, quantum, MAX_OUTLYING)
    if rough is None:
        return everything
    floor = np.interp(x, *_to_the_ends(x, *rough[:2]))
    # A steered clock moves by 100 ns within a window; with that taken away and deep outliers too, the lowest packets tell how
    # close company is: a few that are faster by 100 ns are a floor of their own, and no outliers.
    shallow = np.flatnonzero(y > floor - 2.5 * NEAR_NS - quantum / 4)
    fine = _floor_levels(x[shallow], (y - floor)[shallow], size, quantum, 1)
    if fine is None:
        return everything
    centre, level, near = fine
    floor += np.interp(x, *_to_the_ends(x, centre, level))
    depth_of_cut = (floor - y)[y < floor - near / 2]
    if not len(depth_of_cut):
        return everything
    # As dense just below the floor as further down, so many of them are not cut.
    expected = len(depth_of_cut) * (near / 2) / (2 * float(depth_of_cut.mean()))
    return np.asarray(y >= floor - near / 2), near / 2 * min(1.0, 2 * expected)


def _to_the_ends(x: np.ndarray, centre: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Continue the levels of windows to the first and last packet: held there, a drifting floor's packets would be cut."""
    few = min(4, len(centre))
    ends = [
        float(np.polyval(np.polyfit(centre[part] - at, level[part], 1), 0.0))
        for part, at in ((slice(None, few), x[0]), (slice(-few, None), x[-1]))
    ]
    return np.concatenate(([x[0]], centre, [x[-1]])), np.concatenate((ends[:1], level, ends[1:]))


def _floor_levels(
    x: np.ndarray, y: np.ndarray, size: int, quantum: int, ranks: int
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Return middle and level of the windows whose lowest packets keep each other company, and how close company is.

    How close is judged by the lowest `ranks` packets of each window.
    """
    from scipy.ndimage import median_filter

    n = len(y) // size
    if n < 2:
        return None
    depth = min(size - 1, 48)
    low = np.sort(np.partition(y[: n * size].reshape(n, size), depth, axis=1)[:, : depth + 1], axis=1)
    apart = low[:, COMPANY:] - low[:, :-COMPANY]
    # A dense floor needs no wide net.
    near = min(max(6 * float(np.median(apart[:, :ranks])), 20.0), NEAR_NS + quantum / 8)
    has_company = apart <= near
    found = has_company.any(axis=1)
    if found.sum() < 2:
        return None
    level = low[np.arange(n), has_company.argmax(axis=1)][found]
    centre = x[: n * size].reshape(n, size).mean(axis=1)[found]
    # Outliers that keep each other company, by chance, make a level far below those around it. Mirrored, or a false level at
    # an end would be its own company.
    below = median_filter(level, min(9, len(level)), mode="mirror") - level
    fits = below <= near + 6 * 1.4826 * float(np.median(np.abs(below)))
    return centre[fits], level[fits], near


def _lone_supports(x: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Return the packets that hold the curve down alone: the lowest of their half second by far.

    Spacings of the lowest of many independent delays are alike (exponential, Renyi 1953): one that is many times the others is a
    late stamp's that was not deep enough to be cut.
    """
    lone = []
    touching = np.flatnonzero(gap < TOUCHING_NS)
    # Two that touch are each other's company.
    far = np.diff(x[touching], prepend=-np.inf, append=np.inf) > WINDOW_NS
    for at in touching[far[:-1] & far[1:]]:
        low, high = np.searchsorted(x, [x[at] - WINDOW_NS, x[at] + WINDOW_NS])
        around = gap[low:high]
        if len(around) <= MAX_OUTLYING:
            continue
        lowest = np.sort(np.partition(around, MAX_OUTLYING)[: MAX_OUTLYING + 1])
        spacing = float(lowest[-1] - lowest[1]) / (MAX_OUTLYING - 1)
        if gap[at] == lowest[0] and lowest[1] - lowest[0] > max(MIN_LONE_NS, LONE * spacing):
            lone.append(at)
    return np.array(lone, np.int64)
