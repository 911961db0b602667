"""Moves of a reader and the lag of its packets, on worlds whose answer is written down."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from rxlab.dataset.moves import NAT, follow_share, reader_moves
from rxlab.rundir import MOVE_FIELDS
from rxlab.stages import STAGE_INDEX, STAGE_NAMES

GAP = 1000
READ_AFTER = 300


def world(
    stack: list[int], readers: list[int], flow: int = 0, tid: int = 70, start: int = 10_000
) -> dict[str, np.ndarray]:
    """A packet every microsecond, steered at `start` + row * GAP, its stack on `stack`, read READ_AFTER later on `readers`."""
    n = len(stack)
    time = np.full((n, len(STAGE_NAMES)), NAT)
    cpu = np.full((n, len(STAGE_NAMES)), -1, np.int16)
    at = start + np.arange(n) * GAP
    time[:, STAGE_INDEX["driver_rx"]], time[:, STAGE_INDEX["netif_receive_skb"]] = at, at + 50
    time[:, STAGE_INDEX["switch_in"]] = at + READ_AFTER
    cpu[:, STAGE_INDEX["netif_receive_skb"]] = stack
    columns = {"flow": flow, "tid": tid, "is_data": True}
    packets = {name: np.full(n, value) for name, value in columns.items()} | {"reader_cpu": np.array(readers)}
    return {"time": time, "cpu": cpu, "packets": packets}  # type: ignore[dict-item]


def log_of(*moves: tuple[int, int], tid: int = 70) -> np.ndarray:
    return np.array([(at - 5, at, tid, cpu) for at, cpu in moves], np.dtype(list(MOVE_FIELDS)))


def test_the_lag_counts_from_the_ordered_move() -> None:
    # Moved between rows 2 and 3; rows 3 and 4 still go to CPU 0.
    stack, readers = [0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]
    found = reader_moves(**world(stack, readers), log=log_of((9_000, 0), (12_600, 1)))
    assert {name: column.tolist() for name, column in found.items()} == {
        "time": [12_600], "tid": [70], "flow": [0], "cpu": [1], "from_cpu": [0], "packets": [5], "lag_packets": [2],
        "lag": [15_000 - 12_600],
    }  # fmt: skip


def test_a_move_that_packets_never_follow_has_no_lag() -> None:
    found = reader_moves(**world([0] * 9, [0] * 3 + [1] * 3 + [0] * 3), log=log_of((0, 0), (12_600, 1), (15_600, 0)))
    assert found["packets"].tolist() == [3, 3]
    np.testing.assert_array_equal(found["lag_packets"], [np.nan, 0])
    moves = xr.Dataset({"lag": ("move", found["lag"])})
    assert follow_share(moves) == 0.5


def test_moves_without_packets_between_them_are_left_out() -> None:
    found = reader_moves(**world([0, 0, 1], [0, 0, 1]), log=log_of((0, 0), (11_100, 1), (11_200, 0), (11_300, 1)))
    assert found["time"].tolist() == [11_300]


def test_without_a_log_a_move_is_where_the_reader_is_seen_elsewhere() -> None:
    found = reader_moves(**world([0, 0, 0, 1, 1], [0, 0, 1, 1, 1]))
    assert (found["time"].tolist(), found["cpu"].tolist()) == ([12_000 + READ_AFTER], [1])
    assert (found["lag_packets"].tolist(), found["lag"].tolist()) == ([0], [GAP - READ_AFTER])


def test_flows_and_readers_are_kept_apart_whatever_the_order_of_rows() -> None:
    one, other = world([0, 0, 1, 1], [0, 0, 1, 1]), world([1, 1, 1, 1], [1, 1, 0, 0], flow=3, tid=71, start=10_400)
    mixed = np.array([5, 0, 3, 7, 1, 4, 2, 6])
    time = np.concatenate([one["time"], other["time"]])[mixed]
    cpu = np.concatenate([one["cpu"], other["cpu"]])[mixed]
    packets = {k: np.concatenate([one["packets"][k], other["packets"][k]])[mixed] for k in one["packets"]}
    log = np.concatenate([log_of((0, 0), (11_600, 1)), log_of((0, 1), (11_700, 0), tid=71)])
    found = reader_moves(time, cpu, packets, log)
    assert found["flow"].tolist() == [0, 3]
    np.testing.assert_array_equal(found["lag_packets"], [0, np.nan])


@pytest.mark.parametrize("log", [None, log_of()])
def test_a_reader_that_stays_has_no_moves(log: np.ndarray | None) -> None:
    found = reader_moves(**world([0, 1, 0], [1, 1, 1]), log=log)
    assert all(len(column) == 0 for column in found.values())
