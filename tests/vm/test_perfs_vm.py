"""Two perfs at once, of this machine and Debian's 6.12: recordings of the same traffic read the same and join the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from guest import Finished, run_scenario

from rxlab.dataset.run import open_run, read_events
from rxlab.read.columns import Columns
from rxlab.rundir import PERF_DATA

OWN = {"time", "rank"}


@pytest.fixture(scope="module")
def done() -> Iterator[Finished]:
    with run_scenario("perfs") as finished:
        yield finished


def of_interface(columns: Columns, first: int, last: int) -> Columns:
    """Return the rows between two times, by CPU and in order."""
    rows = np.flatnonzero((columns["time"] > first) & (columns["time"] < last))
    return columns.take(rows[np.lexsort((columns["rank"][rows], columns["cpu"][rows]))])


def test_the_columns_are_the_same(done: Finished) -> None:
    one = read_events(done.folder / "twice" / PERF_DATA)
    two = read_events(done.folder / "second.data")
    assert one.meta["perf_version"] != two.meta["perf_version"], "two versions of perf, or this test says nothing"
    assert not one.lost.n
    assert not two.lost.n
    names = {name for name, columns in two.events.items() if columns.n and name in one.events}
    assert {"net:netif_receive_skb", "tcp:tcp_probe", "sock:sock_recv_length", "skb:skb_copy_datagram_iovec"} <= names
    # Both perfs take one event one after the other, some microseconds apart: the window lies where nothing happens.
    receive = two.events["net:netif_receive_skb"]["time"]
    gaps = np.flatnonzero(np.diff(receive) > 50_000_000)
    first, last = int(receive[gaps[0]]) + 20_000_000, int(receive[gaps[-1]]) + 20_000_000
    for name in sorted(names - {"sched:sched_switch", "sched:sched_waking", "sched:sched_wakeup"}):
        left, right = (of_interface(perf.events[name], first, last) for perf in (one, two))
        assert left.n == right.n, name
        for field in set(left) & set(right) - OWN:
            assert (left[field] == right[field]).all(), f"{name}.{field}"


def test_the_join_is_the_same(done: Finished) -> None:
    one = open_run(done.folder / "twice")
    copy = done.folder / "second"
    shutil.copytree(one.path, copy)
    shutil.copy(done.folder / "second.data", copy / PERF_DATA)
    two = open_run(copy)
    results = [run.verify() for run in (one, two)]
    assert [result["verdict"] for result in results] == ["trusted", "trusted"]
    joined = [run.joined.packets for run in (one, two)]
    frames = np.intersect1d(*(packets["pcap_frame"][packets["status"] == 0] for packets in joined))
    assert len(frames) >= 100
    rows = [np.searchsorted(packets["pcap_frame"], frames) for packets in joined]
    for field in ("skb", "tid", "rx_queue", "reader_cpu", "path_kind", "skb_hash"):
        left, right = (packets[field][at] for packets, at in zip(joined, rows, strict=True))
        assert (left == right).all(), field
