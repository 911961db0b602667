"""Analysed runs -> one self-contained HTML page: trust first, then the answer, then the evidence.

The page loads nothing: styles, the few lines of script and all figures are inside. It is made for someone who was not there.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import rxlab
from rxlab.dataset import schema, stats
from rxlab.errors import RxlabError
from rxlab.show import answer, plots, trust
from rxlab.show.redact import Redactor
from rxlab.show.trust import AnalysedRun
from rxlab.stages import STAGES

TEMPLATE = "report.html"
RECORDED_MARK = "RECORDED"
MAX_BYTES = 10_000_000
# Figures per configuration are drawn for this many at most; tables show all.
MAX_DRAWN = 6


def write_report(
    runs: Sequence[Any],
    out: str | os.PathLike[str],
    *,
    command: Sequence[str] | str | None = None,
    recorded: bool = False,
    title: str | None = None,
    reveal: bool = False,
) -> Path:
    """Write the report of one run, a comparison or a sweep.

    Parameters
    ----------
    runs : sequence
        Analysed runs: :class:`rxlab.Run` or other objects with ``run``, ``host``, ``tree``, ``verify`` and ``path``
        (:class:`rxlab.show.trust.AnalysedRun`). The first one's configuration is the baseline; a sweep's own order is kept.
    command : sequence of str or str, optional
        What makes this report again; by default the runs' own command.
    recorded : bool
        The runs are recorded data and not this machine's: the page says so. Runs in a folder ``data`` or with a file
        ``RECORDED`` in them are known to be.
    reveal : bool
        Show host names and addresses; by default they are replaced by consistent pseudonyms.

    Returns
    -------
    Path
        The page, below 10 MB, mode 0600.
    """
    groups = answer.group_runs(runs)
    analysed = [run for group in groups.values() for run in group]
    recorded = recorded or any(_is_recorded(run.path) for run in analysed)
    if not analysed:
        raise RxlabError(
            "no run to report",
            expected="at least one run directory",
            do="Record one with 'rxlab capture' or 'rxlab demo'.",
        )
    redactor = None if reveal else Redactor.of_hosts([run.host for run in analysed])
    page = _render(_context(groups, command=command, recorded=recorded, title=title, redactor=redactor))
    if len(page.encode()) > MAX_BYTES:
        raise RxlabError(
            "report is too large",
            where=str(out),
            found=f"{len(page.encode()):,} bytes",
            expected=f"at most {MAX_BYTES:,}",
            do="Report fewer runs at a time.",
        )
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
        stream.write(page)
    os.replace(temporary, target)
    return target


def _is_recorded(path: Path) -> bool:
    return path.resolve().parent.name == "data" or (path / RECORDED_MARK).is_file()


def _render(context: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rxlab.show"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = lambda ns: "-" if ns is None else plots.microseconds(float(ns))
    environment.filters["count"] = lambda n: "-" if n is None else f"{int(n):,}"
    environment.filters["share"] = lambda x: "-" if x is None or x != x else f"{100 * x:.2f} %"
    return environment.get_template(TEMPLATE).render(context)


def _context(
    groups: Mapping[str, Sequence[AnalysedRun]],
    *,
    command: Sequence[str] | str | None,
    recorded: bool,
    title: str | None,
    redactor: Redactor | None,
) -> dict[str, Any]:
    runs = [run for group in groups.values() for run in group]
    labels = [label for label, group in groups.items() for _ in group]
    metric = answer.choose_metric(groups)
    pairs = answer.compare_all(groups, metric)
    given = answer.give_answer(groups, pairs, metric)
    checks = trust.trust_panel(runs, recorded=recorded, overhead=_overheads(groups, metric))
    hide: Callable[[Any], str] = str if redactor is None else redactor.text
    return {
        "title": title or _title(groups),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": rxlab.__version__,
        "measured": _measured(runs),
        "answer": given,
        "checks": checks,
        "overall": trust.overall(checks),
        "rows": trust.run_rows(runs, labels),
        "metric": answer.METRICS.get(metric or "", ""),
        "pairs": pairs,
        "comparison_words": answer.comparison_words,
        "workload_rows": _workload_rows(groups, metric),
        "hop_rows": _hop_rows(groups),
        "cost_rows": cost_rows(groups),
        "figures": list(_figures(groups, pairs, metric)),
        "host": [(key, hide(value)) for key, value in _host_facts(runs[0])],
        "workload": [
            (key, hide(value)) for key, value in (runs[0].run.get("workload") or {}).items() if value is not None
        ],
        "settings": _settings(runs),
        "command": hide(_command(runs, command)),
        "run_commands": [(row.path.name, hide(_join_command(row.run.get("command")))) for row in runs],
        "pseudonyms": redactor is not None,
        "stages": STAGES,
    }


def _title(groups: Mapping[str, Any]) -> str:
    labels = list(groups)
    if len(labels) == 1:
        return f"Received packets, {labels[0]}"
    return f"{labels[1]} against {labels[0]}" if len(labels) == 2 else f"{len(labels)} configurations compared"


def _measured(runs: Sequence[AnalysedRun]) -> str:
    starts = [int(run.run.get("start_ns") or 0) for run in runs]
    known = [start for start in starts if start]
    return (
        datetime.fromtimestamp(min(known) / 1e9, UTC).strftime("%Y-%m-%d %H:%M UTC") if known else "at an unknown time"
    )


def _overheads(groups: Mapping[str, Sequence[AnalysedRun]], metric: str | None) -> list[tuple[str, float]]:
    """Return the workload's median latency, traced over untraced, per configuration that has both."""
    found = []
    for label, runs in groups.items():
        sides = [answer.latencies(runs, metric, arms) for arms in (("untraced",), answer.TRACED_ARMS)]
        if all(sides):
            untraced, traced = (stats.estimate_quantile(side, 0.5).value for side in sides)
            found.append((label, traced / untraced))
    return found


def _workload_rows(groups: Mapping[str, Sequence[AnalysedRun]], metric: str | None) -> list[dict[str, Any]]:
    rows = []
    for label, runs in groups.items():
        for arm in dict.fromkeys(run.arm for run in runs):
            values = answer.latencies(runs, metric, (arm,))
            if values:
                rows.append({"configuration": label, "arm": arm, "runs": len(values), **_quantile_cells(values)})
    return rows


def _quantile_cells(runs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return p50, p90, p99 with intervals, p99.9 and maximum without, of the same packets pooled."""
    pooled = np.sort(np.concatenate(runs))
    cells: dict[str, Any] = {f"p{100 * level:g}": stats.estimate_quantile(runs, level) for level in stats.QUANTILES}
    cells["p999"] = (
        float(pooled[min(int(np.ceil(0.999 * len(pooled))) - 1, len(pooled) - 1)]) if len(pooled) >= 1000 else None
    )
    cells["maximum"] = float(pooled[-1])
    cells["n"] = len(pooled)
    cells["modes"] = stats.find_modes(pooled)
    return cells


def _hop_rows(groups: Mapping[str, Sequence[AnalysedRun]]) -> list[dict[str, Any]]:
    rows = []
    for hop in schema.HOP_NAMES:
        for label, runs in groups.items():
            values = [stats.hop_values(tree, hop) for tree in answer.traced_trees(runs)]
            values = [run for run in values if len(run)]
            if values:
                kind = "total" if hop in schema.TOTAL_NAMES else "step"
                rows.append(
                    {"hop": hop, "kind": kind, "configuration": label, "runs": len(values), **_quantile_cells(values)}
                )
    return rows


def cost_rows(groups: Mapping[str, Sequence[AnalysedRun]]) -> list[dict[str, Any]]:
    """Return what a message cost the CPUs, from the kernel's counters, per configuration and arm."""
    rows = []
    for label, runs in groups.items():
        for arm in dict.fromkeys(run.arm for run in runs):
            costs = [cost for run in runs if run.arm == arm and (cost := _cost(run))]
            if costs:
                keys = costs[0].keys() & set.intersection(*(set(cost) for cost in costs))
                rows.append(
                    {"configuration": label, "arm": arm, "runs": len(costs)}
                    | {key: float(np.mean([cost[key] for cost in costs])) for key in keys}
                )
    return rows


def _cost(run: AnalysedRun) -> dict[str, float]:
    if "counters" not in run.tree.children or "app" not in run.tree.children:
        return {}
    app, counters = run.tree["app"].to_dataset(), run.tree["counters"].to_dataset()
    messages = app.sizes.get("message") or app.sizes.get("request")
    if not messages:
        return {}
    cost = {}
    if "softirqs" in counters and "NET_RX" in counters["softirq"].values:
        cost["net_rx"] = float(counters["softirqs"].sel(softirq="NET_RX").sum()) / messages
    if "softnet" in counters and "received_rps" in counters["softnet_field"].values:
        cost["received_rps"] = float(counters["softnet"].sel(softnet_field="received_rps").sum()) / messages
    if "cpu_time" in counters:
        modes = [mode for mode in ("system", "irq", "softirq") if mode in counters["cpu_mode"].values]
        cost["kernel_ns"] = float(counters["cpu_time"].sel(cpu_mode=modes).sum()) / messages
    return cost


def svg_data_uri(figure: Figure) -> str:
    """Return a figure as a ``data:`` URI: isolated from the page's styles and from other figures' ids, and it loads nothing."""
    stream = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rxlab"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def _figures(
    groups: Mapping[str, Sequence[AnalysedRun]], pairs: Sequence[answer.Pair], metric: str | None
) -> Iterator[dict[str, str]]:
    """Yield section, question, caption and image of every figure."""

    def figure(section: str, question: str, caption: str, drawn: Figure) -> dict[str, str]:
        return {"section": section, "question": question, "caption": caption, "src": svg_data_uri(drawn)}

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
                yield figure("explanation", f"Which hops carry the difference of the {name}?", f"{pair.b} minus {pair.a}, traced runs. The bars add up to the difference; lines are 95 % intervals over repetitions, where there are some.",
                             plots.plot_difference(explanation, a=pair.a, b=pair.b))  # fmt: skip
        totals = {label: [stats.hop_values(tree, "total_latency") for tree in found] for label, found in trees.items()}
        yield figure(
            "explanation",
            "How long from the first kernel stage to recvmsg, down to the slowest?",
            "Traced runs, one line per run.",
            plots.plot_ecdf(totals, title=""),
        )
    for label, found in trees.items():
        yield figure(
            "packets",
            f"What did the median packet wait for? {label}",
            "One real packet. Colour: the CPU on which each stage was reached.",
            plots.plot_packet(found[0]),
        )
        yield figure(
            "packets",
            f"Which CPU handed packets to which? {label}",
            "Share of packets, from row to column.",
            plots.plot_steering(found[0]),
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
    for label, found in trees.items():
        yield figure(
            "trust",
            f"Of how many packets was each stage seen? {label}",
            "Packets whose path requires the stage.",
            plots.plot_coverage(found[0]["coverage"].to_dataset(), title=""),
        )
        yield figure(
            "trust",
            f"Do the clocks stay on one axis? {label}",
            "The capture's stamp is compared with the kernel event next to it. A step or a slope here would be a clock's.",
            plots.plot_clock(found[0]),
        )


def _host_facts(run: AnalysedRun) -> list[tuple[str, Any]]:
    host = run.host
    cpus = host.get("cpus") or []
    iface = str(run.run.get("iface") or "")
    nic = (host.get("ifaces") or {}).get(iface) or {}
    places = {
        name: len({cpu.get(name) for cpu in cpus if cpu.get(name) is not None}) for name in ("core", "llc", "node")
    }
    facts = [
        ("Host", host.get("hostname")),
        ("Kernel", host.get("kernel")),
        (
            "CPUs",
            f"{len(cpus)} in {places['core']} cores, {places['llc']} last level caches, {places['node']} nodes"
            if cpus
            else None,
        ),
        ("Governor", host.get("governor")),
        ("irqbalance", {True: "running", False: "not running"}.get(host.get("irqbalance"))),  # type: ignore[arg-type]
        (
            "Interface",
            f"{iface}, driver {nic.get('driver') or 'unknown'}, {len(nic.get('queues') or [])} queues"
            if iface
            else None,
        ),
        ("Idle tasks", "spinner on every CPU" if (run.run.get("idle") or {}).get("spinners") else "left alone"),
        ("perf", (run.run.get("perf") or {}).get("version")),
        ("tcpdump", (run.run.get("tcpdump") or {}).get("version")),
    ]
    return [(key, value) for key, value in facts if value not in (None, "")]


def _settings(runs: Sequence[AnalysedRun]) -> list[tuple[str, str, bool]]:
    """Return setting, its values over all runs, and whether it varied."""
    configurations = [run.run.get("configuration") or {} for run in runs]
    names = dict.fromkeys(name for configuration in configurations for name in configuration)
    values = {
        name: list(dict.fromkeys(str(configuration.get(name, "-")) for configuration in configurations))
        for name in names
    }
    return [(name, " | ".join(found), len(found) > 1) for name, found in values.items()]


def _command(runs: Sequence[AnalysedRun], command: Sequence[str] | str | None) -> str:
    return _join_command(command if command is not None else runs[0].run.get("command"))


def _join_command(command: Any) -> str:
    if isinstance(command, str):
        return command
    return shlex.join(map(str, command)) if command else json.dumps("not recorded")
