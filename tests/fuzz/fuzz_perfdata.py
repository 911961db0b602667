"""Mutation fuzzer of the perf.data reader: each damaged file ends in a PerfData or an RxlabError, soon and in little memory.

    python tests/fuzz/fuzz_perfdata.py 20000                            # cases 0 to 19,999, the same in every run
    NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=/tmp/x python tests/fuzz/fuzz_perfdata.py 2000
    python tests/fuzz/fuzz_perfdata.py 1 --first 4711 --keep /tmp/case  # one case again, its file kept

Seeds are recordings built here and, where there is one, those of the corpus up to 64 KiB.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import harness
from perf_builder import SAMPLE_TYPE, Builder

INTERESTING = (0, 1, 7, 8, 9, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def built_seeds() -> list[bytes]:
    """Return recordings of every form."""
    import zstandard

    seeds = []
    for order in "<>":
        for sample_type, read_format, before in (
            (SAMPLE_TYPE, 0, ""),
            (SAMPLE_TYPE | 1 << 5, 0, "chain"),
            (SAMPLE_TYPE | 1 << 4, 12, "group"),
            (SAMPLE_TYPE & ~(1 << 16) | 1 << 6, 0, ""),
        ):
            builder = Builder(order, sample_type=sample_type, read_format=read_format)
            parts = {"": b"", "chain": builder.pack("3Q", 2, 1, 2), "group": builder.pack("Q4Q", 2, 5, 11, 6, 12)}
            for number in range(12):
                builder.sample(number, time=1000 * number, cpu=number % 3, before_raw=parts[before])
            builder.add(2, builder.pack("QQ", 12, 40) + builder.pack("iiQiiQ", 1, 2, 5_000, 1, 0, 12))
            builder.add(13, builder.pack("Q", 40) + builder.pack("iiQiiQ", 1, 2, 5_000, 1, 0, 12))
            builder.add(78, builder.pack("QQ", 2, 12) + b"my:name\0")
            seeds += [builder.file(), builder.pipe()]
    inner, outer = Builder(), Builder()
    for number in range(40):
        inner.sample(number, time=number)
    stream = zstandard.ZstdCompressor().compress(b"".join(inner.records))
    for at in range(0, len(stream), 96):
        part = stream[at : at + 96]
        outer.add(81, part)
        outer.records.append(outer.record(83, outer.pack("Q", len(part)) + part.ljust(96, b"\0")))
    return [*seeds, outer.file(), outer.pipe()]


def seeds() -> list[bytes]:
    """Return all files to damage."""
    return built_seeds() + harness.corpus_seeds("perfdata", 1 << 16)


def mutate(seeds: list[bytes], case: int) -> bytes:
    """Return the file of one case: a seed with one to eight damages."""
    rng = random.Random(case)
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        if not content:
            break
        # Half of the damage goes to the front, where sizes and offsets are.
        at = rng.randrange(min(len(content), 512) if rng.random() < 0.5 else len(content))
        kind = rng.randrange(7)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind in (1, 2):
            width = rng.choice((1, 2, 4, 8))
            at -= at % width
            value = rng.choice(INTERESTING) & (1 << 8 * width) - 1
            content[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 3:
            del content[at : at + rng.choice((1, 8, 64, 1000))]
        elif kind == 4:
            other = rng.choice(seeds)
            start = rng.randrange(len(other))
            content[at:at] = other[start : start + rng.choice((8, 64, 512))]
        elif kind == 5:
            content[at : at + 8] = rng.randbytes(8)
        elif rng.random() < 0.5:
            del content[rng.randrange(len(content)) :]
    return bytes(content)


def read_all(path: Path, case: int = 0) -> str:
    """Read a file in every way; return what became of it."""
    from rxlab.errors import RxlabError
    from rxlab.read.perfdata import inspect_perfdata, read_perfdata

    try:
        perf = read_perfdata(path)
        perf.load()
        if sum(columns.n for columns in perf.events.values()) != perf.meta["samples"]:
            return "WRONG: rows and samples differ"
        rows = sum(part.meta["samples"] for part in perf.iter_chunks(10))
        if rows != perf.meta["samples"]:
            return f"WRONG: {rows} samples in chunks, {perf.meta['samples']} in all"
        inspect_perfdata(path)
    except RxlabError as error:
        return type(error).__name__ if "\n" not in str(error) else "WRONG: an error of several lines"
    return "truncated" if perf.meta["truncated"] else "read"


TARGET = harness.Target(__file__, seeds, mutate, read_all)

if __name__ == "__main__":
    sys.exit(harness.run(TARGET, __doc__))
