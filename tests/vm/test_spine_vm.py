"""The spine on a real NIC driver: igb with four MSI-X queues, NAPI and GRO, in a guest; analysed here, on the host."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from guest import Finished, run_scenario

from rxlab.dataset.run import Run, open_run
from rxlab.follow.clockfit import NAT
from rxlab.stages import STAGE_INDEX

NIC_STAGES = ("hardirq", "softirq_raise", "softirq", "driver_rx")
MESSAGES = 300


@pytest.fixture(scope="module")
def done() -> Iterator[Finished]:
    """Guest that recorded the spine."""
    with run_scenario("spine") as finished:
        yield finished


@pytest.fixture(scope="module", params=["tcp", "udp"])
def run(request: pytest.FixtureRequest, done: Finished) -> Run:
    """Run of the built-in workload over igb."""
    return open_run(done.folder / request.param)


def test_every_data_packet_is_joined_to_its_reader(run: Run) -> None:
    result = run.verify()
    assert result["data_packets"] >= MESSAGES
    assert result["misjoined"] == 0
    assert result["checked"] >= 0.99 * result["data_packets"]
    assert result["byte_sums_equal"]


def test_nic_stages_are_seen_and_nested(run: Run) -> None:
    joined = run.joined
    data = joined.packets["is_data"].astype(bool)
    times = joined.time[data][:, [STAGE_INDEX[name] for name in NIC_STAGES]]
    seen = times != NAT
    # An interrupt that comes while NET_RX runs raises nothing: that run polls its queue, and no interrupt led to it.
    late = came_in_the_run(run, np.flatnonzero(data))
    assert (late & seen[:, 0]).sum() == 0
    assert late.mean() <= 0.05
    seen[:, 0] |= late
    for column, name in enumerate(NIC_STAGES):
        assert seen[:, column].mean() >= 0.99, name
    whole = times[seen.all(axis=1) & ~late]
    assert len(whole) >= 0.94 * len(times)
    assert (np.diff(whole, axis=1) >= 0).all()


def came_in_the_run(run: Run, rows: np.ndarray) -> np.ndarray:
    """Tell for which packets without a hardirq their queue's own interrupt came after the softirq run that took them began."""
    joined, entries = run.joined, run.perf.events["irq:irq_handler_entry"]
    irqs = {queue["queue"]: queue["irq"] for queue in run.host["ifaces"][run.run["iface"]]["queues"]}
    found = np.zeros(len(rows), bool)
    for at, row in enumerate(rows.tolist()):
        softirq, driver = joined.time[row, [STAGE_INDEX["softirq"], STAGE_INDEX["driver_rx"]]]
        if joined.time[row, STAGE_INDEX["hardirq"]] == NAT and NAT not in (softirq, driver):
            mine = (entries["irq"] == irqs[int(joined.packets["rx_queue"][row])]) & (
                entries["cpu"] == joined.cpu[row, STAGE_INDEX["driver_rx"]]
            )
            found[at] = bool((mine & (entries["time"] > softirq) & (entries["time"] < driver)).any())
    return found
