"""Both ends of a veth captured, by one kernel's clock: the true one-way latency of every packet is known, and the sender's clock is then bent.

Judge: which frame is which comes from the number that the workload writes into every message, not from headers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rxlab.dataset.run import Run, machine_of, open_run
from rxlab.dataset.twohosts import compare_captures
from rxlab.follow.crossings import MERGED
from rxlab.follow.oneway import NAT
from rxlab.follow.received import is_received
from rxlab.follow.twohosts import TwoHosts
from rxlab.follow.verify import message_of_packets
from rxlab.host.journal import Transaction
from rxlab.host.settings import parse_settings
from rxlab.read.columns import Columns
from rxlab.read.pcap import read_pcap
from rxlab.record.capture import capture
from rxlab.record.pcaprecord import PcapRecorder
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Workload

SECOND = 10**9


def record(folder: Path, bed: Testbed, journal: Transaction, load: Workload, rps: bool) -> tuple[Run, Path]:
    """Record a run, and a capture of the same traffic at the sender's end."""
    if rps:
        journal.change(parse_settings({"rps_cpus": "1"}, bed.dst.iface, bed.dst.netns))
    sender = PcapRecorder(folder / "sender.pcap", bed.src.iface, bed.src.netns)
    folder.mkdir(exist_ok=True)
    sender.start()
    try:
        run = capture(folder / "run", testbed=bed, workload=load, transaction=journal, events="min")
    finally:
        sender.stop()
    return open_run(run.path), sender.path


def messages(packets: Columns) -> dict[tuple[int, int, int], int]:
    """Return the row of each frame that begins with a message of the workload, by ports and number."""
    path = Path(packets.attrs["file"])
    number = message_of_packets(path, packets["offset"], packets["payload_offset"], packets["caplen"])
    rows = np.flatnonzero(number >= 0)
    keys = zip(packets["sport"][rows].tolist(), packets["dport"][rows].tolist(), number[rows].tolist(), strict=True)
    return dict(zip(keys, rows.tolist(), strict=True))


def judge(found: TwoHosts, sender: Columns, receiver: Columns) -> tuple[int, int]:
    """Return how many packets that begin with a message were judged, and of how many the true latency is outside its interval."""
    there, here = messages(sender), messages(receiver)
    judged = outside = 0
    for side, came, went, rows_of, left_of in (
        (found.forward, receiver, sender, here, there),
        (found.reverse, sender, receiver, there, here),
    ):
        at = {int(row): place for place, row in enumerate(side["arrived"])}
        for key, row in rows_of.items():
            if row not in at or key not in left_of or side["least"][at[row]] == NAT:
                continue
            true = int(came["time"][row]) - int(went["time"][left_of[key]])
            judged += 1
            outside += not side["least"][at[row]] <= true <= side["most"][at[row]]
    return judged, outside


def bent(time: np.ndarray, seed: int) -> np.ndarray:
    """Return stamps as another host's clock would have given them."""
    rng = np.random.default_rng(seed)
    t = (time - time[0]).astype(np.float64)
    moved = rng.uniform(-100, 100) * 1e-6 * t + rng.uniform(0, 1_500) * np.sin(
        2 * np.pi * t / (20 * SECOND) + rng.uniform(0, 6)
    )
    moved += 0.5 * rng.uniform(-20, 20) * 1e-18 * t * t
    return time + int(rng.integers(-(10**13), 10**13)) + np.rint(moved).astype(np.int64)


@pytest.mark.parametrize("proto", ["udp", "tcp"])
def test_the_true_latency_is_inside_every_interval(tmp_path: Path, journal: Transaction, proto: str) -> None:
    load = Workload(proto=proto, messages=500, flows=3, mode="open", rate=3_000.0, size=64 if proto == "udp" else 6_000)
    with Testbed(registry=journal, gro=proto == "tcp") as bed:
        run, path = record(tmp_path / "both", bed, journal, load, rps=proto == "udp")
    sender, receiver = read_pcap(path), run.packets
    received = is_received(receiver, machine_of(run.run, run.host))
    for seed in range(8):
        found = compare_captures(sender.with_columns(time=bent(sender["time"], seed)), receiver, received=received)
        judged, outside = judge(found, sender, receiver)
        assert judged >= 0.98 * 2 * load.messages * load.flows
        assert outside == 0
        assert found.n_unseen == (0, 0)
        assert found.width_ns[1] <= 2 * found.width_ns[0]
        assert not {"one_direction", "few_packets", "unsteady_clock"} & set(found.bounds.flags)
    merged = (found.forward["status"] == MERGED).mean()
    assert merged > 0.3 if proto == "tcp" else merged == 0
