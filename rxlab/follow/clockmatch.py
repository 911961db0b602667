"""Packets <-> events when the two clocks are unknown: by what needs no clock, else by the pattern of the gaps.

TCP is exact: tcp_probe fires before ACK processing, so its ``snd_una`` is the highest ACK among *earlier* packets of the flow.
Anything else is placed by the one shift at which the gaps of both sides agree; where a second shift agrees nearly as well
(constant-rate traffic of one size) the answer would be a guess, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rxlab.errors import ClockError
from rxlab.follow.envelope import MAX_DRIFT, MIN_PACKETS, Envelope, fit_envelope
from rxlab.follow.floorbound import MAX_BOUND_NS
from rxlab.follow.match import match_packets
from rxlab.read.compiler import njit

# The best shift must beat every other by this factor.
MIN_SCORE_RATIO = 10.0
# Packets of a chunk that is searched for: long ones are sharp, short ones survive losses on both sides.
CHUNKS = (256, 48)
# Where in the capture chunks are taken: either side may lack a contiguous part.
PLACES = (0.5, 0.3, 0.7, 0.1, 0.9, 0.2, 0.4, 0.6, 0.8)
PREFILTER = 16
N_FINALISTS = 400
# Delays beyond this belong to stalls: such packets are left to the join, which knows the clock by then.
MIN_WINDOW_NS = 20_000
EARLY_NS = 1_000
# Losses at random up to which pairs were never wrong (tests/test_clockmatch.py); longer runs are not at random.
MAX_LOSS, MAX_LOSS_BOTH, LONG_RUN = 0.02, 0.002, 50
# A stalled packet looks lost on both sides, and takes the event of a lost neighbour: so often per packet at most (real packets
# with 1 % lost and 0.2 % stalled had up to 10 wrong of 90,000; tests/live/match_draw.py).
MAX_COINCIDENCE = 1e-5
# Where delays vary by more than this share of the packets' distance, neighbours can change places unseen (a capture whose events
# came after RPS: 1 to 5 wrong pairs of 45,000).
MAX_JITTER = 0.4
# So many times better do the slowest packets carry a curve where stamps follow events (seen: 2.5 and 6; elsewhere never above 1).
REVERSED = 1.5
# How fast a clock's frequency may wander: beyond what is matched its course is known to this.
STEERING = 0.6e-6
REMEDY = "Record with 'rxlab capture' (it reads the clocks), or send traffic whose gaps or sizes vary."


class UnlikeGapsError(ClockError):
    """Packets and events whose gaps agree at no shift, whichever of both comes first in a packet's life."""


@dataclass(frozen=True)
class Pairs:
    """Packets and events that belong together.

    Attributes
    ----------
    packet, event : int64 arrays, dims (pair,)
        Row numbers of both sides, ascending.
    ratio : float
        Second-best score over best; infinite where a key decided.
    method : {"tcp_key", "sequence"}
    envelope : Envelope or None
        The clock fitted on the way.
    """

    packet: np.ndarray
    event: np.ndarray
    ratio: float
    method: str
    envelope: Envelope | None = None


def match_tcp_keys(
    packet_ports: tuple[np.ndarray, np.ndarray],
    packet_ack: np.ndarray,
    packet_len: np.ndarray,
    event_ports: tuple[np.ndarray, np.ndarray],
    event_una: np.ndarray,
    event_len: np.ndarray,
    *,
    event_nxt: np.ndarray,
) -> Pairs:
    """Match received TCP packets to tcp_probe events without any clock.

    Parameters
    ----------
    packet_ports, event_ports : pairs of integer arrays, (local port, remote port)
    packet_ack : integer array, dims (packet,)
        ACK numbers, in capture order. Packets without an ACK (SYN) must not be given.
    packet_len, event_len : integer arrays, bytes of TCP payload
    event_una, event_nxt : integer arrays, dims (event,)
        ``snd_una`` and ``snd_nxt`` of tcp_probe.

    Notes
    -----
    Only keys that occur once on both sides count. Where the packet before is missing from the capture the running ACK is one
    packet old and names that packet's event; ``snd_nxt`` tells: no packet acknowledges what was not sent yet.
    """
    flow = packet_ports[0].astype(np.int64) << 16 | packet_ports[1].astype(np.int64)
    una = _running_ack(flow, packet_ack.astype(np.int64))
    known = np.flatnonzero(una >= 0)
    event_flow = event_ports[0].astype(np.int64) << 16 | event_ports[1].astype(np.int64)
    n, m = len(known), len(event_flow)
    # Three numbers make one dense code, two at a time: no key collides, and no row-wise sort is needed.
    code = np.zeros(n + m, np.int64)
    for mine, theirs, span in (
        (flow[known], event_flow, 2**32),
        (una[known], event_una.astype(np.int64), 2**32),
        (packet_len[known].astype(np.int64) % 65536, event_len.astype(np.int64) % 65536, 65536),
    ):
        code = np.unique(code * span + np.concatenate([mine, theirs]), return_inverse=True)[1]
    size = int(code.max()) + 1 if len(code) else 0
    once = (np.bincount(code[:n], minlength=size) == 1) & (np.bincount(code[n:], minlength=size) == 1)
    where = np.full(size, -1, np.int64)
    where[code[n:]] = np.arange(m)
    good = once[code[:n]] if n else np.zeros(0, bool)
    packet, event = known[good], where[code[:n][good]]
    beyond = (packet_ack.astype(np.int64)[packet] - event_nxt.astype(np.int64)[event]) % 2**32
    ahead = (beyond > 0) & (beyond < 2**31)
    return Pairs(packet[~ahead], event[~ahead], np.inf, "tcp_key")


def _running_ack(flow: np.ndarray, ack: np.ndarray) -> np.ndarray:
    """Return the highest ACK among earlier packets of each packet's flow, -1 for its first; sequence numbers wrap."""
    result = np.full(len(flow), -1, np.int64)
    order = np.argsort(flow, kind="stable")
    heads = np.flatnonzero(np.diff(flow[order], prepend=-1))
    for low, high in zip(heads, np.append(heads[1:], len(order)), strict=True):
        rows = order[low:high]
        step = (np.diff(ack[rows]) + 2**31) % 2**32 - 2**31
        running = np.maximum.accumulate(ack[rows[0]] + np.concatenate(([0], np.cumsum(step))))
        result[rows[1:]] = running[:-1] % 2**32
    return result


def match_sequences(stamp: np.ndarray, stamp_len: np.ndarray, event: np.ndarray, event_len: np.ndarray) -> Pairs:
    """Match packets to events of unknown clocks by gaps and lengths.

    Parameters
    ----------
    stamp, event : int64 arrays, nanoseconds of two clocks that differ by any offset and by up to 500 ppm
        In capture order; an event follows its packet's stamp.
    stamp_len, event_len : integer arrays, bytes

    Raises
    ------
    ClockError
        No shift of one against the other is ten times better than every other.
    """
    if min(len(stamp), len(event)) < MIN_PACKETS:
        raise ClockError(
            "too few packets to match two clocks",
            found=f"{len(stamp)} packets, {len(event)} events",
            expected=f"at least {MIN_PACKETS} of both",
        )
    origin = int(stamp[0]), int(event[0])
    x, e = np.asarray(stamp, np.int64) - origin[0], np.asarray(event, np.int64) - origin[1]
    x_len, e_len = np.asarray(stamp_len, np.int64), np.asarray(event_len, np.int64)
    place, size, shift, ratio = _find_shift(x, x_len, e, e_len)
    if ratio < MIN_SCORE_RATIO:
        raise UnlikeGapsError(
            "packets and events cannot be matched without a common clock",
            found=f"the best alignment of the gaps is only {ratio:.1f} times better than the next",
            expected=f"{MIN_SCORE_RATIO:.0f} times",
            do=REMEDY,
        )
    packet, partner, envelope = _grow(x, x_len, e, e_len, place, size, shift)
    shifted = replace(
        envelope,
        knots=envelope.knots + origin[0],
        uncertain=envelope.uncertain + origin[0],
        start_event=envelope.start_event + origin[1],
        origin=envelope.origin + origin[1] - origin[0],
    )
    return Pairs(packet, partner, ratio, "sequence", shifted)


def _find_shift(x: np.ndarray, x_len: np.ndarray, e: np.ndarray, e_len: np.ndarray) -> tuple[int, int, int, float]:
    """Return a chunk of packets (first, size), the event its first packet belongs to, and the score ratio."""
    best = (0, 0, 0, 0.0)
    gaps, event_gaps = np.diff(x), np.diff(e)
    for size in CHUNKS:
        for share in PLACES:
            place = int(share * (len(x) - size))
            if place < 0 or size > len(e):
                continue
            rough = _scores(
                gaps, x_len, event_gaps, e_len, place, PREFILTER, np.arange(len(e) - size + 1, dtype=np.int64)
            )
            n = min(N_FINALISTS, len(rough))
            finalists = np.sort(np.argpartition(rough, n - 1)[:n]).astype(np.int64)
            scores = _scores(gaps, x_len, event_gaps, e_len, place, size, finalists)
            first = int(np.argmin(scores))
            if np.isinf(scores[first]):
                continue
            others = np.delete(scores, first)
            # Never better than the resolution of a stamp: a ratio over 0 would mean nothing.
            ratio = float((others.min() if len(others) else np.inf) / max(float(scores[first]), 50.0))
            if ratio > best[3]:
                best = (place, size, int(finalists[first]), ratio)
            if best[3] >= 4 * MIN_SCORE_RATIO:
                return best
    return best


@njit(cache=True, nogil=True)
def _scores(gaps, x_len, event_gaps, e_len, place, size, shifts):
    """Median difference of the gaps of `size` packets and of as many events from each shift; infinite where lengths differ."""
    result = np.full(len(shifts), np.inf)
    apart = np.empty(size - 1)
    for row in range(len(shifts)):
        k = shifts[row]
        unequal = 0
        for i in range(size):
            if x_len[place + i] != e_len[k + i]:
                unequal += 1
        if unequal * 10 > size:
            continue
        for i in range(size - 1):
            apart[i] = abs(event_gaps[k + i] - gaps[place + i])
        result[row] = np.median(apart)
    return result


def _grow(
    x: np.ndarray, x_len: np.ndarray, e: np.ndarray, e_len: np.ndarray, place: int, size: int, shift: int
) -> tuple[np.ndarray, np.ndarray, Envelope]:
    """Match from the chunk outwards: fit the clock on what is matched, match twice the span, and so on."""
    packet, partner = _longest_run(x, e, place, size, shift)
    low, high = int(packet[0]), int(packet[-1]) + 1
    while low > 0 or high < len(x):
        width = max(high - low, MIN_PACKETS)
        low, high = max(0, low - width // 2), min(len(x), high + width // 2)
        part = np.arange(low, high)
        outside = max(int(x[packet[0]] - x[low]), int(x[high - 1] - x[packet[-1]]), 0)
        span = max(int(x[packet[-1]] - x[packet[0]]), 1)
        if len(packet) >= 8 * MIN_PACKETS:
            # Growing needs a rough clock only.
            few = slice(None, None, max(1, len(packet) // 50_000))
            envelope = fit_envelope(x[packet][few], e[partner][few])
            at = x[part] + envelope.offset_at(x[part])
            late = _window(envelope.excess(x[packet], e[partner]))
            slack = EARLY_NS + STEERING * outside + envelope.bound_ns * (1 + 2 * outside / span)
        else:
            slope, offset, late = _line(x[packet], e[partner])
            at = x[part] + np.rint(offset + slope * (x[part] - x[packet[0]])).astype(np.int64)
            slack = late + min(MAX_DRIFT, 2 * late / span) * outside
        packet, partner = _match_inside(part, at, x_len, e, e_len, int(slack), int(late + slack))
        if len(packet) < MIN_PACKETS // 4:
            raise ClockError("the match of packets and events breaks off", found=f"{len(packet)} pairs", do=REMEDY)
    envelope = fit_envelope(x[packet], e[partner])
    at = x + envelope.offset_at(x)
    late = _window(envelope.excess(x[packet], e[partner]))
    early = int(EARLY_NS + envelope.bound_ns)
    packet, partner = _match_inside(np.arange(len(x)), at, x_len, e, e_len, early, late)
    _refuse_jitter(x[packet], x_len[packet], late)
    _refuse_losses(at, e, packet, partner, early, late)
    envelope = fit_envelope(x[packet], e[partner])
    refuse_reversed(x[packet], e[partner], envelope)
    return packet, partner, envelope


def refuse_reversed(x: np.ndarray, e: np.ndarray, envelope: Envelope) -> None:
    """Refuse where the slowest packets carry a curve better than the fastest: then the stamps follow the events.

    A packet that stalled in between has its event before the window it is looked for in, and takes a neighbour's in silence (7 of
    58,828 real ones under load).
    """
    if envelope.typical_bound_ns <= MAX_BOUND_NS:
        return
    turned = fit_envelope(-x, -e).typical_bound_ns
    if REVERSED * turned < envelope.typical_bound_ns:
        raise ClockError(
            "the stamps follow the events they are matched with",
            found=f"slowest packets within {turned:.0f} ns of a curve, fastest within {envelope.typical_bound_ns:.0f} ns",
            do="Match with an event that follows the stamp, or exchange both sides.",
        )


def _refuse_jitter(x: np.ndarray, x_len: np.ndarray, late: int) -> None:
    """Refuse where packets of one size follow each other faster than their delays vary."""
    order = np.lexsort((x, x_len))
    gap = np.diff(x[order])[np.diff(x_len[order]) == 0]
    apart = float(gap.mean()) if len(gap) else np.inf
    if late > MAX_JITTER * apart:
        raise ClockError(
            "the packets' delays vary too much to match two clocks",
            found=f"delays up to {late / 1000:.0f} us between packets of one size that are {apart / 1000:.0f} us apart",
            expected=f"at most {MAX_JITTER:.0%} of that",
            do=REMEDY,
        )


def _refuse_losses(
    at: np.ndarray, e: np.ndarray, packet: np.ndarray, partner: np.ndarray, early: int, late: int
) -> None:
    """Refuse where both sides lost packets at random: two halves of different packets cannot be told from a pair."""
    shares = []
    for mine, other, before, after, taken in ((at, e, early, late, packet), (e, at, late, early, partner)):
        # Certainly lost: nothing on the other side is near. A long run of them is a capture that began later or paused.
        alone = np.searchsorted(other, mine + after, side="right") == np.searchsorted(other, mine - before)
        inside = slice(int(taken[0]), int(taken[-1]) + 1)
        edges = np.flatnonzero(np.diff(alone[inside], prepend=False, append=False))
        runs = edges[1::2] - edges[::2]
        shares.append(float(runs[runs < LONG_RUN].sum()) / max(len(taken), 1))
    if min(shares) > MAX_LOSS_BOTH or max(shares) > MAX_LOSS or shares[0] * shares[1] > MAX_COINCIDENCE:
        raise ClockError(
            "too many packets are missing to match two clocks",
            found=f"{shares[0]:.2%} of the packets and {shares[1]:.2%} of the events have no partner",
            expected=f"at most {MAX_LOSS:.0%} on one side, {MAX_LOSS_BOTH:.1%} on both, {MAX_LOSS:.0%} with {MAX_COINCIDENCE / MAX_LOSS:.2%}",
            do=REMEDY,
        )


def _longest_run(x: np.ndarray, e: np.ndarray, place: int, size: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the longest part of a chunk in which the gaps agree: a lost packet spoils all pairs after it."""
    rows = np.arange(size)
    apart = np.abs(np.diff(e[shift + rows]) - np.diff(x[place + rows]))
    agree = apart <= max(MIN_WINDOW_NS, 10 * float(np.median(apart)))
    breaks = np.concatenate(([-1], np.flatnonzero(~agree), [size - 1]))
    longest = int(np.argmax(np.diff(breaks)))
    run = np.arange(breaks[longest] + 1, breaks[longest + 1] + 1)
    return place + run, shift + run


def _line(x: np.ndarray, e: np.ndarray) -> tuple[float, float, int]:
    """Return slope and offset of e - x against x - x[0] (Theil), and how far single pairs lie from it."""
    delay = (e - x).astype(np.float64)
    at = (x - x[0]).astype(np.float64)
    pick = np.linspace(0, len(x) - 1, min(len(x), 200)).astype(np.int64)
    first, second = np.triu_indices(len(pick), 1)
    far = at[pick[second]] - at[pick[first]] > at[-1] / 2
    slopes = (delay[pick[second]] - delay[pick[first]])[far] / (at[pick[second]] - at[pick[first]])[far]
    slope = float(np.clip(np.median(slopes), -MAX_DRIFT, MAX_DRIFT)) if len(slopes) else 0.0
    rest = delay - slope * at
    offset = float(np.median(rest))
    return slope, offset, int(max(MIN_WINDOW_NS, 6 * np.quantile(np.abs(rest - offset), 0.8)))


def _window(excess: np.ndarray) -> int:
    """Return how late an event may be, from the excess delays of the pairs so far."""
    return int(max(MIN_WINDOW_NS, 8 * np.quantile(excess, 0.9)))


def _match_inside(
    part: np.ndarray, at: np.ndarray, x_len: np.ndarray, e: np.ndarray, e_len: np.ndarray, early: int, late: int
) -> tuple[np.ndarray, np.ndarray]:
    """Match the packets `part`, whose events are expected from `at` on; doubtful pairs are left out."""
    first = int(np.searchsorted(e, at.min() - early))
    last = int(np.searchsorted(e, at.max() + late, side="right"))
    inside = np.arange(first, last)
    matched = match_packets(at, x_len[part], e[inside] - late, e[inside] + early, e_len[inside], e[inside])
    chosen = matched.event.copy()
    chosen[matched.ambiguous] = -1
    _drop_doubtful(at, x_len[part], e[inside], e_len[inside], chosen, early, late)
    found = np.flatnonzero(chosen >= 0)
    return part[found], inside[chosen[found]]


@njit(cache=True, nogil=True)
def _drop_doubtful(at, at_len, e, e_len, chosen, early, late):
    """Take back pairs that a single packet or event could have instead, until none is left: who was lost is not known."""
    n, m = len(at), len(e)
    owner = np.full(m, -1, np.int64)
    for i in range(n):
        if chosen[i] >= 0:
            owner[chosen[i]] = i
    again = True
    while again:
        again = False
        low = 0
        for i in range(n):
            while low < m and e[low] < at[i] - early:
                low += 1
            j = low
            while j < m and e[j] <= at[i] + late:
                if e_len[j] == at_len[i]:
                    if chosen[i] < 0 and owner[j] >= 0:
                        # A packet without event could have had this one.
                        chosen[owner[j]] = -1
                        owner[j] = -1
                        again = True
                    elif chosen[i] >= 0 and owner[j] < 0:
                        # An event without packet could have been this one's.
                        owner[chosen[i]] = -1
                        chosen[i] = -1
                        again = True
                j += 1
