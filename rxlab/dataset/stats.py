"""Quantiles with honest intervals, and comparisons with a verdict.

Packets of one run are correlated in time and repetitions differ by more than sampling, so two kinds of intervals exist and
say which they are:

* *within one run*: Woodruff's interval (J. Am. Stat. Assoc. 47, 1952) with an effective sample size from batch means (Seila,
  Management Science 28, 1982) and binomial limits (Korn and Graubard, Survey Methodology 24, 1998). What a block bootstrap
  gives, without resampling. It says nothing about the next run.
* *over repetitions*: Student's t over the runs' quantiles, on the log scale for ratios; Welch's (Biometrika 34, 1947) for two
  configurations. A percentile bootstrap covers 74 % at 3 repetitions, t keeps its 95 %.

Several comparisons are corrected by Holm (Scand. J. Stat. 6, 1979). Which hops carry a difference is in explain.py, what a sweep's
settings do in effects.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from scipy import special

from rxlab.errors import RxlabError
from rxlab.stages import STATUSES

QUANTILES = (0.5, 0.9, 0.99)  # with an interval
SHOWN = (0.999, 1.0)  # shown without a claim
BATCHES = 20
MIN_REPETITIONS = 3  # two runs' spread has one degree of freedom: t then spans anything from 0 to years
MODE_VALUES = 1_000_000
MAX_FACTOR = 100.0  # an interval whose ends are further apart than this says that nothing is known
BETTER, WORSE, CANNOT_TELL = "better", "worse", "cannot tell"


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes
    ----------
    value, low, high : float
        NaN limits: too few values (below `MIN_REPETITIONS` runs) for an interval, or they lie too far apart for one.
    n : int
        Values it rests on: packets within one run, runs over repetitions.
    kind : str
        ``"within one run"`` or ``"over repetitions"``: what the interval covers.
    """

    value: float
    low: float
    high: float
    n: int
    kind: str


@dataclass(frozen=True)
class Comparison:
    """One quantile of configuration B against A; lower latency is better.

    Attributes
    ----------
    quantile : float
    a, b : float
        Geometric mean over the runs of the run's quantile, ns.
    ratio, ratio_low, ratio_high : float
        B / A and its interval; NaN limits (of the difference too): not known, and then there is no verdict.
    difference, difference_low, difference_high : float
        B - A, ns.
    p_value, p_corrected : float
        Welch's, and after Holm's correction; NaN with fewer than `MIN_REPETITIONS` runs on either side.
    verdict : str
        ``"better"``, ``"worse"`` (B than A, at the corrected 5 % level) or ``"cannot tell"``.
    runs_a, runs_b : int
    more_repetitions : int or None
        Repetitions of each configuration that a difference of this size would need, in all, to be seen 4 times of 5 at the corrected
        level; None: unknown, or not passed through :func:`correct`.
    kind : str
        What the interval covers, as in :class:`Estimate`.
    noise : float
        Sum of the two sides' variances between runs, on the log scale.
    """

    quantile: float
    a: float
    b: float
    ratio: float
    ratio_low: float
    ratio_high: float
    difference: float
    difference_low: float
    difference_high: float
    p_value: float
    p_corrected: float
    verdict: str
    runs_a: int
    runs_b: int
    more_repetitions: int | None
    kind: str
    noise: float = np.nan


@dataclass(frozen=True)
class Mode:
    """One hump of a distribution: where (ns) and how much of it (0 to 1)."""

    center: float
    share: float


def quantile_interval(values: np.ndarray, quantile: float, *, confidence: float = 0.95) -> Estimate:
    """Estimate a quantile of one run's values, allowing for their correlation in time.

    Parameters
    ----------
    values : float64 array, dims (packet,), in time order
        NaN are left out.
    """
    return quantile_intervals(values, (quantile,), confidence=confidence)[0]


def quantile_intervals(values: np.ndarray, quantiles: Sequence[float], *, confidence: float = 0.95) -> list[Estimate]:
    """Estimate several quantiles of one run's values as :func:`quantile_interval` does, without sorting all of them.

    The values are approximately median-unbiased (Hyndman and Fan's type 8, The American Statistician 50, 1996): the plain
    order statistic of a p99 of 2,000 packets is low by a fifth of its standard error, which repetitions do not average out.
    """
    series = np.asarray(values, np.float64)
    series = series[~np.isnan(series)]
    n = len(series)
    if n == 0:
        return [Estimate(np.nan, np.nan, np.nan, 0, "within one run") for _ in quantiles]
    places = [_place(n, level) for level in quantiles]
    parted = np.partition(series, sorted({rank for low, high, _ in places for rank in (low, high)}))
    found = [float(parted[low] + weight * (parted[high] - parted[low])) for low, high, weight in places]
    limits: list[tuple[int, int] | None] = [
        _limit_ranks(series, value, level, confidence) if n >= 20 and 0 < level < 1 else None
        for value, level in zip(found, quantiles, strict=True)
    ]
    parted.partition(sorted({rank for pair in limits if pair for rank in pair} or {0}))
    estimates = []
    for value, pair in zip(found, limits, strict=True):
        low, high = (float(parted[pair[0]]), float(parted[pair[1]])) if pair else (np.nan, np.nan)
        estimates.append(Estimate(value, low, high, n, "within one run"))
    return estimates


def _place(n: int, level: float) -> tuple[int, int, float]:
    """Return the two order statistics (from 0) that a quantile lies between, and how far from the lower one."""
    position = min(max((n + 1 / 3) * level + 1 / 3 - 1, 0.0), n - 1.0)
    if level in (0, 1):
        position = level * (n - 1.0)
    low = int(position)
    return low, min(low + 1, n - 1), position - low


def _limit_ranks(series: np.ndarray, value: float, quantile: float, confidence: float) -> tuple[int, int]:
    """Return the order statistics (from 0) that are the ends of a quantile's interval."""
    n = len(series)
    n_effective = _effective_size(series <= value, quantile, confidence)
    hits = n_effective * quantile
    tail = (1 - confidence) / 2
    low = special.betaincinv(hits, n_effective - hits + 1, tail)
    high = special.betaincinv(hits + 1, n_effective - hits, 1 - tail)
    first, last = (min(max(int(np.ceil(level * n)) - 1, 0), n - 1) for level in (low, high))
    return first, last


def _effective_size(is_below: np.ndarray, quantile: float, confidence: float) -> float:
    """Return how many independent values would pin the quantile as well as these do, less the price of estimating that."""
    n = len(is_below)
    batches = min(BATCHES, n // 10)
    length = n // batches
    means = is_below[: length * batches].reshape(batches, length).mean(axis=1)
    variance = means.var(ddof=1) / batches
    independent = quantile * (1 - quantile) / n
    n_effective = n if variance <= independent else n * independent / variance
    tail = 1 - (1 - confidence) / 2
    return float(max(n_effective * (special.ndtri(tail) / special.stdtrit(batches - 1, tail)) ** 2, 2.0))


def usable(packets: xr.Dataset) -> np.ndarray:
    """Return which rows statistics use; bool array, dims (packet,).

    Complete data packets: trusted, and with every stage their path must show. Those trusted although stages were not delivered
    (status lost or blind) name their reader, but their hops would reach over what is missing. Of a refused run none is trusted.
    """
    rows = (packets["status"].values == STATUSES.index("complete")) & packets["is_data"].values.astype(bool)
    return rows & packets["trusted"].values.astype(bool) if "trusted" in packets else rows


def left_out(packets: xr.Dataset) -> dict[str, int]:
    """Return how many data packets statistics leave out, by status; complete ones are left out of a refused run only."""
    rows = packets["is_data"].values.astype(bool) & ~usable(packets)
    counts = np.bincount(packets["status"].values[rows], minlength=len(STATUSES))
    return {name: int(count) for name, count in zip(STATUSES, counts, strict=True) if count}


def hop_values(tree: xr.DataTree, hop: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Return one hop's latencies of the usable packets, in packet order, without NaN: float64 ns."""
    rows = usable(tree["packets"].to_dataset()) if rows is None else rows
    values = tree["hops"].to_dataset()["latency"].sel(hop=hop).values[rows]
    return values[~np.isnan(values)]


def locality(tree: xr.DataTree) -> dict[str, float]:
    """Return the share of usable packets whose protocol stack ran on the reader's CPU, core, last level cache and node.

    Keys ``same_cpu``, ``same_core``, ``same_llc``, ``same_node``; NaN where the host's topology is unknown.
    """
    packets = tree["packets"].to_dataset()
    rows = usable(packets)
    shares = {}
    for name in ("same_cpu", "same_core", "same_llc", "same_node"):
        known = packets[name].values[rows]
        known = known[known >= 0]
        shares[name] = float(known.mean()) if len(known) else float("nan")
    return shares


def steered(tree: xr.DataTree, rows: np.ndarray | None = None) -> dict[str, tuple[int, int]]:
    """Return how many usable packets came to the CPU that steering wanted, and of how many that is known.

    Key ``rfs_delivered``: the CPU on which their socket was read last, RFS's aim (without RFS so many are there by chance);
    ``on_rps_target``: the CPU that RPS takes by their hash. (0, 0) where nothing is known.
    """
    packets = tree["packets"].to_dataset()
    if "rfs_delivered" not in packets:
        return {"rfs_delivered": (0, 0), "on_rps_target": (0, 0)}
    rows = usable(packets) if rows is None else rows
    delivered = packets["rfs_delivered"].values[rows]
    stack = packets["cpu"].sel(stage="netif_receive_skb").values[rows]
    target = packets["rps_predicted"].values[rows]
    is_known = (stack >= 0) & (target >= 0)
    return {
        "rfs_delivered": (int((delivered == 1).sum()), int((delivered >= 0).sum())),
        "on_rps_target": (int((stack[is_known] == target[is_known]).sum()), int(is_known.sum())),
    }


def quantile_table(tree: xr.DataTree, *, confidence: float = 0.95) -> xr.Dataset:
    """Return the quantiles of every hop of one run.

    Returns
    -------
    xarray.Dataset
        dims (hop, quantile): ``latency``, ``latency_low``, ``latency_high`` in ns (limits NaN for the quantiles of ``SHOWN``);
        dims (hop,): ``n`` packets, ``modes`` humps found. Attributes: ``packets_used``, and ``left_out`` by status.
    """
    packets = tree["packets"].to_dataset()
    rows = usable(packets)
    labels = tree["hops"].to_dataset()
    hops = [str(hop) for hop in labels["hop"].values]
    levels = (*QUANTILES, *SHOWN)
    table = np.full((3, len(hops), len(levels)), np.nan)
    n, modes = np.zeros(len(hops), np.int64), np.zeros(len(hops), np.int64)
    for index, hop in enumerate(hops):
        values = hop_values(tree, hop, rows)
        n[index] = len(values)
        modes[index] = len(find_modes(values))
        for column, estimate in enumerate(quantile_intervals(values, levels, confidence=confidence)):
            limits = (np.nan, np.nan) if levels[column] in SHOWN else (estimate.low, estimate.high)
            table[:, index, column] = estimate.value, *limits
    ns = {"units": "ns", "clock": "CLOCK_MONOTONIC"}
    dims = ("hop", "quantile")
    return xr.Dataset(
        {
            "latency": (dims, table[0], {**ns, "long_name": "latency quantile"}),
            "latency_low": (dims, table[1], {**ns, "long_name": "lower end of the interval within the run"}),
            "latency_high": (dims, table[2], {**ns, "long_name": "upper end of the interval within the run"}),
            "n": ("hop", n, {"units": "1", "long_name": "packets"}),
            "modes": ("hop", modes, {"units": "1", "long_name": "humps of the distribution"}),
        },
        {"hop": hops, "quantile": list(levels), "hop_kind": ("hop", labels["hop_kind"].values)},
        {
            "packets_used": int(rows.sum()),
            "left_out": ", ".join(f"{n} {name}" for name, n in left_out(packets).items()),
        },
    )


def over_repetitions(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Return the geometric mean over runs and its t interval on the log scale."""
    from scipy import stats as distributions  # half a second, which only comparisons need

    logs = np.log(np.maximum(np.asarray(values, np.float64), 1.0))
    n = len(logs)
    center = logs.mean() if n else np.nan
    half = np.nan
    if n >= MIN_REPETITIONS:
        half = known_half(distributions.t.ppf(1 - (1 - confidence) / 2, n - 1) * logs.std(ddof=1) / np.sqrt(n))
    return Estimate(
        float(np.exp(center)), float(np.exp(center - half)), float(np.exp(center + half)), n, "over repetitions"
    )


def known_half(half: float) -> float:
    """Return the half width of an interval on the log scale, NaN where it is too wide to say anything."""
    return half if 2 * half <= np.log(MAX_FACTOR) else np.nan


def estimate_quantile(runs: Sequence[np.ndarray], quantile: float, *, confidence: float = 0.95) -> Estimate:
    """Estimate a quantile of a configuration from its runs: over repetitions, or within the run where there is one only."""
    if len(runs) == 1:
        return quantile_interval(runs[0], quantile, confidence=confidence)
    return over_repetitions([quantile_interval(run, quantile).value for run in runs], confidence=confidence)


def compare(
    a_runs: Sequence[np.ndarray],
    b_runs: Sequence[np.ndarray],
    *,
    quantiles: Sequence[float] = QUANTILES,
    confidence: float = 0.95,
) -> list[Comparison]:
    """Compare configuration B with A, quantile by quantile, corrected for their number.

    Parameters
    ----------
    a_runs, b_runs : sequences of float64 arrays, ns
        One array per repetition, in time order.

    Returns
    -------
    list of Comparison
        Pass the lists of several comparisons through :func:`correct` together.
    """
    if not a_runs or not b_runs or any(len(run) == 0 for run in (*a_runs, *b_runs)):
        raise RxlabError(
            "nothing to compare",
            found=f"{len(a_runs)} and {len(b_runs)} runs, or runs without latencies",
            expected="at least one run with latencies on each side",
        )
    sides = [[quantile_intervals(run, quantiles, confidence=confidence) for run in runs] for runs in (a_runs, b_runs)]
    return correct(
        [
            compare_estimates(*([run[at] for run in side] for side in sides), quantile=level, confidence=confidence)
            for at, level in enumerate(quantiles)
        ]
    )


def compare_values(a: Sequence[float], b: Sequence[float], *, quantile: float, confidence: float = 0.95) -> Comparison:
    """Compare one number per repetition, already taken from its run (ns); the verdict waits for :func:`correct`."""
    sides = [[Estimate(float(value), np.nan, np.nan, 1, "within one run") for value in side] for side in (a, b)]
    return compare_estimates(*sides, quantile=quantile, confidence=confidence)


def compare_estimates(
    a: Sequence[Estimate], b: Sequence[Estimate], *, quantile: float, confidence: float = 0.95
) -> Comparison:
    """Compare one quantile of the runs of B with A's; the verdict waits for :func:`correct`."""
    from scipy import stats as distributions  # half a second, which only comparisons need

    sides = (a, b)
    values = [np.array([max(estimate.value, 1.0) for estimate in side]) for side in sides]
    logs = [np.log(value) for value in values]
    centers = [float(log.mean()) for log in logs]
    n = [len(log) for log in logs]
    center_a, center_b = np.exp(centers)
    shift = centers[1] - centers[0]
    tail = 1 - (1 - confidence) / 2
    noise = sum(float(log.var(ddof=1)) for log in logs) if min(n) >= MIN_REPETITIONS else np.nan
    half = raw_half = p_value = np.nan
    kind = "over repetitions"
    if min(n) >= MIN_REPETITIONS:
        error, freedom = welch([log.var(ddof=1) for log in logs], n)
        half = known_half(distributions.t.ppf(tail, freedom) * error)
        raw_error, raw_freedom = welch([value.var(ddof=1) for value in values], n)
        if not np.isnan(half):
            raw_half = distributions.t.ppf(tail, raw_freedom) * raw_error
            p_value = float(2 * distributions.t.sf(abs(shift) / error, freedom)) if error > 0 else float(shift == 0)
    elif min(n) == 1:
        half, raw_half = _within(sides)
        half, kind = known_half(half), "within one run"
    difference = center_b - center_a
    return Comparison(
        quantile, float(center_a), float(center_b), float(np.exp(shift)), float(np.exp(shift - half)), float(np.exp(shift + half)),
        float(difference), float(difference - raw_half), float(difference + raw_half),
        p_value, p_value, CANNOT_TELL, n[0], n[1], None, kind, noise,
    )  # fmt: skip


def welch(variances: Sequence[float], n: Sequence[int]) -> tuple[float, float]:
    """Return the standard error of a difference of means and Welch and Satterthwaite's degrees of freedom."""
    parts = [variance / count for variance, count in zip(variances, n, strict=True)]
    total = sum(parts)
    if total == 0:
        return 0.0, float(sum(n) - 2)
    return float(np.sqrt(total)), total**2 / sum(part**2 / (count - 1) for part, count in zip(parts, n, strict=True))


def _within(sides: Sequence[Sequence[Estimate]]) -> tuple[float, float]:
    """Return the half widths (log ratio, difference) that the first runs' own intervals give."""
    logs = [(np.log(max(e.high, 1.0)) - np.log(max(e.low, 1.0))) / 2 for e, *_ in sides]
    raws = [(e.high - e.low) / 2 for e, *_ in sides]
    return float(np.hypot(logs[0], logs[1])), float(np.hypot(raws[0], raws[1]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number; NaN stay and do not count."""
    corrected = [np.nan] * len(p_values)
    floor = 0.0
    tested = sorted((p, index) for index, p in enumerate(p_values) if not np.isnan(p))
    for rank, (p, index) in enumerate(tested):
        floor = max(floor, min(1.0, p * (len(tested) - rank)))
        corrected[index] = floor
    return corrected


def correct(comparisons: Sequence[Comparison], *, level: float = 0.05) -> list[Comparison]:
    """Give verdicts to a family of comparisons, corrected for their number by Holm's procedure."""
    out = []
    tested = sum(not np.isnan(comparison.p_value) for comparison in comparisons)
    for comparison, p_corrected in zip(comparisons, holm([c.p_value for c in comparisons]), strict=True):
        verdict = CANNOT_TELL
        if p_corrected < level:
            verdict = BETTER if comparison.ratio < 1 else WORSE
        more = _more_repetitions(comparison, level / max(tested, 1), verdict)
        out.append(replace(comparison, p_corrected=p_corrected, verdict=verdict, more_repetitions=more))
    return out


def _more_repetitions(comparison: Comparison, level: float, verdict: str) -> int | None:
    """Return how many repetitions in all would show a difference of this size 4 times of 5, at the corrected level."""
    if np.isnan(comparison.p_value) or comparison.ratio == 1 or comparison.noise == 0:
        return None
    reach = special.ndtri(1 - level / 2) + special.ndtri(0.8)
    # One more than the normal approximation asks for: t's price at small numbers.
    needed = int(min(np.ceil(reach**2 * comparison.noise / np.log(comparison.ratio) ** 2) + 1, 10_000))
    return max(needed, min(comparison.runs_a, comparison.runs_b) + 1) if verdict == CANNOT_TELL else needed


def find_modes(values: np.ndarray, *, least_share: float = 0.05) -> list[Mode]:
    """Return the humps of a latency distribution, on the log scale.

    A hump counts if it holds `least_share` of the values and is parted from its neighbour by a valley that lies a fifth below
    the lower of the two and further than chance explains (4 standard deviations of the counts).
    """
    positive = np.asarray(values, np.float64)
    # A million values, evenly spaced in time, show every hump of 5 %.
    positive = positive[:: max(len(positive) // MODE_VALUES, 1)]
    positive = np.log(positive[positive > 0])
    if len(positive) < 100:
        return []
    low, high = np.quantile(positive, [0.001, 0.999])
    if high <= low:
        return [Mode(float(np.exp(low)), 1.0)]
    quartiles = np.quantile(positive, [0.25, 0.75])
    width = max(2 * (quartiles[1] - quartiles[0]) * len(positive) ** (-1 / 3), (high - low) / 200, 0.01)
    counts, edges = np.histogram(positive, bins=max(int((high - low) / width), 4), range=(low, high))
    smooth = np.convolve(counts, [0.25, 0.5, 0.25], mode="same")
    bounds = [0, *_valleys(smooth), len(counts)]
    modes = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        share = counts[begin:end].sum() / max(counts.sum(), 1)
        peak = begin + int(np.argmax(smooth[begin:end]))
        modes.append(Mode(float(np.exp((edges[peak] + edges[peak + 1]) / 2)), float(share)))
    return [mode for mode in modes if mode.share >= least_share]


def _valleys(smooth: np.ndarray) -> Iterator[int]:
    """Yield the bins of the valleys that part two humps for good, left to right."""
    peak, valley = smooth[0], 0
    for index in range(1, len(smooth)):
        lowest = smooth[valley]
        if smooth[index] <= lowest or smooth[index] > peak and not _parts(peak, lowest, smooth[index]):
            valley = index
            peak = max(peak, smooth[index])
        elif _parts(peak, lowest, smooth[index]):
            yield valley
            peak, valley = smooth[index], index


def _parts(left: float, valley: float, right: float) -> bool:
    lower = min(left, right)
    return valley < 0.8 * lower and lower - valley > 4 * np.sqrt(lower + valley)
