"""The report's tables and figures: what the workload saw, every hop, what recording cost, what was drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from rxlab.dataset import effects, explain, schema, stats
from rxlab.show import answer, plots
from rxlab.show.trust import AnalysedRun

# Figures per configuration are drawn for this many at most; tables show all.
MAX_DRAWN = 6
# Heat maps, and combinations of settings with a run that one needs.
MAX_MAPS, MIN_CELLS = 4, 3


def overheads(groups: Mapping[str, Sequence[AnalysedRun]], metric: str | None) -> list[tuple[str, float]]:
    """Return the workload's median latency, traced over untraced, per configuration that has both."""
    found = []
    for label, runs in groups.items():
        sides = [answer.latencies(runs, metric, arms) for arms in (("untraced",), answer.TRACED_ARMS)]
        if all(sides):
            untraced, traced = (stats.estimate_quantile(side, 0.5).value for side in sides)
            found.append((label, traced / untraced))
    return found


def workload_rows(groups: Mapping[str, Sequence[AnalysedRun]], metric: str | None) -> list[dict[str, Any]]:
    """Return the quantiles of the workload's own latency, per configuration and arm."""
    rows = []
    for label, runs in groups.items():
        for arm in dict.fromkeys(run.arm for run in runs):
            values = answer.latencies(runs, metric, (arm,))
            if values:
                rows.append({"configuration": label, "arm": arm, "runs": len(values), **quantile_cells(values)})
    return rows


def quantile_cells(runs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return p50, p90, p99 with intervals, p99.9 and maximum without, of the same packets pooled."""
    pooled = runs[0] if len(runs) == 1 else np.concatenate(runs)
    found = [stats.quantile_intervals(run, stats.QUANTILES) for run in runs]
    cells: dict[str, Any] = {}
    for at, level in enumerate(stats.QUANTILES):
        of_runs = [estimates[at] for estimates in found]
        over = stats.over_repetitions([one.value for one in of_runs])
        cells[f"p{100 * level:g}"] = of_runs[0] if len(runs) == 1 else over
    tail, maximum = stats.quantile_intervals(pooled, stats.SHOWN)
    cells["p999"] = tail.value if len(pooled) >= 1000 else None
    cells["maximum"] = maximum.value
    cells["n"] = len(pooled)
    cells["modes"] = stats.find_modes(pooled)
    return cells


def hop_rows(groups: Mapping[str, Sequence[AnalysedRun]]) -> list[dict[str, Any]]:
    """Return the quantiles of every hop, per configuration."""
    rows = []
    trees = {label: answer.traced_trees(runs) for label, runs in groups.items()}
    usable = {label: [stats.usable(tree["packets"].to_dataset()) for tree in found] for label, found in trees.items()}
    for hop in schema.HOP_NAMES:
        for label, found in trees.items():
            values = [stats.hop_values(tree, hop, rows) for tree, rows in zip(found, usable[label], strict=True)]
            values = [run for run in values if len(run)]
            if values:
                kind = "total" if hop in schema.TOTAL_NAMES else "step"
                rows.append(
                    {"hop": hop, "kind": kind, "configuration": label, "runs": len(values), **quantile_cells(values)}
                )
    return rows


def part_rows(groups: Mapping[str, Sequence[AnalysedRun]], pairs: Sequence[answer.Pair]) -> list[dict[str, Any]]:
    """Return the difference of each explained quantile by CPU and by why the reader ran; the parts of one add up to its total."""
    rows = []
    for pair in pairs[:MAX_DRAWN]:
        for level in pair.explanation:
            for by in ("cpu", "attribution"):
                sides = [answer.traced_trees(groups[name]) for name in (pair.a, pair.b)]
                found = explain.explain(*sides, quantile=level, by=by)
                for part in found[by].values:
                    one = found.sel({by: part})
                    cells = {name: float(one[name]) for name in ("a", "b", "difference", "low", "high")}
                    name = f"CPU {part}" if by == "cpu" else str(part).replace("_", " ")
                    rows.append({"pair": pair, "quantile": level, "by": by, "part": name, **cells})
    return rows


def recording_rows(groups: Mapping[str, Sequence[AnalysedRun]], metric: str | None) -> list[dict[str, Any]]:
    """Return, per configuration with both arms, the hops of the median packet as recorded and less the cost of recording.

    Returns
    -------
    list of dict
        ``configuration``, ``cost`` (Estimate, ns per event at most), ``hops``: (hop, ns as recorded, ns less recording).
    """
    rows = []
    for label, runs in groups.items():
        trees = answer.traced_trees(runs)
        untraced, traced = (answer.latencies(runs, metric, arms) for arms in (("untraced",), answer.TRACED_ARMS))
        cost = explain.cost_per_event(untraced, traced, trees)
        if cost is None:
            continue
        parts = xr.concat([explain.contributions(tree, 0.5) for tree in trees], "run").mean("run")
        less = explain.less_recording(parts, cost.value)
        cells = [(str(hop), float(parts.sel(hop=hop)), float(less.sel(hop=hop))) for hop in parts["hop"].values]
        rows.append({"configuration": label, "cost": cost, "hops": [cell for cell in cells if cell[1]]})
    return rows


def svg_data_uri(figure: Figure) -> str:
    """Return a figure as a ``data:`` URI: isolated from the page's styles and from other figures' ids, and it loads nothing."""
    stream = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rxlab"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def _figure(section: str, question: str, caption: str, drawn: Figure) -> dict[str, str]:
    return {"section": section, "question": question, "caption": caption, "src": svg_data_uri(drawn)}


def draw_sweep(
    ranks: Sequence[effects.Rank], layout: xr.DataArray | None, found: Sequence[effects.Effect]
) -> Iterator[dict[str, str]]:
    """Yield the figures of a sweep: ranks, heat maps over two settings, effects."""
    if ranks:
        caption = "Medians of the untraced runs, 95 % intervals over repetitions. Green: cannot be told from the fastest. Ranks hold together in 95 % of experiments."
        yield _figure("verdict", "Which configuration is fastest?", caption, plots.plot_ranks(ranks, title=""))
    if layout is None or len(layout.dims) < 3:
        return
    caption = "Median latency of the untraced runs: geometric mean and 95 % interval over repetitions. Equal steps of colour are equal ratios."
    others = [str(name) for name in layout.dims[2:-1]]
    for places in list(product(*(range(layout.sizes[name]) for name in others)))[:MAX_MAPS]:
        part = layout.isel(dict(zip(others, places, strict=True)))
        # Two configurations that differ in two settings do not tell what either does.
        if np.isfinite(part.values).any(axis=-1).sum() < MIN_CELLS:
            continue
        held = ", ".join(f"{name}={part[name].values}" for name in others)
        question = "How do two settings go together?" + (f" At {held}" if held else "")
        yield _figure("verdict", question, caption, plots.plot_heatmap(part, title=""))
    if found:
        caption = "Untraced medians; 95 % intervals each, colour where Holm's correction for all of them leaves it significant."
        yield _figure("verdict", "What does each setting do?", caption, plots.plot_effects(found, title=""))


def draw_figures(
    groups: Mapping[str, Sequence[AnalysedRun]],
    pairs: Sequence[answer.Pair],
    metric: str | None,
    *,
    ranks: Sequence[effects.Rank] = (),
    layout: xr.DataArray | None = None,
    found: Sequence[effects.Effect] = (),
) -> Iterator[dict[str, str]]:
    """Yield section, question, caption and image of every figure."""
    figure = _figure
    yield from draw_sweep(ranks, layout, found)
    drawn = dict(list(groups.items())[:MAX_DRAWN])
    untraced = {label: answer.latencies(runs, metric, ("untraced",)) for label, runs in drawn.items()}
    untraced = {label: runs for label, runs in untraced.items() if runs}
    for pair in pairs[:MAX_DRAWN]:
        if pair.untraced:
            yield figure("verdict", f"Is {pair.b} faster than {pair.a}?", "Untraced runs. Grey: the interval does not settle it. Verdicts are corrected for the number of comparisons (Holm), intervals are 95 % each.",
                         plots.plot_comparison(pair.untraced, a=pair.a, b=pair.b, title=""))  # fmt: skip
    if untraced:
        yield figure(
            "verdict",
            "How long do all messages take, down to the slowest?",
            "Untraced runs, one line per run.",
            plots.plot_ecdf(untraced, title="", xlabel="latency seen by the workload (µs)"),
        )
    trees = {label: answer.traced_trees(runs) for label, runs in drawn.items()}
    trees = {label: found for label, found in trees.items() if found}
    if trees:
        yield figure("explanation", "Where does the time of the median packet go?", "Traced runs, so every step includes the cost of recording its events (0.5 to 0.7 µs each). Segments add up to the total.",
                     plots.plot_stage_bars(trees, title=""))  # fmt: skip
        for pair in pairs[:MAX_DRAWN]:
            for level, explanation in pair.explanation.items():
                name = "median" if level == 0.5 else f"p{100 * level:g}"
                which = f" {pair.b} against {pair.a}" if len(pairs) > 1 else ""
                yield figure("explanation", f"Which hops carry the difference of the {name}?{which}", f"{pair.b} minus {pair.a}, traced runs. The bars add up to the difference; lines are 95 % intervals over repetitions, where there are some.",
                             plots.plot_difference(explanation, a=pair.a, b=pair.b))  # fmt: skip
        totals = {
            label: [stats.hop_values(tree, "total_latency") for tree in of_label] for label, of_label in trees.items()
        }
        yield figure(
            "explanation",
            "How long from the first kernel stage to recvmsg, down to the slowest?",
            "Traced runs, one line per run.",
            plots.plot_ecdf(totals, title=""),
        )
    for label, of_label in trees.items():
        yield figure(
            "packets",
            f"What did the median packet wait for? {label}",
            "One real packet. Colour: the CPU on which each stage was reached.",
            plots.plot_packet(of_label[0]),
        )
        yield figure(
            "packets",
            f"Which CPU handed packets to which? {label}",
            "Share of packets, from row to column.",
            plots.plot_steering(of_label[0]),
        )
    arms = {
        label: {arm: answer.latencies(runs, metric, (arm,)) for arm in dict.fromkeys(run.arm for run in runs)}
        for label, runs in drawn.items()
    }
    if any(sum(bool(values) for values in by_arm.values()) > 1 for by_arm in arms.values()):
        yield figure(
            "trust",
            "What did the recording cost?",
            "The workload's own latency, by what was recorded at the same time. Full: untraced; open: traced.",
            plots.plot_arms(arms, title=""),
        )
    for label, of_label in trees.items():
        yield figure(
            "trust",
            f"Of how many packets was each stage seen? {label}",
            "Packets whose path requires the stage.",
            plots.plot_coverage(of_label[0]["coverage"].to_dataset(), title=""),
        )
        yield figure(
            "trust",
            f"Do the clocks stay on one axis? {label}",
            "The capture's stamp is compared with the kernel event next to it. A step or a slope here would be a clock's.",
            plots.plot_clock(of_label[0]),
        )
