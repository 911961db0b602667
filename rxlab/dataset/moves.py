"""A reader that moves between CPUs, and how soon RFS follows it.

RFS sends a packet to the CPU on which its flow was last read (``rps_sock_flow_table``, written by each receive call:
``sock_rps_record_flow`` in include/net/rps.h), once the packets queued on the old CPU are gone (``get_rps_cpu`` in
net/core/dev.c). So it lags behind a reader that moved: by the packets that come before the reader's next call, and by those
that were queued.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from rxlab.stages import STAGE_INDEX

NAT = np.iinfo(np.int64).min
COLUMNS = ("time", "tid", "flow", "cpu", "from_cpu", "packets", "lag_packets", "lag")


def reader_moves(
    time: np.ndarray, cpu: np.ndarray, packets: Any, log: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return every move of a reader and what the packets of its flow did then.

    Parameters
    ----------
    time : int64 array, dims (packet, stage), ns of CLOCK_MONOTONIC
        NaT's integer where a stage was not seen.
    cpu : int16 array, dims (packet, stage)
    packets : mapping of arrays, dims (packet,)
        ``flow``, ``tid``, ``reader_cpu``, ``is_data``.
    log : structured array, optional
        :data:`rxlab.rundir.MOVE_FIELDS`, CLOCK_MONOTONIC: the moves that were ordered. Without it a move is where two packets
        of a flow that follow each other were read on different CPUs, and its instant is when the reader first ran on the new one.

    Returns
    -------
    dict of array, dims (move,)
        Columns of the schema's group ``moves`` in order of time, ``time`` as int64 ns of CLOCK_MONOTONIC. Only moves after
        which a packet of the flow came before the next move.
    """
    rows = np.flatnonzero(np.asarray(packets["is_data"]) & (np.asarray(packets["tid"]) >= 0))
    steered = _steered(time[rows])
    rows, steered = rows[steered != NAT], steered[steered != NAT]
    order = np.argsort(steered, kind="stable")
    rows, steered = rows[order], steered[order]
    stack_cpu = cpu[rows, STAGE_INDEX["netif_receive_skb"]]
    flow, tid = np.asarray(packets["flow"])[rows], np.asarray(packets["tid"])[rows]
    found: list[tuple[int | float, ...]] = []
    for number in np.unique(flow):
        own = np.flatnonzero(flow == number)
        for reader in np.unique(tid[own]):
            mine = own[tid[own] == reader]
            if log is not None:
                at, to = _ordered(log[log["tid"] == reader])
            else:
                at, to = _seen(time[rows[mine]], np.asarray(packets["reader_cpu"])[rows[mine]])
            found += [(t, reader, number, *rest) for t, *rest in _followed(at, to, steered[mine], stack_cpu[mine])]
    found.sort()
    table = np.array(found, np.float64).reshape(len(found), len(COLUMNS))
    columns = {name: table[:, index] for index, name in enumerate(COLUMNS)}
    return columns | {"time": np.array([row[0] for row in found], np.int64)}  # float64 would round it


def _steered(time: np.ndarray) -> np.ndarray:
    """Return when RPS chose the CPU of each packet: as the driver hands it up, else as the stack gets it."""
    handed, received = time[:, STAGE_INDEX["driver_rx"]], time[:, STAGE_INDEX["netif_receive_skb"]]
    return np.where(handed != NAT, handed, received)


def _ordered(log: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return when each ordered move was done, and the CPU; the first entry is where the reader began."""
    order = np.argsort(log["t1"], kind="stable")
    return log["t1"][order], log["cpu"][order]


def _seen(time: np.ndarray, reader_cpu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return when the reader first ran on each CPU it came to, and the CPU, from packets in order."""
    ran = np.full(len(time), NAT)
    for name in ("recvmsg", "copy", "switch_in"):  # the earliest seen wins
        at = time[:, STAGE_INDEX[name]]
        ran = np.where(at != NAT, at, ran)
    usable = (ran != NAT) & (reader_cpu >= 0)
    ran, on = ran[usable], reader_cpu[usable]
    is_new = np.concatenate([[True], on[1:] != on[:-1]]) if len(on) else np.zeros(0, bool)
    return ran[is_new], on[is_new]


def _followed(
    at: np.ndarray, to: np.ndarray, steered: np.ndarray, stack_cpu: np.ndarray
) -> list[tuple[int | float, ...]]:
    """Return (time, cpu, from_cpu, packets, lag_packets, lag) of each move but the first entry."""
    first = np.searchsorted(steered, at, side="right")
    last = np.append(first[1:], len(steered))
    result: list[tuple[int | float, ...]] = []
    for index in range(1, len(at)):
        begin, end = int(first[index]), int(last[index])
        if begin == end or to[index] == to[index - 1]:
            continue
        there = np.flatnonzero(stack_cpu[begin:end] == to[index])
        lag = float(steered[begin + there[0]] - at[index]) if len(there) else np.nan
        n_packets = float(there[0]) if len(there) else np.nan
        result.append((int(at[index]), int(to[index]), int(to[index - 1]), end - begin, n_packets, lag))
    return result


def follow_share(moves: xr.Dataset) -> float:
    """Return the share of moves after which the packets came to the reader's new CPU before it moved on; NaN without moves."""
    return float(np.isfinite(moves["lag"].values).mean()) if moves.sizes["move"] else float("nan")
