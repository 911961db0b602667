"""Recordings without clock readings -> a clock map: match, see where the stamp lies among the events, fit.

A software stamp is taken between two events of the same CPU, so envelopes from both sides enclose the offset: absolute, and the
bound is half their distance. A hardware stamp has events on one side only: times are then excess over the fastest packet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from rxlab.errors import ClockError, MissingEventError, UsageError
from rxlab.follow.clockfit import NAT, ClockMap
from rxlab.follow.clockmatch import Pairs, UnlikeGapsError, match_sequences, match_tcp_keys, refuse_reversed
from rxlab.follow.envelope import MIN_PACKETS, Envelope, fit_envelope
from rxlab.follow.floorbound import MAX_BOUND_NS
from rxlab.follow.kernelpath import KernelPath, event_columns, follow_kernel
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_INDEX

TCP = 6
ACK_FLAG = 0x10
MULTICAST_BIT = 1 << 40
# Events to match stamps with, and whether the stamp is the later of both: a software stamp lies inside netif_rx, behind the driver's
# event, or at the tap; a hardware stamp before them all. After RPS an IPI lies in between.
ORDERS = (
    ("stamp_high", False),
    ("driver_rx", True),
    ("netif_receive_skb", True),
    ("driver_rx", False),
    ("netif_receive_skb", False),
)
# An interval for the stamp may be this much inside out before the stamp cannot lie there.
INSIDE_OUT_NS = 100


def align_recordings(
    events: Mapping[str, Columns],
    packets: Columns,
    *,
    iface: str | None = None,
    perf_clock: str = "",
) -> tuple[ClockMap, str, frozenset[int]]:
    """Find the map between a capture's clock and a recording's, from the packets alone.

    Parameters
    ----------
    events : mapping of str to Columns
        As :func:`rxlab.read_perfdata` gives them, on whatever clock perf used.
    packets : Columns
        As :func:`rxlab.read_pcap` gives them, both directions.
    iface : str, optional
        Device; needed where several received packets and the capture (pcapng) names none of them.
    perf_clock : str
        ``PerfData.meta["clock"]``. CLOCK_MONOTONIC has no drift against CLOCK_REALTIME, so one constant is fitted.

    Returns
    -------
    clock : ClockMap
        From the capture's clock to perf's, ``method`` "brackets" or "envelope".
    iface : str
    macs : frozenset of int
        The captured interface's own addresses, found on the way.

    Raises
    ------
    ClockError
        Packets and events cannot be matched without guessing.
    MissingEventError
        ``net:netif_receive_skb`` was not recorded.
    UsageError
        It cannot be told which device was captured.
    """
    iface = _captured_device(events, iface, packets)
    path = follow_kernel(events, iface)
    if len(path.time) < MIN_PACKETS:
        raise MissingEventError("too few net:netif_receive_skb events to align", where=iface, found=str(len(path.time)))
    refusal: ClockError | None = None
    best: tuple[tuple[bool, int], ClockMap, int] | None = None
    for mac in _candidates(packets):
        # On lo both addresses are zero, and each packet is shown to a capture once.
        received = packets.take((packets["dst_mac"] == mac) & ((packets["src_mac"] != mac) | (mac == 0)))
        try:
            pairs = _pair(path, received, events)
            clock = _fit(path, received["time"][pairs.packet], pairs, perf_clock == "CLOCK_MONOTONIC")
        except ClockError as error:
            refusal = refusal if refusal and isinstance(error, UnlikeGapsError) else error
            continue
        # Replies follow requests so steadily that their gaps agree too; but their stamps do not lie that closely between two events.
        rank = clock.method != "brackets", clock.bound_ns
        if best is None or rank < best[0]:
            best = rank, clock, mac
    if best is None:
        raise refusal or ClockError(
            "no received packets to align", found=f"{packets.n} packets, none to a unicast address"
        )
    _, clock, mac = best
    return replace(clock, perf_clock=perf_clock), iface, frozenset({mac})


def _captured_device(events: Mapping[str, Columns], iface: str | None, packets: Columns) -> str:
    """Return the device whose packets were captured: the one asked for, the one the capture names, or the only one.

    Raises
    ------
    UsageError
        Several devices received packets and nothing says which one was captured, or the one asked for received none.
    """
    receive = event_columns(events, "net:netif_receive_skb")
    names = receive.attrs.get("categories", {}).get("name")
    if not receive.n or not names:
        raise MissingEventError("event net:netif_receive_skb has no samples, so no packet can be aligned")
    counts = dict(zip(map(str, names), np.bincount(receive["name"], minlength=len(names)).tolist(), strict=True))
    found = ", ".join(f"{name} ({counts[name]:,} packets)" for name in sorted(counts, key=lambda name: -counts[name]))
    if iface is not None:
        if not counts.get(iface):
            raise UsageError("no packet was received on this interface", where=f"--iface {iface}", found=found)
        return iface
    likely = [name for name, count in counts.items() if count >= MIN_PACKETS and name != "lo"] or sorted(
        counts, key=lambda name: (name == "lo", -counts[name])
    )[:1]
    told = {str(link.get("name") or "") for link in packets.attrs.get("interfaces", [])} & set(likely)
    if len(told or likely) > 1:
        choice = " or ".join(f"--iface {name}" for name in likely)
        raise UsageError(
            "the recording holds several interfaces, and the capture does not say which one it is of",
            found=found,
            do=f"Give {choice}.",
        )
    return (list(told) or likely)[0]


def _candidates(packets: Columns) -> list[int]:
    """Return the unicast addresses packets were sent to, most frequent first."""
    macs, counts = np.unique(packets["dst_mac"], return_counts=True)
    order = np.argsort(-counts)
    return [int(macs[row]) for row in order if not int(macs[row]) & MULTICAST_BIT and counts[row] >= MIN_PACKETS][:4]


def _pair(path: KernelPath, received: Columns, events: Mapping[str, Columns]) -> Pairs:
    """Match received packets to skbs: by the TCP key where it identifies enough of them, else by the gaps."""
    is_tcp = np.flatnonzero((received["proto"] == TCP) & (received["tcp_flags"] & ACK_FLAG > 0))
    probed = np.flatnonzero(path.columns["snd_una"] >= 0)
    probes = event_columns(events, "tcp:tcp_probe")
    # Without snd_nxt a packet behind a missing one passes for it.
    if min(len(is_tcp), len(probed)) >= MIN_PACKETS and "snd_nxt" in probes:
        row = np.searchsorted(probes["rank"], path.rank[probed, STAGE_INDEX["tcp_rcv"]])
        facts = path.columns
        pairs = match_tcp_keys(
            (received["dport"][is_tcp], received["sport"][is_tcp]),
            received["ack"][is_tcp],
            received["payload_len"][is_tcp],
            (facts["sport"][probed], facts["dport"][probed]),
            facts["snd_una"][probed],
            facts["probe_len"][probed],
            event_nxt=probes["snd_nxt"][row],
        )
        if len(pairs.packet) >= max(MIN_PACKETS, len(is_tcp) // 10):
            return Pairs(is_tcp[pairs.packet], probed[pairs.event], pairs.ratio, pairs.method)
    return _pair_by_gaps(path, received)


def _pair_by_gaps(path: KernelPath, received: Columns) -> Pairs:
    """Match received packets to skbs by the gaps, at the event whose delay against the stamp varies least.

    The side that comes later in a packet's life is late where the packet stalls, and lateness is what the match allows for. Where the
    stamp was taken is not known yet: every order of both is tried, until the fastest packets carry a curve well.
    """
    length = received["wire_len"].astype(np.int64) - 14 - np.where(received["vlan"] >= 0, 4, 0)
    best: Pairs | None = None
    refusal: ClockError | None = None
    for name, stamp_is_later in ORDERS:
        time = path.columns[name] if name in path.columns else path.time[:, STAGE_INDEX[name]]
        if (time == NAT).any():
            continue
        order = np.argsort(time, kind="stable")
        sides = (received["time"], length), (time[order], path.columns["len"][order])
        try:
            pairs = match_sequences(*sides[stamp_is_later], *sides[not stamp_is_later])
        except UnlikeGapsError:
            raise
        except ClockError as error:
            refusal = refusal or error
            continue
        if best is None or _spread(pairs) < _spread(best):
            packet, event = (pairs.event, pairs.packet) if stamp_is_later else (pairs.packet, pairs.event)
            best = replace(pairs, packet=packet, event=order[event])
        if _spread(pairs) <= MAX_BOUND_NS:
            break
    if best is None:
        raise refusal or ClockError("no event of every packet to match the capture with")
    return best


def _spread(pairs: Pairs) -> float:
    """Return how far the fastest packets of a match leave the clock open."""
    return pairs.envelope.typical_bound_ns if pairs.envelope is not None else 0.0


def _sides(path: KernelPath, skb: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return for each stamp position the events just before and just after it."""

    def stage(name: str) -> np.ndarray:
        return path.time[skb, STAGE_INDEX[name]]

    received = stage("tcp_rcv")
    return {
        "bracket": (stage("driver_rx"), path.columns["stamp_high"][skb]),
        "tap": (stage("netif_receive_skb"), np.where(received != NAT, received, stage("data_ready"))),
    }


def _fit(path: KernelPath, stamp: np.ndarray, pairs: Pairs, is_rigid: bool) -> ClockMap:
    """Fit both sides of each possible stamp position; the narrowest that is not inside out holds the stamp."""
    possible: list[tuple[float, str, Envelope, Envelope]] = []
    for position, (before, after) in _sides(path, pairs.event).items():
        seen = (before != NAT) & (after != NAT)
        if seen.sum() < max(MIN_PACKETS, len(stamp) // 2):
            continue
        upper = fit_envelope(stamp[seen], after[seen], method="hull" if is_rigid else "auto")
        # The other side is the same fit with time running backwards.
        lower = fit_envelope(-stamp[seen], -before[seen], method="hull" if is_rigid else "auto")
        middle = stamp[seen]
        width = float(np.median(upper.offset_at(middle) + lower.offset_at(-middle)))
        if width > -INSIDE_OUT_NS:
            possible.append((width, position, upper, lower))
    if possible:
        possible.sort(key=lambda one: one[0])
        _, position, upper, lower = possible[0]
        knots = upper.knots
        if len(upper.start_event) == 1:
            knots = np.unique(np.concatenate([upper.knots, -lower.knots]))
        high, low = upper.offset_at(knots), -lower.offset_at(-knots)
        # The shape comes from the side with the denser floor, the level from between both.
        shape, side = (high, upper) if upper.typical_bound_ns <= lower.typical_bound_ns else (low, lower)
        # One constant is the middle of the curve, and the ends may swing.
        own = side.typical_bound_ns if is_rigid else side.bound_ns
        curve = shape + int(np.median((high + low) // 2 - shape))
        bound = float(np.maximum(high - curve, curve - low).max()) + own
        segment = np.zeros(len(knots), np.int64) if len(upper.start_event) == 1 else upper.segment
        flags = side.flags
        for _, _, other_upper, other_lower in possible[1:]:
            # Steady delays let the stamp lie at either place, an offset apart: the bound covers both.
            flags = (*side.flags, "ambiguous_position")
            away = np.maximum(other_upper.offset_at(knots) - curve, curve + other_lower.offset_at(-knots))
            bound = max(bound, float(away.max()) + own)
        laid = replace(upper, knots=knots, segment=segment, flags=flags)
        return _clock_map(laid, curve, bound, position, "brackets", is_rigid)
    first = _earliest(path, pairs.event)
    seen = first != NAT
    envelope = fit_envelope(stamp[seen], first[seen])
    refuse_reversed(stamp[seen], first[seen], envelope)
    return _clock_map(envelope, envelope.offset_at(envelope.knots), envelope.bound_ns, "nic", "envelope", False)


def _earliest(path: KernelPath, skb: np.ndarray) -> np.ndarray:
    """Return the first event of each skb on the CPU that received it; never one after RPS."""
    names = ("hardirq", "softirq_raise", "softirq", "driver_rx")
    times = path.time[skb][:, [STAGE_INDEX[name] for name in names]]
    # One kind of event for all packets: a mixture would have as many floors.
    share = (times != NAT).mean(axis=0)
    usable = np.flatnonzero(share > 0.9)
    return times[:, usable[0]] if len(usable) else path.time[skb, STAGE_INDEX["netif_receive_skb"]]


def _clock_map(
    envelope: Envelope, curve: np.ndarray, bound: float, position: str, method: str, is_rigid: bool
) -> ClockMap:
    """Lay a curve out as segments, straight from knot to knot."""
    knots, segment = envelope.knots, envelope.segment
    if (np.diff(knots) < 0).any():
        raise ClockError(
            "the capture's clock was stepped back, so its stamps are ambiguous",
            found=f"{len(envelope.uncertain)} steps",
            do="Cut the capture at the step.",
        )
    starts = np.flatnonzero(np.append(np.diff(segment) == 0, False))
    if is_rigid:
        heads = np.flatnonzero(np.diff(segment, prepend=-1))
        edges = np.append(heads, len(knots))
        level = np.array([int(np.median(curve[a:b])) for a, b in zip(edges[:-1], edges[1:], strict=True)], np.int64)
        columns = {"start_real": knots[heads].copy(), "offset": -level}
    else:
        run = (knots[starts + 1] - knots[starts]).astype(np.float64)
        columns = {
            "start_real": knots[starts].copy(),
            "offset": -curve[starts].astype(np.int64),
            "anchor": knots[starts],
            "slope": -(curve[starts + 1] - curve[starts]) / run,
        }
        if method == "envelope":
            columns["bound"] = np.ceil(envelope.bound[starts]).astype(np.int64)
    columns["start_real"][0] = NAT
    return ClockMap(
        Columns(columns),
        envelope.uncertain,
        int(np.ceil(bound)),
        stamp_position=position,
        method=method,
        flags=envelope.flags,
    )
