"""RPS and RFS do what the kernel's rule says: the target by the flow's hash, and the CPU of a reader that moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rxlab.dataset.run import Run
from rxlab.dataset.stats import steered, usable
from rxlab.host.journal import Transaction, apply
from rxlab.host.settings import parse_settings
from rxlab.record.capture import capture
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Workload
from rxlab.rundir import MOVE_FIELDS, MOVES_LOG

OFF = {"rps_cpus": "0,1", "rps_sock_flow_entries": "0", "rps_flow_cnt": "0"}
ON = {"rps_cpus": "0,1", "rps_sock_flow_entries": "32768", "rps_flow_cnt": "32768"}
MIGRATING = Workload(mode="open", rate=2000, messages=2000, migrate=0.05, migrate_cpus="0,1", client_cpu=0)
MANY = Workload(messages=60, flows=12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """The moving reader with RFS off and on, and twelve flows under RPS alone."""
    folder = tmp_path_factory.mktemp("rfs")
    found = {}
    with apply(journal_dir=folder / "journal", allow_system_changes=True) as journal, Testbed(registry=journal) as bed:
        for name, settings, load in (("off", OFF, MIGRATING), ("on", ON, MIGRATING), ("hash", OFF, MANY)):
            found[name] = record(folder / name, journal, bed, settings, load)
        yield found


def record(out: Path, journal: Transaction, bed: Testbed, settings: dict[str, str], load: Workload) -> Run:
    with journal.change(parse_settings(settings, bed.dst.iface, bed.dst.netns)):
        return Run(capture(out, testbed=bed, workload=load, transaction=journal).path)


def stack_cpus(run: Run) -> np.ndarray:
    packets = run.tree["packets"].to_dataset()
    return packets["cpu"].sel(stage="netif_receive_skb").values[usable(packets)]


def delivered_share(run: Run) -> float:
    """Share of the packets that came to the CPU where their socket was read last, of those whose last read was seen."""
    packets = run.tree["packets"].to_dataset()
    flag = packets["rfs_delivered"].values[usable(packets)]
    return float((flag[flag >= 0] == 1).mean())


def test_the_rps_target_is_that_of_the_hash(runs: dict[str, Run]) -> None:
    """``map->cpus[reciprocal_scale(hash, map->len)]`` (get_rps_cpu, net/core/dev.c), by the hash of netif_rx_entry."""
    run = runs["hash"]
    entries = run.perf.events["net:netif_rx_entry"]
    by_birth = dict(
        zip(
            zip(entries["time"].tolist(), entries["skbaddr"].tolist(), strict=True),
            entries["hash"].tolist(),
            strict=True,
        )
    )
    packets = run.tree["packets"].to_dataset()
    rows = usable(packets)
    offset = int(run.tree["clocks"]["axis_offset"])
    births = (packets["time"].sel(stage="driver_rx").values[rows].astype(np.int64) - offset).tolist()
    hashes = np.array(
        [by_birth[key] for key in zip(births, packets["skb"].values[rows].tolist(), strict=True)], np.uint64
    )
    assert len(hashes) > 600
    assert (hashes > 0).all()
    predicted = (hashes * np.uint64(2)) >> np.uint64(32)  # two CPUs in the map, in order of their number
    np.testing.assert_array_equal(predicted, stack_cpus(run))
    assert set(predicted.tolist()) == {0, 1}, "twelve flows with one target prove little"
    np.testing.assert_array_equal(packets["rps_predicted"].values[rows], stack_cpus(run))


@pytest.mark.parametrize("name", ["off", "on"])
def test_the_reader_is_where_the_log_says(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    log = np.fromfile(run.path / MOVES_LOG, np.dtype(list(MOVE_FIELDS)))
    packets = run.tree["packets"].to_dataset()
    rows = usable(packets)
    offset = np.timedelta64(int(run.tree["clocks"]["axis_offset"]), "ns")
    time = (packets["time"].values[rows] - offset).astype(np.int64)  # NaT stays NaT, the least integer
    stages = packets["stage"].values.tolist()
    begun, returned = time[:, stages.index("switch_in")], time[:, stages.index("recvmsg")]
    stay = np.searchsorted(log["t1"], begun, side="right") - 1
    until = np.append(log["t0"][1:], np.iinfo(np.int64).max)
    inside = (begun > 0) & (stay >= 0) & (returned < until[stay])
    assert inside.sum() > 500
    np.testing.assert_array_equal(packets["reader_cpu"].values[rows][inside], log["cpu"][stay[inside]])
    # Where it read last when the next packet came: there, if it had not moved since that read.
    handed = time[:, stages.index("driver_rx")]
    next_row = np.flatnonzero(inside[:-1] & (handed[1:] > returned[:-1])) + 1
    assert len(next_row) > 300
    said = packets["last_read_cpu"].values[rows][next_row]
    known = said >= 0  # unknown near windows in which perf delivered nothing
    assert known.mean() > 0.7
    np.testing.assert_array_equal(said[known], log["cpu"][stay[next_row - 1]][known])


def test_rfs_follows_the_reader_and_rps_alone_does_not(runs: dict[str, Run]) -> None:
    assert len(set(stack_cpus(runs["off"]).tolist())) == 1, "one flow has one hash"
    moves = runs["on"].tree["moves"].to_dataset()
    assert moves.sizes["move"] >= 15
    followed = np.isfinite(moves["lag"].values)
    assert followed.mean() >= 0.9
    assert (moves["lag"].values[followed] >= 0).all()
    # What sweeps and the report tell; the twelve flows came where the kernel's own hash says (above).
    there, known = steered(runs["on"].tree)["rfs_delivered"]
    assert known > 1000
    assert there / known == delivered_share(runs["on"])
    there, known = steered(runs["hash"].tree)["on_rps_target"]
    assert there == known > 600
    shares = {name: delivered_share(run) for name, run in runs.items()}
    assert shares["on"] > 0.9
    assert 0.3 < shares["off"] < 0.7, "the hash points at one of two CPUs, the reader changes between them"
    # It follows by the reader's next call, not by chance: every move that packets did not meet cost some of them.
    assert np.median(moves["lag_packets"].values[followed]) < np.median(moves["packets"].values[followed]) / 2
    off = runs["off"].tree["moves"].to_dataset()
    assert 0.3 < np.isfinite(off["lag"].values).mean() < 0.7, "half of the moves end where the hash points"
