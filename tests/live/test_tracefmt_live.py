"""Every tracepoint format of the running kernel."""

from __future__ import annotations

from pathlib import Path

from rxlab.read.tracefmt import parse_format


def test_every_format_of_this_kernel() -> None:
    paths = list(Path("/sys/kernel/tracing/events").glob("*/*/format"))
    assert len(paths) > 500
    for path in paths:
        text = path.read_text()
        event = parse_format(text)
        assert len(event.fields) == text.count("\tfield:"), path
        assert event.name == path.parent.name
