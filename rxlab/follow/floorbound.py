"""How far the clock may be from a curve below its packets, and whether the packets can carry a curve at all.

One side alone is known, so a floor that moves looks like a clock that moves. What gives a moving floor away: the slower packets move
with it by more, and a curve that followed it leaves its packets elsewhere.
"""

from __future__ import annotations

import numpy as np

from rxlab.follow.lowercurve import window_minima

KNOT_NS = 1_000_000_000
# What the floor leaves open counts by this. Chosen on recordings (see docs/clocks.md) so that every packet of 99 % of the perturbations
# was within its bound; as in split conformal prediction (Lei et al. 2018) nothing is assumed of how the errors are distributed.
GAP_SHARE = 0.77
# What is open in one knot interval bends the curve in so many on either side; and nowhere is less open than in this share of all.
REACH, USUAL = 2, 0.75
# Near an end packets hold the curve from one side only, and it swings with a floor that moves there: so many times wider is the bound
# in the first and last knot interval, and in the second and last but one.
END_SHARES = (1.75, 1.2)
# Beyond what the fast tenth of the packets moves against the curve, where a floor wanders for seconds on a loaded machine, or where the
# fastest of a quarter second keep away by so much more than usual, the floor is said to move.
MAX_MOVED_NS, MAX_AWAY_NS = 60.0, 25.0
# Twenty quantiles lie within so many of twice their standard error by chance.
CHANCE = 2.0
# Windows with fewer packets, or with less than this share of the usual number, say nothing.
MIN_FILLED, FILLED_SHARE = 16, 0.2
ROUNDING_NS = 2.0
# The floor is sparse where fewer packets than this lie within NEAR_NS of the curve, per knot.
MIN_SUPPORT = 3
NEAR_NS = 100
# Nor can a floor whose packets leave this much open carry a curve (seen: TCP at its tap, where one packet in 500 is faster by
# 140 ns: beyond the bound in 5 % of the perturbations).
MAX_BOUND_NS = 150
# Fewer quarter seconds do not tell what is usual.
MIN_WINDOWS = 9
# Late stamps are strewn; where this share of a second's packets was cut, the curve may lie above a floor.
MAX_CUT, MIN_CUT = 0.03, 8


def curve_bound(x: np.ndarray, y: np.ndarray, knots: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Return how far the clock may be from a curve in each knot interval: by a floor that moves, between knots, and near the ends.

    Where even the fastest packet of three eighths of a second keeps away, the floor has moved or the clock has, which cannot be told;
    for less no clock leaves its curve and comes back, but a floor does. What lasts for seven eighths is no lack of fast packets, and
    counts once more.
    """
    from scipy.ndimage import maximum_filter1d, minimum_filter1d

    n_intervals = len(knots) - 1
    gap = y - np.interp(x, knots, curve)
    at = window_minima(x, gap, max(4, 8 * round(float(x[-1]) / KNOT_NS)))
    away = sum(minimum_filter1d(gap[at], size, mode="mirror") for size in (3, 7))
    # Where there are no packets at all, as much may be open as anywhere.
    left_open = np.full(n_intervals, -np.inf)
    np.maximum.at(left_open, np.clip(np.searchsorted(knots, x[at], side="right") - 1, 0, n_intervals - 1), away)
    left_open[np.isinf(left_open)] = left_open.max()
    around = maximum_filter1d(left_open, 2 * REACH + 1, mode="nearest")
    # Between knots a smooth curve is off its chord by an eighth of the second difference.
    sag = _bend(curve) / 8
    return ROUNDING_NS + sag + GAP_SHARE * np.maximum(around, np.quantile(left_open, USUAL))


def _bend(curve: np.ndarray) -> float:
    """Return the largest second difference from knot to knot."""
    return float(np.abs(np.diff(curve, 2)).max(initial=0.0))


def without_packets(x: np.ndarray, knots: np.ndarray, curve: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Return the bounds of knot intervals, wider where hardly any packet holds the curve: around pauses, and before a lone last packet.

    From the last packets on, the curve goes straight and the clock may bend as it did elsewhere.
    """
    n_windows = 4 * len(bound)
    filled = np.flatnonzero(_filled(x, float(knots[-1]), n_windows)[1])
    if not len(filled):
        return bound * (1 + len(bound))
    window = np.arange(n_windows)
    right = np.searchsorted(filled, window)
    far = np.minimum(
        np.abs(filled[np.minimum(right, len(filled) - 1)] - window), np.abs(window - filled[np.maximum(right - 1, 0)])
    )
    away = far.reshape(-1, 4).max(axis=1) / 4
    return bound * (1 + away) + _bend(curve) / 2 * away**2


def widened(bound: np.ndarray) -> np.ndarray:
    """Return the bounds of a segment's knot intervals, wider near its ends."""
    share = np.ones(len(bound))
    for at, more in reversed(list(enumerate(END_SHARES[: len(bound)]))):
        share[[at, -1 - at]] = more
    return share * bound


def _filled(x: np.ndarray, end: float, n_windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges, as rows, of equally long windows, and which of them hold more than next to nothing."""
    edges = np.searchsorted(x, np.linspace(0.0, end, n_windows + 1))
    edges[-1] = len(x)
    size = np.diff(edges)
    return edges, size >= max(float(MIN_FILLED), FILLED_SHARE * float(np.median(size)))


def _filled_windows(x: np.ndarray, per_knot: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first and last row (exclusive) of equally long windows, without those that hold next to nothing."""
    edges, filled = _filled(x, float(x[-1]), max(4, per_knot * round(float(x[-1]) / KNOT_NS)))
    return edges[:-1][filled], edges[1:][filled]


def _moved_by(x: np.ndarray, gap: np.ndarray) -> float:
    """Return by how much the fast tenth of the packets comes and goes above the curve, from second to second.

    A clock that moves takes all packets with it, and the curve follows. What slows the fastest packets (memory, a neighbour, the
    CPU's frequency) slows the others by more: so a floor that wanders is seen though one side alone is known.
    """
    tenths = []
    for low, high in zip(*_filled_windows(x, 1), strict=True):
        # A quantile of n packets lies within a standard error, about between these two of them.
        n, error = high - low, np.sqrt(0.09 * (high - low))
        ranks = [int(max(n / 10 - error, 0)), n // 10, int(min(n / 10 + error, n - 1))]
        tenths.append(np.partition(gap[low:high], ranks)[ranks])
    if not tenths:
        return 0.0
    below, tenth, above = np.array(tenths).T
    moved = float(np.ptp(tenth))
    return moved if moved > CHANCE * float(np.median(above - below)) else 0.0


def _kept_away(x: np.ndarray, gap: np.ndarray) -> float:
    """Return by how much more than usual the curve keeps away from the fastest packets of any quarter second."""
    lowest = np.array([gap[low:high].min() for low, high in zip(*_filled_windows(x, 4), strict=True)])
    # Minima of windows are spread exponentially: twice the median is usual.
    return float((lowest - 2 * np.median(lowest)).max()) if len(lowest) >= MIN_WINDOWS else 0.0


def _cut_at_once(x: np.ndarray, cut: np.ndarray) -> bool:
    """Tell whether the packets cut as late stamps crowd in one second: then they were a floor."""
    if not len(cut):
        return False
    edges = np.linspace(0.0, float(x[-1]), max(4, round(float(x[-1]) / KNOT_NS)) + 1)
    cut_there, left = np.histogram(cut, edges)[0], np.histogram(x, edges)[0]
    return bool((cut_there > np.maximum(MAX_CUT * left, MIN_CUT)).any())


def judge_floor(
    x: np.ndarray, gap: np.ndarray, cut: np.ndarray, knots: np.ndarray, bound: float, quantum: int
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return flags of a floor that cannot carry its curve, and the packets near the curve per knot interval.

    Parameters
    ----------
    x, gap : float64 arrays, dims (packet,), nanoseconds since the first stamp, and above the curve
    cut : float64 array, dims (outlier,), nanoseconds since the first stamp
        Where packets were cut as late stamps.
    knots : float64 array, dims (knot,), nanoseconds since the first stamp
    bound : float
        The largest that :func:`curve_bound` gave.
    quantum : int
        Resolution of the stamps, nanoseconds.
    """
    slack = quantum / 8
    near = x[gap <= NEAR_NS + slack]
    support = np.diff(np.searchsorted(near, knots[1:-1]), prepend=0, append=len(near))
    flags = []
    if np.quantile(support, 0.1) < MIN_SUPPORT or bound > MAX_BOUND_NS + slack:
        flags.append("sparse_floor")
    elif _moved_by(x, gap) > MAX_MOVED_NS + slack or _kept_away(x, gap) > MAX_AWAY_NS + slack or _cut_at_once(x, cut):
        flags.append("moving_floor")
    return tuple(flags), support
