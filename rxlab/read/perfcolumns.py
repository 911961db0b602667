"""Columns of events: which fields there are, their memory, and the gather that fills it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from rxlab.read import perfgather as pg
from rxlab.read import tracefmt
from rxlab.read.columns import Columns
from rxlab.read.perfattr import L_ADDR, L_IP, L_PERIOD, L_TID, Attr
from rxlab.read.perffile import PerfFile
from rxlab.read.perfindex import Index, Tables, run_all

_SCALARS = {1: pg.K_U8, 2: pg.K_U16, 4: pg.K_U32, 8: pg.K_U64}
_VARIABLE = {tracefmt.LOC: pg.K_LOC, tracefmt.REL_LOC: pg.K_REL_LOC, tracefmt.REST: pg.K_REST}


@dataclass(frozen=True)
class ColumnPlan:
    """One column: its name, where its bytes come from and what they become.

    Attributes
    ----------
    name : str
    dtype : dtype
        Of one element.
    count : int
        Elements per row.
    kind, offset, size : int
        As the field table of :mod:`rxlab.read.perfgather` has them.
    field : Field or None
        The tracepoint field, None for a word of the sample.
    """

    name: str
    dtype: np.dtype
    count: int
    kind: int
    offset: int
    size: int
    field: tracefmt.Field | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return self.dtype.itemsize * self.count

    @property
    def unit(self) -> int:
        """Bytes of the view the column is addressed through."""
        if self.kind == pg.K_TEXT:
            return 1
        return 8 if self.kind == pg.K_TEXT8 else self.dtype.itemsize


def plan_columns(attr: Attr, event_format: tracefmt.EventFormat | None) -> list[ColumnPlan]:
    """Return the columns to gather for one event."""
    layout = attr.layout()
    plans = []
    if layout[L_TID] >= 0:
        for name, offset in (("pid", layout[L_TID]), ("tid", layout[L_TID] + 4)):
            plans.append(ColumnPlan(name, np.dtype(np.int32), 1, pg.K_SAMPLE_U32, offset, 4))
    if event_format is None:
        for name, position in (("ip", L_IP), ("addr", L_ADDR), ("period", L_PERIOD)):
            if layout[position] >= 0:
                plans.append(ColumnPlan(name, np.dtype(np.uint64), 1, pg.K_SAMPLE_U64, layout[position], 8))
        return plans
    taken = set(tracefmt.SAMPLE_COLUMNS)
    for item in event_format.fields:
        if item.column not in taken:
            taken.add(item.column)
            plans.append(plan_field(item))
    return plans


def plan_field(item: tracefmt.Field) -> ColumnPlan:
    """Return the column of one tracepoint field."""
    if item.kind in _VARIABLE:
        return ColumnPlan(item.column, item.dtype, 1, _VARIABLE[item.kind], item.offset, 4, item)
    if item.kind == tracefmt.TEXT:
        is_words = item.size % 8 == 0 and sys.byteorder == "little"
        return ColumnPlan(
            item.column, item.dtype, 1, pg.K_TEXT8 if is_words else pg.K_TEXT, item.offset, item.size, item
        )
    if item.kind == tracefmt.ARRAY:
        return ColumnPlan(item.column, item.dtype, item.count, pg.K_ARRAY, item.offset, item.itemsize, item)
    return ColumnPlan(item.column, item.dtype, 1, _SCALARS[item.itemsize], item.offset, item.size, item)


class Dictionary:
    """What one thread has seen in variable fields; grows when a kernel finds it full."""

    def __init__(self) -> None:
        self.arrays = self._sized(1 << 12, 1 << 16)

    @staticmethod
    def _sized(entries: int, pool: int) -> tuple[np.ndarray, ...]:
        numbers = (
            np.empty(entries, np.uint64),
            np.empty(entries, np.int64),
            np.empty(entries, np.int64),
            np.empty(entries, np.int64),
        )
        return (np.full(2 * entries, -1, np.int64), *numbers, np.empty(pool, np.uint8), np.zeros(2, np.int64))

    def grow(self) -> None:
        """Make room for four times as much."""
        old = self.arrays
        self.arrays = self._sized(4 * old[1].size, 4 * old[5].size)
        for new, array in zip(self.arrays[1:6], old[1:6], strict=True):
            new[: array.size] = array
        self.arrays[6][:] = old[6]
        pg.rebuild_slots(self.arrays[1], int(old[6][pg.D_ENTRIES]), self.arrays[0])

    def entries(self) -> list[tuple[int, bytes]]:
        """Return (field number, bytes) of each entry."""
        _, _, owners, firsts, lengths, pool, state = self.arrays
        pieces = zip(owners.tolist(), firsts.tolist(), lengths.tolist(), strict=True)
        return [
            (owner, pool[first : first + length].tobytes())
            for _, (owner, first, length) in zip(range(int(state[0])), pieces, strict=False)
        ]


def gather_columns(
    perf: PerfFile, index: Index, numbers: list[int], *, threads: int, clock: str
) -> tuple[dict[str, Columns], int]:
    """Copy the fields of some events out of the file.

    Returns
    -------
    columns : dict of str to Columns
        By event name.
    n_short : int
        Values that lay beyond the end of their sample, set to zero.
    """
    plans = {number: plan_columns(perf.events.attrs[number], format_of(perf, number)) for number in numbers}
    counts = np.diff(index.rows)
    arena, bases = allocate(plans, counts)
    fields, first_fields, flat = field_table(plans, bases, len(perf.events.names))
    layouts = Tables(perf).layouts
    dictionaries, n_short = gather_segments(perf, index, (layouts, fields, first_fields), arena, threads)
    arrays = [
        view_column(arena, base, plan, int(counts[number])) for (number, plan), base in zip(flat, bases, strict=True)
    ]
    categories = merge_dictionaries(dictionaries, flat, arrays, big=perf.big)
    columns: dict[str, Columns] = {}
    for number in numbers:
        rows = slice(int(index.rows[number]), int(index.rows[number + 1]))
        event: dict[str, np.ndarray] = {"time": index.time[rows], "cpu": index.cpu[rows]}
        event.update(
            {
                plan.name: array
                for (owner, plan), array in zip(flat, arrays, strict=True)
                if owner == number and plan.field is None
            }
        )
        event.setdefault("pid", np.full(rows.stop - rows.start, -1, np.int32))
        event.setdefault("tid", np.full(rows.stop - rows.start, -1, np.int32))
        event["rank"] = index.rank[rows]
        event.update(
            {
                plan.name: array
                for (owner, plan), array in zip(flat, arrays, strict=True)
                if owner == number and plan.field is not None
            }
        )
        columns[perf.events.names[number]] = Columns(event, event_attrs(perf, number, clock, categories))
    return columns, n_short


def format_of(perf: PerfFile, number: int) -> tracefmt.EventFormat | None:
    """Return the format of an event, None when it is no tracepoint or its format is not known."""
    attr = perf.events.attrs[number]
    return perf.formats.get(attr.config) if attr.is_tracepoint else None


def event_attrs(perf: PerfFile, number: int, clock: str, categories: dict[tuple[int, str], list]) -> dict[str, Any]:
    """Return the attributes of an event's columns."""
    event_format = format_of(perf, number)
    own = {name: values for (owner, name), values in categories.items() if owner == number}
    symbols = event_format.symbols if event_format else {}
    return {
        "event": perf.events.names[number],
        "clock": clock,
        "file": str(perf.path),
        "categories": own,
        "symbols": symbols,
    }


def allocate(plans: dict[int, list[ColumnPlan]], counts: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return one allocation for all columns and each column's first byte in it, on cache lines of their own."""
    bases, size = [], 0
    for number, columns in plans.items():
        for plan in columns:
            bases.append(size)
            size += (plan.row_bytes * int(counts[number]) + 63) // 64 * 64
    return np.empty(size // 8 + 1, np.uint64), bases


def field_table(
    plans: dict[int, list[ColumnPlan]], bases: list[int], n_events: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ColumnPlan]]]:
    """Return the kernels' field table, each event's first field in it, and (event, plan) of each row."""
    flat = [(number, plan) for number, columns in sorted(plans.items()) for plan in columns]
    fields = np.zeros((len(flat), pg.FIELD_COLUMNS), np.int64)
    for row, ((_, plan), base) in enumerate(zip(flat, bases, strict=True)):
        is_text = plan.field is not None and plan.field.is_text
        fields[row] = (plan.kind, plan.offset, plan.size, plan.count, base // plan.unit, is_text)
    owners = np.array([number for number, _ in flat], np.int64)
    return fields, np.searchsorted(owners, np.arange(n_events + 1)), flat


def gather_segments(
    perf: PerfFile, index: Index, tables: tuple[np.ndarray, ...], arena: np.ndarray, threads: int
) -> tuple[list[Dictionary], int]:
    """Run the gather over all segments, each thread with a dictionary of its own."""
    arenas = tuple(arena.view(dtype) for dtype in (np.uint8, np.uint16, np.uint32, np.uint64))
    samples = (index.start, index.event, index.place)
    dictionaries = [Dictionary() for _ in range(max(1, threads))]

    def run(thread: int) -> int:
        n_short = 0
        firsts, work = np.empty((2, index.rows.size), np.int64), np.empty((pg.WORK, pg.GATHER), np.int64)
        for segment, low, high in zip(perf.segments, index.segments[:-1], index.segments[1:], strict=True):
            at, stop = (low + (high - low) * (thread + step) // len(dictionaries) for step in (0, 1))
            while at < stop:
                at, short = pg.gather_samples(
                    segment.buffer,
                    perf.order,
                    samples,
                    (at, stop),
                    tables,
                    arenas,
                    dictionaries[thread].arrays,
                    thread << pg.CODE_BITS,
                    firsts,
                    work,
                )
                n_short += short
                if at < stop:
                    dictionaries[thread].grow()
        return n_short

    return dictionaries, sum(run_all(run, range(len(dictionaries)), threads))


def view_column(arena: np.ndarray, base: int, plan: ColumnPlan, count: int) -> np.ndarray:
    """Return the column at byte `base` of the allocation."""
    array = arena.view(np.uint8)[base : base + plan.row_bytes * count].view(plan.dtype)
    return array.reshape(count, plan.count) if plan.kind == pg.K_ARRAY else array


def merge_dictionaries(
    dictionaries: list[Dictionary], flat: list[tuple[int, ColumnPlan]], arrays: list[np.ndarray], *, big: bool
) -> dict[tuple[int, str], list]:
    """Give the threads' codes one meaning: sorted categories by (event, column); rewrites the code columns."""
    found = [dictionary.entries() for dictionary in dictionaries]
    categories: dict[tuple[int, str], list] = {}
    longest = max((len(entries) for entries in found), default=0)
    for number, (owner, plan) in enumerate(flat):
        if plan.field is None or plan.kind not in _VARIABLE.values():
            continue
        values = sorted({raw for entries in found for field, raw in entries if field == number})
        codes = {raw: code for code, raw in enumerate(values)}
        final = np.full((len(found), max(1, longest)), -1, np.int32)
        for thread, entries in enumerate(found):
            for entry, (field, raw) in enumerate(entries):
                if field == number:
                    final[thread, entry] = codes[raw]
        pg.remap_codes(arrays[number], final)
        categories[(owner, plan.name)] = [category(raw, plan.field, big=big) for raw in values]
    return categories


def category(raw: bytes, item: tracefmt.Field, *, big: bool) -> Any:
    """Return the value of a variable field: text, or a tuple of integers."""
    if item.is_text:
        return raw.decode("utf-8", "backslashreplace")
    whole = len(raw) // item.itemsize * item.itemsize
    return tuple(
        np.frombuffer(raw[:whole], f"{'>' if big else '<'}{'i' if item.signed else 'u'}{item.itemsize}").tolist()
    )
