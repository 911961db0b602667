"""A dataset larger than memory: laid out and written block by block of packets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import xarray as xr

from rxlab.dataset import store
from rxlab.dataset.writing import write, written
from rxlab.follow.join import Joined

# The dimension that grows.
PACKET = "packet"


def save_in_blocks(
    joined: Joined,
    path: str | os.PathLike[str],
    *,
    run: Mapping[str, Any],
    host: Mapping[str, Any],
    counters: Mapping[str, Any] | None = None,
    app_latency: Mapping[str, Any] | None = None,
    beside: Mapping[str, xr.Dataset] | None = None,
    block: int | None = None,
) -> Path:
    """Lay out and write what :func:`rxlab.dataset.store.build` and ``save`` do, holding a block of packets at a time.

    Parameters
    ----------
    joined : Joined
        Its columns may lie in files (:class:`rxlab.follow.rowtable.RowTable`).
    path : path-like
    run, host, counters, app_latency, beside
        As ``build`` has them.
    block : int
        Packets at a time; by default those of :data:`rxlab.dataset.store.BLOCK`.
    """
    block = block or store.BLOCK
    facts: dict[str, Any] = {
        "run": run,
        "host": host,
        "counters": counters,
        "app_latency": app_latency,
        "beside": beside,
    }
    n = joined.packets.n
    head = store.build(joined, **facts, rows=slice(0, min(block, n)))
    with written(path) as temporary:
        write(head, temporary, growing=PACKET)
        with h5netcdf.File(temporary, "r+") as file:
            for begin in range(block, n, block):
                rows = slice(begin, min(begin + block, n))
                for group, dataset in store.packet_groups(joined, run, host, rows).items():
                    _append(file[group], dataset, rows)
    return Path(path)


def _append(group: Any, dataset: xr.Dataset, rows: slice) -> None:
    """Write a block's variables behind those that a group has."""
    group.resize_dimension(PACKET, rows.stop)
    for name, variable in dataset.variables.items():
        if PACKET in variable.dims:
            values = variable.values
            encoded = values.view(np.int64) if values.dtype.kind == "M" else values
            group.variables[name][rows] = encoded.astype(group.variables[name].dtype, copy=False)
