"""What a sweep's settings do: main effects, interactions, a ranking with intervals, and whether the order of the runs mattered.

One number per run comes in (a quantile, ns); everything is done on the log scale, so effects are ratios.

* *Effects* are contrasts of the configurations' means, with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946):
  no equal spread and no equal number of runs is assumed. Corrected together by Holm (Scand. J. Stat. 6, 1979).
* *Ranks* have limits from all pairwise comparisons, corrected together: a configuration is at best behind those that are
  significantly faster, at worst before those that are significantly slower (Mogstad, Romano, Shaikh, Wilhelm, Review of Economic
  Studies 91, 2024). Choosing the best of many by its mean alone would promise too much.
* *Order* is checked for a drift over the experiment and for what the configuration before leaves behind (Fisher's F on nested
  linear models: Cox, Planning of Experiments, 1958).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import stats
from rxlab.errors import RxlabError

LEVEL = 0.05


@dataclass(frozen=True)
class Effect:
    """What one setting does on average over the others, or how much two settings change each other's effect.

    Attributes
    ----------
    settings, levels, baselines : tuples
        One of each for a main effect, two for an interaction; the effect is `levels` against `baselines`.
    ratio, low, high : float
        Latency ratio and its 95 % interval; of an interaction the ratio of the ratios: 1 where the settings do not interact.
    p_value, p_corrected : float
        NaN where too few configurations have two runs.
    cells : int
        Combinations of the other settings it rests on.
    """

    settings: tuple[str, ...]
    levels: tuple[Any, ...]
    baselines: tuple[Any, ...]
    ratio: float
    low: float
    high: float
    p_value: float
    p_corrected: float
    cells: int

    @property
    def is_interaction(self) -> bool:
        """Whether it is of two settings."""
        return len(self.settings) > 1

    @property
    def is_known(self) -> bool:
        """Whether it is significant after the correction."""
        return bool(self.p_corrected < LEVEL)

    @property
    def words(self) -> str:
        """Say what is compared: ``rps=on against off``, ``rps=on with load=4000``."""
        named = [f"{name}={level}" for name, level in zip(self.settings, self.levels, strict=True)]
        return " with ".join(named) if self.is_interaction else f"{named[0]} against {self.baselines[0]}"


@dataclass(frozen=True)
class Rank:
    """One configuration among several, fastest first.

    Attributes
    ----------
    label : str
    estimate : stats.Estimate
        Geometric mean over its runs and interval.
    first, last : int
        Best and worst rank it may have, 95 % for all together.
    against_best : stats.Comparison or None
        Against the fastest one (None for that itself), corrected over all pairs.
    """

    label: str
    estimate: stats.Estimate
    first: int
    last: int
    against_best: stats.Comparison | None


@dataclass(frozen=True)
class Best:
    """The fastest configuration and what speaks for it.

    Attributes
    ----------
    rank : Rank
    rivals : tuple of str
        Configurations that cannot be told from it, itself not among them.
    runner_up : Rank or None
    cost : stats.Estimate or None
        CPU time in the kernel per packet, ns.
    cost_against_runner_up : stats.Comparison or None
        The runner-up's cost against the best one's.
    """

    rank: Rank
    rivals: tuple[str, ...]
    runner_up: Rank | None
    cost: stats.Estimate | None
    cost_against_runner_up: stats.Comparison | None


@dataclass(frozen=True)
class Order:
    """Whether the order of the runs mattered.

    Attributes
    ----------
    drift, low, high : float
        Last run's latency over the first one's, everything else equal, and its 95 % interval.
    p_drift, p_carry : float
        Of no drift; of no influence of the configuration before (NaN: not enough runs). Corrected for each other.
    confounded : float
        Share of the order that the configurations explain (0 shuffled well, 1 one after the other).
    runs : int
    """

    drift: float
    low: float
    high: float
    p_drift: float
    p_carry: float
    confounded: float
    runs: int

    @property
    def is_known(self) -> bool:
        """Whether there is anything to say."""
        return bool(np.isfinite(self.p_drift))


def find_effects(values: xr.DataArray, *, confidence: float = 0.95) -> list[Effect]:
    """Return every setting's main effects and every two settings' interactions, corrected together.

    Parameters
    ----------
    values : DataArray, dims (settings..., repetition), ns
        One quantile of each run; NaN: no run. Baseline is each setting's first value.
    """
    names = [str(name) for name in values.dims if name != "repetition"]
    logs = np.log(np.maximum(values.transpose(*names, "repetition").values, 1.0))
    labels = {name: values[name].values if name in values.coords else np.arange(values.sizes[name]) for name in names}
    means, errors, n = _cells(logs)
    wanted = [(name,) for name in names] + list(combinations(names, 2))
    found = []
    for settings in wanted:
        axes = [names.index(name) for name in settings]
        for at in product(*(range(1, means.shape[axis]) for axis in axes)):
            contrast, cells = _contrast(np.isfinite(means), axes, at)
            if cells:
                ratio, low, high, p_value = _estimate(contrast, means, errors, n, confidence)
                levels = tuple(labels[name][one] for name, one in zip(settings, at, strict=True))
                baselines = tuple(labels[name][0] for name in settings)
                found.append(Effect(settings, levels, baselines, ratio, low, high, p_value, np.nan, cells))
    corrected = stats.holm([effect.p_value for effect in found])
    return [replace(effect, p_corrected=p) for effect, p in zip(found, corrected, strict=True)]


def _cells(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, squared standard error and runs of each configuration; NaN where there are too few runs."""
    n = np.isfinite(logs).sum(axis=-1)
    filled = np.where(np.isfinite(logs), logs, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(n > 0, filled.sum(axis=-1) / n, np.nan)
        squares = np.where(np.isfinite(logs), (logs - means[..., np.newaxis]) ** 2, 0.0).sum(axis=-1)
        errors = np.where(n > 1, squares / (n - 1) / n, np.nan)
    return means, errors, n


def _contrast(known: np.ndarray, axes: Sequence[int], at: Sequence[int]) -> tuple[np.ndarray, int]:
    """Return the weights of the configurations in an effect, and over how many combinations of the other settings it is a mean."""
    weights = np.zeros(known.shape)
    moved = np.moveaxis(weights, axes, range(len(axes)))
    seen = np.moveaxis(known, axes, range(len(axes)))
    corners = list(product(*((0, one) for one in at)))
    complete = np.logical_and.reduce([seen[corner] for corner in corners])
    cells = int(np.sum(complete))
    for corner in corners:
        sign = (-1) ** sum(one == 0 for one in corner)
        moved[corner] = np.where(complete, sign / max(cells, 1), 0.0)
    return weights, cells


def _estimate(
    weights: np.ndarray, means: np.ndarray, errors: np.ndarray, n: np.ndarray, confidence: float
) -> tuple[float, float, float, float]:
    """Return ratio, interval and p of a contrast of means on the log scale."""
    from scipy import stats as distributions  # half a second, which only comparisons need

    used = weights != 0
    w, shift = weights[used], float((weights[used] * means[used]).sum())
    parts = w**2 * errors[used]
    half = p_value = np.nan
    if np.isfinite(parts).all():
        variance = parts.sum()
        if variance > 0:
            freedom = variance**2 / (parts**2 / (n[used] - 1)).sum()
            if freedom >= 2:  # less says nothing: an interval from 0 to years
                error = np.sqrt(variance)
                half = stats.known_half(distributions.t.ppf(1 - (1 - confidence) / 2, freedom) * error)
                p_value = float(2 * distributions.t.sf(abs(shift) / error, freedom))
    return float(np.exp(shift)), float(np.exp(shift - half)), float(np.exp(shift + half)), p_value


def rank(groups: Mapping[str, Sequence[float]], *, quantile: float = 0.5, confidence: float = 0.95) -> list[Rank]:
    """Rank configurations, fastest first, with limits of their ranks.

    Parameters
    ----------
    groups : mapping of str to sequence of float
        Configuration -> one number per run, ns (a quantile of the run).
    quantile : float
        Which one; kept in the comparisons.
    """
    groups = {label: values for label, values in groups.items() if len(values)}
    estimates = {label: stats.over_repetitions(values, confidence=confidence) for label, values in groups.items()}
    order = sorted(groups, key=lambda label: estimates[label].value)
    pairs = list(combinations(order, 2))  # the faster one first
    compared = stats.correct(
        [stats.compare_values(groups[a], groups[b], quantile=quantile, confidence=confidence) for a, b in pairs],
        level=1 - confidence,
    )
    found = dict(zip(pairs, compared, strict=True))
    ranks = []
    for label in order:
        ahead = sum(pair[1] == label and one.verdict != stats.CANNOT_TELL for pair, one in found.items())
        behind = sum(pair[0] == label and one.verdict != stats.CANNOT_TELL for pair, one in found.items())
        best = found.get((order[0], label))
        ranks.append(Rank(label, estimates[label], 1 + ahead, len(order) - behind, best))
    return ranks


def choose_best(ranks: Sequence[Rank], cost: Mapping[str, Sequence[float]]) -> Best:
    """Return the fastest of ranked configurations with its evidence.

    Parameters
    ----------
    ranks : sequence of Rank
    cost : mapping of str to sequence of float
        Configuration -> CPU time per packet of each run, ns; may lack some or all.
    """
    if not ranks:
        raise RxlabError("nothing to choose from", expected="runs of at least one configuration")
    first, second = ranks[0], ranks[1] if len(ranks) > 1 else None
    mine = cost.get(first.label) or []
    theirs = (cost.get(second.label) or []) if second else []
    compared = stats.correct([stats.compare_values(mine, theirs, quantile=0.5)])[0] if mine and theirs else None
    rivals = tuple(one.label for one in ranks[1:] if one.first == 1)
    return Best(first, rivals, second, stats.over_repetitions(mine) if mine else None, compared)


def check_order(
    labels: Sequence[Hashable], starts_ns: Sequence[int], values: Sequence[float], *, confidence: float = 0.95
) -> Order:
    """Tell whether runs drift over the experiment, or keep something of the run before.

    Parameters
    ----------
    labels : sequence
        Configuration of each run.
    starts_ns : sequence of int
        When each run started.
    values : sequence of float
        One quantile of each run, ns.
    """
    from scipy import stats as distributions  # half a second, which only comparisons need

    order = np.argsort(np.asarray(starts_ns), kind="stable")
    y = np.log(np.maximum(np.asarray(values, np.float64)[order], 1.0))
    codes = np.unique([str(label) for label in labels], return_inverse=True)[1][order]
    n, groups = len(y), int(codes.max(initial=0)) + 1
    position = np.linspace(-0.5, 0.5, n)
    base = np.eye(groups)[codes]
    none = Order(np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, n)
    if n - groups - 1 < 2:
        return none
    confounded = 1 - _residual(base, position) / max(_residual(np.ones((n, 1)), position), 1e-300)
    trend = np.column_stack([base, position])
    if np.linalg.matrix_rank(trend) < trend.shape[1]:
        return replace(none, confounded=float(confounded))
    coefficients, *_ = np.linalg.lstsq(trend, y, rcond=None)
    freedom = n - trend.shape[1]
    squares = _residual(trend, y)
    spread = np.sqrt(squares / freedom * np.linalg.inv(trend.T @ trend)[-1, -1])
    slope = float(coefficients[-1])
    half = float(distributions.t.ppf(1 - (1 - confidence) / 2, freedom) * spread)
    p_drift = float(2 * distributions.t.sf(abs(slope) / spread, freedom)) if spread > 0 else float(slope == 0)
    p_carry = _carry(trend, codes, groups, y)
    p_drift, p_carry = stats.holm([p_drift, p_carry])
    drift, low, high = (float(np.exp(value)) for value in (slope, slope - half, slope + half))
    return Order(drift, low, high, p_drift, p_carry, float(confounded), n)


def _carry(model: np.ndarray, codes: np.ndarray, groups: int, y: np.ndarray) -> float:
    """Return the p of no influence of the configuration of the run before; NaN where there are too few runs to tell."""
    from scipy import stats as distributions  # half a second, which only comparisons need

    if groups < 2:
        return np.nan
    before = np.eye(groups)[codes[:-1], 1:]
    small, y = model[1:], y[1:]
    large = np.column_stack([small, before])
    ranks = [int(np.linalg.matrix_rank(one)) for one in (small, large)]
    freedom = len(y) - ranks[1]
    if freedom < 2 or ranks[1] == ranks[0]:
        return np.nan
    rest = _residual(large, y)
    gained = (_residual(small, y) - rest) / (ranks[1] - ranks[0])
    return float(distributions.f.sf(gained / (rest / freedom), ranks[1] - ranks[0], freedom)) if rest > 0 else np.nan


def _residual(model: np.ndarray, y: np.ndarray) -> float:
    coefficients, *_ = np.linalg.lstsq(model, y, rcond=None)
    return float(((y - model @ coefficients) ** 2).sum())
