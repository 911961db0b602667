"""Mutated captures through `read_pcap`, `read_pcap(chunks=)` and `inspect_pcap`: a result or an RxlabError, nothing else.

    python tests/fuzz/fuzz_pcap.py --files 20000 --seeds DIR [--seed 1]

A process with an address-space limit does the reading, so memory eaten shows as a failure. Every file must be done in
a second. With ``NUMBA_BOUNDSCHECK=1`` (and an empty ``NUMBA_CACHE_DIR``) every load of the compiled code is checked too.
Exit status 1 and the offending bytes in ``fuzz-pcap-*.bin`` on a failure.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import capture_builder as cb

from rxlab.errors import RxlabError
from rxlab.read.pcap import inspect_pcap, read_pcap

SECONDS_PER_FILE = 1.0
MEMORY_PER_FILE = 300 << 20
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
    """Return one small capture of each format with many kinds of packet."""
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
    return seeds


def mutate(seed: bytes, rng: random.Random) -> bytes:
    """Return a damaged copy: bytes flipped, words replaced, pieces cut, repeated or inserted."""
    content = bytearray(seed)
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


def read_all(path: Path, chunks: int) -> str:
    """Read a file in every way; return how it ended."""
    try:
        packets = read_pcap(path)
    except RxlabError as error:
        if "\n" in str(error):
            raise AssertionError("an error of more than one line") from error
        return type(error).__name__
    size = path.stat().st_size
    if packets.n and not packets.attrs["compression"]:
        assert int((packets["offset"] + packets["caplen"]).max()) <= size
    assert sum(piece.n for piece in read_pcap(path, chunks=chunks)) == packets.n
    assert inspect_pcap(path)["packets"] == packets.n
    return "truncated" if packets.attrs["truncated"] else "whole"


def resident() -> int:
    """Return this process's anonymous memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Run the mutations and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seeds", type=Path, help="folder of captures to mutate, beside the built ones")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    seeds = built_seeds()
    if args.seeds:
        seeds += [
            p.read_bytes() for p in sorted(args.seeds.rglob("*")) if p.is_file() and 24 < p.stat().st_size < 200_000
        ]
    outcomes: dict[str, int] = {}
    slowest = most = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated"
        for seed in built_seeds():  # compile before the clock runs and the memory is limited
            path.write_bytes(seed)
            read_all(path, 3)
        base = resident()
        resource.setrlimit(resource.RLIMIT_DATA, (base + (2 << 30), resource.RLIM_INFINITY))
        for number in range(args.files):
            content = mutate(rng.choice(seeds), rng)
            path.write_bytes(content)
            start = time.perf_counter()
            try:
                outcome = read_all(path, rng.choice((1, 2, 7, 1000)))
            except Exception as error:
                kept = Path(f"fuzz-pcap-{args.seed}-{number}.bin")
                kept.write_bytes(content)
                print(f"FAILED {kept}: {type(error).__name__}: {error}")
                return 1
            slowest, most = max(slowest, time.perf_counter() - start), max(most, resident() - base)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(
        f"{args.files} files from {len(seeds)} seeds: {outcomes}; slowest {slowest:.3f} s, memory +{most / 2**20:.0f} MiB"
    )
    # A busy machine can make one file late; the limit is for hangs and quadratic loops.
    return 0 if slowest < 3 * SECONDS_PER_FILE and most < MEMORY_PER_FILE else 1


if __name__ == "__main__":
    sys.exit(main())
