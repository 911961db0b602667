"""The verdict on a join: gates that need no oracle, and whether the run is trusted, degraded or refused.

What the gates count is a sum over packets, so the parts of a recording are counted one by one and added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from rxlab.follow import gates
from rxlab.follow.asof import pick
from rxlab.follow.clockfit import NAT, RESIDUAL_QUANTILES, ClockMap
from rxlab.follow.consumption import Consumption
from rxlab.follow.pairing import StampPlace
from rxlab.follow.parts import Followed
from rxlab.follow.stagetrust import doubt_text, doubtful_stages
from rxlab.follow.status import FLAGGED, NOT_COUNTED, TCP, UDP, Evidence, has_status, pieces_with
from rxlab.follow.together import beside
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_INDEX, STATUSES

MAX_FLAGGED = 0.01
# Of a run with this verdict no row is trusted: a pair that looks certain rests on the same map of clocks as those that are not there.
REFUSED = "refused"
# tcpdump runs a little longer than perf: some of a live capture's packets always lie outside.
MAX_OUTSIDE = 0.25


@dataclass
class Tally:
    """Sums over packets, by which a join is judged.

    Attributes
    ----------
    counts : dict of str to int
        ``data`` packets, those ``counted``, ``flagged``, ``matched``, ``excused`` (not matched: perf says that it lost events there),
        ``outside``, ``in_doubt``, ``contested`` (:class:`rxlab.follow.consumption.Consumption`); those of any that are flagged
        (``doubted``) and have a ``certain`` reader all the same; and violations by gate.
    coverage : Columns, dims (stage,)
    on_wire, copied : int64 arrays, dims (flow,)
        Stream bytes of packets called consumed, and bytes that copies moved from their skbs.
    is_tcp : bool array, dims (flow,)
    residual : pair of int64 arrays
        Distances (ns) of stamps from where they were expected, in order, and how many packets had each.
    blind : int64 array, dims (window, 4)
    blind_tasks : dict of str to int
        Tasks whose running opened blind windows.
    """

    counts: dict[str, int]
    coverage: Columns
    on_wire: np.ndarray
    copied: np.ndarray
    is_tcp: np.ndarray
    residual: tuple[np.ndarray, np.ndarray]
    blind: np.ndarray
    blind_tasks: dict[str, int]

    @classmethod
    def of(
        cls,
        followed: Followed,
        flows: Columns,
        mine: np.ndarray,
        new: np.ndarray,
        copies: np.ndarray,
        blind: np.ndarray,
    ) -> Tally:
        """Count some packets of a part, the stamps of those that are `new`, some of its copies (masks) and blind windows."""
        evidence, columns = followed.evidence, followed.columns
        taken, residual = evidence.taken, followed.pairs.residual[new]
        coverage = beside(_coverage, followed, mine)
        status = columns["status"]
        data = mine & columns["is_data"]
        counted, flagged = data & ~has_status(status, NOT_COUNTED), has_status(status, FLAGGED)
        masks = {
            "data": data,
            "counted": counted,
            "flagged": counted & flagged,
            "matched": counted & (evidence.matched.event >= 0),
            "excused": counted & (evidence.matched.event < 0) & has_status(status, ("lost",)),
            "outside": data & has_status(status, ("outside_window",)),
            "doubted": data & flagged,
            "certain": data & flagged & columns["trusted"],
            "in_doubt": mine & taken.anchors_disagree,
            "contested": mine & taken.is_contested & has_status(status, ("ambiguous",)),
            "order": mine & has_status(status, ("negative",)),
            "ports": mine & _wrong_ports(columns, flows, evidence),
            "calls": mine & _misfit_calls(columns, taken, evidence.largest_call),
            "causal": mine & _late_stamps(followed),
        }
        consumed = mine & followed.rows.seen("recvmsg") & (columns["payload_len"] > 0) & (columns["proto"] == TCP)
        from_flow = pick(columns["flow"], taken.copied_from, -1)[copies]
        moved = taken.copies["len"][copies][from_flow >= 0] if len(from_flow) else None
        return cls(
            {name: int(mask.sum()) for name, mask in masks.items()},
            coverage(),
            _new_bytes(columns, np.flatnonzero(consumed & (columns["flow"] >= 0)), evidence.so_far.read, flows.n),
            np.bincount(from_flow[from_flow >= 0], weights=moved, minlength=flows.n).astype(np.int64),
            flows["proto"] == TCP,
            _counted(residual[residual != NAT]),
            blind,
            gates.blind_tasks(evidence.events, blind),
        )

    def add(self, other: Tally) -> None:
        """Add what another part counted."""
        for name, count in other.counts.items():
            self.counts[name] += count
        self.coverage = Columns({name: self.coverage[name] + other.coverage[name] for name in self.coverage})
        self.on_wire, self.copied = self.on_wire + other.on_wire, self.copied + other.copied
        values = np.concatenate((self.residual[0], other.residual[0]))
        found, inverse = np.unique(values, return_inverse=True)
        weights = np.concatenate((self.residual[1], other.residual[1]))
        self.residual = found, np.bincount(inverse, weights=weights, minlength=len(found)).astype(np.int64)
        self.blind = np.concatenate((self.blind, other.blind))
        for task, count in other.blind_tasks.items():
            self.blind_tasks[task] = self.blind_tasks.get(task, 0) + count

    def quantile(self, q: float) -> float:
        """Return a quantile of the residuals, by linear interpolation."""
        values, counts = self.residual
        last = np.cumsum(counts) - 1
        at = q * float(last[-1])
        low, high = (values[np.searchsorted(last, edge)] for edge in (np.floor(at), np.ceil(at)))
        return float(low + (high - low) * (at - np.floor(at)))


def _counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that occur, in order, and how often; few of many: by hashing."""
    codes, found = pd.factorize(values)
    order = np.argsort(found)
    return found[order], np.bincount(codes, minlength=len(found))[order]


def clock_told(clock: ClockMap, place: StampPlace, tally: Tally) -> ClockMap:
    """Return the clock map with where the stamps were taken, and how far they lay from their events."""
    quantiles = {q: tally.quantile(q) for q in RESIDUAL_QUANTILES} if len(tally.residual[0]) else {}
    return replace(clock, stamp_position=place.position, stamp_evidence=place.evidence, residual=quantiles)


def _new_bytes(columns: Columns, rows: np.ndarray, before: Columns, n_flows: int) -> np.ndarray:
    """Return for each flow how many bytes of its stream some packets brought beyond the pieces counted before."""
    after = pieces_with(before, columns, rows)
    # Exact: sums of integers below 2**53.
    sums = [np.bincount(p["flow"], weights=p["end"] - p["begin"], minlength=n_flows) for p in (after, before)]
    return (sums[0] - sums[1]).astype(np.int64)


def _coverage(followed: Followed, mine: np.ndarray) -> Columns:
    """Count per stage: expected, seen, and why the rest is missing."""
    required, time, columns = followed.required, followed.rows.time, followed.columns
    if not mine.all():
        required, time, columns = required[mine], time[mine], columns.take(mine)
    seen, status = time != NAT, columns["status"]
    missing = required & ~seen
    why = np.stack(
        [np.bincount(status[missing[:, stage]], minlength=len(STATUSES)) for stage in range(missing.shape[1])], axis=1
    )
    counts = {
        "expected": required.sum(axis=0),
        "matched": (required & seen).sum(axis=0),
        "seen": seen.sum(axis=0),
        **dict(zip(STATUSES, why, strict=True)),
        "doubtful": doubtful_stages(required, time, columns),
    }
    return Columns({name: count.astype(np.int64) for name, count in counts.items()})


def give_verdict(
    tally: Tally, clock: ClockMap, lost: int, damage: tuple[str, ...] = ()
) -> tuple[dict[str, Any], str, list[str]]:
    """Return the gates, the verdict and its reasons.

    Parameters
    ----------
    tally : Tally
    clock : ClockMap
    lost : int
        Events perf reported as lost.
    damage : tuple of str
        What is known to be missing from the files themselves: a capture or a recording that was cut.
    """
    counts, windows = tally.counts, tally.blind
    n, flagged = counts["counted"], counts["flagged"]
    fraction = float(flagged / n) if n else 0.0
    told: dict[str, Any] = {
        "order": _violations(counts["order"]),
        "ports": _violations(counts["ports"]),
        # Rows whose stream or queue position is in doubt are flagged each; only many of them say that the run is.
        "anchors": {
            "ok": counts["in_doubt"] <= MAX_FLAGGED * n,
            "violations": counts["in_doubt"],
            "contested": counts["contested"],
        },
        "calls": _violations(counts["calls"]),
        "bytes": gates.byte_sums(tally.on_wire, tally.copied, tally.is_tcp),
        "lost": _violations(lost),
        # What the fit says of itself: a floor too sparse to carry it, a stamp whose place cannot be known.
        "clock": {**_violations(len(clock.flags)), "flags": list(clock.flags)},
        "causal": _violations(counts["causal"]),
        "blind": {
            "ok": True,
            "violations": len(windows),
            "window_ns": int((windows[:, 3] - windows[:, 2]).sum()),
            "tasks": dict(sorted(tally.blind_tasks.items(), key=lambda item: -item[1])),
        },
        # More than the edges of a run says that perf stopped.
        "window": {"ok": counts["outside"] <= MAX_OUTSIDE * counts["data"], "violations": counts["outside"]},
        # A software stamp is taken inside netif_rx or at the tap. One that is neither is not this capture's clock.
        "stamp": _violations(int(clock.method == "readings" and clock.stamp_position == "nic")),
        "flagged": {"ok": fraction <= MAX_FLAGGED, "violations": flagged, "fraction": fraction},
    }
    if not n:
        verdict, reasons = REFUSED, ["no data packets were received while perf was recording"]
    elif clock.stamp_position == "unknown" or counts["matched"] < max(0.5 * (n - counts["excused"]), 1):
        verdict = REFUSED
        reasons = ["fewer than half of the captured data packets were found in the kernel's events"]
        if counts["excused"]:
            reasons[0] += f", and {counts['excused']} of them are excused by losses that perf reported"
    else:
        failed = [name for name, gate in told.items() if not gate["ok"]]
        verdict = "degraded" if failed or damage else "trusted"
        reasons = [f"{name}: {told[name]['violations']} violations" for name in failed]
    if verdict == "degraded" and counts["contested"]:
        reasons.append(
            f"{counts['contested']} datagrams may be either's of several readers of their socket, whose calls overlapped"
        )
    if verdict == "degraded":
        reasons += doubt_text(counts["doubted"], counts["certain"], tally.coverage)
    return told, verdict, reasons + list(damage)


def _violations(count: int) -> dict[str, Any]:
    return {"ok": count == 0, "violations": count}


def _late_stamps(followed: Followed) -> np.ndarray:
    """Tell which NIC stamps come after the first event of their own packet: a wrong pair, or a clock beyond its bound."""
    evidence = followed.evidence
    nic = followed.rows.time[:, STAGE_INDEX["nic"]]
    first = pick(evidence.path.first_event(), evidence.matched.event, NAT)
    return (nic != NAT) & (nic > first + evidence.clock.bound_ns)


def _wrong_ports(columns: Columns, flows: Columns, evidence: Evidence) -> np.ndarray:
    """Tell which TCP packets' tcp_probe names other ports than the packet has; sport is the local socket's.

    A packet that the host forwarded to itself may have been given others on the way (a published container port: DNAT).
    """
    flow, skb, path = columns["flow"], evidence.matched.event, evidence.path
    local, peer = pick(path.columns["sport"], skb, -1), pick(path.columns["dport"], skb, -1)
    seen = (local >= 0) & (flow >= 0) & (skb >= 0) & (pick(path.columns["devices"], skb, 0) == 0)
    return seen & ((pick(flows["dport"], flow, 0) != local) | (pick(flows["sport"], flow, 0) != peer))


def _misfit_calls(packets: Columns, taken: Consumption, largest: int) -> np.ndarray:
    """Tell which packets are joined to a call that does not fit them: a datagram's length, a segment's copies, the order of both.

    A copy belongs to the call that follows it in its task, a call returns one datagram, and a stream is copied in its order.
    """
    claimed = taken.receive >= 0
    if not taken.receives.n:
        return claimed
    returned = pick(taken.receives["ret"], taken.receive, 0).astype(np.int64)
    is_udp, length = claimed & (packets["proto"] == UDP), packets["payload_len"]
    # A short buffer cuts datagrams to its own size, the largest that any call returns.
    misfit = is_udp & ((returned > length) | ((returned < length) & (returned < returned[is_udp].max(initial=largest))))
    packets_of = np.bincount(taken.receive[is_udp], minlength=taken.receives.n + 1)
    misfit |= is_udp & (packets_of[taken.receive] > 1)
    copied = claimed & (taken.last_copy >= 0) & ~taken.anchors_disagree
    misfit |= copied & (pick(taken.copies["call"], taken.last_copy, -1) != taken.receive)
    rows = np.flatnonzero(copied & (taken.first_copy >= 0))
    rows = rows[np.lexsort((packets["position"][rows], packets["flow"][rows]))]
    rank = pick(taken.copies["rank"], taken.first_copy[rows], -1)
    back = (packets["flow"][rows][1:] == packets["flow"][rows][:-1]) & (rank[1:] < rank[:-1])
    misfit[rows[1:][back]] = True
    misfit[rows[:-1][back]] = True
    return misfit
