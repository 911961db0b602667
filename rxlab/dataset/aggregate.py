"""Many packets, many runs: mergeable histograms, coverage of several runs, a sweep's runs as one dataset.

Histograms have logarithmic buckets that are the same everywhere, so they merge exactly by adding, across runs, hosts and time,
and a quantile read from them is within 1 % of the exact one (Masson, Rim, Lee: DDSketch, VLDB 2019).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import schema, stats
from rxlab.dataset.moves import follow_share
from rxlab.errors import RxlabError, SchemaError
from rxlab.stages import STAGE_NAMES

RELATIVE_ERROR = 0.01
GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
# Bucket i holds (GAMMA**(i-2), GAMMA**(i-1)] ns, i from 1; bucket 0 holds all up to and including 0 ns (negative hops are
# counted, not hidden); the last one is open: above 1000 s.
N_BUCKETS = int(np.ceil(np.log(1e12) / np.log(GAMMA))) + 3

# The workload's own latencies stand beside the hops: they are what arms without trace have.
SWEEP_HOPS = (*schema.HOP_NAMES, "one_way_latency", "round_trip_latency", "benchmark_time")
CPU_MODES = ("user", "nice", "system", "irq", "softirq", "idle")
SOFTNET_FIELDS = ("processed", "dropped", "time_squeeze", "received_rps")
# How x86 and arm64 both name them in /proc/interrupts.
IPI_LABELS = {
    "call_ipis_per_packet": "Function call interrupts",
    "reschedule_ipis_per_packet": "Rescheduling interrupts",
}

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


@dataclass(frozen=True)
class Grid:
    """The shape of a sweep's dataset, known before any of its runs is analysed.

    Attributes
    ----------
    axes : mapping
        Settings that varied, each with its labels in order.
    repetitions : int
    arms : sequence of str
    n_cpus : int
        CPUs of the host; 0 where no run has counters.
    queues : sequence of int
        Receive queues that have an interrupt of their own.
    fixed : mapping
        What did not vary: name to value. Scalar coordinates.
    along : mapping
        What one axis decides: name to ``(axis, values)``. Coordinates beside that axis.
    """

    axes: Mapping[str, Sequence[Any]]
    repetitions: int
    arms: Sequence[str]
    n_cpus: int = 0
    queues: Sequence[int] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    along: Mapping[str, tuple[str, Sequence[Any]]] = field(default_factory=dict)

    @property
    def base(self) -> tuple[str, ...]:
        """Dimensions that together say which run."""
        return (*self.axes, "repetition", "arm")

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of `base`."""
        return (*(len(labels) for labels in self.axes.values()), self.repetitions, len(self.arms))

    def place(self, labels: Mapping[str, Any], repetition: int, arm: str) -> tuple[int, ...]:
        """Return the position of a run along `base`."""
        where = (list(values).index(labels[name]) for name, values in self.axes.items())
        return (*where, repetition, list(self.arms).index(arm))

    def coords(self) -> dict[str, Any]:
        """Return every coordinate of the dataset."""
        inner = {
            "hop": np.array(SWEEP_HOPS),
            "stage": np.array(STAGE_NAMES),
            "quantile": list(stats.QUANTILES),
            "bucket": ("bucket", bucket_centers(), {"units": "ns", "long_name": "center of the bucket"}),
        }
        if self.n_cpus:
            inner |= {"cpu": np.arange(self.n_cpus), "cpu_mode": np.array(CPU_MODES)}
            inner |= {"softnet_field": np.array(SOFTNET_FIELDS)}
        if self.queues:
            inner["queue"] = np.array(self.queues)
        axes = {name: label_array(labels) for name, labels in self.axes.items()}
        along = {name: (axis, label_array(values)) for name, (axis, values) in self.along.items()}
        fixed = {name: label_array([value])[0] for name, value in self.fixed.items()}
        return {**fixed, **along, **axes, "arm": np.array(list(self.arms)), **inner}

    def variables(self) -> list[schema.Variable]:
        """Return the variables of the schema that such a sweep has."""
        gone = (() if self.n_cpus else ("cpu",)) + (() if self.queues else ("queue",))
        found = [entry for entry in schema.SCHEMA if entry.group == "sweep"]
        return [entry for entry in found if not set(gone) & set(entry.dims)]

    def empty(self) -> xr.Dataset:
        """Return the dataset without any run: NaN, and 0 where something is counted."""
        coords = self.coords()
        template = xr.Dataset(coords=coords)
        variables = {}
        for spec in self.variables():
            shape = (*self.shape, *(template.sizes[dim] for dim in spec.dims[3:]))
            blank = np.nan if spec.dtype == "float64" else 0
            variables[spec.name] = ((*self.base, *spec.dims[3:]), np.full(shape, blank, spec.dtype), spec.attrs())
        attrs = {"schema_version": schema.SCHEMA_VERSION, "Conventions": schema.CONVENTIONS}
        return xr.Dataset(variables, coords, attrs)


def label_array(labels: Sequence[Any]) -> np.ndarray:
    """Return labels as integers or floats where all are numbers, else as text."""
    if labels and all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels):
        return np.array(labels)
    return np.array([str(label) for label in labels])


def combine(trees: Sequence[xr.DataTree]) -> xr.Dataset:
    """Lay runs out along the settings that varied, repetition and arm, in memory.

    Parameters
    ----------
    trees : sequence of xarray.DataTree
        As :func:`rxlab.dataset.store.build` made them; runs of one configuration and arm count as repetitions in the given order.

    Returns
    -------
    xarray.Dataset
        Variables of the schema's table "A sweep"; settings that did not vary are scalar coordinates. The hops of arms without
        trace are the workload's own latencies. :func:`rxlab.dataset.sweepstore.aggregate_sweep` does the same for a folder.
    """
    configurations = [json.loads(tree.attrs["configuration"]) for tree in trees]
    varied = varied_settings(configurations)
    seen: Counter[tuple[str, ...]] = Counter()
    places = []
    for tree, configuration in zip(trees, configurations, strict=True):
        labels = {name: str(configuration.get(name, "")) for name in varied}
        key = (*labels.values(), str(tree.attrs["arm"]))
        places.append((labels, seen[key], key[-1]))
        seen[key] += 1
    first = configurations[0] if configurations else {}
    counted = [tree["counters"].sizes["cpu"] for tree in trees if "counters" in tree.children]
    grid = Grid(
        axes=varied,
        repetitions=max(seen.values(), default=0),
        arms=list(dict.fromkeys(arm for _, _, arm in places)),
        n_cpus=max(counted, default=0),
        fixed={name: str(value) for name, value in first.items() if name not in varied},
    )
    sweep = grid.empty()
    for tree, place in zip(trees, places, strict=True):
        for name, values in summarize(tree, grid).items():
            sweep[name].values[grid.place(*place)] = values
    return sweep


def summarize(tree: xr.DataTree, grid: Grid, queue_irqs: Mapping[int, int] | None = None) -> dict[str, Any]:
    """Return one run's part of a sweep's dataset.

    Parameters
    ----------
    tree : xarray.DataTree
        The run.
    grid : Grid
        The sweep it belongs to.
    queue_irqs : mapping, optional
        Interrupt of each receive queue, by number.

    Returns
    -------
    dict of str to array or scalar
        Variables of the schema's table "A sweep" without their leading dimensions.
    """
    has_trace = "hops" in tree.children
    rows = stats.usable(tree["packets"].to_dataset()) if has_trace else None
    found = _latencies(tree, rows)
    verdict = str(tree.attrs.get("verdict", "degraded")) if has_trace else "untraced"
    found["verdict"] = np.int8(schema.VERDICTS.index(verdict))
    if rows is not None:
        found["coverage"] = tree["coverage"]["fraction"].values
        found["lost"] = float(tree.attrs.get("lost", np.nan))
        found["clock_bound"] = float(tree["clocks"]["bound"])
        woken = tree["packets"].to_dataset()["time"].sel(stage="waking").values[rows]
        n_wakeups = len(np.unique(woken[~np.isnat(woken)]))
        found |= _locality(tree, rows)
        found["wakeups_per_packet"] = _ratio(n_wakeups, float(rows.sum()))
    if grid.n_cpus and "counters" in tree.children:
        found |= _counters(tree["counters"].to_dataset().load(), grid, queue_irqs or {})
    return found


def _locality(tree: xr.DataTree, rows: np.ndarray) -> dict[str, Any]:
    """Return how many packets ran on their reader's CPU, where RFS and RPS want them, and how they followed it when it moved."""
    same = tree["packets"].to_dataset()["same_cpu"].values[rows]
    found: dict[str, Any] = {"on_reader_cpu": _ratio(float((same == 1).sum()), float((same >= 0).sum())), "moves": 0.0}
    found |= {name: _ratio(there, known) for name, (there, known) in stats.steered(tree, rows).items()}
    if "moves" not in tree.children:
        return found
    moves = tree["moves"].to_dataset()
    found |= {"moves": float(moves.sizes["move"]), "moves_followed": follow_share(moves)}
    for name in ("lag_packets", "lag"):
        values = moves[name].values[np.isfinite(moves[name].values)]
        found[name] = np.quantile(values, stats.QUANTILES) if len(values) else np.full(len(stats.QUANTILES), np.nan)
    return found


def _latencies(tree: xr.DataTree, rows: np.ndarray | None) -> dict[str, Any]:
    """Return quantiles, their intervals and histograms of all hops; of hops that are not there NaN and zeros."""
    app = tree["app"].to_dataset() if "app" in tree.children else xr.Dataset()
    n = len(SWEEP_HOPS)
    names = ("latency", "latency_low", "latency_high")
    found: dict[str, Any] = {name: np.full((n, len(stats.QUANTILES)), np.nan) for name in names}
    found["count"] = np.zeros((n, N_BUCKETS), np.int64)
    for index, hop in enumerate(SWEEP_HOPS):
        if hop in schema.HOP_NAMES:
            values = stats.hop_values(tree, hop, rows) if rows is not None else np.empty(0)
        else:
            values = app[hop].values if hop in app else np.empty(0)
        found["count"][index] = LogHistogram().add(values).counts
        for column, level in enumerate(stats.QUANTILES):
            estimate = stats.quantile_interval(values, level)
            found["latency"][index, column] = estimate.value
            found["latency_low"][index, column] = estimate.low
            found["latency_high"][index, column] = estimate.high
    return found


def _counters(counters: xr.Dataset, grid: Grid, queue_irqs: Mapping[int, int]) -> dict[str, Any]:
    """Return what the counters say a packet costs."""

    def total(name: str, label: str, words: Sequence[str]) -> float:
        if name not in counters:
            return np.nan
        chosen = np.isin(counters[label].values.astype(str), list(words))
        return float(counters[name].values[chosen].sum()) if chosen.any() else np.nan

    def per_cpu(name: str, label: str, words: Sequence[str]) -> np.ndarray:
        table = np.full((len(words), grid.n_cpus), np.nan)
        names = counters[label].values.astype(str).tolist() if name in counters else []
        for row, word in enumerate(words):
            if word in names:
                values = counters[name].values[names.index(word)][: grid.n_cpus]
                table[row, : len(values)] = values
        return table

    packets = total("nstat", "nstat_name", ("IpInReceives", "Ip6InReceives"))
    own_irqs = [str(irq) for irq in queue_irqs.values()]
    hardirqs = total("interrupts", "irq", own_irqs)
    found: dict[str, Any] = {
        "packets": packets,
        "softirqs_per_hardirq": _ratio(total("softirqs", "softirq", ["NET_RX"]), hardirqs),
        "cpu_time_per_packet": per_cpu("cpu_time", "cpu_mode", CPU_MODES) / (packets if packets else np.nan),
        "softnet": per_cpu("softnet", "softnet_field", SOFTNET_FIELDS),
    }
    for name, label in IPI_LABELS.items():
        found[name] = _ratio(total("interrupts", "irq_label", [label]), packets)
    if grid.queues:
        found["interrupts"] = per_cpu("interrupts", "irq", [str(queue_irqs.get(queue, "")) for queue in grid.queues])
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else np.nan
