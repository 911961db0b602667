"""64 flows over the four queues of an igb: RSS by its table, interrupts by their affinity, counted as the kernel counts them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from guest import Finished, run_scenario

from rxlab.dataset.run import Run, open_run
from rxlab.host.interrupts import parse_interrupts
from rxlab.read.flows import toeplitz_hash
from rxlab.stages import STAGE_INDEX

FLOWS = 64
QUEUES = 4


@pytest.fixture(scope="module")
def done() -> Iterator[Finished]:
    with run_scenario("queues") as finished:
        yield finished


@pytest.fixture(scope="module")
def run(done: Finished) -> Run:
    return open_run(done.folder / "spread")


@pytest.fixture(scope="module")
def seen(done: Finished) -> dict[str, Any]:
    return json.loads((done.folder / "spread.json").read_text())


def data(run: Run) -> np.ndarray:
    """Return which rows carry payload."""
    return run.joined.packets["is_data"].astype(bool)


def indirection(text: str) -> list[int]:
    """Return the queue of each entry of the table that ``ethtool -x`` prints."""
    rows = re.findall(r"^\s+\d+:((?:\s+\d+)+)\s*$", text, re.MULTILINE)
    return [int(queue) for row in rows for queue in row.split()]


def test_the_flows_use_all_queues(run: Run) -> None:
    packets = run.joined.packets
    mine = data(run)
    pairs = set(zip(packets["flow"][mine].tolist(), packets["rx_queue"][mine].tolist(), strict=True))
    assert len({flow for flow, _ in pairs}) == FLOWS == len(pairs), "a flow stays on its queue"
    assert {queue for _, queue in pairs} == set(range(QUEUES))


def test_queues_follow_from_the_addresses_the_key_and_the_table(run: Run, seen: dict[str, Any]) -> None:
    """Judge: Toeplitz over the addresses of the capture with the kernel's key, looked up in what ``ethtool -x`` prints."""
    packets = run.joined.packets
    table = np.array(indirection(seen["table"]))
    assert len(table) == 128
    captured = run.packets.take(packets["pcap_frame"] - int(run.packets["frame"][0]))
    key = bytes.fromhex(seen["key"].replace(":", ""))[:40]
    hashes = toeplitz_hash(captured, key)
    mine = data(run)
    assert (packets["skb_hash"][mine] == hashes[mine]).all(), "the NIC's hash"
    assert (packets["rx_queue"][mine] == table[hashes[mine] % len(table)]).all()


def test_interrupts_run_where_their_affinity_says(run: Run, seen: dict[str, Any]) -> None:
    joined, mine = run.joined, data(run)
    irqs = {queue["queue"]: str(queue["irq"]) for queue in run.host["ifaces"][run.run["iface"]]["queues"]}
    allowed = {queue: int(seen["affinity"][irq]) for queue, irq in irqs.items()}
    assert len(set(allowed.values())) == QUEUES, "an interrupt per CPU, so that this test can fail"
    cpu = joined.cpu[mine, STAGE_INDEX["hardirq"]]
    expected = np.array([allowed[queue] for queue in joined.packets["rx_queue"][mine].tolist()])
    # An interrupt that finds NET_RX running raises nothing: that run polls its queue too, and no interrupt led to it.
    assert (cpu >= 0).mean() >= 0.95
    assert (cpu == expected)[cpu >= 0].all()


def test_moving_the_interrupts_moves_the_packets(done: Finished) -> None:
    run = open_run(done.folder / "moved")
    cpu = run.joined.cpu[data(run), STAGE_INDEX["hardirq"]]
    assert (cpu >= 0).mean() >= 0.9, "on one CPU, more often so"
    assert set(cpu[cpu >= 0].tolist()) == {2}
    assert set(run.joined.packets["rx_queue"][data(run)].tolist()) == set(range(QUEUES)), "queues are as before"
    assert run.run["got"]["restored"] is True
    before, after = ((done.folder / f"affinities-{when}").read_text() for when in ("before", "after"))
    assert before == after


def test_recorded_interrupts_are_those_the_kernel_counted(run: Run, seen: dict[str, Any]) -> None:
    """Judge: /proc/interrupts, read in the middle of the recording; each reading takes a moment, so there are two counts."""
    entries = run.perf.events["irq:irq_handler_entry"]
    first, last = (parse_interrupts(seen[when]["text"]) for when in ("before", "after"))
    at = {name: (seen[name]["before_ns"], seen[name]["after_ns"]) for name in ("before", "after")}
    exact = 0
    for queue in run.host["ifaces"][run.run["iface"]]["queues"]:
        irq = str(queue["irq"])
        counted = sum(last[irq]["cpus"]) - sum(first[irq]["cpus"])
        times = entries["time"][entries["irq"] == queue["irq"]]
        least = int(((times > at["before"][1]) & (times < at["after"][0])).sum())
        most = int(((times > at["before"][0]) & (times < at["after"][1])).sum())
        assert least <= counted <= most, f"queue {queue['queue']}"
        assert counted > FLOWS / QUEUES
        exact += least == most
    assert exact >= QUEUES - 1, "the readings are between two interrupts nearly always"
