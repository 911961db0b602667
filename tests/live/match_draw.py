"""Matching without a clock on real packets: 100,000 TCP requests and 100,000 UDP packets, with parts of either side missing.

``python tests/live/match_draw.py [FOLDER]`` as root; five minutes. Records both on a testbed into FOLDER (a temporary one by default;
runs already there are used again), takes the pairs of the run's own clock readings as the truth, gives the packets another clock,
takes packets or events away, and prints how many pairs were found and how many are wrong. Ends with an error where one is.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rxlab.dataset.run import Run, open_run
from rxlab.errors import ClockError
from rxlab.follow.clockfit import NAT
from rxlab.follow.clockmatch import Pairs, match_sequences, match_tcp_keys
from rxlab.pipeline import record_run
from rxlab.stages import STAGE_INDEX

N = 100_000
TRAFFIC = {
    "tcp": {"proto": "tcp", "messages": N},
    "udp": {"proto": "udp", "mode": "open", "rate": 3_000.0, "messages": N},
}


def losses(n: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield what is taken away, and which packets and which events are left."""
    rng = np.random.default_rng(1)
    row, all_of_them = np.arange(n), np.ones(n, bool)
    yield "nothing", all_of_them, all_of_them
    for share in (0.0, 0.3, 0.8):
        left = (row < share * n) | (row >= (share + 0.2) * n)
        yield f"20 % of the packets from {share:.0%} on", left, all_of_them
        yield f"20 % of the events from {share:.0%} on", all_of_them, left
    yield "1 % of the packets at random", rng.random(n) > 0.01, all_of_them
    yield "1 % of the events at random", all_of_them, rng.random(n) > 0.01


def other_clock(stamp: np.ndarray) -> np.ndarray:
    """Return the stamps of a clock 37 s ahead, 18 ppm fast and steered by 1.5 us."""
    t = (stamp - stamp[0]).astype(np.float64)
    return stamp + np.rint(37_000_123_456 + 18e-6 * t + 1_500 * np.sin(2 * np.pi * t / 20e9)).astype(np.int64)


def judged(pairs: Pairs, packets: np.ndarray, events: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """Return how many pairs were found, are wrong, and could have been found; `truth` has each packet's event, -1 for none."""
    packet, event = np.flatnonzero(packets)[pairs.packet], np.flatnonzero(events)[pairs.event]
    whole = int((events[truth] & (truth >= 0) & packets).sum())
    return len(packet), int((truth[packet] != event).sum()), whole


def tcp_cases(run: Run) -> Iterator[tuple[str, str, int, int, int]]:
    """Match requests and acknowledgements to tcp_probe by the key, with parts of either missing."""
    joined, captured, probe = run.joined, run.packets, run.perf.events["tcp:tcp_probe"]
    rows = np.flatnonzero((joined.packets["pcap_frame"] > 0) & (joined.packets["proto"] == 6))
    rows = rows[np.argsort(joined.packets["pcap_frame"][rows])]
    frame = np.searchsorted(captured["frame"], joined.packets["pcap_frame"][rows])
    has_ack = captured["tcp_flags"][frame] & 0x10 > 0
    rows, frame = rows[has_ack], frame[has_ack]
    seen = joined.time[rows, STAGE_INDEX["tcp_rcv"]]
    order = np.argsort(probe["time"], kind="stable")
    probe = probe.take(order)
    at = np.minimum(np.searchsorted(probe["time"], seen), probe.n - 1)
    truth = np.where((seen != NAT) & (probe["time"][at] == seen), at, -1)
    received = np.unique(truth[truth >= 0])
    probe, truth = probe.take(received), np.where(truth >= 0, np.searchsorted(received, truth), -1)
    column = {name: captured[name][frame] for name in ("dport", "sport", "ack", "payload_len")}
    n = min(len(frame), probe.n)
    for what, some_packets, some_events in losses(n):
        packets = np.append(some_packets, np.ones(len(frame) - n, bool))
        events = np.append(some_events, np.ones(probe.n - n, bool))
        pairs = match_tcp_keys(
            (column["dport"][packets], column["sport"][packets]),
            column["ack"][packets],
            column["payload_len"][packets],
            (probe["sport"][events], probe["dport"][events]),
            probe["snd_una"][events],
            probe["data_len"][events],
            event_nxt=probe["snd_nxt"][events],
        )
        yield what, "", *judged(pairs, packets, events, truth)


def udp_cases(run: Run, stage: str) -> Iterator[tuple[str, str, int, int, int]]:
    """Match datagrams to one kind of event by the gaps, with parts of either missing."""
    packets, event = run.joined.packets, run.joined.time[:, STAGE_INDEX[stage]]
    rows = np.flatnonzero((event != NAT) & (packets["pcap_frame"] > 0) & (packets["proto"] == 17))
    rows = rows[np.argsort(packets["pcap_frame"][rows])]
    stamp, event = other_clock(packets["pcap_time"][rows]), event[rows]
    by_time = np.argsort(event, kind="stable")
    truth = np.argsort(by_time)
    size = packets["wire_len"][rows]
    for what, some_packets, some_events in losses(len(rows)):
        some = by_time[some_events]
        try:
            pairs = match_sequences(stamp[some_packets], size[some_packets], event[some], size[some])
        except ClockError as refusal:
            yield what, f"refused: {refusal}", 0, 0, int((some_packets & some_events[truth]).sum())
        else:
            yield what, "", *judged(pairs, some_packets, some_events, truth)


def main(folder: Path) -> int:
    """Record what is not there yet, and print a line per case."""
    wrong = 0
    for proto, traffic in TRAFFIC.items():
        if not (folder / proto).exists():
            record_run(folder / proto, testbed=True, workload=traffic)
        run = open_run(folder / proto)
        kinds = [""] if proto == "tcp" else ["driver_rx", "softirq_raise", "netif_receive_skb"]
        for stage in kinds:
            for what, refusal, n_pairs, n_wrong, n_whole in tcp_cases(run) if proto == "tcp" else udp_cases(run, stage):
                wrong += n_wrong
                print(
                    f"{proto:4}{stage:18}{what:32}",
                    refusal or f"{n_pairs} of {n_whole} pairs, {n_wrong} wrong",
                    flush=True,
                )
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as made:
        sys.exit(main(Path(made)))
