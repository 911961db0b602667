"""What each receive call can have consumed: two bounds that close on the truth, or say that it cannot be known.

A socket is a queue. Its calls consume it in order, so the place each call ended at (a datagram's number, a stream position) lies
between bounds that come from many sides: a call consumes at least what it returned, nothing that had not arrived, and everything
there was before a moment at which the queue was empty. Each bound holds whatever events are missing; where both
meet, the call is known. Nothing is counted from afar, so nothing can be shifted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxlab.read.compiler import njit

NOWHERE = np.iinfo(np.int64).min // 4


@dataclass(frozen=True)
class Calls:
    """The receive calls of sockets in order, and what bounds the place each ended at; dims (call,).

    Attributes
    ----------
    socket : int64 array
        Number of the call's socket; calls of one socket lie together.
    step : int64 array
        How far a call moves: bytes returned (stream), 1 (datagrams); 0 for one that found nothing.
    is_next : bool array
        No call can be missing between the one before and this one.
    low : int64 array
        The call ended here or later, by evidence of its own (`NOWHERE`: none).
    high : int64 array
        The call ended here or earlier: what had arrived.
    """

    socket: np.ndarray
    step: np.ndarray
    is_next: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Bounds:
    """Where each call ended; dims (call,).

    Attributes
    ----------
    place : int64 array
        `NOWHERE` where it cannot be known.
    low, high : int64 arrays
        The bounds; in doubt they are those of the call alone.
    agree : bool
        All bounds agree: none was found to be false.
    """

    place: np.ndarray
    low: np.ndarray
    high: np.ndarray
    agree: bool


def close_in(calls: Calls, following: np.ndarray | None = None, preceding: np.ndarray | None = None) -> Bounds:
    """Close the bounds of a socket's calls in on the place each ended at.

    Parameters
    ----------
    calls : Calls
    following, preceding : int64 arrays, dims (place,), optional
        For a queue some of whose places may be empty (a datagram that may have been dropped): the next and the previous place
        that cannot be. Index 0 is the place -1, before the first.
    """
    empty = np.empty(0, np.int64)
    low, high, doubtful, agree = _solve(
        calls.socket,
        calls.step,
        calls.is_next.copy(),
        calls.low,
        calls.high,
        empty if following is None else following,
        empty if preceding is None else preceding,
    )
    return Bounds(np.where((low == high) & ~doubtful, low, NOWHERE), low, high, agree)


@njit(cache=True, nogil=True)
def _up(place, step, following):
    """Return the furthest place the call after one that ended at `place` can have ended at."""
    if step and len(following) and -1 <= place < len(following) - 1:
        return following[place + 1]
    return place + step


@njit(cache=True, nogil=True)
def _down(place, step, preceding):
    """Return the earliest place the call before one that ended at `place` can have ended at."""
    if step and len(preceding) and -1 <= place < len(preceding) - 1:
        return preceding[place + 1]
    return place - step


@njit(cache=True, nogil=True)
def _solve(socket, step, is_next, own_low, own_high, following, preceding):
    """Propagate the bounds along the calls, both ways; a contradiction is a call that nobody saw, and what led to it is in doubt."""
    n = len(step)
    agree = True
    own_low, own_high = own_low.copy(), own_high.copy()
    # Calls only go forward, whatever is missing: what a later one cannot have passed, an earlier one has not. A lower bound
    # beyond that is false (a reader that a timer woke from another sleep, taken for one that its datagram woke).
    for m in range(n - 1, -1, -1):
        if m + 1 < n and socket[m] == socket[m + 1]:
            own_high[m] = min(own_high[m], own_high[m + 1] - step[m + 1])
        if own_low[m] > own_high[m]:
            own_low[m] = NOWHERE
            agree = False
    low, high = own_low.copy(), own_high.copy()
    doubtful = np.zeros(n, np.bool_)
    sure = -1
    for m in range(n):
        top = own_high[m]
        if m == 0 or socket[m] != socket[m - 1]:
            is_next[m] = False
            sure = m - 1
        else:
            if low[m - 1] > NOWHERE:
                low[m] = max(low[m], low[m - 1] + step[m])
            if is_next[m]:
                top = min(top, _up(high[m - 1], step[m], following))
        if low[m] > top:
            agree = False
            for k in range(sure + 1, m):
                doubtful[k] = True
            is_next[m] = False
            top = own_high[m]
            if low[m] > top:
                # More than had arrived: the bound itself is false.
                doubtful[m] = True
                low[m] = own_low[m] if own_low[m] <= top else NOWHERE
        high[m] = top
        if low[m] == own_high[m] or own_low[m] == high[m]:
            sure = m
    for m in range(n - 2, -1, -1):
        if socket[m] != socket[m + 1]:
            continue
        high[m] = min(high[m], high[m + 1] - step[m + 1])
        if is_next[m + 1] and low[m + 1] > NOWHERE:
            low[m] = max(low[m], _down(low[m + 1], step[m + 1], preceding))
        if low[m] > high[m]:
            doubtful[m] = True
            agree = False
    return low, high, doubtful, agree
