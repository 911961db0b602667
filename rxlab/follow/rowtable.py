"""The joined rows while they come in parts: arrays in memory, or in files that the kernel may write out and forget."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from rxlab.read.columns import Columns


class RowTable:
    """Columns of known length, filled row by row in any order.

    Parameters
    ----------
    n : int
        Rows.
    folder : path-like, optional
        Where the columns lie, in files without a name that vanish with them; None: in memory.
    """

    def __init__(self, n: int, folder: str | os.PathLike[str] | None = None) -> None:
        self._n, self._folder = n, None if folder is None else Path(folder)
        self.columns: dict[str, np.ndarray] = {}

    def write(self, row: np.ndarray | slice, values: Columns | dict[str, np.ndarray]) -> None:
        """Write some rows of some columns; a row written again is replaced."""
        for name, array in values.items():
            if name not in self.columns:
                self.columns[name] = self._blank(array.dtype, array.shape[1:])
            self.columns[name][row] = array

    def _blank(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        size = (self._n, *shape)
        if self._folder is None or not self._n:
            return np.zeros(size, dtype)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.truncate(int(np.prod(size)) * dtype.itemsize)
            return np.memmap(file, dtype, "r+", shape=size)
