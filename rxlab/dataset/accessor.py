"""``.rx`` on a run's DataTree and on a sweep's Dataset: the questions people ask, a word each.

Registered by importing this module, which ``rxlab.dataset.run`` does. A dataset opened without rxlab has no ``.rx``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from importlib.metadata import entry_points
from itertools import product
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import effects, explain, schema, stats
from rxlab.dataset.effects import Best, Effect, Rank
from rxlab.errors import RxlabError, UsageError
from rxlab.stages import STAGE_NAMES

WORKLOAD_HOPS = (
    "one_way_latency",
    "round_trip_latency",
    "benchmark_time",
)  # what the workload saw itself: there without trace too
NUMBERS = ("ratio", "ratio_low", "ratio_high", "difference", "difference_low", "difference_high", "p_corrected")

# Fewer steps between the same two stages tell nothing of what is usual.
MIN_ALIKE = 8


@xr.register_datatree_accessor("rx")
class RunAccessor:
    """``tree.rx``: one traced run."""

    def __init__(self, tree: xr.DataTree) -> None:
        self._tree = tree

    def hops(self) -> xr.Dataset:
        """Return the quantiles of every hop with their intervals (:func:`rxlab.dataset.stats.quantile_table`)."""
        return stats.quantile_table(self._traced())

    def locality(self) -> dict[str, float]:
        """Return the share of packets whose stack ran where the reader did (:func:`rxlab.dataset.stats.locality`)."""
        return stats.locality(self._traced())

    def slowest(self, n: int = 10) -> xr.Dataset:
        """Return the `n` packets that took longest, slowest first, and the step that made each slow.

        That is the step furthest beyond its usual latency, the median of the run's steps between the same two stages, not the longest:
        a step that always takes long makes no packet slow. Where hardly any packet has that step, those that show more stages between
        the two count as well: a step that only one packet has is not its own measure.

        Returns
        -------
        xarray.Dataset, dims (packet,)
            ``frame``, ``row`` (of /packets), ``total_latency`` ns, ``slowest_hop`` (the stage it ends at), ``hop_from``, ``hop_latency``
            and ``usual_latency`` ns, ``cpu`` at that stage, ``comm``. Complete data packets only.
        """
        tree = self._traced()
        packets, hops = tree["packets"].to_dataset(), tree["hops"].to_dataset()
        total = hops["latency"].sel(hop="total_latency").values
        usable = np.flatnonzero(stats.usable(packets) & ~np.isnan(total))
        rows = usable[np.argsort(-total[usable], kind="stable")][:n]
        # The step from the NIC's stamp lies before total_latency.
        within = hops["hop_from"].values[:, : len(schema.STEP_NAMES)] != STAGE_NAMES.index("nic")
        usual = np.full((len(rows), len(schema.STEP_NAMES)), np.nan)
        steps = usual.copy()
        for column in range(steps.shape[1]):  # one at a time: a run may be larger than memory
            values = np.where(within[:, column], hops["latency"].isel(hop=column).values, np.nan)
            steps[:, column] = values[rows]
            begins, ends = hops["hop_from"].values[:, column], STAGE_NAMES.index(schema.STEP_NAMES[column])
            for stage in np.unique(begins[rows][np.isfinite(steps[:, column])]):
                mine = values[usable][begins[usable] == stage]
                mine = mine[np.isfinite(mine)]
                if len(mine) < MIN_ALIKE:
                    between = [packets["time"].isel(stage=at).values[usable] for at in (int(stage), ends)]
                    mine = (between[1] - between[0])[~(np.isnat(between[0]) | np.isnat(between[1]))].view(np.int64)
                usual[begins[rows] == stage, column] = np.median(mine) if len(mine) else np.nan
        step = _culprit(steps, usual) if len(rows) else np.zeros(0, np.int64)
        each = np.arange(len(rows))
        comm = schema.meanings(packets["comm"]) if "flag_values" in packets["comm"].attrs else {}
        ns = {"units": "ns", "clock": schema.MONO}
        stages = np.array(STAGE_NAMES, dtype=object)
        return xr.Dataset(
            {
                "frame": ("packet", packets["pcap_frame"].values[rows]),
                "row": ("packet", rows),
                "total_latency": ("packet", total[rows], ns),
                "slowest_hop": ("packet", np.array(schema.STEP_NAMES, dtype=object)[step]),
                "hop_from": ("packet", stages[hops["hop_from"].values[rows, step]]),
                "hop_latency": ("packet", steps[each, step], ns),
                "usual_latency": ("packet", usual[each, step], ns),
                "cpu": ("packet", packets["cpu"].values[rows, step + 1]),  # the first stage ends no step
                "comm": (
                    "packet",
                    np.array([comm.get(int(c), "") for c in packets["comm"].values[rows]], dtype=object),
                ),
            }
        )

    def compare(
        self,
        others: xr.DataTree | Sequence[xr.DataTree],
        *,
        hop: str = "total_latency",
        more: Sequence[xr.DataTree] = (),
    ) -> list[stats.Comparison]:
        """Compare a hop of `others` (configuration B) with this run's (A, with its repetitions `more`), quantile by quantile.

        From traced runs: an explanation, no verdict on a setting (tracing costs more where RPS adds events). With one run on
        a side the interval is that within the run and nothing is decided.
        """
        b = [others] if isinstance(others, xr.DataTree) else list(others)
        sides = [[stats.hop_values(tree.rx._traced(), hop) for tree in side] for side in ([self._tree, *more], b)]
        return stats.compare(*sides)

    def explain(
        self, others: xr.DataTree | Sequence[xr.DataTree], *, quantile: float = 0.5, by: str = "hop"
    ) -> xr.Dataset:
        """Split the difference between `others` and this run (:func:`rxlab.dataset.explain.explain`)."""
        b = [others] if isinstance(others, xr.DataTree) else list(others)
        return explain.explain([self._traced()], [tree.rx._traced() for tree in b], quantile=quantile, by=by)

    @property
    def plot(self) -> RunPlots:
        """Figures of this run."""
        return RunPlots(self._traced())

    def _traced(self) -> xr.DataTree:
        if "packets" not in self._tree.children:
            raise RxlabError(
                "no packets in this dataset",
                found=f"groups {', '.join(self._tree.children) or 'none'}",
                expected="the root of a traced run's dataset, as rxlab.open_run(...).tree gives it",
            )
        return self._tree


def _figures() -> Any:
    """Return the module that draws. It is named by the package's metadata: this room may not know the one that shows."""
    found = list(entry_points(group="rxlab.figures"))
    if not found:
        raise RxlabError("nothing installed that draws", expected="rxlab[analysis]", do="Install rxlab again.")
    return found[0].load()


class RunPlots:
    """``tree.rx.plot``: one figure per question. Needs matplotlib."""

    def __init__(self, tree: xr.DataTree) -> None:
        self._tree = tree

    def packet(self, row: int | None = None) -> Any:
        """Draw the life of one packet (`row` of /packets), by default the median one."""
        return _figures().plot_packet(self._tree, row)

    def timeline(self, events: Mapping[str, Any], row: int | None = None) -> Any:
        """Draw what the CPUs did around a packet; `events` are the recording's, ``run.perf.events``."""
        return _figures().plot_timeline(self._tree, events, row)

    def stages(self, quantile: float = 0.5) -> Any:
        """Draw where the time of a quantile goes."""
        return _figures().plot_stage_bars({"this run": [self._tree]}, quantile=quantile)

    def ecdf(self, *hops: str) -> Any:
        """Draw the distribution of hops, total_latency by default."""
        return _figures().plot_ecdf({hop: [stats.hop_values(self._tree, hop)] for hop in hops or ("total_latency",)})

    def steering(self) -> Any:
        """Draw from which CPU to which the packets went."""
        return _figures().plot_steering(self._tree)

    def coverage(self) -> Any:
        """Draw of how many packets each stage was seen."""
        return _figures().plot_coverage(self._tree["coverage"].to_dataset())

    def clock(self) -> Any:
        """Draw the residuals of the clock fit."""
        return _figures().plot_clock(self._tree)


@xr.register_dataset_accessor("rx")
class SweepAccessor:
    """``ds.rx``: a sweep, as :func:`rxlab.dataset.aggregate.combine` lays it out."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset

    def hops(self, *, arm: str | None = None) -> xr.DataArray:
        """Return the latency quantiles of every hop, their median over the repetitions; ns, dims (settings, hop, quantile)."""
        latency = self._sweep()["latency"].sel(arm=self._arm(arm))
        return latency.median("repetition", skipna=True, keep_attrs=True)

    def slowest(
        self, n: int = 10, *, arm: str | None = None, hop: str | None = None, quantile: float = 0.99
    ) -> xr.DataArray:
        """Return the `n` slowest configurations by a quantile of a hop, slowest first: ns, dims (configuration,)."""
        arm = self._arm(arm)
        values = self.hops(arm=arm).sel(hop=self._hop(hop, arm), quantile=quantile)
        stacked = values.stack(configuration=list(values.dims)).dropna("configuration")
        return stacked.isel(configuration=np.argsort(-stacked.values, kind="stable")[:n])

    def compare(self, setting: str, *, arm: str | None = None, hop: str | None = None) -> xr.Dataset:
        """Compare every value of a setting with its first one, over the repetitions, the other settings held.

        Parameters
        ----------
        setting : str
            A dimension of the sweep.
        arm : str, optional
            By default ``untraced`` where there is one: verdicts come from there.
        hop : str, optional
            By default what the workload measured itself, else total_latency.

        Returns
        -------
        xarray.Dataset, dims (setting, other settings, quantile)
            ``ratio`` and ``difference`` (ns) with 95 % limits, ``p_corrected`` (Holm, for all of them together), ``verdict``.
        """
        sweep, arm = self._sweep(), self._arm(arm)
        if setting not in self._settings():
            raise UsageError(
                "not a setting that varies",
                found=repr(setting),
                expected=", ".join(self._settings()) or "a sweep of two",
            )
        hop = self._hop(hop, arm)
        latency = sweep["latency"].sel(arm=arm, hop=hop)
        held = [name for name in self._settings() if name != setting]
        latency = latency.transpose(setting, *held, "quantile", "repetition")
        values = latency.values
        places = list(product(range(1, values.shape[0]), *(range(size) for size in values.shape[1:-1])))
        found = {place: _compare_cells(values[(0, *place[1:])], values[place]) for place in places}
        known = [place for place in places if found[place] is not None]
        corrected = dict(zip(known, stats.correct([found[place] for place in known]), strict=True))  # type: ignore[misc]
        shape = (values.shape[0] - 1, *values.shape[1:-1])
        tables: dict[str, np.ndarray] = {name: np.full(shape, np.nan) for name in NUMBERS}
        verdict = np.full(shape, stats.CANNOT_TELL, dtype=object)
        for place, comparison in corrected.items():
            at = (place[0] - 1, *place[1:])
            verdict[at] = comparison.verdict
            for name, table in tables.items():
                table[at] = getattr(comparison, name)
        dims = latency.dims[:-1]
        units = {name: {"units": "ns" if name.startswith("difference") else "1"} for name in tables}
        variables: dict[str, Any] = {name: (dims, table, units[name]) for name, table in tables.items()}
        coords = {str(name): latency[name].values for name in dims[1:] if name in latency.coords}
        coords[setting] = latency[setting].values[1:]
        attrs = {"baseline": f"{setting}={latency[setting].values[0]}", "arm": arm, "hop": hop}
        return xr.Dataset({**variables, "verdict": (dims, verdict)}, coords, attrs)

    def runs(self, *, arm: str | None = None, hop: str | None = None, quantile: float = 0.5) -> xr.DataArray:
        """Return one number per run: a quantile of a hop, ns, dims (settings..., repetition); arm and hop as in :meth:`compare`."""
        arm = self._arm(arm)
        latency = self._sweep()["latency"].sel(arm=arm, hop=self._hop(hop, arm), quantile=quantile)
        return latency.transpose(*self._settings(), "repetition")

    def effects(self, *, arm: str | None = None, hop: str | None = None, quantile: float = 0.5) -> list[Effect]:
        """Return what each setting does and which ones interact (:func:`rxlab.dataset.effects.find_effects`)."""
        return effects.find_effects(self.runs(arm=arm, hop=hop, quantile=quantile))

    def rank(self, *, arm: str | None = None, hop: str | None = None, quantile: float = 0.5) -> list[Rank]:
        """Return the configurations, fastest first, with limits of their ranks (:func:`rxlab.dataset.effects.rank`)."""
        return effects.rank(self._by_configuration(self.runs(arm=arm, hop=hop, quantile=quantile)), quantile=quantile)

    def best(self, *, arm: str | None = None, hop: str | None = None, quantile: float = 0.5) -> Best:
        """Return the fastest configuration with its evidence: runner-up, rivals, and the CPU time a packet costs in each."""
        arm = self._arm(arm)
        ranks = self.rank(arm=arm, hop=hop, quantile=quantile)
        cost: dict[str, list[float]] = {}
        if "cpu_time_per_packet" in self._dataset:
            time = self._dataset["cpu_time_per_packet"].sel(arm=arm, cpu_mode=["system", "irq", "softirq"])
            total = time.sum(["cpu_mode", "cpu"], min_count=1).transpose(*self._settings(), "repetition")
            cost = self._by_configuration(total)
        return effects.choose_best(ranks, cost)

    def _by_configuration(self, runs: xr.DataArray) -> dict[str, list[float]]:
        settings = self._settings()
        found = {}
        for place in product(*(range(runs.sizes[name]) for name in settings)):
            cell = runs.isel(dict(zip(settings, place, strict=True)))
            values = cell.values[~np.isnan(cell.values)]
            if len(values):
                label = ", ".join(f"{name}={cell[name].values}" for name in settings)
                found[label or "the configuration"] = values.tolist()
        return found

    @property
    def plot(self) -> SweepPlots:
        """Figures of this sweep."""
        self._sweep()
        return SweepPlots(self)

    def _sweep(self) -> xr.Dataset:
        if not {"repetition", "arm", "hop", "quantile"} <= set(self._dataset.dims) or "latency" not in self._dataset:
            raise RxlabError(
                "not a sweep",
                found=f"dims {', '.join(map(str, self._dataset.dims)) or 'none'}",
                expected="latency over (settings, repetition, arm, hop, quantile); for one run use tree.rx of its DataTree",
            )
        return self._dataset

    def _settings(self) -> list[str]:
        fixed: set[Hashable] = {"repetition", "arm", "hop", "quantile"}
        return [str(name) for name in self._sweep()["latency"].dims if name not in fixed]

    def _arm(self, arm: str | None) -> str:
        arms = [str(name) for name in self._sweep()["arm"].values]
        if arm is not None and arm not in arms:
            raise UsageError("no such arm", found=repr(arm), expected=", ".join(arms))
        return arm or ("untraced" if "untraced" in arms else arms[0])

    def _hop(self, hop: str | None, arm: str) -> str:
        latency = self._sweep()["latency"].sel(arm=arm)
        if hop is not None and hop not in latency["hop"].values:
            raise UsageError("no such hop", found=repr(hop), expected=", ".join(map(str, latency["hop"].values)))
        there = [name for name in WORKLOAD_HOPS if name in latency["hop"].values]
        seen = [name for name in there if bool(latency.sel(hop=name).notnull().any())]
        return hop or (seen[0] if seen else "total_latency")


def _culprit(steps: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Return for each packet the step furthest beyond its usual latency; the longest where none is beyond it."""
    longest = np.where(np.isnan(steps), -np.inf, steps)
    excess = longest - np.nan_to_num(usual)
    return np.where((excess > 0).any(axis=1), excess.argmax(axis=1), longest.argmax(axis=1))


def _compare_cells(a: np.ndarray, b: np.ndarray) -> stats.Comparison | None:
    """Compare one quantile's values over the repetitions, None where a side has none."""
    sides = [[np.array([value]) for value in side[~np.isnan(side)]] for side in (a, b)]
    if not all(sides):
        return None
    # A run is one number here: the quantile is taken already.
    return stats.compare(*sides, quantiles=(0.5,))[0]


class SweepPlots:
    """``ds.rx.plot``: one figure per question about a sweep. Needs matplotlib; options as in :meth:`SweepAccessor.runs`."""

    def __init__(self, sweep: SweepAccessor) -> None:
        self._rx = sweep

    def heatmap(self, rows: str, columns: str, *, held: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """Draw a latency over two settings with intervals, the others at their first value or as `held` says."""
        runs = self._rx.runs(**options)
        others = {name: runs[name].values[0] for name in runs.dims if name not in (rows, columns, "repetition")}
        return _figures().plot_heatmap(runs.sel({**others, **(held or {})}).transpose(rows, columns, "repetition"))

    def effects(self, **options: Any) -> Any:
        """Draw what each setting does, and which ones interact."""
        return _figures().plot_effects(self._rx.effects(**options))

    def ranks(self, **options: Any) -> Any:
        """Draw the configurations in rank order."""
        return _figures().plot_ranks(self._rx.rank(**options))
