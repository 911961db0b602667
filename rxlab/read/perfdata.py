"""perf.data -> columns: every sample and every tracepoint field, typed, in time order.

``perf script`` prints text at 0.7 million samples per second and no maintained Python library reads the binary file. Here
one pass finds the records, one says what each sample is, the samples are put in order, and the fields are then copied
straight into their final columns, event by event on demand or all at once with :meth:`PerfData.load`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rxlab.errors import FormatError, MissingEventError, TruncatedFileError, UsageError
from rxlab.read import perfgather, perfindex
from rxlab.read.columns import Columns
from rxlab.read.perfcolumns import gather_columns
from rxlab.read.perffile import PerfFile, open_perffile
from rxlab.read.perfindex import Index, Tables
from rxlab.read.perfmeta import LOST, LOST_SAMPLES, count_index, describe, describe_counts, read_lost
from rxlab.read.perfwindows import FOREVER, Summary, choose_edges, is_before, iterate_windows, summarize
from rxlab.rundir import PERF_DATA, RUN_JSON


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

    def __init__(self, source: Source, index: Index | None, meta: dict[str, Any], lost: Columns) -> None:
        self._source, self._whole = source, index
        self._decoded: dict[str, Columns] = {}
        self.meta = meta
        self.lost = lost

    def __repr__(self) -> str:
        return f"<PerfData {self.meta['path']}: {self.meta['samples']} samples of {len(self.events)} events>"

    @property
    def events(self) -> Mapping[str, Columns]:
        """Columns by event name."""
        # Made anew: kept, it and its owner would hold each other, and a window's memory would wait for the garbage collector.
        return _Events(self)

    @property
    def _index(self) -> Index:
        if self._whole is None:
            source = self._source
            samples = perfindex.read_samples(source.perf, source.tables, threads=source.threads)
            self._whole = perfindex.build_index(source.perf, samples, threads=source.threads)
        return self._whole

    def _names(self) -> list[str]:
        return [
            name
            for name in self.meta["samples_per_event"]
            if self._source.wanted is None or name in self._source.wanted
        ]

    def _decode(self, names: list[str]) -> None:
        source = self._source
        numbers = [source.perf.events.names.index(name) for name in names if name not in self._decoded]
        columns, short = gather_columns(
            source.perf, self._index, numbers, threads=source.threads, clock=self.meta["clock"]
        )
        self._decoded.update(columns)
        self.meta["missing_values"] = self.meta.get("missing_values", 0) + short

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Return CPU and time (ns) of all samples in order, without decoding any field."""
        order = np.argsort(self._index.rank)
        return self._index.cpu[order], self._index.time[order]

    def load(self) -> PerfData:
        """Decode every event now, in one pass over the file, and return self."""
        self._decode(self._names())
        return self

    def stats(self) -> dict[str, Any]:
        """Return counts and span without decoding any field.

        Keys: ``samples, samples_per_event, first_ns, last_ns, lost`` (samples the kernel could not deliver),
        ``lost_by_kind`` {``LOST``, ``LOST_SAMPLES``: two counts of the same losses}, ``duplicates, unknown_ids, truncated, warnings``.
        """
        by_kind = {
            kind.decode(): int(self.lost["count"][self.lost["kind"] == kind].sum()) for kind in (LOST, LOST_SAMPLES)
        }
        keys = (
            "samples",
            "samples_per_event",
            "first_ns",
            "last_ns",
            "duplicates",
            "unknown_ids",
            "truncated",
            "warnings",
        )
        return {**{key: self.meta[key] for key in keys}, "lost": max(by_kind.values()), "lost_by_kind": by_kind}

    def iter_chunks(self, n_samples: int | None = None, *, window_ns: int | None = None) -> Iterator[PerfData]:
        """Yield the recording in windows of time, each a PerfData of its own, with bounded memory.

        The windows' columns one after the other are the recording's; ``rank`` goes on from window to window, ``meta`` counts
        the window's samples, ``lost`` has the losses recorded in it.

        Parameters
        ----------
        n_samples : int, optional
            About so many samples each; default: ``chunks=`` of :func:`read_perfdata`, else a million.
        window_ns : int, optional
            Windows of this length instead.
        """
        source = self._source
        summary = source.summary()
        edges = choose_edges(summary, n_samples or source.chunks or 1_000_000)
        if window_ns is not None:
            if window_ns <= 0:
                raise UsageError(
                    "a window needs a length", found=f"window_ns={window_ns}", expected="nanoseconds above 0"
                )
            first, last = summary.counts.first_ns, summary.counts.last_ns
            edges = [*range(first, last + 1, window_ns), FOREVER] if first is not None and last is not None else edges
        lost_time = np.clip(self.lost["time"], edges[0], None)
        for number, index in enumerate(
            iterate_windows(source.perf, source.tables, edges, summary, threads=source.threads)
        ):
            meta = {**self.meta, **describe_counts(source.perf, count_index(index))}
            lost = self.lost.take((lost_time >= edges[number]) & is_before(lost_time, edges[number + 1]))
            yield PerfData(source, index, meta, lost)

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


@dataclass
class Source:
    """What all windows of a recording share.

    Attributes
    ----------
    perf, tables
        The opened file.
    wanted : set of str or None
        Events asked for; None: all.
    chunks : int or None
        Samples per chunk asked for.
    threads : int
    """

    perf: PerfFile
    tables: Tables
    wanted: set[str] | None
    chunks: int | None
    threads: int
    _summary: Summary | None = None

    def summary(self) -> Summary:
        """Return the span of each block, walking the samples the first time."""
        if self._summary is None:
            self._summary = summarize(self.perf, self.tables, threads=self.threads)
        return self._summary


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
        Names wanted; all by default. Those not recorded are simply not there; ``rank`` counts all events of the file.
    chunks : int, optional
        Samples per chunk of :meth:`PerfData.iter_chunks`; nothing of the file's size is then held before something is asked
        for, and ``meta`` counts duplicates in (``duplicates`` is None).
    local_formats : bool, optional
        For a recording that lost its formats: take those of the running kernel.
    threads : int, optional

    Returns
    -------
    PerfData

    Raises
    ------
    FormatError
        Not a perf.data file, or damaged beyond salvage.
    """
    if chunks is not None and chunks <= 0:
        raise UsageError("a chunk needs a size", found=f"chunks={chunks}", expected="samples above 0")
    announce_compilation()
    perf = open_perffile(path, local_formats=local_formats)
    tables = perfindex.Tables(perf)
    wanted = None if events is None else set(events)
    source = Source(perf, tables, wanted, chunks, max(1, min(threads, 16)))
    index = None
    if chunks is None:
        samples = perfindex.read_samples(perf, tables, threads=source.threads)
        index = perfindex.build_index(perf, samples, threads=source.threads)
    counts = source.summary().counts if index is None else count_index(index)
    return PerfData(source, index, describe(perf, counts), read_lost(perf))


def announce_compilation() -> None:
    """Say on a terminal why the first call ever takes seconds: Numba compiles the kernels and keeps them on disk."""
    folder = Path(str(perfgather.gather_samples.stats.cache_path))
    if sys.stderr.isatty() and not any(folder.glob("perfgather.gather_samples-*.nbi")):
        print("rxlab: compiling the perf.data reader (once, a few seconds)", file=sys.stderr)


def inspect_perfdata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``rxlab inspect FILE --json`` prints about a perf.data file.

    Keys: ``kind, samples, samples_per_event`` (events with samples), ``first_ns, last_ns, lost, lost_by_kind, duplicates, unknown_ids, truncated, warnings``.

    Raises
    ------
    FormatError
        Not a perf.data file, or a directory without one.
    TruncatedFileError
        The file is damaged and no sample could be salvaged.
    """
    top = Path(path)
    if top.is_dir() and not (top / "data").exists():
        is_run = (top / RUN_JSON).exists()
        raise FormatError(
            "a run directory, not a recording" if is_run else "a directory, not a recording",
            where=str(path),
            expected="a perf.data, pcap or pcapng file, or a directory that perf record --threads made",
            do=f"Name a file in it, e.g. {top / PERF_DATA}." if is_run else None,
        )
    stats = read_perfdata(path, chunks=1_000_000).stats()
    if stats["truncated"] and not stats["samples"]:
        raise TruncatedFileError("nothing could be salvaged", where=str(path), found="; ".join(stats["warnings"]))
    stats["samples_per_event"] = {name: count for name, count in stats["samples_per_event"].items() if count}
    return {"kind": "perf.data", **stats}
