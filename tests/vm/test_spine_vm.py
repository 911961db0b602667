"""The spine on a real NIC driver: igb with four MSI-X queues, NAPI and GRO, in a guest; analysed here, on the host."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from guest import run_in_guest

from rxlab.dataset.run import Run, open_run
from rxlab.follow.clockfit import NAT
from rxlab.stages import STAGE_INDEX

NIC_STAGES = ("hardirq", "softirq_raise", "softirq", "driver_rx")
MESSAGES = 300


@pytest.fixture(scope="module", params=["tcp", "udp"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run of the built-in workload over igb."""
    workload = json.dumps({"proto": request.param, "messages": MESSAGES})
    command = ["{python}", str(Path(__file__).with_name("guest_spine.py")), "{folder}"]
    with run_in_guest(command, seconds=280, environment={"SPINE_WORKLOAD": workload}) as done:
        assert done.status == 0, done.output
        yield open_run(done.folder / "run")


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
    for column, name in enumerate(NIC_STAGES):
        assert seen[:, column].mean() >= 0.99, name
    whole = times[seen.all(axis=1)]
    assert len(whole) >= 0.99 * len(times)
    assert (np.diff(whole, axis=1) >= 0).all()


def test_interrupt_counters_equal_the_recorded_handler_entries(run: Run) -> None:
    """Judge: the kernel's own /proc/interrupts, read before perf starts and after it ends, so never less than perf saw."""
    entries = run.perf.events["irq:irq_handler_entry"]
    recorded = Counter(entries["irq"].tolist())
    counted = {
        int(irq): sum(row["cpus"]) for irq, row in run.counters["difference"]["interrupts"].items() if irq.isdigit()
    }
    queues = {irq for irq in recorded if counted.get(irq)}
    assert queues
    assert all(counted[irq] >= recorded[irq] for irq in queues)
