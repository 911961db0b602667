"""A log of kernel functions -> the phases of a connection's life, with the gaps between them.

A log interleaves what several contexts do: each task, and on each CPU the interrupts that borrow whatever task runs there. Each
context is followed by itself; a function that :data:`rxlab.stages.PHASES` does not name belongs to the phase of the call
before it in the same context.
"""

from __future__ import annotations

import fnmatch
import re

import numpy as np

from rxlab.read.columns import Columns
from rxlab.stages import PHASES

OTHER = "other"
# Longer than any function of the stack runs on an idle CPU.
PAUSE_NS = 100_000
PHASE_NAMES = (*(phase.name for phase in PHASES), OTHER)
_RULES = [
    (re.compile("|".join(fnmatch.translate(pattern) for pattern in phase.functions)), code)
    for code, phase in enumerate(PHASES)
]


def phase_of(function: str) -> int:
    """Return the code of the phase a function begins, -1 where it tells nothing."""
    return next((code for rule, code in _RULES if rule.match(function)), -1)


def find_phases(calls: Columns, *, pause_ns: int = PAUSE_NS) -> Columns:
    """Cut a function log into spans of one phase in one context, without a pause.

    Parameters
    ----------
    calls : Columns, dims (call,)
        From :func:`rxlab.read.tracetext.read_function_log`.
    pause_ns : int
        A longer time without a call ends a span: the task slept, or did what the log's filter leaves out.

    Returns
    -------
    Columns, dims (span,), in order of their start
        `phase` int8 (code into ``attrs["categories"]["phase"]``), `start` and `end` int64 ns of the log's clock: entry of its
        first and of its last function (the log has no returns, so the last one's own time is not in it); `calls` int32;
        `gap` int64 ns since the last call of the same context, -1 for its first span; `cpu` int32 of the first call; `pid` int32 and `comm` int32 code of the task, -1 in an interrupt; `function`
        int32 code of the first function.
    """
    context = _contexts(calls)
    order = np.lexsort((np.arange(calls.n), calls["time"], context))
    context, time = context[order], calls["time"][order]
    by_function = np.array([phase_of(name) for name in calls.attrs["categories"]["function"]], np.int8)
    phase = _carried(by_function[calls["function"][order]], context)
    since = np.diff(time, prepend=time[:1])
    is_new = np.diff(context, prepend=-1) != 0
    first = np.flatnonzero(is_new | (np.diff(phase, prepend=-1) != 0) | (since > pause_ns))
    last = np.append(first[1:], calls.n) - 1
    head = order[first]
    in_task = calls["in_interrupt"][head] != 1
    spans = Columns(
        {
            "phase": phase[first],
            "start": time[first],
            "end": time[last],
            "calls": (last - first + 1).astype(np.int32),
            "gap": np.where(is_new[first], -1, since[first]),
            "cpu": calls["cpu"][head],
            "pid": np.where(in_task, calls["pid"][head], -1).astype(np.int32),
            "comm": np.where(in_task, calls["comm"][head], -1).astype(np.int32),
            "function": calls["function"][head],
        },
        {**calls.attrs, "categories": {**calls.attrs["categories"], "phase": list(PHASE_NAMES)}},
    )
    return spans.take(np.lexsort((first, spans["start"])))


def during(spans: Columns, comm: str) -> Columns:
    """Return the spans, of all contexts, from the first to the last one of a task; none where the task is not in the log."""
    names = spans.attrs["categories"]["comm"]
    rows = np.flatnonzero(spans["comm"] == names.index(comm)) if comm in names else np.empty(0, np.int64)
    if not len(rows):
        return spans.take(rows)
    return spans.take((spans["start"] >= spans["start"][rows[0]]) & (spans["start"] <= spans["end"][rows].max()))


def _contexts(calls: Columns) -> np.ndarray:
    """Return a number from 0 for each call's context: its task, or in an interrupt its CPU."""
    key = np.where(calls["in_interrupt"] == 1, -1 - calls["cpu"].astype(np.int64), calls["pid"])
    return np.unique(key, return_inverse=True)[1]


def _carried(phase: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Fill calls without a phase of their own from the one before in their context; what has none before it is "other"."""
    rows = np.arange(len(phase))
    told = np.maximum.accumulate(np.where(phase >= 0, rows, -1))
    begins = np.maximum.accumulate(np.where(np.diff(context, prepend=-1) != 0, rows, 0))
    return np.where(told >= begins, phase[np.maximum(told, 0)], len(PHASES)).astype(np.int8)
