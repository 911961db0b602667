"""Many packets, many runs: mergeable histograms, coverage of several runs, a sweep's runs as one dataset.

Histograms have logarithmic buckets that are the same everywhere, so they merge exactly by adding, across runs, hosts and time,
and a quantile read from them is within 1 % of the exact one (Masson, Rim, Lee: DDSketch, VLDB 2019).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import schema, stats
from rxlab.errors import RxlabError, SchemaError
from rxlab.stages import STAGE_NAMES

RELATIVE_ERROR = 0.01
GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
# Bucket i holds (GAMMA**(i-2), GAMMA**(i-1)] ns, i from 1; bucket 0 holds all up to and including 0 ns (negative hops are
# counted, not hidden); the last one is open: above 1000 s.
N_BUCKETS = int(np.ceil(np.log(1e12) / np.log(GAMMA))) + 3

# Points of a curve that is to be drawn, however many packets it stands for.
CURVE_POINTS = 600


class LogHistogram:
    """Counts of latencies in logarithmic buckets.

    Attributes
    ----------
    counts : int64 array, dims (bucket,)
    minimum, maximum : float
        Exact, ns; NaN when empty.
    """

    def __init__(self, counts: np.ndarray | None = None, minimum: float = np.nan, maximum: float = np.nan) -> None:
        self.counts = np.zeros(N_BUCKETS, np.int64) if counts is None else np.asarray(counts, np.int64)
        if self.counts.shape != (N_BUCKETS,):
            raise SchemaError("histogram has other buckets", found=f"{self.counts.shape}", expected=f"({N_BUCKETS},)")
        self.minimum, self.maximum = minimum, maximum

    @property
    def n(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum())

    def add(self, values: np.ndarray) -> LogHistogram:
        """Count values (float64 ns; NaN are left out) and return self."""
        finite = np.asarray(values, np.float64)
        finite = finite[~np.isnan(finite)]
        if len(finite):
            self.counts += np.bincount(bucket_of(finite), minlength=N_BUCKETS)
            self.minimum = float(np.fmin(self.minimum, finite.min()))
            self.maximum = float(np.fmax(self.maximum, finite.max()))
        return self

    def merge(self, other: LogHistogram) -> LogHistogram:
        """Return the histogram of both, exactly as if all values had been counted in one."""
        return LogHistogram(
            self.counts + other.counts,
            float(np.fmin(self.minimum, other.minimum)),
            float(np.fmax(self.maximum, other.maximum)),
        )

    def quantile(self, level: float) -> float:
        """Return a quantile within 1 % of the exact order statistic, ns; NaN when empty."""
        if not self.n:
            return float("nan")
        rank = min(max(int(np.ceil(level * self.n)), 1), self.n)
        if rank == self.n:
            return self.maximum
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return float(np.clip(bucket_centers()[bucket], self.minimum, self.maximum))


def bucket_of(values: np.ndarray) -> np.ndarray:
    """Return the bucket of each latency: int64 array."""
    with np.errstate(divide="ignore", invalid="ignore"):
        index = np.ceil(np.log(np.maximum(values, 1e-300)) / np.log(GAMMA)) + 1
    return np.where(values <= 0, 0, np.clip(index, 1, N_BUCKETS - 1)).astype(np.int64)


def bucket_centers() -> np.ndarray:
    """Return the value that stands for each bucket, ns: within 1 % of all in it."""
    centers = 2 * GAMMA ** (np.arange(N_BUCKETS) - 1.0) / (GAMMA + 1)
    centers[0] = 0.0
    return centers


def histogram_of(tree: xr.DataTree, hop: str) -> LogHistogram:
    """Count one hop's latencies of a run's usable packets."""
    return LogHistogram().add(stats.hop_values(tree, hop))


def tail_curve(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return latency (ns) and the share of packets above it, at points dense in the tail: at most CURVE_POINTS of them."""
    ordered = np.sort(values)
    n = len(ordered)
    tail = np.unique(np.round(np.geomspace(1, max(n, 1), CURVE_POINTS)).astype(np.int64))
    rows = n - tail[tail <= n]
    return ordered[rows][::-1], (tail[tail <= n] / n)[::-1]


def merged_coverage(trees: Iterable[xr.DataTree]) -> xr.Dataset:
    """Return the coverage of several runs as of one: counts added, the share computed from them."""
    counts: xr.Dataset | None = None
    for tree in trees:
        one = tree["coverage"].to_dataset().drop_vars("fraction").load()
        counts = one if counts is None else (counts + one).assign_attrs(one.attrs)
    if counts is None:
        raise RxlabError("no run to merge", expected="at least one traced run")
    fraction = (counts["matched"] / counts["expected"].where(counts["expected"] > 0)).assign_attrs(
        schema.variable("coverage", "fraction").attrs()
    )
    for name in counts.data_vars:
        counts[name].attrs = schema.variable("coverage", str(name)).attrs()
    return counts.assign(fraction=fraction)


def varied_settings(configurations: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the settings that differ between configurations, each with its values as text in order of appearance."""
    names = dict.fromkeys(name for configuration in configurations for name in configuration)
    values = {
        name: list(dict.fromkeys(str(configuration.get(name, "")) for configuration in configurations))
        for name in names
    }
    return {name: found for name, found in values.items() if len(found) > 1}


def combine(trees: Sequence[xr.DataTree]) -> xr.Dataset:
    """Lay the runs of a sweep out along the settings that varied, repetition and arm.

    Parameters
    ----------
    trees : sequence of xarray.DataTree
        As :func:`rxlab.dataset.store.build` made them; runs of one configuration and arm count as repetitions in the given order.

    Returns
    -------
    xarray.Dataset
        Variables of the schema's table "A sweep"; settings that did not vary are scalar coordinates. The hops of arms without
        trace are the workload's own latencies.
    """
    configurations = [json.loads(tree.attrs["configuration"]) for tree in trees]
    varied = varied_settings(configurations)
    arms = list(dict.fromkeys(str(tree.attrs["arm"]) for tree in trees))
    places = []
    seen: dict[tuple[int, ...], int] = {}
    for tree, configuration in zip(trees, configurations, strict=True):
        where = tuple(values.index(str(configuration.get(name, ""))) for name, values in varied.items())
        key = (*where, arms.index(str(tree.attrs["arm"])))
        places.append((*where, seen.setdefault(key, 0), key[-1]))
        seen[key] += 1
    hops = (*schema.HOP_NAMES, "one_way_latency", "round_trip_latency")
    shape = (*(len(values) for values in varied.values()), max(seen.values(), default=0), len(arms))
    tables = _empty_tables(shape, len(hops))
    for tree, place in zip(trees, places, strict=True):
        _fill(tables, place, tree, hops)
    fixed = (
        {name: str(value) for name, value in configurations[0].items() if name not in varied} if configurations else {}
    )
    coords: dict[str, Any] = {
        **varied,
        "arm": arms,
        "hop": list(hops),
        "stage": list(STAGE_NAMES),
        "quantile": list(stats.QUANTILES),
    }
    coords |= {"bucket": ("bucket", bucket_centers(), {"units": "ns", "long_name": "center of the bucket"}), **fixed}
    base = (*varied, "repetition", "arm")
    variables = {}
    for name, table in tables.items():
        spec = schema.variable("sweep", name)
        variables[name] = ((*base, *spec.dims[3:]), table, spec.attrs())
    return xr.Dataset(variables, coords, {"schema_version": schema.SCHEMA_VERSION, "Conventions": schema.CONVENTIONS})


def _empty_tables(shape: tuple[int, ...], n_hops: int) -> dict[str, np.ndarray]:
    quantiles = (*shape, n_hops, len(stats.QUANTILES))
    tables = {name: np.full(quantiles, np.nan) for name in ("latency", "latency_low", "latency_high")}
    tables["count"] = np.zeros((*shape, n_hops, N_BUCKETS), np.int64)
    tables["coverage"] = np.full((*shape, len(STAGE_NAMES)), np.nan)
    tables |= {name: np.full(shape, np.nan) for name in ("lost", "clock_bound")}
    return tables


def _fill(tables: dict[str, np.ndarray], place: tuple[int, ...], tree: xr.DataTree, hops: Sequence[str]) -> None:
    has_trace = "hops" in tree.children
    app = tree["app"].to_dataset() if "app" in tree.children else xr.Dataset()
    rows = stats.usable(tree["packets"].to_dataset()) if has_trace else None
    for index, hop in enumerate(hops):
        if hop in schema.HOP_NAMES:
            values = stats.hop_values(tree, hop, rows) if has_trace else np.empty(0)
        else:
            values = app[hop].values if hop in app else np.empty(0)
        tables["count"][(*place, index)] = LogHistogram().add(values).counts
        for column, level in enumerate(stats.QUANTILES):
            estimate = stats.quantile_interval(values, level)
            tables["latency"][(*place, index, column)] = estimate.value
            tables["latency_low"][(*place, index, column)] = estimate.low
            tables["latency_high"][(*place, index, column)] = estimate.high
    if has_trace:
        tables["coverage"][place] = tree["coverage"]["fraction"].values
        tables["lost"][place] = float(tree.attrs.get("lost", np.nan))
        tables["clock_bound"][place] = float(tree["clocks"]["bound"])
