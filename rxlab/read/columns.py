"""Columns: named NumPy arrays of one length, what travels between the readers and the dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rxlab.errors import MissingColumnError


class Columns(Mapping[str, np.ndarray]):
    """Named one-dimensional arrays of equal length, with attributes.

    ``columns["time"]`` is an array; ``columns.n`` is the number of rows (``len()`` is the number of columns, as in any
    mapping). Timestamps are int64 nanoseconds and ``attrs["clock"]`` names their clock.

    Parameters
    ----------
    arrays : mapping of str to array
        All of one length. Text columns are dictionary-encoded by their reader or of dtype ``S``.
    attrs : mapping, optional
        Facts about all rows: clock, file, counts of what was skipped.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any] | None = None) -> None:
        self._arrays = dict(arrays)
        self.attrs: dict[str, Any] = dict(attrs or {})
        lengths = {len(array) for array in self._arrays.values()}
        if len(lengths) > 1:
            raise ValueError(f"columns differ in length: { {name: len(a) for name, a in self._arrays.items()} }")
        self.n: int = lengths.pop() if lengths else 0

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self._arrays[name]
        except KeyError:
            raise MissingColumnError(
                "a field that is needed is not there",
                found=", ".join(map(str, self._arrays)) or "no fields",
                expected=str(name),
                do="The description of an event in the file is damaged, or of a kernel that names it otherwise.",
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        names = ", ".join(f"{name}:{array.dtype}" for name, array in self._arrays.items())
        return f"<Columns {self.n} rows: {names}>"

    def take(self, rows: np.ndarray | slice) -> Columns:
        """Return the given rows (index array, boolean mask or slice) as new columns."""
        return Columns({name: array[rows] for name, array in self._arrays.items()}, self.attrs)

    def with_columns(self, **arrays: np.ndarray) -> Columns:
        """Return the same columns with some added or replaced."""
        return Columns({**self._arrays, **arrays}, self.attrs)

    def followed_by(self, other: Columns) -> Columns:
        """Return these rows and the `other`'s after them, in the columns of these; attributes are the other's."""
        return Columns(
            {
                name: np.concatenate((array, other[name].astype(array.dtype, copy=False)))
                for name, array in self.items()
            },
            other.attrs,
        )
