"""Runs for other tools: pyperf suites, Parquet and CSV tables; pcapng.py and perfetto.py have formats of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyperf
import xarray as xr

from rxlab.dataset import schema, stats
from rxlab.dataset.run import Run, open_run
from rxlab.errors import RxlabError, UsageError
from rxlab.rundir import check_free
from rxlab.show.answer import METRICS
from rxlab.show.pcapng import to_pcapng
from rxlab.show.perfetto import to_perfetto
from rxlab.show.redact import Redactor
from rxlab.show.share import redact_tree, task_names, write_dataset
from rxlab.show.trust import AnalysedRun

# pyperf keeps every value as JSON text; its estimators need no more than this many of a run.
MAX_VALUES = 10_000
EXPORTS = ("pyperf", "parquet", "csv", "netcdf", "pcapng", "perfetto")


def export_run(
    path: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    reveal: bool = False,
    hide_tasks: bool = False,
    force: bool = False,
) -> Path:
    """Write a recorded run for another tool: one of `EXPORTS`.

    `reveal` keeps what identifies hosts and networks as recorded; `hide_tasks` replaces the names of tasks too. A file that is
    there is replaced only with `force`.
    """
    if to not in EXPORTS:
        raise UsageError("unknown export", where="--to", found=repr(to), expected=", ".join(EXPORTS))
    if reveal and hide_tasks:
        raise UsageError("to reveal and to hide at once", found="--reveal --hide-tasks", expected="one of them")
    run, target = open_run(path), Path(out)
    if target.is_dir():
        raise UsageError("an export is one file", where=str(target), found="a folder", expected="the name of a file")
    if to in ("parquet", "csv") and target.suffix != f".{to}":
        target = target.with_name(f"{target.name}.{to}")
    check_free(target, force)
    written = _export(run, to, target, reveal=reveal, hide_tasks=hide_tasks)
    # As the run itself: what was recorded is its owner's until it is given away.
    written.chmod(0o600)
    return written


def _export(run: Run, to: str, target: Path, *, reveal: bool, hide_tasks: bool) -> Path:
    redactor = None
    if not reveal:
        redactor = Redactor.of_hosts([run.host], tasks=task_names(run.tree) if hide_tasks else ())
    if to == "pyperf":
        return to_pyperf([run], target, redactor=redactor)
    if to == "netcdf":
        return write_dataset(run.tree, target, redactor)
    if to == "pcapng":
        return to_pcapng(run, target, reveal=reveal, redactor=redactor)
    tree = run.tree if redactor is None or "packets" not in run.tree.children else redact_tree(run.tree, redactor)
    return to_perfetto(tree, target) if to == "perfetto" else to_table(tree, target)


def to_pyperf(
    runs: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    hops: Sequence[str] = ("total_latency",),
    redactor: Redactor | None = None,
) -> Path:
    """Write the latencies of the repetitions of one configuration as a pyperf suite.

    ``python -m pyperf compare_to A.json B.json``, ``hist`` and ``stats`` read it. One benchmark per workload latency and per
    hop, one pyperf run per repetition, values in seconds; of more than 10,000 packets evenly spaced ones are taken.

    Parameters
    ----------
    runs : sequence of rxlab.Run
    hops : sequence of str
        Labels of the coordinate ``hop``; traced runs only.
    """
    analysed = [AnalysedRun.of(run) for run in runs]
    benchmarks = []
    for name in (*METRICS, *hops):
        series = [(run, values) for run in analysed if (values := _latencies(run, name)) is not None and len(values)]
        if series:
            benchmarks.append(pyperf.Benchmark([_pyperf_run(name, run, values, redactor) for run, values in series]))
    if not benchmarks:
        raise RxlabError("nothing to export", found="no latencies in these runs", expected=", ".join((*METRICS, *hops)))
    target = Path(path)
    pyperf.BenchmarkSuite(benchmarks).dump(str(target), replace=True)
    return target


def _latencies(run: AnalysedRun, name: str) -> np.ndarray | None:
    if name in METRICS:
        return run.workload_latency(name)
    return stats.hop_values(run.tree, name) if run.is_traced else None


def _pyperf_run(name: str, run: AnalysedRun, values: np.ndarray, redactor: Redactor | None) -> pyperf.Run:
    spaced = values[np.linspace(0, len(values) - 1, min(len(values), MAX_VALUES)).astype(np.int64)]
    # A backward hop is no duration; pyperf refuses it.
    seconds = [float(value) / 1e9 for value in spaced if value > 0]
    described = json.dumps(run.run.get("configuration") or {}, sort_keys=True)
    metadata: Mapping[str, Any] = {
        "name": name,
        "unit": "second",
        "description": described if redactor is None else redactor.text(described),
    }
    return pyperf.Run(seconds, metadata=dict(metadata), collect_metadata=False)


def packet_frame(tree: xr.DataTree) -> pd.DataFrame:
    """Return one row per packet: /packets variables, codes as words, ``<stage>_time`` (ns of CLOCK_REALTIME; empty: not seen), ``<hop>_ns``."""
    packets, hops = tree["packets"].to_dataset(), tree["hops"].to_dataset()
    columns: dict[str, Any] = {}
    for name, array in packets.data_vars.items():
        if array.dims != ("packet",):
            continue
        if "flag_values" in array.attrs:
            words = schema.meanings(array)
            columns[str(name)] = pd.Categorical.from_codes(*_dense_codes(array.values, words))
        else:
            columns[str(name)] = array.values
    for index, stage in enumerate(packets["stage"].values):
        columns[f"{stage}_time"] = packets["time"].values[:, index]
    for index, hop in enumerate(hops["hop"].values):
        columns[f"{hop}_ns"] = hops["latency"].values[:, index]
    return pd.DataFrame(columns)


def _dense_codes(values: np.ndarray, words: Mapping[int, str]) -> tuple[np.ndarray, list[str]]:
    """Return codes from 0 and their words in that order; a code without a word is missing (-1)."""
    codes = np.full(len(values), -1, np.int64)
    for position, code in enumerate(words):
        codes[values == code] = position
    return codes, list(words.values())


def to_table(tree: xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write the packets of a run as Parquet or CSV, by the file's suffix."""
    target = Path(path)
    if "packets" not in tree.children:
        raise RxlabError("nothing to export", found="a run without trace", expected="a traced run")
    if target.suffix == ".parquet":
        packet_frame(tree).to_parquet(target)
    elif target.suffix == ".csv":
        packet_frame(tree).to_csv(target, index=False)
    else:
        raise UsageError(
            "unknown table format", where=str(target), found=target.suffix or "no suffix", expected=".parquet or .csv"
        )
    return target
