"""How far the clock may be from a curve below its packets, and whether the packets can carry a curve at all.

One side alone is known, so a floor that moves looks like a clock that moves. What gives a moving floor away: the slower packets move
with it by more, and a curve that followed it leaves its packets elsewhere.
"""

from __future__ import annotations

import numpy as np

from rxlab.follow.lowercurve import window_minima

KNOT_NS = 1_000_000_000
# The share of the looser twin's distance in the bound, and which parts it has, were chosen so that it held in more than 99 % of
# perturbations of recorded and simulated floors made for this purpose and never judged on; as in split conformal prediction
# (Lei et al. 2018) nothing is assumed of how the errors are distributed.
LOOSER_SHARE = 0.1
# The same of what the fast tenth of the packets moves against the curve, where a floor wanders for seconds on a loaded machine; and
# beyond this, or where the fastest of a quarter second keep away by this much more than usual, the floor is said to move (chosen on
# 28 recordings under ten kinds of load, where 95 % of the perturbations were within without both, 99.5 % of what is left with them).
MOVED_SHARE, MAX_MOVED_NS = 0.6, 20.0
# Twenty quantiles lie within so many of twice their standard error by chance.
CHANCE = 2.0
# Windows with fewer packets, or with less than this share of the usual number, say nothing.
MIN_FILLED, FILLED_SHARE = 16, 0.2
ROUNDING_NS = 3.0
# The floor is sparse where fewer packets than this lie within NEAR_NS of the curve, per knot.
MIN_SUPPORT = 3
NEAR_NS = 100
# Nor can a floor whose packets leave this much open carry a curve (seen: TCP at its tap, where one packet in 500 is faster by
# 140 ns: beyond the bound in 5 % of the perturbations).
MAX_BOUND_NS = 150
# Near an end packets hold the curve from one side only, and it swings: what its last second keeps away counts whole.
END_WINDOWS = 4
# Late stamps are strewn; where this share of a second's packets was cut, the curve may lie above a floor.
MAX_CUT, MIN_CUT = 0.03, 8


def curve_bound(x: np.ndarray, y: np.ndarray, knots: np.ndarray, curve: np.ndarray, looser: np.ndarray) -> float:
    """Return how far the clock may be from a curve: by a floor that moves, between the knots, by the price on unrest.

    Where even the fastest packet of three eighths of a second keeps away, the floor has moved or the clock has: which cannot be
    told. For less no clock leaves its curve and comes back, but a floor does.
    """
    from scipy.ndimage import minimum_filter1d

    gap = y - np.interp(x, knots, curve)
    lowest = gap[window_minima(x, gap, max(4, 8 * round(float(x[-1]) / KNOT_NS)))]
    largest = float(minimum_filter1d(lowest, 3, mode="mirror").max())
    # Between knots a smooth curve is off its chord by an eighth of the second difference.
    sag = float(np.abs(np.diff(curve, 2)).max(initial=0.0)) / 8
    # Beyond the last well filled half second, before one late packet, nothing holds the looser curve.
    low, high = _filled_windows(x, 2)
    apart = _apart(np.interp(x[(low + high) // 2], knots, looser - curve))
    return ROUNDING_NS + largest + sag + LOOSER_SHARE * apart


def _apart(difference: np.ndarray) -> float:
    """Return the largest difference of two curves, one constant apart."""
    return float(np.abs(difference - np.median(difference)).max(initial=0.0)) if len(difference) else 0.0


def _filled_windows(x: np.ndarray, per_knot: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first and last row (exclusive) of equally long windows, without those that hold next to nothing."""
    n_windows = max(4, per_knot * round(float(x[-1]) / KNOT_NS))
    edges = np.searchsorted(x, np.linspace(0.0, float(x[-1]), n_windows + 1))
    edges[-1] = len(x)
    size = np.diff(edges)
    filled = size >= max(float(MIN_FILLED), FILLED_SHARE * float(np.median(size)))
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


def _kept_away(x: np.ndarray, gap: np.ndarray) -> tuple[float, float]:
    """Return by how much more than usual the curve keeps away from the fastest packets of any quarter second, and near an end."""
    lowest = np.array([gap[low:high].min() for low, high in zip(*_filled_windows(x, 4), strict=True)])
    if len(lowest) <= 2 * END_WINDOWS:
        return 0.0, 0.0
    # Minima of windows are spread exponentially: twice the median is usual.
    beyond = np.maximum(lowest - 2 * np.median(lowest), 0.0)
    return float(beyond.max()), float(max(beyond[:END_WINDOWS].max(), beyond[-END_WINDOWS:].max()))


def _cut_at_once(x: np.ndarray, cut: np.ndarray) -> bool:
    """Tell whether the packets cut as late stamps crowd in one second: then they were a floor."""
    if not len(cut):
        return False
    edges = np.linspace(0.0, float(x[-1]), max(4, round(float(x[-1]) / KNOT_NS)) + 1)
    cut_there, left = np.histogram(cut, edges)[0], np.histogram(x, edges)[0]
    return bool((cut_there > np.maximum(MAX_CUT * left, MIN_CUT)).any())


def judge_floor(
    x: np.ndarray, gap: np.ndarray, cut: np.ndarray, bound: float, n_intervals: int, quantum: int
) -> tuple[tuple[str, ...], np.ndarray, float]:
    """Return flags of a floor that cannot carry its curve, the packets near the curve per knot interval, and the whole bound.

    Parameters
    ----------
    x, gap : float64 arrays, dims (packet,), nanoseconds since the first stamp, and above the curve
    cut : float64 array, dims (outlier,), nanoseconds since the first stamp
        Where packets were cut as late stamps.
    bound : float
        What :func:`curve_bound` gave.
    n_intervals, quantum : int
        Intervals to count in; resolution of the stamps, nanoseconds.
    """
    slack = quantum / 8
    interval = np.minimum((x * (n_intervals / x[-1])).astype(np.int64), n_intervals - 1)
    support = np.bincount(interval[gap <= NEAR_NS + slack], minlength=n_intervals)
    moved = _moved_by(x, gap)
    anywhere, at_end = _kept_away(x, gap)
    whole = bound + MOVED_SHARE * moved + at_end
    flags = set()
    if np.quantile(support, 0.1) < MIN_SUPPORT or bound > MAX_BOUND_NS + slack:
        flags.add("sparse_floor")
    elif whole > MAX_BOUND_NS + slack or max(moved, anywhere) > MAX_MOVED_NS + slack or _cut_at_once(x, cut):
        flags.add("moving_floor")
    return tuple(flags), support, whole
