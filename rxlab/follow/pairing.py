"""Captured packets <-> skbs: where the stamp was taken, and the windows for the match that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.clockfit import NAT, ClockMap
from rxlab.follow.hidden import Hidden
from rxlab.follow.kernelpath import KernelPath
from rxlab.follow.match import STALL_NS, TOLERANCE_NS, Matched, classify_stamp, is_place_sure, match_by_flow
from rxlab.follow.repeats import running_max
from rxlab.read.columns import Columns
from rxlab.stages import PATH_KINDS, STAGE_INDEX

_RX = STAGE_INDEX["netif_receive_skb"]
# How long after netif_receive_skb a tap stamps at most where lost events leave it open.
LOSSY_TAP_NS = 20_000
# How long before it is queued to a CPU's backlog an skb was stamped at most, of two CPUs that queue to the same.
TO_QUEUE_NS = 50_000
# Share of the packets of a protocol that must fit a place of their own.
MIN_APART = 0.8
_FIRST = np.iinfo(np.int64).min // 4


def tolerance_of(clock: ClockMap) -> int:
    """Return by how much a stamp and an event's time may disagree, ns."""
    return max(TOLERANCE_NS, int(clock.bound_ns))


@dataclass(frozen=True)
class StampPlace:
    """Where a capture's stamps were taken (:func:`rxlab.follow.match.classify_stamp`), whether that is sure and its driver seen.

    ``apart`` is where those of the protocol were taken that differs, and whether that is TCP. A segment that a socket of the same
    network namespace sent still carries its time of departure (EDT), so netif_rx does not stamp it (``net_timestamp_check``,
    net/core/dev.c) and the tap does (``skb_tstamp``), while datagrams beside it are stamped by netif_rx.
    """

    position: str
    evidence: dict[str, float]
    is_sure: bool
    has_driver: bool
    apart: tuple[str, bool] | None = None

    def groups(self, is_tcp: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Return positions, each with the rows of the packets stamped there."""
        if self.apart is None:
            return [(self.position, np.arange(len(is_tcp)))]
        position, is_of_tcp = self.apart
        mine = is_tcp == is_of_tcp
        return [(self.position, np.flatnonzero(~mine)), (position, np.flatnonzero(mine))]


@dataclass(frozen=True)
class Pairs:
    """Packets <-> skbs.

    Attributes
    ----------
    matched : Matched
    place : StampPlace
    is_uncertain : bool array, dims (packet,)
        It may be so because events are missing: its skb's evidence may be another packet's.
    residual : int64 array, dims (packet,), nanoseconds
        Stamp less the instant it was expected at, NaT where unmatched or matched before.
    """

    matched: Matched
    place: StampPlace
    is_uncertain: np.ndarray
    residual: np.ndarray


def pair_packets(
    path: KernelPath,
    received: Columns,
    stamp: np.ndarray,
    clock: ClockMap,
    lossy: Hidden,
    known: Matched | None = None,
    place: StampPlace | None = None,
) -> Pairs:
    """Match packets to skbs in the windows that follow from where the stamp was taken.

    Parameters
    ----------
    path : KernelPath
    received : Columns
    stamp : int64 array, dims (packet,), nanoseconds of CLOCK_MONOTONIC
    clock : ClockMap
    lossy : Hidden
    known : Matched, optional
        Pairs made before (event -2: this packet is to be matched); their packets and skbs are taken.
    place : StampPlace, optional
        Where the stamps were taken, when an earlier part of the recording has told.
    """
    columns = path.columns
    rx_time, drv_time = path.time[:, _RX], path.time[:, STAGE_INDEX["driver_rx"]]
    has_driver, is_tcp = drv_time != NAT, received["proto"] == 6
    sees_driver = bool(has_driver.any()) if place is None else place.has_driver
    # netif_receive_skb sees the skb above its MAC header, and without the VLAN tag that the NIC took off and libpcap puts
    # back; a tag that the NIC left (the outer one of two, often) is still in it. The driver's event says which it is.
    tag = np.where((received["vlan"] >= 0) & (not sees_driver), 4, 0)
    length = received["wire_len"].astype(np.int64) - 14 - tag
    skb_len = columns["len"] + 4 * (columns["vlan_tagged"] > 0)
    if place is None:
        span = columns["stamp_high"] - drv_time
        driver = (drv_time[has_driver], span[has_driver], skb_len[has_driver])
        position, evidence = classify_stamp(stamp, length, *driver, rx_time, skb_len)
        # The readings say whose stamp it is: however soon the kernel follows, it is the NIC's.
        position = "nic" if clock.method == "cross_stamps" else position
        place = StampPlace(position, evidence, is_place_sure(position, evidence), sees_driver)
        if position in ("bracket", "tap"):
            place = replace(place, apart=_place_apart(place, stamp, length, is_tcp, driver, rx_time, skb_len))
    event = np.full(received.n, -2, np.int64) if known is None else known.event.copy()
    ambiguous = np.zeros(received.n, bool) if known is None else known.ambiguous.copy()
    residual, uncertain = np.full(received.n, NAT, np.int64), np.zeros(received.n, bool)
    for position, rows in place.groups(is_tcp):
        low, high, expected = _stamp_windows(path, position, tolerance_of(clock), lossy)
        # Two queues' polls overlap: what one driver got first it may hand up last. Each such window ends where its skb goes on.
        overtaking = has_driver if position == "bracket" else np.zeros(len(has_driver), bool)
        # A driver's event that was not delivered leaves its skb a wide window, and packets of which nothing was delivered may be in it.
        doubtful = (~has_driver & sees_driver & (position == "bracket")) | lossy.any
        packets, free = rows[event[rows] == -2], np.ones(len(rx_time), bool)
        free[event[event >= 0]] = False
        skbs = np.flatnonzero(free)
        found = match_by_flow(
            stamp[packets], length[packets], low[skbs], high[skbs], skb_len[skbs], expected[skbs],
            overtaking[skbs] if position == "bracket" else None,
            received["directed_flow"][packets], columns["hash"][skbs], doubtful[skbs],
        )  # fmt: skip
        event[packets] = pick(skbs, found.event, -1)
        ambiguous[packets] = found.ambiguous | (not place.is_sure)
        fresh = packets[event[packets] >= 0]
        residual[fresh] = stamp[fresh] - expected[event[fresh]]
        uncertain[rows] = ambiguous[rows] & pick(doubtful, event[rows], lossy.any)
    return Pairs(Matched(event, ambiguous), place, uncertain, residual)


def _place_apart(
    place: StampPlace,
    stamp: np.ndarray,
    length: np.ndarray,
    is_tcp: np.ndarray,
    driver: tuple[np.ndarray, np.ndarray, np.ndarray],
    rx_time: np.ndarray,
    skb_len: np.ndarray,
) -> tuple[str, bool] | None:
    """Tell whether TCP, or the rest, was stamped elsewhere than most of the capture: if nearly all of it fits there, and hardly any here."""
    for is_of_tcp in (True, False):
        mine = is_tcp == is_of_tcp
        if not mine.any() or mine.all():
            continue
        position, evidence = classify_stamp(stamp[mine], length[mine], *driver, rx_time, skb_len)
        if position in ("bracket", "tap") and position != place.position and is_place_sure(position, evidence):
            fits, here = evidence[position], evidence[place.position]
            if fits >= MIN_APART and here <= 1 - MIN_APART:
                return position, is_of_tcp
    return None


def _stamp_windows(
    path: KernelPath, position: str, tolerance: int, lossy: Hidden
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each skb the earliest and the latest stamp its packet can have, and the one expected."""
    columns = path.columns
    rx_time, drv_time = path.time[:, _RX], path.time[:, STAGE_INDEX["driver_rx"]]
    has_driver = drv_time != NAT
    if position == "bracket":
        low = np.where(has_driver, columns["stamp_low"] - tolerance, rx_time - STALL_NS)
        high = np.where(has_driver, columns["stamp_high"] + tolerance, rx_time + tolerance)
        # GRO hands up, and stamps, at the end of a poll; a packet that was not moved enters the stack right after.
        is_napi = columns["path_kind"] == PATH_KINDS.index("napi")
        expected = np.where(has_driver & ~is_napi, columns["stamp_low"], rx_time)
        if not has_driver.all():
            # A CPU's backlog is a queue: what it processed before another packet had come, and was stamped, before that; and after
            # those processed before it, but for the time from a stamp to the queue.
            since = _greatest_of_earlier(path, np.where(has_driver, low, _FIRST)) - TO_QUEUE_NS
            low = np.where(has_driver, low, np.maximum(low, since))
            high = np.where(has_driver, high, np.minimum(high, _least_of_later(path, high)))
            expected = np.where(has_driver, expected, np.minimum(expected, _least_of_later(path, expected)))
        return low, high, expected
    if position == "tap":
        return rx_time - tolerance, _tap_limit(path, lossy) + tolerance, rx_time
    first = path.first_event()
    return first - STALL_NS, first + tolerance, first


def _greatest_of_earlier(path: KernelPath, instants: np.ndarray) -> np.ndarray:
    """Return for each skb the greatest of the `instants` of it and those that its CPU processed before it."""
    cpu = path.cpu[:, _RX].astype(np.int64)
    order = np.lexsort((path.rank[:, _RX], cpu))
    greatest = np.empty(len(instants), np.int64)
    greatest[order] = running_max(instants[order], cpu[order])
    return greatest


def _least_of_later(path: KernelPath, instants: np.ndarray) -> np.ndarray:
    """Return for each skb the least of the `instants` of it and those that its CPU processed after it."""
    cpu = path.cpu[:, _RX].astype(np.int64)
    order = np.lexsort((-path.rank[:, _RX], cpu))
    least = np.empty(len(instants), np.int64)
    least[order] = -running_max(-instants[order], cpu[order])
    return least


def _tap_limit(path: KernelPath, lossy: Hidden) -> np.ndarray:
    """Return until when a tap stamp of each skb can come: before the CPU's next skb, and before its own next stage."""
    rx_time, cpu, rank = path.time[:, _RX], path.cpu[:, _RX], path.rank[:, _RX]
    index = AsOf(rank, cpu)
    following = index.first_after(rank, cpu)
    limit = np.where(following >= 0, rx_time[np.maximum(following, 0)], rx_time + STALL_NS)
    for stage in ("tcp_rcv", "data_ready"):
        time = path.time[:, STAGE_INDEX[stage]]
        limit = np.where(time != NAT, np.minimum(limit, time), limit)
    # Where the next events may be missing they limit nothing.
    limit = np.where(lossy.touch(rx_time, limit, cpu), np.minimum(limit, rx_time + LOSSY_TAP_NS), limit)
    return np.minimum(limit, rx_time + STALL_NS)
