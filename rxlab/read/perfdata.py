"""perf.data -> columns: every sample and every tracepoint field, typed, in time order.

``perf script`` prints text at 0.7 million samples per second and no maintained Python library reads the binary file. Here
one pass finds the records, one says what each sample is, the samples are put in order, and the fields are then copied
straight into their final columns, event by event on demand or all at once with :meth:`PerfData.load`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from rxlab.errors import MissingEventError
from rxlab.read import perfindex
from rxlab.read.columns import Columns
from rxlab.read.perfcolumns import gather_columns
from rxlab.read.perffile import PerfFile, open_perffile
from rxlab.read.perfmeta import describe, read_lost


class PerfData:
    """A recording: columns of each event, what was lost, and facts about it.

    Attributes
    ----------
    events : Mapping of str to Columns
        ``"sys:name"`` -> columns, decoded on first use. Each has ``time`` (int64 ns of the clock ``meta["clock"]``), ``cpu``
        (int32, -1: not recorded), ``pid`` (int32, the process), ``tid`` (int32), ``rank`` (int64, position in the order (time,
        cpu, file position) over all events of the file), then every field under its kernel name; a field called like one of
        these five becomes ``field_NAME``. ``attrs["categories"][field]`` holds the texts that an int32 code column points
        into (-1: none), ``attrs["symbols"][field]`` the kernel's names of a field's values.
    lost : Columns
        One row per LOST and LOST_SAMPLES record: ``time``, ``cpu``, ``count``, ``kind``, ``event``. The kinds count the same
        losses twice: never add them.
    meta : dict
        See :func:`rxlab.read.perfmeta.describe`.
    """

    def __init__(
        self, perf: PerfFile, index: perfindex.Index, meta: dict[str, Any], lost: Columns, threads: int
    ) -> None:
        self._perf, self._index, self._threads = perf, index, threads
        self._decoded: dict[str, Columns] = {}
        self.meta = meta
        self.lost = lost
        self.events: Mapping[str, Columns] = _Events(self)

    def __repr__(self) -> str:
        return f"<PerfData {self.meta['path']}: {self.meta['samples']} samples of {len(self.events)} events>"

    def _names(self) -> list[str]:
        return list(self.meta["samples_per_event"])

    def _decode(self, names: list[str]) -> None:
        numbers = [self._perf.events.names.index(name) for name in names if name not in self._decoded]
        columns, short = gather_columns(
            self._perf, self._index, numbers, threads=self._threads, clock=self.meta["clock"]
        )
        self._decoded.update(columns)
        if short:
            self.meta["short_fields"] = self.meta.get("short_fields", 0) + short

    def load(self) -> PerfData:
        """Decode every event now, in one pass over the file, and return self."""
        self._decode(self._names())
        return self

    def to_pandas(self, event: str) -> Any:
        """Return one event as a pandas DataFrame, texts decoded, ``time`` as int64 ns."""
        import pandas

        columns = self.events[event]
        return pandas.DataFrame({name: _plain(columns, name) for name in columns}, copy=False)

    def to_arrow(self, event: str) -> Any:
        """Return one event as a pyarrow Table; texts are dictionary arrays, array fields fixed-size lists."""
        import pyarrow

        columns = self.events[event]
        arrays = {}
        for name, array in columns.items():
            categories = columns.attrs["categories"].get(name)
            if categories is not None:
                indices = pyarrow.array(array, mask=array < 0)
                arrays[name] = pyarrow.DictionaryArray.from_arrays(
                    indices, pyarrow.array([str(text) for text in categories], pyarrow.string())
                )
            elif array.ndim == 2:
                arrays[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.ravel()), array.shape[1])
            elif array.dtype.kind == "S":
                arrays[name] = pyarrow.array(
                    [text.decode("utf-8", "replace") for text in array.tolist()], pyarrow.string()
                )
            else:
                arrays[name] = pyarrow.array(array)
        return pyarrow.table(arrays)


class _Events(Mapping[str, Columns]):
    """The events of a recording by name, decoded on first use."""

    def __init__(self, owner: PerfData) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> Columns:
        names = self._owner._names()
        if name not in names:
            import difflib

            close = difflib.get_close_matches(str(name), names, n=3)
            raise MissingEventKeyError(
                f"event {name!r} was not recorded",
                where=str(self._owner.meta["path"]),
                found=", ".join(close) if close else ", ".join(names[:8]),
                do=f"Record it: perf record -e {name}",
            )
        if name not in self._owner._decoded:
            self._owner._decode([name])
        return self._owner._decoded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._owner.meta["samples_per_event"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner._names())

    def __len__(self) -> int:
        return len(self._owner._names())


class MissingEventKeyError(MissingEventError, KeyError):
    """A MissingEventError that ``Mapping.get`` and ``in`` understand."""

    def __str__(self) -> str:
        return self.line()


def _plain(columns: Columns, name: str) -> Any:
    array = columns[name]
    categories = columns.attrs["categories"].get(name)
    if categories is not None:
        import pandas

        return pandas.Categorical.from_codes(
            array, categories=pandas.Index(categories, dtype=object, tupleize_cols=False)
        )
    if array.ndim == 2:
        return list(array)
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8", "replace")
    return array


def read_perfdata(
    path: str | os.PathLike[str],
    *,
    events: Iterable[str] | None = None,
    chunks: int | None = None,
    local_formats: bool = False,
    threads: int = 2,
) -> PerfData:
    """Read a perf.data file, pipe recording or directory.

    Parameters
    ----------
    path : path
    events : iterable of str, optional
        Names wanted; all by default. ``rank`` counts the samples of all events all the same.
    chunks : int, optional
        Samples per chunk of :meth:`PerfData.iter_chunks`.
    local_formats : bool, optional
        For a recording that lost its formats: take those of the running kernel.
    threads : int, optional
    """
    perf = open_perffile(path, local_formats=local_formats)
    tables = perfindex.Tables(perf)
    index = perfindex.build_index(perf, perfindex.read_samples(perf, tables, threads=threads))
    meta = describe(perf, index)
    return PerfData(perf, index, meta, read_lost(perf), threads)
