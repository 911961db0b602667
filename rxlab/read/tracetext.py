"""Trace text -> columns: ftrace's ``trace`` file of any age, ``trace-cmd report``, ``perf script``, and function logs.

One line is one event; what a line cannot say is a null (-1), never a guess. Text is some hundred times slower to read
than `rxlab.read_perfdata`, and rounds times to what was printed: use it for logs that exist only as text.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from rxlab.errors import FormatError, MissingEventError
from rxlab.read.columns import Columns
from rxlab.read.tracefmt import SAMPLE_COLUMNS

# Longer than any kernel prints (its trace buffer holds 4 kB a line); such a line is no event.
_MAX_LINE = 16_384
# comm-pid (tgid) [cpu] flags time: event.  The tgid column is optional since 4.x, the flags since 2.6.33; before 2.6.27
# there were none. Flags had 4 characters, 5 since 5.x.
_FTRACE = re.compile(
    r"(?P<comm>.{1,256}?)(?<![/\s])-(?P<tid>\d+)\s+"
    r"(?:\(\s*(?P<pid>-+|\d+)\)\s+)?"
    r"\[(?P<cpu>\d+)\]\s+"
    r"(?:(?P<flags>[.\dA-Za-z#]{4,7})\s+)?"
    r"(?P<time>\d+(?:\.\d+)?):\s+(?P<rest>.*)"
)
# Latency format: comm-pid  cpu+flags  12us : event, with a mark for long delays.
_LATENCY = re.compile(
    r"(?P<comm>.{1,256}?)-(?P<tid>\d+)\s+(?P<cpu>\d+)(?P<flags>[.\dA-Za-z#]{4,5})\s+(?P<time>\d+)us[ !+#*@$]*:\s+(?P<rest>.*)"
)
# comm pid/tid [cpu] time: period event: fields
_PERF = re.compile(
    r"(?P<comm>.{1,256}?)\s+(?P<pid>-?\d+)(?:/(?P<tid>-?\d+))?\s+(?:\[(?P<cpu>-?\d+)\]\s+)?(?P<time>\d+\.\d+):\s+(?:\d+\s+)?"
    r"(?P<event>\S{1,256}?):(?:\s+(?P<rest>.*)|$)"
)
# Third flag: softirq, hard IRQ, hard IRQ inside a softirq, NMI (kernel/trace/trace_output.c, trace_print_lat_fmt).
_INTERRUPT_FLAGS = "shHzZ"
_FUNCTION = re.compile(r"(?P<function>[\w.$]+)\s+(?:\[\w+\]\s+)?<-\s*(?P<caller>[\w.$]+)")
_EVENT = re.compile(r"(?P<event>[\w:.-]{1,128}):(?:\s+(?P<fields>.*)|$)")
# What perf script appends to a tracepoint that was recorded with an instruction pointer: address symbol (object).
_SYMBOL = re.compile(r"\s+[0-9a-f]{6,16}\s+\S+.*\([^()]*\)\s*$")
_KEY = re.compile(r"(?:^|[\s({,])([A-Za-z_][\w.]*)=")
_INTEGER = re.compile(r"(-?\d+|0x[0-9a-fA-F]+)(?: \(-?\d+\))?")
# Fields as libtraceevent's sched plugin prints them.
_SWITCH = re.compile(r"(.*):(-?\d+) \[(-?\d+)\] (\S+) ==> (.*):(-?\d+) \[(-?\d+)\]")
_SWITCH_FIELDS = ("prev_comm", "prev_pid", "prev_prio", "prev_state", "next_comm", "next_pid", "next_prio")
_WAKEUP = re.compile(r"(?:task )?(.*):(-?\d+) \[(-?\d+)\](?: success=\d)?(?: (?:CPU:|\[)(\d+)\]?)?")
_WAKEUP_FIELDS = ("comm", "pid", "prio", "target_cpu")
# Columns a line itself has; an event's field of such a name is called field_NAME, as in recordings.
_LINE_COLUMNS = frozenset((*SAMPLE_COLUMNS, "comm", "text"))


class _Codes:
    """Dictionary encoding: texts in order of first appearance."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def of(self, text: str) -> int:
        return self.codes.setdefault(text, len(self.codes))

    @property
    def texts(self) -> list[str]:
        return list(self.codes)


class TraceText:
    """Events of a trace text.

    Attributes
    ----------
    events : dict of str to Columns
        By the name printed ("sched_switch" in ftrace, "sched:sched_switch" in perf script); dims (event,), file order.
        `time` int64 ns of the trace's clock, `cpu` int32, `pid` (thread group) and `tid` int32, -1 where not printed;
        `comm` int32 codes; `rank` int64 = position by (time, cpu, line) among all events; `text` int32 codes of all that
        follows the event's name; then the fields printed as key=value: int64 where all are integers (uint64 where they
        need it), else int32 codes, -1 where a line lacks the field. Codes point into ``attrs["categories"][column]``.
    functions : Columns or None
        The function tracer's lines: `time`, `cpu`, `pid`, `in_interrupt`, `comm`, `function`, `caller`.
    meta : dict
        format ("ftrace" | "latency" | "perf script"), clock, events, events_per_name, first_ns, last_ns (file order),
        lines, other_lines (comments, stack frames and what is no event), warnings.
    """

    def __init__(self, events: dict[str, Columns], functions: Columns | None, meta: dict[str, Any]) -> None:
        self.events, self.functions, self.meta = events, functions, meta

    def __repr__(self) -> str:
        return f"<TraceText {self.meta['format']}: {self.meta['events']} events of {len(self.events)} names>"


def read_tracetext(path: str | os.PathLike[str]) -> TraceText:
    """Read the text of ftrace, ``trace-cmd report`` or ``perf script``; what surrounds the events is skipped.

    Raises
    ------
    FormatError
        No line of the file is an event.
    """
    where = os.fspath(path)
    lines = _Lines(where)
    rows = list(lines.events())
    if not rows:
        raise FormatError(
            "no trace event found", where=where, expected="text of ftrace, trace-cmd report or perf script"
        )
    rank = np.empty(len(rows), np.int64)
    rank[sorted(range(len(rows)), key=lambda i: (rows[i].time, rows[i].cpu, i))] = np.arange(len(rows))
    by_name: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_name.setdefault("" if row.function else row.event, []).append(number)
    attrs = {"clock": lines.clock, "file": where}
    function_rows = [rows[i] for i in by_name.pop("", [])]
    events = {
        name: _event_columns([rows[i] for i in numbers], rank[numbers], attrs) for name, numbers in by_name.items()
    }
    functions = _function_columns(function_rows, attrs) if function_rows else None
    counts = {name: len(numbers) for name, numbers in by_name.items()}
    meta = {
        "format": lines.kind,
        "clock": lines.clock,
        "events": len(rows),
        "events_per_name": counts | ({"function": len(function_rows)} if function_rows else {}),
        "first_ns": rows[0].time,
        "last_ns": rows[-1].time,
        "lines": lines.n,
        "other_lines": lines.n - len(rows),
        "warnings": lines.warnings(),
    }
    return TraceText(events, functions, meta)


def read_function_log(path: str | os.PathLike[str]) -> Columns:
    """Read the function tracer's log: which kernel function was entered, by whom, when, in which task.

    Returns
    -------
    Columns, dims (call,), file order
        `time` int64 ns of the trace's clock, `cpu` int32, `pid` int32 (the thread), `in_interrupt` int8 (1: in a hard or soft
        interrupt that borrowed the task, -1: not printed), `comm`, `function` and `caller` int32 codes into
        ``attrs["categories"]``.

    Raises
    ------
    MissingEventError
        The text has events but no function calls.
    """
    trace = read_tracetext(path)
    if trace.functions is None:
        raise MissingEventError(
            "no function call in the trace text",
            where=os.fspath(path),
            found=", ".join(list(trace.events)[:5]),
            expected="lines like 'wget-12 [000] 1.000001: tcp_sendmsg <-inet_sendmsg'",
            do="Record with `echo function > current_tracer`.",
        )
    return trace.functions


class _Row:
    """One event line."""

    __slots__ = ("caller", "comm", "cpu", "event", "fields", "function", "in_interrupt", "pid", "text", "tid", "time")

    def __init__(self, match: re.Match[str], time: int) -> None:
        groups = match.groupdict()
        self.time, self.comm = time, groups["comm"].strip()
        self.cpu = int(groups["cpu"]) if groups["cpu"] else -1
        pid, tid = groups.get("pid"), groups["tid"]
        self.pid = int(pid) if pid and not pid.startswith("--") else -1
        # perf script without -F pid prints one number, the thread's
        self.tid = int(tid) if tid else self.pid
        flags = groups.get("flags") or ""
        self.in_interrupt = int(flags[2] in _INTERRUPT_FLAGS) if flags else -1
        self.event, self.text, self.function, self.caller = "", "", "", ""
        self.fields: dict[str, str] = {}


class _Lines:
    """The lines of a trace text, with what was learned on the way."""

    def __init__(self, path: str) -> None:
        self._path, self.n, self.kind, self._long = path, 0, "", 0
        self.clock = "trace clock (not said)"
        self._unfit = 0

    def events(self) -> Iterator[_Row]:
        """Yield the event lines; a line after an event that is none belongs to its text (a print with a newline)."""
        try:
            with open(self._path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
                yield from self._events(file)
        except OSError as error:
            raise FormatError("cannot read trace text", where=self._path, found=error.strerror) from None

    def _events(self, file: Any) -> Iterator[_Row]:
        last: _Row | None = None
        is_html = False
        while line := file.readline(_MAX_LINE):
            self.n += 1
            if len(line) == _MAX_LINE:
                self._long += 1
                while line and not line.endswith("\n"):
                    line = file.readline(_MAX_LINE)
                continue
            line = line.rstrip("\n\r")
            is_html = is_html or (self.n == 1 and line.startswith("<"))
            row = self._parse(line.strip())
            if row is not None:
                if last is not None:
                    yield last
                last = row
            elif (
                last is not None
                and self.kind == "ftrace"
                and line
                and not is_html
                and not line.startswith(("#", "CPU:"))
            ):
                last.text += "\n" + line
        if last is not None:
            yield last

    def _parse(self, line: str) -> _Row | None:
        if not line or line[0] == "#":
            return None
        for kind, pattern in (("ftrace", _FTRACE), ("perf script", _PERF), ("latency", _LATENCY)):
            if self.kind in ("", kind) and (match := pattern.match(line)):
                row = self._row(match, kind)
                if row is not None:
                    self.kind = kind
                    return row
        return None

    def _row(self, match: re.Match[str], kind: str) -> _Row | None:
        time = _time_ns(match["time"], kind)
        if time is None or len(match["tid"] or "") > 9 or len(match["cpu"] or "") > 9:
            self._unfit += 1
            return None
        row = _Row(match, time)
        rest = match["rest"] or ""
        if kind == "perf script":
            row.event, row.text = match["event"], rest
            row.fields = _fields(row.event, _SYMBOL.sub("", " " + rest).strip())
            return row
        if "." not in match["time"] and kind == "ftrace":
            self.clock = "counter (ticks, not time)"
        if call := _FUNCTION.match(rest):
            row.function, row.caller = call["function"], call["caller"]
            return row
        if event := _EVENT.match(rest):
            row.event, row.text = event["event"], event["fields"] or ""
            row.fields = _fields(row.event, row.text)
            return row
        return None

    def warnings(self) -> list[str]:
        """Return what was skipped although it looked like an event."""
        found = []
        if self._long:
            found.append(f"{self._long} lines longer than {_MAX_LINE} characters skipped")
        if self._unfit:
            found.append(f"{self._unfit} lines with impossible numbers skipped")
        return found


def _time_ns(text: str, kind: str) -> int | None:
    """Return int ns of printed seconds (or microseconds, or a counter's ticks as they are); None beyond int64."""
    whole, dot, fraction = text.partition(".")
    if len(whole) > 19:
        return None
    if kind == "latency":
        time = int(whole) * 1000
    elif dot:
        time = int(whole) * 1_000_000_000 + int(fraction[:9].ljust(9, "0"))
    else:
        time = int(whole)
    return time if time < 2**63 else None


def _fields(event: str, text: str) -> dict[str, str]:
    """Return the fields of an event's text: the sched plugin's forms, or key=value."""
    name = event.rpartition(":")[2]
    if name == "sched_switch" and (match := _SWITCH.fullmatch(text.strip())):
        return dict(zip(_SWITCH_FIELDS, match.groups(), strict=True))
    if name.startswith("sched_wak") and (match := _WAKEUP.fullmatch(text.strip())):
        pairs = zip(_WAKEUP_FIELDS, match.groups(), strict=True)
        return {key: value for key, value in pairs if value is not None}
    keys = list(_KEY.finditer(text))
    ends = [*(key.start() for key in keys[1:]), len(text)][: len(keys)]
    fields: dict[str, str] = {}
    for key, end in zip(keys, ends, strict=True):
        value = text[key.end() : end].strip()
        fields.setdefault(key[1], value.removesuffix("==>").rstrip(" ,"))
    return fields


def _integer(text: str) -> int | None:
    match = _INTEGER.fullmatch(text)
    if match is None or len(match[1]) > 20:
        return None
    value = int(match[1], 16) if match[1].startswith("0x") else int(match[1])
    return value if -(2**63) <= value < 2**64 else None


def _field_column(values: list[str | None]) -> tuple[np.ndarray, list[str] | None]:
    """Return a column of printed values, and its categories where they are not all integers."""
    integers = [None if value is None else _integer(value) for value in values]
    known = [value for value in integers if value is not None]
    if len(known) == len(values):
        if max(known) < 2**63:
            return np.array(known, np.int64), None
        if min(known) >= 0:
            return np.array(known, np.uint64), None
    codes = _Codes()
    column = np.array([-1 if value is None else codes.of(value) for value in values], np.int32)
    return column, codes.texts


def _event_columns(rows: list[_Row], rank: np.ndarray, attrs: dict[str, Any]) -> Columns:
    arrays, categories = _line_columns(rows)
    arrays["rank"] = rank
    texts = _Codes()
    arrays["text"] = np.array([texts.of(row.text) for row in rows], np.int32)
    categories["text"] = texts.texts
    names = Counter(name for row in rows for name in row.fields)
    for name in names:
        column = f"field_{name}" if name in _LINE_COLUMNS else name
        arrays[column], encoded = _field_column([row.fields.get(name) for row in rows])
        if encoded is not None:
            categories[column] = encoded
    return Columns(arrays, {**attrs, "categories": categories})


def _function_columns(rows: list[_Row], attrs: dict[str, Any]) -> Columns:
    arrays, categories = _line_columns(rows)
    arrays["pid"] = arrays.pop("tid")  # a function log prints one number, and calls it PID
    arrays["in_interrupt"] = np.array([row.in_interrupt for row in rows], np.int8)
    for name in ("function", "caller"):
        codes = _Codes()
        arrays[name] = np.array([codes.of(getattr(row, name)) for row in rows], np.int32)
        categories[name] = codes.texts
    return Columns(arrays, {**attrs, "categories": categories})


def _line_columns(rows: list[_Row]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    comms = _Codes()
    arrays: dict[str, np.ndarray] = {
        "time": np.array([row.time for row in rows], np.int64),
        "cpu": np.array([row.cpu for row in rows], np.int32),
        "pid": np.array([row.pid for row in rows], np.int32),
        "tid": np.array([row.tid for row in rows], np.int32),
        "comm": np.array([comms.of(row.comm) for row in rows], np.int32),
    }
    return arrays, {"comm": comms.texts}
