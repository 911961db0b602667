"""The verdict on a join: gates that need no oracle, and whether the run is trusted, degraded or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rxlab.follow import gates
from rxlab.follow.asof import pick
from rxlab.follow.clockfit import NAT
from rxlab.follow.consumption import Consumption
from rxlab.follow.kernelpath import KernelPath
from rxlab.follow.stagetrust import doubt_text
from rxlab.follow.status import FLAGGED, NOT_COUNTED, TCP, UDP, Evidence
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_INDEX, STATUSES

if TYPE_CHECKING:
    from rxlab.follow.join import Joined

MAX_FLAGGED = 0.01
# tcpdump runs a little longer than perf: some of a live capture's packets always lie outside.
MAX_OUTSIDE = 0.25


def give_verdict(joined: Joined, evidence: Evidence) -> None:
    """Fill gates, verdict and reasons."""
    columns, taken, matched = joined.packets, evidence.taken, evidence.matched
    names = np.asarray(STATUSES)[columns["status"]]
    counted = columns["is_data"] & ~np.isin(names, NOT_COUNTED)
    flagged = counted & np.isin(names, FLAGGED)
    n, in_doubt = int(counted.sum()), int(taken.anchors_disagree.sum())
    windows = evidence.blind
    consumed = (joined.time[:, STAGE_INDEX["recvmsg"]] != NAT) & (columns["payload_len"] > 0)
    fraction = float(flagged.sum() / n) if n else 0.0
    joined.gates = {
        "order": _violations(int((names == "negative").sum())),
        "ports": _violations(_wrong_ports(joined, evidence.path, matched.event)),
        # Rows whose stream or queue position is in doubt are flagged each; only many of them say that the run is.
        "anchors": {"ok": in_doubt <= MAX_FLAGGED * n, "violations": in_doubt},
        "calls": _violations(_misfit_calls(columns, taken)),
        "bytes": gates.byte_sums(columns, consumed, columns["proto"] == TCP, taken.bytes_copied),
        "lost": _violations(evidence.lost),
        # What the fit says of itself: a floor too sparse to carry it, a stamp whose place cannot be known.
        "clock": {**_violations(len(joined.clock.flags)), "flags": list(joined.clock.flags)},
        "causal": _violations(_late_stamps(joined, evidence)),
        "blind": {
            "ok": True,
            "violations": len(windows),
            "window_ns": int((windows[:, 3] - windows[:, 2]).sum()),
            "tasks": gates.blind_tasks(evidence.events, windows),
        },
        "window": _window_gate(columns["is_data"], names),
        # A software stamp is taken inside netif_rx or at the tap. One that is neither is not this capture's clock.
        "stamp": _violations(int(joined.clock.method == "readings" and joined.clock.stamp_position == "nic")),
        "flagged": {"ok": fraction <= MAX_FLAGGED, "violations": int(flagged.sum()), "fraction": fraction},
    }
    if not n:
        joined.verdict, joined.reasons = "refused", ["no data packets were received while perf was recording"]
    elif joined.clock.stamp_position == "unknown" or (matched.event[counted] >= 0).mean() < 0.5:
        joined.verdict = "refused"
        joined.reasons = ["fewer than half of the captured data packets were found in the kernel's events"]
    else:
        failed = [name for name, gate in joined.gates.items() if not gate["ok"]]
        joined.verdict = "degraded" if failed or evidence.damage else "trusted"
        joined.reasons = [f"{name}: {joined.gates[name]['violations']} violations" for name in failed]
    if joined.verdict == "degraded":
        joined.reasons += doubt_text(columns, joined.coverage, joined.verdict)
    joined.reasons += evidence.damage


def _window_gate(is_data: np.ndarray, names: np.ndarray) -> dict[str, Any]:
    """Judge how many data packets came while perf was not recording: more than the edges of a run says it stopped."""
    outside = int((is_data & (names == "outside_window")).sum())
    return {"ok": outside <= MAX_OUTSIDE * int(is_data.sum()), "violations": outside}


def _late_stamps(joined: Joined, evidence: Evidence) -> int:
    """Count NIC stamps that come after the first event of their own packet: a wrong pair, or a clock beyond its bound."""
    nic, skb = joined.time[:, STAGE_INDEX["nic"]], evidence.matched.event
    first = pick(evidence.path.first_event(), skb, NAT)
    return int(((nic != NAT) & (nic > first + evidence.clock.bound_ns)).sum())


def _violations(count: int) -> dict[str, Any]:
    return {"ok": count == 0, "violations": count}


def _wrong_ports(joined: Joined, path: KernelPath, skb: np.ndarray) -> int:
    """Count TCP packets whose tcp_probe names other ports than the packet has; sport is the local socket's."""
    flow = joined.packets["flow"]
    local, peer = pick(path.columns["sport"], skb, -1), pick(path.columns["dport"], skb, -1)
    seen = (local >= 0) & (flow >= 0) & (skb >= 0)
    row = np.maximum(flow, 0)
    if not joined.flows.n:
        return 0
    wrong = (joined.flows["dport"][row] != local) | (joined.flows["sport"][row] != peer)
    return int((wrong & seen).sum())


def _misfit_calls(packets: Columns, taken: Consumption) -> int:
    """Count packets whose call does not fit them: a datagram's length, a segment's copies, the order of both.

    A copy belongs to the call that follows it in its task, a call returns one datagram, and a stream is copied in its order.
    """
    claimed = taken.receive >= 0
    returned = pick(taken.receives["ret"].astype(np.int64), taken.receive, 0)
    is_udp, length = claimed & (packets["proto"] == UDP), packets["payload_len"]
    # A short buffer cuts datagrams to its own size, the largest that any call returns.
    misfit = is_udp & ((returned > length) | ((returned < length) & (returned < returned[is_udp].max(initial=0))))
    calls, count = np.unique(taken.receive[is_udp], return_counts=True)
    misfit |= is_udp & np.isin(taken.receive, calls[count > 1])
    copied = claimed & (taken.last_copy >= 0) & ~taken.anchors_disagree
    misfit |= copied & (pick(taken.copies["call"], taken.last_copy, -1) != taken.receive)
    rows = np.flatnonzero(copied & (taken.first_copy >= 0))
    rows = rows[np.lexsort((packets["position"][rows], packets["flow"][rows]))]
    rank = pick(taken.copies["rank"], taken.first_copy[rows], -1)
    back = (packets["flow"][rows][1:] == packets["flow"][rows][:-1]) & (rank[1:] < rank[:-1])
    misfit[rows[1:][back]] = True
    misfit[rows[:-1][back]] = True
    return int(misfit.sum())
