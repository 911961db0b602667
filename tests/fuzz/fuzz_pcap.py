"""Mutation fuzzer of the capture reader: `read_pcap`, `read_pcap(chunks=)` and `inspect_pcap` give a result or an RxlabError.

    python tests/fuzz/fuzz_pcap.py 20000                            # cases 0 to 19,999, the same in every run
    NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=/tmp/x python tests/fuzz/fuzz_pcap.py 2000
    python tests/fuzz/fuzz_pcap.py 1 --first 4711 --keep /tmp/case  # one case again, its file kept

Seeds are captures built here and, where there is one, those of the corpus up to 200 kB.
"""

from __future__ import annotations

import gzip
import random
import struct
import sys
from pathlib import Path

import harness  # isort: skip (it puts tests/ on the path)

import capture_builder as cb

# Lengths that have broken readers: zero, one less and more than a boundary, sign bits, everything.
EVIL = [
    0,
    1,
    3,
    4,
    11,
    12,
    16,
    0x7F,
    0xFF,
    0xFFFF,
    0x10000,
    0x3FFFF,
    0x40001,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFC,
    0xFFFFFFFF,
]


def built_seeds() -> list[bytes]:
    """Return one small capture of each format with many kinds of packet, plain and compressed."""
    import zstandard

    packets = [
        *cb.http_exchange(),
        cb.ethernet(cb.ipv4(cb.udp(struct.pack(">II", 0x08000000, 5 << 8) + cb.http_exchange()[0], 1, 4789), 17)),
        cb.ethernet(cb.ipv6(bytes([6, 1]) + bytes(14) + cb.tcp(b"x"), 0), 0x86DD, tags=[(0x88A8, 3), (0x8100, 4)]),
        cb.ethernet(cb.ipv4(struct.pack(">HHI", 0x2000, 0x0800, 9) + cb.ipv4(cb.tcp()), 47)),
    ]
    blocks = [cb.enhanced(p, i, options=cb.option(1, b"note") + cb.option(2, bytes(4))) for i, p in enumerate(packets)]
    big = [cb.enhanced(p, i, endian=">") for i, p in enumerate(packets)]
    seeds = [cb.classic(packets, endian=e, magic=m) for e in "<>" for m in (0xA1B2C3D4, 0xA1B23C4D, 0xA1B2CD34)]
    seeds += [cb.classic([p[14:] for p in packets], linktype=link) for link in (0, 101, 108, 113, 228, 229, 276)]
    seeds.append(cb.section() + cb.interface(options=cb.option(9, b"\x9e")) + b"".join(blocks) + cb.simple(packets[0]))
    seeds.append(cb.section(">") + cb.interface(">") + b"".join(big) + cb.section("<") + cb.interface() + blocks[0])
    return [*seeds, gzip.compress(seeds[0]), zstandard.ZstdCompressor().compress(seeds[-1])]


def seeds() -> list[bytes]:
    """Return all files to damage."""
    return built_seeds() + [seed for seed in harness.corpus_seeds("pcap", 200_000) if len(seed) > 24]


def mutate(seeds: list[bytes], case: int) -> bytes:
    """Return the file of one case: bytes flipped, words replaced, pieces cut, repeated or inserted."""
    rng = random.Random(case)
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(content)) if content else 0
        way = rng.randrange(6)
        if way == 0 and content:
            content[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            content[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(EVIL))
        elif way == 2:
            content[at & ~3 : (at & ~3) + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(EVIL))
        elif way == 3:
            del content[at : at + rng.randrange(1, 64)]
        elif way == 4:
            content[at:at] = content[at : at + rng.randrange(1, 64)]
        else:
            content[at : at + 8] = rng.randbytes(8)
    if rng.random() < 0.2:
        del content[rng.randrange(len(content) + 1) :]
    return bytes(content)


def read_all(path: Path, case: int = 0) -> str:
    """Read a file in every way; return what became of it."""
    from rxlab.errors import RxlabError
    from rxlab.read.pcap import inspect_pcap, read_pcap

    try:
        packets = read_pcap(path)
    except RxlabError as error:
        return type(error).__name__ if "\n" not in str(error) else "WRONG: an error of several lines"
    if packets.n and not packets.attrs["compression"]:
        end = int((packets["offset"] + packets["caplen"]).max())
        if end > path.stat().st_size:
            return f"WRONG: a packet ends at byte {end}"
    pieces = sum(piece.n for piece in read_pcap(path, chunks=(1, 2, 7, 1000)[case % 4]))
    counted = inspect_pcap(path)["packets"]
    if not pieces == counted == packets.n:
        return f"WRONG: {packets.n} packets, {pieces} in pieces, {counted} counted"
    return "truncated" if packets.attrs["truncated"] else "whole"


TARGET = harness.Target(__file__, seeds, mutate, read_all)

if __name__ == "__main__":
    sys.exit(harness.run(TARGET, __doc__))
