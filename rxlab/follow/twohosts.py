"""Two hosts' captures -> one-way latencies in both directions, and what is known of the two clocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxlab.errors import ClockError
from rxlab.follow.crossings import AMBIGUOUS, CROSSINGS, Crossing, match_captures
from rxlab.follow.envelope import MIN_STEP_NS
from rxlab.follow.oneway import OffsetBounds, bound_offset, latencies, resolution
from rxlab.read.columns import Columns
from rxlab.read.pcapfile import NAT

# So many stamps before and after tell a clock's step from a stamp that is wrong.
AROUND = 9


@dataclass(frozen=True)
class TwoHosts:
    """What two captures of one conversation say together.

    Attributes
    ----------
    forward, reverse : Columns
        Packets to the receiver (rows of its capture) and to the sender (rows of the sender's), as
        :func:`rxlab.follow.oneway.latencies` gives them.
    bounds : OffsetBounds
        Of the receiver's clock minus the sender's.
    n_unseen : tuple of int
        Packets to the receiver, to the sender, of which nothing arrived.
    width_ns : tuple of int
        Least and median distance of both ends of the interval; NAT where one is not known.
    """

    forward: Columns
    reverse: Columns
    bounds: OffsetBounds
    n_unseen: tuple[int, int]
    width_ns: tuple[int, int]

    @property
    def statuses(self) -> dict[str, tuple[int, int]]:
        """Packets of each status, forward and reverse."""
        counts = [np.bincount(side["status"], minlength=len(CROSSINGS)) for side in (self.forward, self.reverse)]
        return {name: (int(counts[0][at]), int(counts[1][at])) for at, name in enumerate(CROSSINGS)}


def align_two_hosts(
    sender: Columns, receiver: Columns, *, received: np.ndarray | None = None, clock_error: int | None = None
) -> TwoHosts:
    """Match two hosts' captures and bound the one-way latency of every packet.

    Parameters
    ----------
    sender, receiver : Columns
        As :func:`rxlab.follow.crossings.match_captures` takes them, each stamped by one clock.
    received : bool array, dims (packet,), optional
        Which of the receiver's packets came in, where that is known.
    clock_error : int, optional
        The clocks are said to agree to within so many nanoseconds.

    Raises
    ------
    ClockError
        The captures have no packets in common, are the same one, the receiver's clock was stepped back, or the clocks do not agree as
        said.
    """
    forward, reverse = match_captures(sender, receiver, received)
    there, here = sender["time"], receiver["time"]
    _refuse_stepped_back(here)
    quantum = resolution(there[there != NAT]), resolution(here[here != NAT])
    out, back = _sure(forward), _sure(reverse)
    pairs = (
        (there[forward.first[out]], here[forward.arrived[out]]),
        (here[reverse.first[back]], there[reverse.arrived[back]]),
    )
    _refuse_same_place(*pairs)
    bounds = bound_offset(*pairs, quantum=quantum, clock_error=clock_error)
    towards = latencies(forward, there, here, bounds, is_forward=True, quantum=quantum)
    backwards = latencies(reverse, here, there, bounds, is_forward=False, quantum=quantum[::-1])
    width = np.concatenate([(side["most"] - side["least"])[side["most"] != NAT] for side in (towards, backwards)])
    widths = (int(width.min()), int(np.median(width))) if len(width) else (int(NAT), int(NAT))
    return TwoHosts(towards, backwards, bounds, (forward.n_unseen, reverse.n_unseen), widths)


def _sure(crossing: Crossing) -> np.ndarray:
    """Return the packets whose frame is known: of one that was sent several times the earliest says little."""
    return np.flatnonzero((crossing.first >= 0) & (crossing.status != AMBIGUOUS))


def _refuse_stepped_back(time: np.ndarray) -> None:
    """Refuse a capture whose clock was stepped back: its stamps occur twice. A single stamp that is wrong is no step."""
    timed = time[time != NAT]
    back = [
        at
        for at in (np.flatnonzero(np.diff(timed) < -MIN_STEP_NS) + 1).tolist()
        if _middle(timed[at : at + AROUND]) < _middle(timed[max(at - AROUND, 0) : at]) - MIN_STEP_NS
    ]
    if back:
        raise ClockError(
            "the receiver's clock was stepped back, so its stamps are ambiguous",
            found=f"{len(back)} steps, the first after packet {back[0]}",
            do="Cut the capture at the step.",
        )


def _middle(times: np.ndarray) -> int:
    return int(np.sort(times)[len(times) // 2])


def _refuse_same_place(*pairs: tuple[np.ndarray, np.ndarray]) -> None:
    """Refuse two captures of one interface: no packet takes any time from one to the other."""
    if sum(len(left) for left, _ in pairs) > 1 and all(np.array_equal(left, came) for left, came in pairs):
        raise ClockError(
            "both captures were taken at the same place",
            found="every packet has the same stamp in both",
            expected="the sender's capture and the receiver's",
        )
