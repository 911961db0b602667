"""A folder of a sweep's runs -> one Zarr store, written run by run.

One run is one chunk of every variable, so several processes can write different runs of one store at the same time. It opens
with plain ``xarray.open_zarr`` where rxlab is not installed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset.aggregate import Grid, summarize, varied_settings
from rxlab.dataset.run import Run, each_run, left_out_text
from rxlab.errors import FormatError, RxlabError
from rxlab.rundir import DATASET, RUN_JSON, SWEEP_JSON, SWEEP_STORE, find_runs, read_json

# Zarr 3's text is not yet readable elsewhere; format 2 is, by everything that reads Zarr.
ZARR_FORMAT = 2
# Fields of the built-in workload that become scalar coordinates where they did not vary.
WORKLOAD_COORDS = (
    "proto",
    "family",
    "mode",
    "messages",
    "duration",
    "size",
    "reply_size",
    "flows",
    "rate",
    "arrivals",
    "migrate",
)
ALIAS_OF = {"server_cpu": "app_cpu", "client_cpu": "client_cpu"}


def aggregate_sweep(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    each: Callable[[Callable[[str], str | None], list[str]], Iterable[str | None]] = map,
    say: Callable[[str], None] = print,
) -> Path:
    """Analyse every run of a sweep that is not analysed yet, and lay all out as one dataset.

    Parameters
    ----------
    folder : path-like
        What ``rxlab sweep`` recorded: ``sweep.json`` and run directories.
    out : path-like, optional
        Store to write, replaced whole; ``sweep.zarr`` in the folder by default.
    each : callable
        How a function is called for each run directory: ``map``, or what has several processes do it (a Dask cluster's
        ``client.map``). Answers come in the order of the directories.
    say : callable
        Told of progress, and of runs that could not be analysed: those stay "absent" in the variable ``verdict``.

    Returns
    -------
    Path
        The store.
    """
    where = Path(folder)
    target = Path(out) if out is not None else where / SWEEP_STORE
    plan = read_json(where / SWEEP_JSON)
    runs, damaged = recorded_runs(where, int(plan["repetitions"]))
    grid = grid_of(plan, runs)
    unfinished = target.with_name(f".{target.name}.tmp")
    if damaged:
        say(f"not in the dataset: {left_out_text(damaged)}")
    try:
        create_store(unfinished, grid, plan)
        paths = [str(run.path) for run in runs]
        for number, problem in enumerate(each(partial(try_run, str(unfinished), grid, plan), paths)):
            say(f"analysed [{number + 1}/{len(runs)}] {runs[number].path.name}")
            if problem:
                say(f"  not in the dataset: {problem}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def recorded_runs(folder: Path, repetitions: int) -> tuple[list[Run], dict[Path, RxlabError]]:
    """Return the runs of a sweep's first repetitions that came to their end, complete or not, in name order; and those that cannot be read."""
    runs, damaged = each_run(find_runs(folder), lambda run: run)
    runs = [run for run in runs if run.run.get("sweep")]
    runs = [run for run in runs if run.run["status"] in ("complete", "partial")]
    runs = [run for run in runs if int(run.run["sweep"]["repetition"]) < repetitions]
    if not runs:
        raise FormatError("no run of a sweep", where=str(folder), expected=f"directories with {RUN_JSON}")
    return runs, damaged


def grid_of(plan: Mapping[str, Any], runs: Sequence[Run]) -> Grid:
    """Return the shape of the dataset from sweep.json and the hosts of the runs."""
    configurations = plan["configurations"]
    labels = _labels(plan)
    axes = {name: list(dict.fromkeys(entry[name] for entry in labels)) for name in (labels[0] if labels else {})}
    fixed, along = _coordinates(configurations, labels, axes)
    queues = sorted({queue for run in runs for queue in queue_irqs(run)})
    return Grid(
        axes=axes,
        repetitions=int(plan["repetitions"]),
        arms=list(plan["arms"]),
        n_cpus=max((len(run.host.get("cpus") or []) for run in runs), default=0),
        queues=queues,
        fixed=_workload_coords(runs, {*axes, *along, *fixed}) | fixed,
        along=along,
    )


def _labels(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each configuration's labels; of a sweep without named axes, the settings that differ."""
    if plan.get("labels"):
        return [dict(entry) for entry in plan["labels"]]
    varied = varied_settings(plan["configurations"])
    return [{name: str(entry.get(name, "")) for name in varied} for entry in plan["configurations"]]


def _coordinates(
    configurations: Sequence[Mapping[str, Any]], labels: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, Any], dict[str, tuple[str, Sequence[Any]]]]:
    """Sort the settings that are no axis themselves into those that never vary and those that one axis decides."""
    fixed: dict[str, Any] = {}
    along: dict[str, tuple[str, Sequence[Any]]] = {}
    for name in dict.fromkeys(name for entry in configurations for name in entry):
        values = [entry.get(name, "") for entry in configurations]
        if name in axes:
            continue
        if len(set(map(str, values))) == 1:
            fixed[name] = values[0]
            continue
        for axis, known in axes.items():
            of_label = {
                label: {v for v, at in zip(values, labels, strict=True) if at[axis] == label} for label in known
            }
            if all(len(found) == 1 for found in of_label.values()):
                along[name] = (axis, [next(iter(of_label[label])) for label in known])
                break
    return fixed, along


def _workload_coords(runs: Sequence[Run], taken: set[str]) -> dict[str, Any]:
    """Return what the workloads of all runs have in common."""
    loads = [run.run.get("workload") or {} for run in runs]
    found = {}
    for name in (*WORKLOAD_COORDS, *ALIAS_OF):
        values = {load.get(name) for load in loads}
        coord = ALIAS_OF.get(name, name)
        if len(values) == 1 and None not in values and coord not in taken:
            found[coord] = values.pop()
    return found


def queue_irqs(run: Run) -> dict[int, int]:
    """Return the interrupt of each receive queue of the captured interface that has one."""
    iface = (run.host.get("ifaces") or {}).get(run.run.get("iface")) or {}
    return {
        int(queue["queue"]): int(queue["irq"]) for queue in iface.get("queues") or [] if queue.get("irq") is not None
    }


def create_store(path: Path, grid: Grid, plan: Mapping[str, Any]) -> None:
    """Write a store of this shape that holds no run yet."""
    empty = grid.empty()
    empty.attrs |= {
        "title": "rxlab: a sweep, one run per cell",
        "order": str(plan.get("order", "shuffled")),
        "seed": int(plan.get("seed", 0)),
        "repeated": json.dumps(plan.get("repeated") or []),
    }
    ones = (1,) * len(grid.base)
    chunks = {str(name): {"chunks": (*ones, *array.shape[len(ones) :])} for name, array in empty.data_vars.items()}
    empty.to_zarr(path, mode="w", zarr_format=ZARR_FORMAT, encoding=chunks)


def try_run(store: str, grid: Grid, plan: Mapping[str, Any], path: str) -> str | None:
    """Write one run directory into its place of a store; return why that cannot be done."""
    try:
        write_run(Path(store), grid, Run(Path(path)), plan)
    except RxlabError as error:
        return error.line()
    return None


def write_run(path: Path, grid: Grid, run: Run, plan: Mapping[str, Any]) -> None:
    """Write one run into its place of a store; analyses it first where that was not done."""
    place = place_of(grid, run, plan)
    if not run.rundir.has(DATASET):
        run.analyze_in_place()
    tree = Run(run.path).tree  # not this run's own: it would keep the whole dataset in memory
    try:
        found = summarize(tree, grid, queue_irqs(run))
    finally:
        tree.close()
    leading = (np.newaxis,) * len(grid.base)
    known = {entry.name: entry for entry in grid.variables()}
    region = {dim: slice(at, at + 1) for dim, at in zip(grid.base, place, strict=True)}
    variables = {
        name: ((*grid.base, *known[name].dims[3:]), np.asarray(value)[leading]) for name, value in found.items()
    }
    xr.Dataset(variables).to_zarr(path, mode="r+", region=region, zarr_format=ZARR_FORMAT)


def place_of(grid: Grid, run: Run, plan: Mapping[str, Any]) -> tuple[int, ...]:
    """Return where a run lies in the sweep."""
    cell = run.run["sweep"]
    configuration = run.run.get("configuration") or {}
    labels = cell.get("labels") or {name: str(configuration.get(name, "")) for name in grid.axes}
    try:
        return grid.place(labels, int(cell["repetition"]), str(run.run["arm"]))
    except (KeyError, ValueError):
        raise FormatError("not a run of this sweep", where=str(run.path), found=str(labels)) from None
