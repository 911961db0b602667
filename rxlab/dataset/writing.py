"""Trees as netCDF4 files: how their variables are encoded, and a file that is there only when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rxlab.errors import RxlabError

NAT = np.iinfo(np.int64).min


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a file to write, mode 0600, that takes its name only when all is written."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    except OSError as error:
        # Not the name of the temporary file, which nobody gave.
        raise RxlabError(
            "cannot be written", where=str(target), found=error.strerror, do="Choose another -o."
        ) from None
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write(tree: xr.DataTree, path: Path, *, growing: str | None = None) -> None:
    """Write a tree; columns are chunked one stage or hop at a time, so that reading one of them touches only its bytes.

    A `growing` dimension can be made longer later.
    """
    encoding = {node.path: {str(n): _encoding(node.variables[n]) for n in node.variables} for node in tree.subtree}
    unlimited = {node.path: {growing} for node in tree.subtree if growing in node.dims}
    tree.to_netcdf(path, engine="h5netcdf", encoding=encoding, unlimited_dims=unlimited or None)


def _encoding(variable: Any) -> dict[str, Any]:
    """Return the netCDF encoding of one variable: exact timestamps, no fill values where codes say it, compression."""
    encoding: dict[str, Any] = {}
    if variable.dtype.kind == "M":
        encoding = {"units": "nanoseconds since 1970-01-01", "dtype": "int64", "_FillValue": NAT}
    elif variable.dtype.kind in "iub":
        encoding = {"_FillValue": None}
    if variable.dtype.kind in "iufbM" and variable.ndim and variable.size:
        rows = min(variable.shape[0], 1 << 17)
        encoding.update(zlib=True, complevel=1, shuffle=True, chunksizes=(rows,) + (1,) * (variable.ndim - 1))
        if variable.shape[0] < 256:
            encoding["chunksizes"] = variable.shape
    return encoding
