"""Runs of a small comparison whose truth is planted, for the report's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from joined_builder import make_app_logs, make_counters, make_host, make_joined, make_run

from rxlab.dataset import store
from rxlab.show.trust import AnalysedRun

VERIFIED = {
    "checked": 600, "complete": 1.0, "misjoined": 0, "flagged": 0, "data_packets": 600, "t1_minus_exit_ns": {"p50": 500}, "scm_minus_pcap_ns": None,
    "byte_sums_equal": True, "counters_agree": {"ok": True, "received_rps": {"counter": 600, "joined": 600}},
}  # fmt: skip


def make_runs(
    *, ratio: float = 1.3, reps: int = 5, n: int = 600, traced: bool = True, settings=("0", "2"), between: float = 0.01
) -> list[AnalysedRun]:
    """Return `reps` untraced runs and one traced run of each configuration; every next one is `ratio` times slower."""
    rng = np.random.default_rng(42)
    runs = []
    for index, rps in enumerate(settings):
        configuration = {"rps_cpus": rps, "gro": "off"}
        for repetition in range(reps):
            latency = 10_000 * ratio**index * np.exp(rng.normal(0, between) + 0.3 * rng.standard_normal(n))
            run = make_run(arm="untraced", configuration=configuration, perf=None, tcpdump=None)
            tree = store.build(
                None, run=run, host=make_host(), counters=make_counters(), app_latency=make_app_logs(latency)
            )
            runs.append(AnalysedRun(run, make_host(), tree, None, Path(f"c{index:02d}-r{repetition:02d}-untraced")))
        if traced:
            run = make_run(arm="std", configuration=configuration)
            joined = make_joined(n, seed=index + 1, path_kind="backlog_rps" if index else "backlog")
            logs = make_app_logs(15_000 * ratio**index * np.exp(0.3 * rng.standard_normal(n)))
            tree = store.build(joined, run=run, host=make_host(), counters=make_counters(), app_latency=logs)
            runs.append(AnalysedRun(run, make_host(), tree, VERIFIED, Path(f"c{index:02d}-r00-std")))
    return runs
