"""The join of a recording that does not fit in memory: slab by slab of time, each taking over what is open from those before.

The rows are those of :func:`rxlab.follow.join.join`. A packet is told of once a slab has seen a while beyond it; one that waits for
its reader longer than that is told of again when it was read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from rxlab.follow.asof import pick
from rxlab.follow.carry import Kept, carried_events, carried_packets, keep_packets, last_of_group, open_packets
from rxlab.follow.clockfit import NAT, ClockMap
from rxlab.follow.consumption import MSG_PEEK
from rxlab.follow.feeding import Earlier, Fed
from rxlab.follow.handshake import COMPLETES, accept_returns, accept_times
from rxlab.follow.hidden import blind_windows, combine_windows
from rxlab.follow.join import Joined, comm_of, follow_part, refuse_without_packets
from rxlab.follow.kernelpath import event_columns
from rxlab.follow.match import STALL_NS
from rxlab.follow.older import RECEIVE as CALLS
from rxlab.follow.older import as_on_newer_kernels
from rxlab.follow.pairing import StampPlace
from rxlab.follow.parts import Followed, Known, Part
from rxlab.follow.received import Machine
from rxlab.follow.repeats import last_pieces
from rxlab.follow.rowtable import RowTable
from rxlab.follow.status import FlowsSoFar, pieces_with
from rxlab.follow.together import side_threads
from rxlab.follow.verdict import REFUSED, Tally, clock_told, give_verdict
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_INDEX, SUBSTITUTES

FOREVER = np.iinfo(np.int64).max
RECEIVE, SWITCH = "net:netif_receive_skb", "sched:sched_switch"


@dataclass(frozen=True)
class Reach:
    """How far a slab looks beyond the packets it tells of.

    Attributes
    ----------
    back, ahead : int, nanoseconds
        Events at hand before the first and after the last of them. A packet may wait in the backlog, and its stamp precede its
        events, by a stall; a reader may come at any time.
    first : int
        Packets of the kernel and of the capture by which it is told where the stamps were taken; slabs wait for them,
    patience : int
        but not more than so many.
    most : int
        Packets older than that which are remembered: they wait for their reader, or stand in a queue behind an unknown call.
    """

    back: int = 2 * STALL_NS
    ahead: int = 2 * STALL_NS
    first: int = 2_000
    patience: int = 8
    most: int = 100_000


@dataclass(frozen=True)
class Recording:
    """A recording in slabs.

    Attributes
    ----------
    events : iterable of mappings of str to Columns
        The events of each slab, in order of time, ``rank`` going on from slab to slab.
    packets : iterable of Columns
        The received packets in pieces, as :func:`rxlab.follow.received.received_packets` gives them.
    n_packets : int
    flows : Columns, dims (flow,)
    asked : mapping of str to bool
        The events that were asked for, and of which there are any.
    span : tuple of int, nanoseconds of CLOCK_MONOTONIC
        The first and the last event.
    lost : int
        Events perf reported as lost.
    lost_windows : tuple of arrays
        Where (:func:`rxlab.follow.hidden.lost_windows`).
    damage : tuple of str
    """

    events: Iterable[Mapping[str, Columns]]
    packets: Iterable[Columns]
    n_packets: int
    flows: Columns
    asked: Mapping[str, bool]
    span: tuple[int, int]
    lost: int = 0
    lost_windows: tuple[np.ndarray, np.ndarray, np.ndarray] = (np.empty(0, np.int64),) * 3
    damage: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Rows of the joined table; a row that comes again replaces the one before.

    Attributes
    ----------
    row : int64 array
        Place among all received packets.
    time, cpu, packets
        As in :class:`rxlab.follow.join.Joined`; codes of ``comm`` and ``drop_reason`` are those of this table of rows.
    """

    row: np.ndarray
    time: np.ndarray
    cpu: np.ndarray
    packets: Columns


class SlabJoin:
    """The join of a recording in slabs: iterate to get its rows, then ask for what was found of all of them.

    Parameters
    ----------
    recording : Recording
    clock : ClockMap
    machine : Machine
    reach : Reach
    threads : int, optional
        As :func:`rxlab.follow.join.join`.
    """

    def __init__(
        self, recording: Recording, clock: ClockMap, machine: Machine, reach: Reach | None = None, *, threads: int = 2
    ) -> None:
        self._asked = {name for name, has_any in recording.asked.items() if has_any}
        refuse_without_packets(self._asked)
        # An event that was asked for and is not in a slab did not happen in it.
        self._blank = {name: event_columns({}, name) for name in recording.asked}
        self._recording, self._clock, self._machine = recording, clock, machine
        self._reach, self._threads = reach or Reach(), threads
        self._so_far = FlowsSoFar.nothing(recording.flows.n)
        self._earlier = Earlier(Fed.nothing(), recording.span[0])
        self._place: StampPlace | None = None
        self._is_placed, self._placed_by = False, 0
        self._known: Known | None = None
        self._held: Columns | None = None
        self._pieces = self._so_far.read
        self._old: dict[str, Columns] = {}
        self._chain = _SwitchChain()
        self._tally: Tally | None = None
        self._given_up, self._since = 0, recording.span[0]
        self._counted_rank = -1
        self._names: Columns | None = None
        self._cpus: dict[str, np.ndarray] = {}
        self._recorded = self._asked | ({CALLS} if self._asked.intersection(SUBSTITUTES[CALLS]) else set())
        self._setups: list[Columns] = []
        self._accepts: list[Columns] = []
        self._open_rows = np.empty(0, np.int64)
        self.drop_reasons = ["none"]

    def __iter__(self) -> Iterator[Rows]:
        """Yield the rows of each slab."""
        reach, earlier_until, held_back = self._reach, NAT, 0
        dense: dict[str, Columns] = {}
        waiting = _Waiting(self._recording.packets, self._clock)
        for slab in self._recording.events:
            fresh = as_on_newer_kernels(slab, self._asked)
            self._chain.take(fresh)
            self._note_names(event_columns(fresh, SWITCH))
            self._accepts.append(accept_returns(fresh))
            dense = _followed_by(dense, fresh)
            until = max((int(columns["time"][-1]) for columns in fresh.values() if columns.n), default=NAT)
            told_until = until - reach.ahead
            held_back += 1
            new = waiting.until(until)
            is_enough = min(event_columns(dense, RECEIVE).n, new.n) >= reach.first
            too_early = not self._is_placed and not is_enough and held_back < reach.patience
            if too_early or told_until <= earlier_until:
                waiting.put_back(new)
                continue
            earlier_until, held_back = told_until, 0
            yield self._step(dense, new, waiting, told_until, is_last=False)
            self._is_placed |= is_enough
            cut = self._earlier.rank
            dense = {name: c.take(slice(int(np.searchsorted(c["rank"], cut)), None)) for name, c in dense.items()}
        yield self._step(dense, waiting.until(FOREVER), waiting, FOREVER, is_last=True)

    def _step(
        self, dense: Mapping[str, Columns], new: Columns, waiting: _Waiting, told_until: int, *, is_last: bool
    ) -> Rows:
        """Join what is at hand and tell of the packets stamped before an instant."""
        part = self._part(dense, new)
        with side_threads(self._threads, sum(columns.n for columns in part.events.values())):
            followed = follow_part(part, self._clock, self._machine)
        if not self._is_placed and new.n >= self._placed_by:
            # Where no part has enough packets to tell where the stamps were taken, the one with the most does.
            self._place, self._placed_by = followed.pairs.place, new.n
        return self._tell(followed, part, waiting, told_until, is_last)

    def result(self) -> Joined:
        """Return what was found of all packets, as :func:`rxlab.follow.join.join` does, without their rows."""
        recording, tally, place = self._recording, self._tally, self._place
        if tally is None or place is None:
            raise ValueError("the slabs have not been joined: iterate first")
        clock = clock_told(self._clock, place, tally)
        gates, verdict, reasons = give_verdict(tally, clock, recording.lost, recording.damage)
        if self._given_up:
            verdict = "degraded" if verdict == "trusted" else verdict
            reasons.append(f"{self._given_up} packets waited for a reader longer than the join in slabs remembers them")
        none = np.empty((0, len(tally.coverage["expected"])))
        empty = none.astype(np.int64), none.astype(np.int16), Columns({})
        return Joined(*empty, recording.flows, tally.coverage, clock, gates, verdict, reasons)

    def accepted(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of completed handshakes and when accept() returned each; known when all slabs were seen."""
        setups, calls = _all_of(self._setups), _all_of(self._accepts)
        return setups["row"], accept_times(setups["ready"], setups["socket"], setups["tid"].astype(np.int64), calls)

    def _note_names(self, switch: Columns) -> None:
        """Keep the last switch to each task: it has the name the task had last."""
        if switch.n:
            names = Columns({name: switch[name] for name in ("rank", "next_pid", "next_comm")})
            names = names if self._names is None else self._names.followed_by(names)
            self._names = names.take(np.flatnonzero(last_of_group(names["next_pid"])))

    def _part(self, dense: Mapping[str, Columns], new: Columns) -> Part:
        """Return the part of the recording that is at hand: events, the packets held, and new ones."""
        recording, known = self._recording, self._known
        hidden, lossy, unseen, blind = combine_windows(recording.lost_windows, self._chain.windows(self._since))
        received = new
        if self._held is not None and known is not None:
            received = self._held.followed_by(new)
            order = np.argsort(received["row"], kind="stable")
            received, no, none = received.take(order), np.zeros(new.n, bool), np.full(new.n, -1, np.int64)
            blanks: tuple[np.ndarray, ...] = (none - 1, no, no, none, no, no, no, none.astype(np.int16), no, no)
            known = Known(
                known.path,
                *(np.concatenate((old, blank))[order] for old, blank in zip(known.of_packets(), blanks, strict=True)),
            )
        return Part(
            _followed_by(_followed_by(self._blank, self._old), dense), self._recorded, recording.span, received, hidden, lossy, unseen,
            blind, self._so_far, self._earlier, self._place if self._is_placed else None, known, self._pieces, self._cpus_seen(dense),
        )  # fmt: skip

    def _cpus_seen(self, events: Mapping[str, Columns]) -> dict[str, np.ndarray]:
        """Return on which CPUs each event was seen so far, those of `events` among them."""
        for name, columns in events.items():
            self._cpus[name] = np.union1d(self._cpus.get(name, columns["cpu"][:0]), columns["cpu"])
        return self._cpus

    def _tell(self, followed: Followed, part: Part, waiting: _Waiting, told_until: int, is_last: bool) -> Rows:
        """Return the rows that this slab tells of, count them, and keep what the next one needs."""
        n, evidence, known = followed.columns.n, followed.evidence, part.known
        counted = np.zeros(n, bool) if known is None else known.is_counted
        is_freed = (evidence.freed[0] > 0) & ~followed.pairs.is_uncertain | (False if known is None else known.is_freed)
        told = counted | (evidence.stamp < told_until) | is_last
        was_open = counted & self._was_open(part)
        is_open = told & (was_open | ~counted) & open_packets(followed, told, is_freed)
        since = told_until - self._reach.back
        known_rank = np.full(n, -1, np.int64) if known is None else known.call_rank
        kept = keep_packets(followed, told, is_open, known_rank, since, self._reach.most)
        over = told & (was_open | ~counted) & ~(is_open & kept.stays & (not is_last))
        self._given_up += int((over & is_open).sum()) if not is_last else 0
        self._count(followed, over, told & ~counted, kept.stays | ~told, told_until, is_last)
        if not is_last:
            self._carry(followed, part, kept, is_freed, told, told_until)
            waiting.put_back(part.received.take(np.flatnonzero(~told)))
        rows = np.flatnonzero(over | (told & ~counted))
        packets = followed.columns.take(rows)
        ready = followed.rows.rank[rows, STAGE_INDEX["data_ready"]]
        acks = np.flatnonzero(packets["handshake"] == COMPLETES)
        setups = Columns({name: packets[name] for name in ("row", "socket", "tid")}).with_columns(ready=ready)
        self._setups.append(setups.take(acks))
        words = packets.attrs["categories"]["drop_reason"]
        self.drop_reasons += [word for word in words if word not in self.drop_reasons]
        code = np.array([self.drop_reasons.index(word) for word in words], np.int16)
        packets = packets.with_columns(drop_reason=code[packets["drop_reason"]])
        return Rows(packets["row"], followed.rows.time[rows], followed.rows.cpu[rows], packets)

    def comm_of(self, tid: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return the code of each task's name, -1 where unknown, and the names; known when all slabs were seen."""
        return comm_of({} if self._names is None else {SWITCH: self._names}, tid)

    def _was_open(self, part: Part) -> np.ndarray:
        """Tell which of the packets at hand were held because their reader may still come."""
        return (
            np.isin(part.received["row"], self._open_rows)
            if self._held is not None
            else np.zeros(part.received.n, bool)
        )

    def _count(
        self, followed: Followed, over: np.ndarray, new: np.ndarray, stays: np.ndarray, told_until: int, is_last: bool
    ) -> None:
        """Add the packets that are over, the copies and the blind windows of this slab to the tally."""
        taken = followed.evidence.taken
        fresh = (taken.copied_from >= 0) & (taken.copies["rank"] > self._counted_rank)
        told = fresh & ((taken.copies["time"] < told_until) | is_last)
        if told.any():
            self._counted_rank = int(taken.copies["rank"][told].max())
        # Copies from packets that leave are not linked again.
        copies = told | (fresh & ~pick(stays, taken.copied_from, True))
        blind = combine_windows(self._recording.lost_windows, self._chain.take_new())[-1]
        tally = Tally.of(followed, self._recording.flows, over, new, copies, blind)
        if self._tally is None:
            self._tally = tally
        else:
            self._tally.add(tally)

    def _carry(
        self, followed: Followed, part: Part, kept: Kept, is_freed: np.ndarray, told: np.ndarray, told_until: int
    ) -> None:
        """Keep what the next slab needs of this one."""
        evidence, columns, since = followed.evidence, followed.columns, told_until - self._reach.back
        taken, fed, leaving = evidence.taken, self._earlier.fed, told & ~kept.stays
        fresh = told & ~(np.zeros(columns.n, bool) if part.known is None else part.known.is_counted)
        fed_rows = np.flatnonzero(fresh & (taken.fed > 0))
        flow = columns["flow"][fed_rows]
        port = self._recording.flows["dport"][flow] if len(flow) else flow
        fed = fed.with_datagrams(flow, taken.fed[fed_rows], port, columns["row"][fed_rows])
        calls = taken.receives
        largest = 0
        if calls.n:
            mine = (calls["protocol"] != 6) & ((calls["flags"] & MSG_PEEK) == 0)
            largest = int(calls["ret"][mine].max(initial=0))
        left = np.union1d(fed.left, taken.socket[leaving & (taken.socket > 0)])
        fed = replace(
            fed, left=left, behind=fed.behind + int((fresh & taken.is_silent).sum()), largest=max(fed.largest, largest)
        )
        cut = _rank_at(part.events, since)
        self._old = carried_events(part.events, followed, kept, cut, left)
        self._known = carried_packets(followed, kept, is_freed)
        rows = np.flatnonzero(kept.stays)
        self._held = part.received.take(rows)
        self._open_rows = self._held["row"][kept.is_open[rows]]
        is_read = told & (taken.receive >= 0)
        self._so_far.raise_to(columns, leaving, is_read)
        mine = leaving & (columns["proto"] == 6) & columns["is_data"] & ~is_freed & (columns["flow"] >= 0)
        self._pieces = last_pieces(pieces_with(self._pieces, columns, np.flatnonzero(mine)))
        self._earlier = Earlier(fed, self._recording.span[0], cut)
        self._since = since


class _Waiting:
    """The captured packets that no slab has told of."""

    def __init__(self, pieces: Iterable[Columns], clock: ClockMap) -> None:
        self._pieces, self._clock = iter(pieces), clock
        self._packets: Columns | None = None

    def until(self, time: int) -> Columns:
        """Take out the packets stamped before an instant of CLOCK_MONOTONIC. A capture is in order but for stalls."""
        while self._packets is None or self._last_stamp() <= time + STALL_NS:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._packets = piece if self._packets is None else self._packets.followed_by(piece)
        packets = self._packets
        assert packets is not None, "a capture has packets"
        is_due = self._clock.to_monotonic(packets["time"]) <= time
        self._packets = packets.take(np.flatnonzero(~is_due))
        return packets.take(np.flatnonzero(is_due))

    def put_back(self, packets: Columns) -> None:
        """Return packets that the next slab is to tell of."""
        self._packets = packets if self._packets is None else packets.followed_by(self._packets)

    def _last_stamp(self) -> int:
        assert self._packets is not None
        return int(self._clock.to_monotonic(self._packets["time"][-1:]).max(initial=NAT))


class _SwitchChain:
    """The blind windows of a recording, found slab by slab."""

    def __init__(self) -> None:
        self._last: Columns | None = None
        self._recent = self._new = np.empty((0, 4), np.int64)

    def take(self, events: Mapping[str, Columns]) -> None:
        """Look at the switches of the next slab."""
        switch = event_columns(events, SWITCH)
        if not switch.n:
            return
        if self._last is not None:
            switch = self._last.followed_by(switch)
        found = blind_windows({SWITCH: switch})
        self._recent, self._new = np.concatenate((self._recent, found)), np.concatenate((self._new, found))
        self._last = switch.take(np.flatnonzero(last_of_group(switch["cpu"])))

    def windows(self, since: int) -> np.ndarray:
        """Return the windows that reach beyond a while before an instant, and forget the others."""
        self._recent = self._recent[self._recent[:, 3] >= since - STALL_NS]
        return self._recent

    def take_new(self) -> np.ndarray:
        """Return the windows found since last asked."""
        new, self._new = self._new, np.empty((0, 4), np.int64)
        return new


def _all_of(parts: list[Columns]) -> Columns:
    """Return the rows of all parts."""
    return Columns({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _followed_by(events: Mapping[str, Columns], later: Mapping[str, Columns]) -> dict[str, Columns]:
    """Return the events of both, those of each kind one after the other."""
    both = dict(events)
    for name, columns in later.items():
        both[name] = both[name].followed_by(columns) if name in both and both[name].n else columns
    return both


def _rank_at(events: Mapping[str, Columns], time: int) -> int:
    """Return the rank of the first event from an instant on."""
    ranks = [int(c["rank"][at]) for c in events.values() if (at := int(np.searchsorted(c["time"], time))) < c.n]
    return min(ranks, default=FOREVER)


def join_in_slabs(
    recording: Recording,
    clock: ClockMap,
    machine: Machine,
    reach: Reach | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Joined:
    """Join a recording slab by slab.

    Parameters
    ----------
    recording : Recording
    clock : ClockMap
    machine : Machine
    reach : Reach, optional
    folder : path-like, optional
        Where the rows are kept (:class:`rxlab.follow.rowtable.RowTable`), None: in memory.
    """
    slabs, table = SlabJoin(recording, clock, machine, reach), RowTable(recording.n_packets, folder)
    for part in slabs:
        table.write(part.row, {"stage_time": part.time, "stage_cpu": part.cpu, **part.packets})
    joined, rows = slabs.result(), slice(None)
    comm, comms = slabs.comm_of(table.columns["tid"])
    table.write(rows, {"comm": comm})
    if joined.verdict == REFUSED:
        table.write(rows, {"trusted": np.zeros(recording.n_packets, bool)})
    row, accepted = slabs.accepted()
    table.write(row, {"accept_time": accepted})
    time, cpu = table.columns.pop("stage_time"), table.columns.pop("stage_cpu")
    packets = Columns(table.columns, {"categories": {"comm": comms, "drop_reason": slabs.drop_reasons}})
    return replace(joined, time=time, cpu=cpu, packets=packets)
