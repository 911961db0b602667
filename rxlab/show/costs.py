"""What a message cost the CPUs, from the kernel's own counters: softirqs, packets moved, time in the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rxlab.dataset import stats
from rxlab.show.trust import AnalysedRun


def cost_rows(groups: Mapping[str, Sequence[AnalysedRun]]) -> list[dict[str, Any]]:
    """Return the cost of a message per configuration and arm: means over its runs (of CPU time geometric, with its interval).

    Returns
    -------
    list of dict
        ``configuration, arm, runs``; where counted ``net_rx`` softirqs and ``received_rps`` packets per message, ``kernel_ns`` with
        ``kernel_low``, ``kernel_high`` (NaN below `stats.MIN_REPETITIONS` runs).
    """
    rows = []
    for label, runs in groups.items():
        for arm in dict.fromkeys(run.arm for run in runs):
            found = [cost for run in runs if run.arm == arm and (cost := message_cost(run))]
            if not found:
                continue
            keys = [key for key in found[0] if all(key in cost for cost in found)]
            row: dict[str, Any] = {"configuration": label, "arm": arm, "runs": len(found)}
            row |= {key: float(np.mean([cost[key] for cost in found])) for key in keys}
            if "kernel_ns" in row:
                spread = stats.over_repetitions([cost["kernel_ns"] for cost in found])
                row |= {"kernel_ns": spread.value, "kernel_low": spread.low, "kernel_high": spread.high}
            rows.append(row)
    return rows


def compare_cost(a: Sequence[AnalysedRun], b: Sequence[AnalysedRun]) -> stats.Comparison | None:
    """Compare the kernel's CPU time per message of the untraced runs of two configurations; None where it was not counted."""
    sides = [[message_cost(run).get("kernel_ns", 0.0) for run in runs if run.arm == "untraced"] for runs in (a, b)]
    counted = [[value for value in side if value > 0] for side in sides]
    return stats.correct([stats.compare_values(*counted, quantile=0.5)])[0] if all(counted) else None


def message_cost(run: AnalysedRun) -> dict[str, float]:
    """Return what one message of a run cost, over the whole host; empty without counters or a workload's log."""
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
