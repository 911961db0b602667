"""One-way latency between two hosts whose clocks differ: an interval for every packet, never a point.

A packet to the receiver takes its latency plus what the receiver's clock is ahead, one to the sender its latency less that. No latency is
negative, so every packet of one direction bounds the difference from above and every one of the other from below, and nothing in
the packets tells where in between it lies: the two latencies are known to within the least round trip. Drift and bends are taken
from the envelope of one direction (:mod:`rxlab.follow.envelope`); from there a bound reaches to its neighbours, and widens on the
way by what a clock's frequency may have wandered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxlab.errors import ClockError
from rxlab.follow.clockmatch import STEERING
from rxlab.follow.crossings import INCONSISTENT, STEP, Crossing
from rxlab.follow.envelope import MAX_DRIFT, MIN_PACKETS, Envelope, fit_envelope
from rxlab.follow.floorbound import KNOT_NS
from rxlab.read.columns import Columns
from rxlab.read.compiler import njit
from rxlab.read.pcapfile import NAT

# A curve of more intervals than this takes minutes; a longer capture gets longer ones.
MAX_INTERVALS = 1_000
# Where the two sides contradict each other a clock wandered more than was allowed for: twice as much is tried, so often.
MAX_DOUBLINGS = 12
# Unless so few packets are to blame that their stamps must be wrong, or they are taken for others.
MAX_WRONG, MIN_WRONG = 0.01, 3
ROUNDING_NS = 2
# In so many parts of an interval it is looked how far the fastest packets keep away from the curve.
WINDOWS = 8
# The floor is sparse where a tenth of the packets have an interval so many times the least, and a microsecond.
SPARSE, SPARSE_NS = 3.0, 1_000
MAX_QUANTUM_NS = 1_000


@dataclass(frozen=True)
class Reference:
    """A curve that follows the receiver's clock minus the sender's up to a constant, by the fastest packets of one direction.

    Attributes
    ----------
    envelope : Envelope or None
        None: too few packets, or too unsteady ones; the curve is flat.
    sign : {1, -1}
        -1: of packets to the receiver, fitted with time running backwards, for an envelope is a function of the stamp that comes first.
    level : int
        The curve where there is no envelope.
    edges : int64 array, dims (interval + 1,), nanoseconds of the receiver's clock
    slope_error : float64 array, dims (interval,)
        How far the slope may be off in each interval: see :func:`_slope_errors`.
    """

    envelope: Envelope | None
    sign: int
    level: int
    edges: np.ndarray
    slope_error: np.ndarray

    def __call__(self, t: np.ndarray) -> np.ndarray:
        """Return the curve at instants of the receiver's clock, int64 ns."""
        if self.envelope is None:
            return np.full(len(t), self.level, np.int64)
        return -self.sign * self.envelope.offset_at(self.sign * t)

    def wandered(self, t: np.ndarray, factor: float = 1.0) -> np.ndarray:
        """Return by how much the clocks may have wandered from the curve since its beginning, float64 ns, ascending with `t`."""
        errors = np.maximum(self.slope_error, np.minimum(self.slope_error * factor, MAX_DRIFT))
        x, edges = ((at - self.edges[0]).astype(np.float64) for at in (t, self.edges))
        so_far = np.concatenate(([0.0], np.cumsum(np.diff(edges) * errors)))
        return (
            np.interp(x, edges, so_far) + errors[0] * np.minimum(x, 0.0) + errors[-1] * np.maximum(x - edges[-1], 0.0)
        )

    @property
    def mean_error(self) -> float:
        """The slope's error, on average over time."""
        return float(np.average(self.slope_error, weights=np.diff(self.edges)))

    @property
    def drift(self) -> float:
        """Mean slope of the curve, nanoseconds per nanosecond; NaN where it is not known."""
        if self.envelope is None or self.mean_error >= MAX_DRIFT:
            return float("nan")
        inside = np.diff(self.envelope.segment) == 0
        run, rise = (float(np.diff(part)[inside].sum()) for part in (self.envelope.knots, self.envelope.offset))
        # Turning both time and curve leaves the slope; an envelope of packets to the sender is upside down.
        return -rise / run

    @property
    def steps(self) -> np.ndarray:
        """Where a clock was stepped: int64 array, dims (step, 2), nanoseconds of the receiver's clock."""
        if self.envelope is None:
            return np.empty((0, 2), np.int64)
        return np.sort(np.sort(self.sign * self.envelope.uncertain, axis=1), axis=0)


def _slope_errors(envelope: Envelope, stamp: np.ndarray, event: np.ndarray, cut: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the intervals of a curve (edges on the stamp's clock, ascending) and how far its slope may be off in each.

    Either end of an interval may be off by as much as the fastest packets around keep away from the curve, or by its bound, and by what
    the stamps are `cut`; within
    an interval a clock's frequency changes by 0.6 ppm, or by what the curve bends at either end.
    """
    if "short" in envelope.flags:
        return np.array([stamp[0], max(int(stamp[-1]), int(stamp[0]) + 1)]), np.array([MAX_DRIFT])
    heads = np.flatnonzero(np.diff(envelope.segment) == 0)
    left, right = envelope.knots[heads], envelope.knots[heads + 1]
    run = (right - left).astype(np.float64)
    slope = (envelope.offset[heads + 1] - envelope.offset[heads]) / run
    bend = np.zeros(len(slope))
    follows = np.flatnonzero(np.diff(envelope.segment[heads]) == 0)
    bend[follows] = np.abs(np.diff(slope))[follows]
    bend[follows + 1] = np.maximum(bend[follows + 1], np.abs(np.diff(slope))[follows])
    window = min(KNOT_NS, int(run.min())) // WINDOWS + 1
    number = (stamp - stamp[0]) // window
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    lowest = np.minimum.reduceat(envelope.excess(stamp, event), starts)
    interval = np.clip(np.searchsorted(left, stamp[starts], side="right") - 1, 0, len(left) - 1)
    away = np.zeros(len(left))
    np.maximum.at(away, interval, lowest.astype(np.float64))
    around = np.maximum(away, np.maximum(np.append(away[1:], 0.0), np.append(0.0, away[:-1])))
    error = STEERING + bend + 2 * (np.maximum(around, envelope.bound_ns) + cut) / run
    return np.append(left, right[-1]), error


@dataclass(frozen=True)
class OffsetBounds:
    """Between which two curves the receiver's clock minus the sender's lies.

    Attributes
    ----------
    reference : Reference
    upper, lower : pairs of arrays, dims (packet,)
        When, in nanoseconds of the receiver's clock (int64, ascending), and how far above (below) the reference the difference may be
        then (float64).
    factor : float
        How many times its slope's error the clocks wander from the reference.
    clock_error : int or None
        Within how many nanoseconds both clocks are said to agree.
    flags : tuple of str
        ``one_direction``: one side is not known, for want of packets. ``few_packets``: fewer than 64 of a direction.
        ``drift_unknown``: of both, or so unsteady ones that the clocks may drift by 500 ppm. ``unsteady_clock``: the sides are compatible only
        if a clock wandered more than the envelope says. ``sparse_floor``: fast packets are so rare that the bounds lie much further apart
        at most times than at their narrowest.
    """

    reference: Reference
    upper: tuple[np.ndarray, np.ndarray]
    lower: tuple[np.ndarray, np.ndarray]
    factor: float = 1.0
    clock_error: int | None = None
    flags: tuple[str, ...] = ()

    @property
    def wander(self) -> float:
        """How far the difference may move against the reference on average, nanoseconds per nanosecond."""
        error = self.reference.mean_error
        return max(error, min(self.factor * error, MAX_DRIFT))

    @property
    def edges(self) -> np.ndarray:
        """Starts of the segments after clock steps, int64, nanoseconds of the receiver's clock."""
        return self.reference.steps[:, 1]

    def at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest difference at instants of the receiver's clock, int64 ns; NAT where not known."""
        level = self.reference(t)
        below, above = (_reach(t, *side, self.reference, self.factor) for side in (self.lower, self.upper))
        least = np.where(np.isfinite(below), level - _whole(below), NAT)
        largest = np.where(np.isfinite(above), level + _whole(above), NAT)
        if self.clock_error is None:
            return least, largest
        largest[largest == NAT] = self.clock_error
        return np.maximum(least, -self.clock_error), np.minimum(largest, self.clock_error)


def resolution(time: np.ndarray) -> int:
    """Return the resolution of a capture's stamps in nanoseconds; libpcap cuts to microseconds what it writes as such."""
    common = int(np.gcd.reduce(np.diff(time))) if len(time) > 1 else 1
    if common <= MAX_QUANTUM_NS:
        return max(common, 1)
    return next(unit for unit in (10**9, 10**6, 1_000, 100, 10, 1) if common % unit == 0)


def bound_offset(
    forward: tuple[np.ndarray, np.ndarray],
    reverse: tuple[np.ndarray, np.ndarray],
    *,
    quantum: tuple[int, int] = (1, 1),
    clock_error: int | None = None,
) -> OffsetBounds:
    """Bound the receiver's clock minus the sender's by the packets of both directions.

    Parameters
    ----------
    forward : pair of int64 arrays, dims (packet,), nanoseconds
        When packets left (sender's clock) and when they arrived (receiver's clock).
    reverse : pair of int64 arrays, dims (packet,), nanoseconds
        When packets left (receiver's clock) and when they arrived (sender's clock).
    quantum : pair of int, nanoseconds
        Resolution of the sender's and the receiver's stamps, which are cut, not rounded.
    clock_error : int, optional
        Both clocks are said to agree to within so many nanoseconds.

    Raises
    ------
    ClockError
        No packet crossed; or the clocks are further apart than they are said to be.

    Notes
    -----
    Each packet bounds the difference at its own instant; from there its bound opens like a cone, by what the slope of the reference may be
    off. The lowest of all cones is found in two passes.
    """
    at = np.asarray(forward[1], np.int64), np.asarray(reverse[0], np.int64)
    over = at[0] - forward[0] + (quantum[1] - 1), at[1] - reverse[1] - (quantum[0] - 1)
    if not len(at[0]) and not len(at[1]):
        raise ClockError("no packet was captured on both hosts", found="0 packets of either direction")
    orders = [np.argsort(t, kind="stable") for t in at]
    sides = [(t[order], d[order]) for t, d, order in zip(at, over, orders, strict=True)]
    reference = _refer(sides[0], sides[1], sum(quantum) - 2)
    flags = (
        {"one_direction"} if not min(map(len, at)) else {"few_packets"} if min(map(len, at)) < MIN_PACKETS else set()
    )
    if reference.envelope is None:
        flags.add("drift_unknown")
    bounds, narrowed = _compatible(reference, sides)
    if narrowed:
        flags.add("unsteady_clock")
    if clock_error is not None:
        _refuse_wrong_claim(bounds, clock_error)
    bounds = OffsetBounds(reference, bounds.upper, bounds.lower, bounds.factor, clock_error)
    least, largest = bounds.at(np.concatenate(at))
    known = (least != NAT) & (largest != NAT)
    if known.any():
        width = (largest - least)[known]
        if np.quantile(width, 0.9) > SPARSE * max(int(width.min()), 0) + SPARSE_NS:
            flags.add("sparse_floor")
    return OffsetBounds(reference, bounds.upper, bounds.lower, bounds.factor, clock_error, tuple(sorted(flags)))


def _refer(forward: tuple[np.ndarray, np.ndarray], reverse: tuple[np.ndarray, np.ndarray], cut: int = 0) -> Reference:
    """Return the curve of the direction whose fastest packets tell the slope best."""
    found = []
    for sign, (t, difference) in ((-1, forward), (1, reverse)):
        if len(t) < MIN_PACKETS:
            continue
        knot_ns = max(KNOT_NS, int(t[-1] - t[0]) // MAX_INTERVALS)
        stamp, event = (sign * t)[::sign], (sign * (t - difference))[::sign]
        envelope = fit_envelope(stamp, event, knot_ns=knot_ns)
        edges, errors = _slope_errors(envelope, stamp, event, cut)
        found.append(Reference(envelope, sign, 0, (sign * edges)[::sign], errors[::sign]))
    best = min(found, key=lambda one: one.mean_error, default=None)
    # A curve that may be off by more than crystals are apart tells less than none.
    if best is not None and best.mean_error <= MAX_DRIFT:
        return best
    t, difference = forward if len(forward[0]) else reverse
    return Reference(None, 1, int(difference[0]), np.array([t[0], t[-1] + 1]), np.array([MAX_DRIFT]))


def _compatible(reference: Reference, sides: list[tuple[np.ndarray, np.ndarray]]) -> tuple[OffsetBounds, bool]:
    """Return bounds that do not contradict each other, and whether the clock had to wander more for it than its curve says.

    Raises
    ------
    ClockError
        There are none.
    """
    sides, factor = list(sides), 1.0
    for _ in range(MAX_DOUBLINGS):
        bounds = _laid(reference, sides, factor)
        wrong = _contradicted(bounds, sides)
        counts = [int(one.sum()) for one in wrong]
        if not any(counts):
            return bounds, factor > 1
        few = int(np.argmin([count if count else np.inf for count in counts]))
        drop = {few} if counts[few] * 4 <= counts[1 - few] else {0, 1}
        if all(counts[at] <= max(MIN_WRONG, MAX_WRONG * len(sides[at][0])) for at in drop):
            for at in drop:
                t, difference = sides[at]
                sides[at] = t[~wrong[at]], difference[~wrong[at]]
        elif bounds.wander < MAX_DRIFT:
            factor *= 2
        else:
            break
    raise ClockError(
        "the packets of both directions contradict each other",
        found=f"{counts[0]:,} of {len(sides[0][0]):,} to the receiver and {counts[1]:,} of {len(sides[1][0]):,} back "
        "arrived before they left",
        do="Cut the captures where a clock was stepped; have both directions stamped alike.",
    )


def _laid(reference: Reference, sides: list[tuple[np.ndarray, np.ndarray]], factor: float) -> OffsetBounds:
    """Lay both bounds out: the lowest cone of all packets to the receiver, the highest of those to the sender."""
    edges = reference.steps[:, 1]
    cones = []
    for sign, (t, difference) in zip((1, -1), sides, strict=True):
        beyond = sign * (difference - reference(t)).astype(np.float64)
        _open_cones(beyond, np.searchsorted(edges, t, side="right"), reference.wandered(t, factor))
        cones.append((t, beyond))
    return OffsetBounds(reference, cones[0], cones[1], factor)


@njit(cache=True, nogil=True)
def _open_cones(beyond, segment, wandered):
    """Lower each bound to what its neighbours' cones allow, in place; no cone reaches across a step."""
    for row in range(1, len(beyond)):
        if segment[row] == segment[row - 1]:
            beyond[row] = min(beyond[row], beyond[row - 1] + (wandered[row] - wandered[row - 1]))
    for row in range(len(beyond) - 2, -1, -1):
        if segment[row] == segment[row + 1]:
            beyond[row] = min(beyond[row], beyond[row + 1] + (wandered[row + 1] - wandered[row]))


def _reach(t: np.ndarray, at: np.ndarray, beyond: np.ndarray, reference: Reference, factor: float) -> np.ndarray:
    """Return the lowest cone at instants `t`; infinite where no packet of the segment has one."""
    result = np.full(len(t), np.inf)
    if not len(at):
        return result
    edges = reference.steps[:, 1]
    mine, theirs = np.searchsorted(edges, t, side="right"), np.searchsorted(edges, at, side="right")
    here, there = reference.wandered(t, factor), reference.wandered(at, factor)
    after = np.searchsorted(at, t)
    for near in (after - 1, after):
        row = np.clip(near, 0, len(at) - 1)
        is_reached = (near >= 0) & (near < len(at)) & (theirs[row] == mine)
        result = np.where(is_reached, np.minimum(result, beyond[row] + np.abs(here - there[row])), result)
    return result


def _whole(beyond: np.ndarray) -> np.ndarray:
    """Return bounds as whole nanoseconds, not narrower."""
    return np.ceil(np.where(np.isfinite(beyond), beyond, 0.0)).astype(np.int64)


def _contradicted(bounds: OffsetBounds, sides: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Tell for the packets of each direction whether the other direction's bound says they arrived before they left."""
    least, largest = bounds.at(sides[0][0])[0], bounds.at(sides[1][0])[1]
    return [
        (least != NAT) & (sides[0][1] < least - ROUNDING_NS),
        (largest != NAT) & (sides[1][1] > largest + ROUNDING_NS),
    ]


def _refuse_wrong_claim(bounds: OffsetBounds, clock_error: int) -> None:
    """Refuse clocks said to agree that cannot."""
    t = np.concatenate((bounds.upper[0], bounds.lower[0]))
    least, largest = bounds.at(t)
    ahead, behind = (least != NAT) & (least > clock_error), (largest != NAT) & (largest < -clock_error)
    if ahead.any() or behind.any():
        row = int(np.argmax(ahead | behind))
        low, high = (f"{int(one[row]):,}" if one[row] != NAT else "?" for one in (least, largest))
        raise ClockError(
            "the clocks are further apart than they are said to be",
            found=f"the receiver's {low} to {high} ns ahead, by the packets",
            expected=f"at most {clock_error:,} ns",
            do="Leave --clock-error out: the packets alone bound the difference.",
        )


def latencies(
    crossing: Crossing,
    left: np.ndarray,
    arrived: np.ndarray,
    bounds: OffsetBounds,
    *,
    is_forward: bool,
    quantum: tuple[int, int] = (1, 1),
) -> Columns:
    """Return the interval of each packet's one-way latency.

    Parameters
    ----------
    crossing : Crossing
    left, arrived : int64 arrays, dims (frame,), nanoseconds
        Stamps of the capture where the packets left and of the one where they arrived, each on its own clock.
    bounds : OffsetBounds
        Of the receiver's clock minus the sender's.
    is_forward : bool
        Whether the packets go to the receiver.
    quantum : pair of int, nanoseconds
        Resolution of `left` and `arrived`.

    Returns
    -------
    Columns, dims (packet,)
        ``arrived, first, last`` (rows of the captures), ``status`` (of :data:`rxlab.follow.crossings.CROSSINGS`) and
        ``least, most`` int64 ns: from the stamp where it left to the stamp where it arrived; NAT where not known. A packet that several
        frames may have brought has the interval that holds all of them.
    """
    n, status = len(crossing.arrived), crossing.status.copy()
    least, most = np.full(n, NAT, np.int64), np.full(n, NAT, np.int64)
    steps = bounds.reference.steps
    # The nearest departure gives the least latency, the farthest the most; the clocks are compared on the receiver's.
    for result, carrier, side, cut in (
        (least, crossing.last, is_forward, 1 - quantum[0]),
        (most, crossing.first, not is_forward, quantum[1] - 1),
    ):
        rows = np.flatnonzero(carrier >= 0)
        came, went = arrived[crossing.arrived[rows]], left[carrier[rows]]
        at = came if is_forward else went
        bound = bounds.at(at)[int(side)]
        result[rows] = np.where(bound == NAT, NAT, came - went - (bound if is_forward else -bound) + cut)
        for low, high in steps.tolist():
            status[rows[(at > low) & (at < high)]] = STEP
    status[(most != NAT) & (most < 0)] = INCONSISTENT
    # Where a side is not known the latency is still no less than nothing.
    least[(least < 0) & ((least != NAT) | (most != NAT))] = 0
    least[(status == STEP) | (status == INCONSISTENT)] = most[(status == STEP) | (status == INCONSISTENT)] = NAT
    names = ("arrived", "first", "last")
    return Columns(
        {**{name: getattr(crossing, name) for name in names}, "status": status, "least": least, "most": most}
    )
