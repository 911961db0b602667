"""The values of a pyperf script that was a run's workload -> columns. pyperf reads its own format; this only lays it out."""

from __future__ import annotations

import os

import numpy as np

from rxlab.errors import FormatError
from rxlab.read.columns import Columns

# pyperf counts times in seconds (pyperf.Benchmark.get_unit); what has another unit is no latency.
_UNIT = "second"


def read_pyperf(path: str | os.PathLike[str]) -> Columns:
    """Read a pyperf JSON file: the measured values (not the warm-ups) of every benchmark that measures time.

    Returns
    -------
    Columns, dims (value,), in the order of the file
        `value` float64 ns, time of one loop; `benchmark` int32 code into ``attrs["categories"]["benchmark"]``.

    Raises
    ------
    FormatError
        Not a file pyperf reads.
    """
    import pyperf

    try:
        suite = pyperf.BenchmarkSuite.load(os.fspath(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            "not a pyperf file", where=os.fspath(path), found=f"{type(error).__name__}: {error}"
        ) from None
    timed = [benchmark for benchmark in suite.get_benchmarks() if benchmark.get_unit() == _UNIT]
    values = [np.array(benchmark.get_values(), np.float64) * 1e9 for benchmark in timed]
    codes = [np.full(len(found), code, np.int32) for code, found in enumerate(values)]
    return Columns(
        {
            "value": np.concatenate([np.empty(0), *values]),
            "benchmark": np.concatenate([np.empty(0, np.int32), *codes]),
        },
        {"categories": {"benchmark": [benchmark.get_name() for benchmark in timed]}, "file": os.fspath(path)},
    )
