"""What a recording holds, whichever kind it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rxlab.errors import FormatError
from rxlab.read.pcap import inspect_pcap
from rxlab.read.perfdata import inspect_perfdata


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Tell what a perf.data, pcap or pcapng file holds, by its content, not its name."""
    file = Path(path)
    if not file.exists():
        raise FormatError("no such file", where=str(file))
    if file.is_dir():
        return inspect_perfdata(file)
    with open(file, "rb") as stream:
        magic = stream.read(8)
    is_perf = magic in (b"PERFILE2", b"2ELIFREP", b"PERFFILE", b"ELIFFREP")
    return inspect_perfdata(file) if is_perf else inspect_pcap(file)
