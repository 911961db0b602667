"""RPS's target foretold from each packet's hash by the kernel's rule, on an igb and a veth; RFS behind a reader that moves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
from guest import Finished, run_scenario

from rxlab.dataset.run import Run, open_run
from rxlab.follow.kernelpath import KernelPath, follow_kernel
from rxlab.follow.steering import reader_moves, rps_target
from rxlab.host.cpulist import parse_cpus
from rxlab.stages import STAGE_INDEX

PROBED = re.compile(r"(\d+)\.(\d{6}): enqueue: .*? skb=0x([0-9a-f]+) hash=(\d+) cpu=(\d+)")
RX = STAGE_INDEX["netif_receive_skb"]


@pytest.fixture(scope="module")
def done() -> Iterator[Finished]:
    with run_scenario("rps.py") as finished:
        yield finished


def followed(done: Finished, name: str) -> tuple[Run, KernelPath]:
    """Return a run and the path of each of its skbs."""
    run = open_run(done.folder / name)
    return run, follow_kernel(run.perf.events, run.run["iface"])


def hashes_there(done: Finished, name: str, path: KernelPath) -> tuple[np.ndarray, np.ndarray]:
    """Return hash and target of each skb as the probe saw them when it was put on a backlog, -1 where it was not."""
    seen: dict[int, list[tuple[int, int, int]]] = {}
    for match in PROBED.finditer((done.folder / f"{name}.probed").read_text()):
        at = int(match[1]) * 1_000_000_000 + int(match[2]) * 1000
        seen.setdefault(int(match[3], 16), []).append((at, int(match[4]), int(match[5])))
    found = np.full((2, len(path.rank)), -1, np.int64)
    for row, address in enumerate(path.columns["skbaddr"].tolist()):
        # The trace's clock is cut to microseconds.
        before = [entry for entry in seen.get(address, []) if entry[0] - 1000 <= path.time[row, RX]]
        if before:
            found[:, row] = before[-1][1:]
    return found[0], found[1]


@pytest.mark.parametrize("name", ["igb", "veth"])
def test_every_packet_goes_where_its_hash_says(done: Finished, name: str) -> None:
    run, path = followed(done, name)
    cpus = parse_cpus(run.run["configuration"]["rps_cpus"])
    hashes, targets = hashes_there(done, name, path)
    known = hashes >= 0
    assert known.sum() >= 300
    assert known.mean() >= 0.99
    assert (rps_target(hashes[known], cpus) == path.cpu[known, RX]).all(), "100 %"
    assert (targets[known] == path.cpu[known, RX]).all()
    assert set(path.cpu[known, RX].tolist()) == set(cpus), "each CPU got some, so that this test can fail"


def test_the_recorded_hash_foretells_only_where_it_covers_the_ports(done: Finished) -> None:
    """veth: the sender's hash, of layer 4. igb: PKT_HASH_TYPE_L3, which the kernel does not use."""
    for name, foretells in (("veth", True), ("igb", False)):
        run, path = followed(done, name)
        hashed = path.columns["hash"] > 0
        assert hashed.mean() >= 0.99
        right = rps_target(path.columns["hash"][hashed], parse_cpus(run.run["configuration"]["rps_cpus"]))
        share = (right == path.cpu[hashed, RX]).mean()
        assert share == 1.0 if foretells else share < 0.9, name


def test_the_dataset_names_the_cpu_that_rps_chose(done: Finished) -> None:
    run, path = followed(done, "igb")
    packets = run.joined.packets
    moved = packets["rps_cpu"] >= 0
    assert run.joined.verdict == "trusted"
    assert moved.any()
    assert (packets["rps_cpu"][moved] == run.joined.cpu[moved, RX]).all()
    assert set(packets["rps_cpu"][moved].tolist()) <= set(parse_cpus(run.run["configuration"]["rps_cpus"]))


def test_rfs_follows_a_reader_that_moves(done: Finished) -> None:
    """Judge: the reader's own log of when it moved and when it read on; before that the kernel cannot know."""
    run = open_run(done.folder / "rfs")
    moves = reader_moves(run.perf.events, run.joined)
    logged = [move for move in json.loads((done.folder / "moves.json").read_text()) if "reads_ns" in move]
    last = int(run.joined.time[run.joined.packets["is_data"].astype(bool), RX].max())
    logged = [move for move in logged if move["reads_ns"] < last]
    assert len(logged) >= 5
    followed_moves = 0
    for move in logged:
        [at] = [
            row
            for row in range(moves.n)
            if moves["time"][row] <= move["at_ns"] and (row + 1 == moves.n or moves["time"][row + 1] > move["at_ns"])
        ]
        assert moves["to_cpu"][at] == move["cpu"]
        assert move["at_ns"] - moves["time"][at] < 20_000_000, "it logs as soon as it runs there"
        if moves["lag_ns"][at] < 0:
            continue
        followed_moves += 1
        assert moves["time"][at] + moves["lag_ns"][at] > move["reads_ns"]
        assert moves["lag_packets"][at] >= 3, "messages came every 4 ms while it paused for 30"
    assert followed_moves >= 3
