"""Two unknown clocks over a million packets: fitting the envelope, applying it, matching by gaps, matching by the TCP key; two hosts.

Poisson packets at 50,000 a second over 20 s; the clocks differ by 37 s, 18 ppm and an oscillation of 1.5 us. Targets: fit 0.3 s,
match 2.5 s.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pyperf

from rxlab.follow.clockmatch import match_sequences, match_tcp_keys
from rxlab.follow.envelope import fit_envelope
from rxlab.follow.twohosts import align_two_hosts
from rxlab.read.columns import Columns

N, RATE = 1_000_000, 50_000


def packets() -> tuple[np.ndarray, np.ndarray]:
    """Return stamps and events."""
    rng = np.random.default_rng(1)
    arrival = 10**12 + np.cumsum(rng.exponential(1e9 / RATE, N)).astype(np.int64)
    t = arrival - arrival[0]
    clock = 37e9 + 18e-6 * t + 1_500 * np.sin(2 * np.pi * t / 20e9)
    delay = 3_000 + rng.exponential(200, N) + rng.exponential(1_000, N) * (rng.random(N) < 0.3)
    return arrival + np.rint(clock).astype(np.int64), np.maximum.accumulate(arrival + delay.astype(np.int64))


def two_captures() -> tuple[Columns, Columns]:
    """Return both captures of half a million TCP requests and their replies: a million packets arrive."""
    stamp, event = packets()
    turn, n = np.arange(N), N // 2
    # Requests leave on the even turns of one of 64 connections, replies on the odd ones; a reply leaves on the receiver's clock.
    is_reply, flow = turn % 2 == 1, (turn // 2) % 64
    position = 64 * (turn // 128)
    ends = np.where(is_reply, 2, 1), np.where(is_reply, 1, 2)
    zero = np.zeros(N, np.int64)
    shared = {
        "frame": turn + 1, "caplen": zero + 118, "proto": zero + 6, "flow": flow, "flow_dir": is_reply.astype(np.int8), "fragment": zero,
        "ip_version": zero + 4, "src_hi": zero, "dst_hi": zero, "src_lo": ends[0], "dst_lo": ends[1], "payload_len": zero + 64,
        "sport": np.where(is_reply, 80, 40_000 + flow), "dport": np.where(is_reply, 40_000 + flow, 80), "seq": position,
        "ack": position + 64 * is_reply, "tcp_flags": zero + 24, "tsval": turn // 50, "tsecr": zero, "ip_id": turn % 65_536, "digest": zero,
    }  # fmt: skip
    assert n * 2 == N
    there = np.where(is_reply, stamp + 50_000, stamp)
    return tuple(Columns({**shared, "time": time}) for time in (there, event))  # type: ignore[return-value]


def main() -> None:
    """Run the benchmarks."""
    runner = pyperf.Runner()
    stamp, event = packets()
    length = np.random.default_rng(2).integers(60, 1500, N)
    envelope = fit_envelope(stamp, event)
    port, turn = np.full(N, 80), np.arange(N)
    runner.bench_func("clocks: fit the envelope, 1e6 packets", fit_envelope, stamp, event)
    runner.bench_func("clocks: convert 1e6 stamps", envelope.to_event_clock, stamp)
    runner.bench_func("clocks: match by gaps, 1e6 packets", match_sequences, stamp, length, event, length)
    keys = ((port, port), 64 * turn + 64, length, (port, port), 64 * turn, length)
    by_key = partial(match_tcp_keys, *keys, event_nxt=64 * turn + 64)
    runner.bench_func("clocks: match by the TCP key, 1e6 packets", by_key)
    runner.bench_func("clocks: one-way latencies of two hosts, 1e6 packets", align_two_hosts, *two_captures())


if __name__ == "__main__":
    main()
