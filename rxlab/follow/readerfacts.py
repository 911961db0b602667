"""What is known of each packet's reader beside its stages: since when it slept, how it reads, and where it read last."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.clockfit import NAT
from rxlab.follow.consumption import Consumption, sleeps
from rxlab.follow.hidden import Hidden
from rxlab.follow.kernelpath import event_columns, task_ids
from rxlab.follow.stagetable import StageTable
from rxlab.read.columns import Columns
from rxlab.stages import READER_KINDS, STAGE_INDEX

IO_URING = "io_uring:io_uring_complete"
_NEVER = np.iinfo(np.int64).max
_RX, _DRIVER, _SWITCH = (STAGE_INDEX[name] for name in ("netif_receive_skb", "driver_rx", "switch_in"))


def reader_facts(
    rows: StageTable, columns: Columns, taken: Consumption, events: Mapping[str, Columns], hidden: Hidden
) -> Columns:
    """Add what is known of each packet's reader.

    Parameters
    ----------
    rows : StageTable, dims (packet, stage)
    columns : Columns, dims (packet,)
        ``tid`` and ``socket``.
    taken : Consumption
    events : mapping of str to Columns
    hidden : Hidden
        Where events may be missing; nothing is said across.

    Returns
    -------
    Columns, dims (packet,)
        With ``sleep_time`` (CLOCK_MONOTONIC ns, NaT: it did not sleep, or that was not seen) and ``sleep_cpu``, ``reader_kind``
        (code of :data:`rxlab.stages.READER_KINDS`), ``last_read_cpu`` (-1: unknown).
    """
    tid = columns["tid"].astype(np.int64)
    asleep, on = _fell_asleep(rows, tid, events, hidden)
    return columns.with_columns(
        sleep_time=asleep,
        sleep_cpu=on,
        reader_kind=_reader_kinds(tid, taken, events, hidden),
        last_read_cpu=_last_read(rows, columns["socket"], taken.receives, hidden),
    )


def _fell_asleep(
    rows: StageTable, tid: np.ndarray, events: Mapping[str, Columns], hidden: Hidden
) -> tuple[np.ndarray, np.ndarray]:
    """Return when and where the reader went to sleep that the packet's switch-in ended; NaT and -1 where it did not sleep.

    The last switch away from it before that switch-in, if it was a sleep and no preemption. Nothing is said across a window in
    which a switch may be missing. (Where perf delivered nothing for whole turns of a task the chain of switches is unbroken, and
    that cannot be noticed.)
    """
    switch = event_columns(events, "sched:sched_switch")
    leaves = AsOf(switch["rank"], task_ids(switch, "prev_pid"))
    left = leaves.last_before(rows.rank[:, _SWITCH], tid)
    slept = (left >= 0) & pick(sleeps(switch), left, 0).astype(bool)
    slept &= ~hidden.touch(pick(switch["time"], left, NAT), rows.time[:, _SWITCH])
    left = np.where(slept, left, -1)
    return pick(switch["time"], left, NAT), pick(switch["cpu"], left, -1).astype(np.int16)


def _reader_kinds(tid: np.ndarray, taken: Consumption, events: Mapping[str, Columns], hidden: Hidden) -> np.ndarray:
    """Tell how each packet was read: by a receive system call, or by a request in an io_uring.

    Both return through ``sock_recvmsg``. A ring's request posts its completion with the same result right after, in the task that
    received, before that receives again (io_uring/net.c, ``io_recv`` -> ``io_req_complete``).
    """
    code = {name: number for number, name in enumerate(READER_KINDS)}
    kind = np.full(len(tid), code["unknown"], np.int8)
    if IO_URING not in events:
        return kind
    completed, receives = events[IO_URING], taken.receives
    known = (taken.receive >= 0) & (tid >= 0)
    if not completed.n:
        kind[known] = code["syscall"]
        return kind
    returned = pick(receives["rank"], taken.receive, -1)
    posts, calls = AsOf(completed["rank"], completed["tid"]), AsOf(receives["rank"], receives["tid"])
    post = posts.first_after(np.where(known, returned, -1), tid)
    following = calls.first_after(returned, tid)
    end = pick(receives["time"], taken.receive, NAT)
    until = np.minimum(pick(completed["time"], post, _NEVER), pick(receives["time"], following, _NEVER))
    is_ring = (post >= 0) & (posts.rank_of(post, _NEVER) < calls.rank_of(following, _NEVER))
    is_ring &= pick(completed["res"].astype(np.int64), post, -1) == pick(
        receives["ret"].astype(np.int64), taken.receive, -2
    )
    unclear = hidden.touch(end, np.where(until == _NEVER, end, until))
    kind[known & ~unclear] = code["syscall"]
    kind[known & is_ring] = code["io_uring"]
    return kind


def _last_read(rows: StageTable, socket: np.ndarray, receives: Columns, hidden: Hidden) -> np.ndarray:
    """Return the CPU on which the packet's socket was last read before the packet was steered; -1 where that was not seen.

    That is where RFS wants the packet: every receive call writes its CPU to the flow's entry of ``rps_sock_flow_table``
    (``sock_rps_record_flow`` in ``inet_recvmsg``, net/ipv4/af_inet.c), and ``get_rps_cpu`` reads it as the driver hands the packet up.
    """
    # Where the driver's event was recorded, a packet that lacks it was steered nobody knows when.
    at = _DRIVER if (rows.rank[:, _DRIVER] >= 0).any() else _RX
    steered, time = rows.rank[:, at], rows.time[:, at]
    if not receives.n or "sk" not in receives:
        return np.full(len(steered), -1, np.int16)
    index = AsOf(receives["rank"], receives["sk"].astype(np.uint64, copy=False))
    call = index.last_before(np.where(socket > 0, steered, -1), socket.astype(np.uint64, copy=False))
    call = np.where(hidden.touch(pick(receives["time"], call, NAT), time), -1, call)
    return pick(receives["cpu"], call, -1).astype(np.int16)
