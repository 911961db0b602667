"""Why is it faster: a difference of a quantile split into hops, CPUs or attribution classes, and what the tracing adds to it.

Contributions to a quantile are conditional means at the quantile (Gourieroux, Laurent, Scaillet, J. Empirical Finance 7, 2000),
which add up to it. They come from traced runs, and recording an event costs time on the path: where one configuration has more
events than the other, the difference has a bias, which :func:`tracing_bias` states and :func:`less_recording` takes off for
those who ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from rxlab.dataset import schema, stats
from rxlab.errors import RxlabError, UsageError
from rxlab.stages import STAGE_INDEX

PARTS = ("hop", "cpu", "attribution")
# Packets by rank around a quantile that stand for it.
WINDOW = 0.05
LARGE_BIAS = 0.1  # of the effect: beyond it the report warns


@dataclass(frozen=True)
class Bias:
    """What recording adds to the difference of two configurations: the workload's median, traced against untraced.

    Attributes
    ----------
    effect : float
        Untraced B - A, ns: what there is to explain.
    bias, low, high : float
        Traced B - A minus `effect`, ns, and its interval over repetitions (NaN below `stats.MIN_REPETITIONS` runs of each).
    """

    effect: float
    bias: float
    low: float
    high: float

    @property
    def share(self) -> float:
        """The bias over the effect; infinite without an effect."""
        return abs(self.bias / self.effect) if self.effect else np.inf

    @property
    def is_large(self) -> bool:
        """Whether it exceeds a tenth of the effect."""
        return bool(self.share > LARGE_BIAS)


def explain(
    a_trees: Sequence[xr.DataTree], b_trees: Sequence[xr.DataTree], *, quantile: float = 0.5, by: str = "hop"
) -> xr.Dataset:
    """Split the difference of a quantile of total_latency between two configurations.

    Parameters
    ----------
    by : str
        ``"hop"``: steps; ``"cpu"``: the CPU on which each step ended; ``"attribution"``: why the reader ran, each class with its
        share of the packets.

    Returns
    -------
    xarray.Dataset
        dims (`by`,): ``a``, ``b`` contribution to the quantile, ns, mean over runs; ``difference`` b - a, adding up to ``total``;
        ``low``, ``high`` the interval of the difference over repetitions (NaN below `stats.MIN_REPETITIONS` runs).
    """
    from scipy import stats as distributions  # half a second, which only comparisons need

    found = [[contributions(tree, quantile, by=by) for tree in trees] for trees in (a_trees, b_trees)]
    labels = list(dict.fromkeys(label for side in found for parts in side for label in parts[by].values.tolist()))
    if by == "cpu":
        labels.sort()
    tables = [np.stack([parts.reindex({by: labels}, fill_value=0.0).values for parts in side]) for side in found]
    means = [table.mean(axis=0) for table in tables]
    half = np.full(len(labels), np.nan)
    n = [len(table) for table in tables]
    if min(n) >= stats.MIN_REPETITIONS:
        variances = [table.var(axis=0, ddof=1) for table in tables]
        for index in range(len(labels)):
            error, freedom = stats.welch([variance[index] for variance in variances], n)
            half[index] = distributions.t.ppf(0.975, freedom) * error
    difference = means[1] - means[0]
    ns = {"units": "ns"}
    variables = {
        "a": (by, means[0], {**ns, "long_name": "contribution in A"}),
        "b": (by, means[1], {**ns, "long_name": "contribution in B"}),
        "difference": (by, difference, {**ns, "long_name": "B - A"}),
        "low": (by, difference - half, {**ns, "long_name": "lower end of B - A"}),
        "high": (by, difference + half, {**ns, "long_name": "upper end of B - A"}),
        "total": (
            (),
            difference.sum(),
            {**ns, "long_name": f"difference of the {quantile:g} quantiles of total_latency"},
        ),
    }
    return xr.Dataset(variables, {by: labels}, {"quantile": quantile})


def contributions(tree: xr.DataTree, quantile: float, *, by: str = "hop") -> xr.DataArray:
    """Return what each step, CPU or attribution class contributes to a quantile of total_latency: dims (`by`,), ns.

    The mean of each part over the packets around the quantile (up to 5 % of all by rank), scaled by the quantile over the
    mean of their totals, which is near one; so they add up to the quantile.
    """
    if by not in PARTS:
        raise UsageError("cannot explain by that", found=repr(by), expected=", ".join(PARTS))
    value, around = packets_around(tree, quantile)
    hops, packets = tree["hops"].to_dataset(), tree["packets"].to_dataset()
    kinds = hops["hop_kind"].values
    steps = [str(hop) for hop, kind in zip(hops["hop"].values, kinds, strict=True) if kind == "step"]
    latency = np.stack([_step_latency(hops, step, around) for step in steps], axis=1)
    if by == "hop":
        labels, parts = np.array(steps, dtype=object), latency.mean(axis=0)
    elif by == "cpu":
        cpu = np.stack([packets["cpu"].sel(stage=step).values[around] for step in steps], axis=1).astype(np.int64)
        labels = np.unique(cpu[latency != 0])
        parts = np.array([np.where(cpu == one, latency, 0.0).sum(axis=1).mean() for one in labels])
    else:
        code = packets["attribution"].values[around]
        words = schema.meanings(packets["attribution"])
        labels = np.array([words[int(one)] for one in np.unique(code)], dtype=object)
        parts = np.array([np.where(code == one, latency.sum(axis=1), 0.0).mean() for one in np.unique(code)])
    scale = value / parts.sum() if parts.sum() else 1.0
    attrs = {"units": "ns", "long_name": "contribution to the quantile"}
    return xr.DataArray(parts * scale, dims=by, coords={by: labels}, attrs=attrs)


def hop_contributions(tree: xr.DataTree, quantiles: Sequence[float]) -> xr.DataArray:
    """Return what each step contributes to several quantiles of total_latency: dims (quantile, hop), ns.

    The same as :func:`contributions` at each, reading every column once.
    """
    windows = [packets_around(tree, quantile) for quantile in quantiles]
    hops = tree["hops"].to_dataset()
    everything = np.arange(hops.sizes["packet"])
    parts = np.zeros((len(windows), len(schema.STEP_NAMES)))
    for column, step in enumerate(schema.STEP_NAMES):
        latency = _step_latency(hops, step, everything)
        parts[:, column] = [latency[around].mean() for _, around in windows]
    sums = parts.sum(axis=1)
    scale = [value / total if total else 1.0 for (value, _), total in zip(windows, sums, strict=True)]
    coords = {"quantile": list(quantiles), "hop": list(schema.STEP_NAMES)}
    attrs = {"units": "ns", "long_name": "contribution to the quantile"}
    return xr.DataArray(parts * np.array(scale)[:, np.newaxis], dims=("quantile", "hop"), coords=coords, attrs=attrs)


def packets_around(tree: xr.DataTree, quantile: float) -> tuple[float, np.ndarray]:
    """Return a quantile of total_latency (ns) and the rows of the usable packets around it by rank."""
    totals = tree["hops"].to_dataset()["latency"].sel(hop="total_latency").values
    rows = np.flatnonzero(stats.usable(tree["packets"].to_dataset()) & ~np.isnan(totals))
    if not len(rows):
        raise RxlabError(
            "no complete packet to explain",
            found="no total_latency",
            expected="a traced run with complete data packets",
        )
    totals = totals[rows]
    n = len(rows)
    center = min(int(np.ceil(quantile * n)) - 1, n - 1)
    # A window inside the shorter tail, so that it stays centered on the quantile.
    reach = int(min(WINDOW / 2 * n, center, n - 1 - center))
    by_rank = np.argpartition(totals, sorted({center - reach, center + reach}))
    around = np.sort(rows[by_rank[center - reach : center + reach + 1]])
    return stats.quantile_interval(totals, quantile).value, around


def _step_latency(hops: xr.Dataset, step: str, rows: np.ndarray) -> np.ndarray:
    # A step not seen contributes nothing: its time is in the next one. The step from the NIC's stamp is before total_latency.
    values = hops["latency"].sel(hop=step).values[rows]
    from_nic = hops["hop_from"].sel(hop=step).values[rows] == STAGE_INDEX["nic"]
    return np.where(np.isnan(values) | from_nic, 0.0, values)


def tracing_bias(
    a: tuple[Sequence[np.ndarray], Sequence[np.ndarray]], b: tuple[Sequence[np.ndarray], Sequence[np.ndarray]]
) -> Bias | None:
    """Return what recording adds to the difference of the workload's medians; None where an arm has no runs.

    A configuration's median is the geometric mean over its runs, the measure of the tables and of the verdict.

    Parameters
    ----------
    a, b : pairs of sequences of float64 arrays, ns
        The workload's latencies of the configuration's untraced and of its traced runs.
    """
    from scipy import stats as distributions  # half a second, which only comparisons need

    if not all((*a, *b)):
        return None
    (a_untraced, a_traced), (b_untraced, b_traced) = ([_mean_of_medians(arm) for arm in side] for side in (a, b))
    effect = b_untraced[0] - a_untraced[0]
    bias = b_traced[0] - a_traced[0] - effect
    n = [len(arm) for side in (a, b) for arm in side]
    half = np.nan
    if min(n) >= stats.MIN_REPETITIONS:
        error, freedom = stats.welch([variance for _, variance in (a_untraced, a_traced, b_untraced, b_traced)], n)
        half = distributions.t.ppf(0.975, freedom) * error
    return Bias(float(effect), float(bias), float(bias - half), float(bias + half))


def _mean_of_medians(runs: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the geometric mean of the runs' medians (ns), as tables and verdicts have it, and the variance of one run's (ns^2).

    The variance is that of the logarithms carried over to the mean (delta method); NaN for one run.
    """
    medians = [stats.quantile_interval(run, 0.5).value for run in runs]
    mean = stats.over_repetitions(medians).value
    return mean, float(mean**2 * np.log(medians).var(ddof=1)) if len(medians) > 1 else np.nan


def cost_per_event(
    untraced: Sequence[np.ndarray], traced: Sequence[np.ndarray], trees: Sequence[xr.DataTree]
) -> stats.Estimate | None:
    """Return what recording one event of the median packet's path cost, at most, ns: None where an arm has no runs.

    The workload's median traced minus untraced, over the stages seen of the packets around the median. The sender and the
    scheduler raise events too, so this is an upper bound.
    """
    from scipy import stats as distributions  # half a second, which only comparisons need

    if not untraced or not traced or not trees:
        return None
    sides = [_mean_of_medians(arm) for arm in (untraced, traced)]
    events = float(np.mean([_stages_seen(tree, packets_around(tree, 0.5)[1]) for tree in trees]))
    cost = (sides[1][0] - sides[0][0]) / events
    n = [len(untraced), len(traced)]
    half = np.nan
    if min(n) >= stats.MIN_REPETITIONS:
        error, freedom = stats.welch([variance for _, variance in sides], n)
        half = distributions.t.ppf(0.975, freedom) * error / events
    kind = "over repetitions"
    return stats.Estimate(float(cost), float(cost - half), float(cost + half), min(n), kind)


def _stages_seen(tree: xr.DataTree, rows: np.ndarray) -> float:
    hops = tree["hops"].to_dataset()
    seen = [~np.isnan(hops["latency"].sel(hop=step).values[rows]) for step in schema.STEP_NAMES]
    return 1.0 + float(np.mean(np.sum(seen, axis=0)))


def less_recording(parts: xr.DataArray, cost_ns: float, seen: xr.DataArray | float = 1.0) -> xr.DataArray:
    """Return contributions of hops with the estimated cost of recording taken off: an estimate, named as one.

    A step holds one event's cost: that of the event it starts at, whose stamp is taken before it is written. Steps that
    contribute nothing keep nothing; what would come out negative is left negative, because it says that the estimate is too large.
    """
    corrected = xr.where(parts > 0, parts - cost_ns * seen, parts)
    attrs = {"units": "ns", "long_name": "contribution to the quantile, less the estimated cost of recording"}
    return corrected.assign_attrs(attrs)
