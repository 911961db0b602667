"""A NIC's clock and its stamps, in the emulated igb: read, fitted, checked against clock_gettime(), and put back. Never on metal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guest import Finished, run_in_guest

from rxlab.dataset.run import open_run
from rxlab.follow.clockfit import NAT
from rxlab.follow.crossfit import fit_nic
from rxlab.stages import STAGE_INDEX


@pytest.fixture(scope="module")
def done() -> Iterator[Finished]:
    command = ["{python}", str(Path(__file__).with_name("guest_phc.py")), "{folder}"]
    with run_in_guest(command, seconds=400) as finished:
        assert finished.status == 0, finished.output
        yield finished


@pytest.fixture(scope="module")
def found(done: Finished) -> dict[str, Any]:
    return json.loads((done.folder / "phc.json").read_text())


def test_cross_stamps_agree_with_clock_gettime(found: dict[str, Any]) -> None:
    """Judge: the same clock by another system call, between two readings of CLOCK_MONOTONIC."""
    clock = found["clock"]
    stamps = clock["phc"]
    assert {(stamp["method"], stamp["clock"]) for stamp in stamps} == {("extended", "raw")}, "igb on Linux 6.12"
    fitted = fit_nic(stamps, clock["readings"])
    before, nic, after = (np.array(column, np.int64) for column in zip(*clock["seen"], strict=True))
    at = fitted.to_monotonic(nic)
    assert (np.maximum(before - at, at - after) <= fitted.bound_ns).all()
    assert not fitted.flags


def test_stamping_is_switched_on_and_put_back(found: dict[str, Any]) -> None:
    stamps = found["stamps"]
    assert stamps["stamping_during"].startswith("ptpv2-event")
    assert stamps["stamping_after"] == stamps["stamping_before"] != stamps["stamping_during"]
    assert "does not stamp every packet" in stamps["refusal"], "tcpdump would silently fall back to software stamps"


def test_every_stamp_precedes_its_packet_s_interrupt(done: Finished, found: dict[str, Any]) -> None:
    run = open_run(done.folder / "run")
    joined = run.joined
    nic = joined.time[:, STAGE_INDEX["nic"]]
    hardirq = joined.time[:, STAGE_INDEX["hardirq"]]
    both = (nic != NAT) & (hardirq != NAT)
    assert both.sum() >= 0.9 * found["stamps"]["hardware_stamped"] > 0
    assert (nic[both] <= hardirq[both] + joined.clock.bound_ns).all()
    assert joined.gates["causal"]["ok"]
    assert joined.clock.method == "cross_stamps"
    latency = run.tree["hops"].to_dataset()["latency"].sel(hop="nic_latency")
    assert int(latency.notnull().sum()) >= both.sum()
