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
    for column, name in enumerate(NIC_STAGES):
        assert seen[:, column].mean() >= 0.99, name
    whole = times[seen.all(axis=1)]
    assert len(whole) >= 0.99 * len(times)
    assert (np.diff(whole, axis=1) >= 0).all()
