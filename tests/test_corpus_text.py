"""Trace texts by others: their lines, first and last times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rxlab.errors import FormatError
from rxlab.read.tracetext import read_tracetext

pytestmark = pytest.mark.corpus


def seconds_to_ns(text: str) -> int:
    whole, _, fraction = text.partition(".")
    return int(whole) * 10**9 + int(fraction.ljust(9, "0"))


def test_lines_first_and_last_times(corpus: Path) -> None:
    entries = [e for e in json.loads((corpus / "manifest.json").read_text())["files"] if e["kind"] == "text"]
    assert len(entries) > 25
    for entry in entries:
        path, reference = corpus / entry["file"], entry["reference"]
        if reference["first"] is None:  # a table of thread groups, not a trace
            with pytest.raises(FormatError, match="no trace event"):
                read_tracetext(path)
            continue
        meta = read_tracetext(path).meta
        assert meta["first_ns"] == seconds_to_ns(reference["first"]), entry["file"]
        assert meta["last_ns"] == seconds_to_ns(reference["last"]), entry["file"]
        # The reference counts a last line without its newline twice or once, depending on the file's end.
        assert abs(meta["lines"] - reference["lines"]) <= 1, entry["file"]


def test_every_line_with_a_stamp_is_an_event(corpus: Path) -> None:
    for path in sorted((corpus / "text" / "trappy").glob("*.txt")):
        lines = path.read_text().splitlines()
        assert read_tracetext(path).meta["events"] == sum("] " in line and ": " in line for line in lines), path.name
