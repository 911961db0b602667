"""Record one scenario and hold its join against every judge there is: one row of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scenarios import MSS, Scenario, record, witness_of
from witness import Seen, judge

from rxlab.dataset.run import Run, open_run
from rxlab.follow.clockfit import NAT
from rxlab.follow.join import Joined
from rxlab.follow.status import NOT_COUNTED
from rxlab.follow.verify import calls_of_packets, read_app_log, verify_join
from rxlab.host.journal import Transaction
from rxlab.rundir import APP_LOG
from rxlab.stages import ATTRIBUTIONS, READER_KINDS, STATUSES

# Readers whose every receive call waits for a message, and takes it whole.
BLOCKING = ("builtin", "recvfrom", "read", "readv", "recvmsg")
LABELLED = 0.9  # share of the trusted packets whose way of reading is said: not near windows of loss
HIDDEN = ("blind", "lost")  # perf did not deliver their events, and the run says so


@dataclass
class Row:
    """What the judges said of one run.

    Attributes
    ----------
    packets, frames : int
        Data packets that a reader could have had, and all received frames.
    complete, hidden, flagged, checked, misjoined : int
        Data packets followed to the reader; not shown by perf; not trusted for another cause; compared with the truth; joined
        to another call than the truth, or called dropped although they were read.
    contested : int
        Of those not trusted: may be either's of several readers of one socket.
    excluded : int
        Frames of any kind that perf did not show.
    lost_share : float
        Events that perf says it could not deliver, of all.
    blind_tasks : dict
        Names of the tasks during which perf delivered nothing, and how often.
    witness : dict
        Of bpftrace, where it watched.
    failures : list of str
        What any judge holds against the run.
    """

    scenario: str
    state: str
    path: Path
    packets: int = 0
    frames: int = 0
    complete: int = 0
    hidden: int = 0
    excluded: int = 0
    flagged: int = 0
    contested: int = 0
    checked: int = 0
    misjoined: int = 0
    verdict: str = ""
    lost_share: float = 0.0
    blind_tasks: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    witness: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def draw(scenario: Scenario, state: str, out: Path, packets: int, journal: Transaction, **options: Any) -> Row:
    """Record one run and judge it."""
    recorded = record(scenario, state, out, packets, journal, **options)
    row = judged(scenario, state, out)
    row.failures += recorded.run["problems"]
    return row


def judged(scenario: Scenario, state: str, out: Path) -> Row:
    """Judge a recorded run."""
    run = open_run(out)
    joined, numbers = run.joined, run._messages()
    assert numbers is not None
    seen = Seen(witness_of(out)) if scenario.witness else None
    if run.rundir.has(APP_LOG):
        log = read_app_log(run.rundir.file(APP_LOG))
    else:
        assert seen is not None, "no log and no witness: nobody knows the truth"
        log = seen.app_log()
    counters = run.counters.get("difference")
    result = verify_join(joined, log, messages=numbers, counters=counters, events=run.perf.events)
    names = np.asarray(STATUSES)[joined.packets["status"]]
    row = Row(scenario.name, state, out, packets=result["data_packets"], frames=joined.packets.n)
    counted = joined.packets["is_data"] & ~np.isin(names, NOT_COUNTED)
    row.complete, row.statuses = int((counted & (names == "complete")).sum()), result["statuses"]
    row.excluded = int(np.isin(names, HIDDEN).sum())
    row.hidden = int((counted & np.isin(names, HIDDEN)).sum())
    row.flagged = result["flagged"] - row.hidden
    row.contested = joined.gates["anchors"]["contested"]
    row.checked, row.misjoined, row.verdict = result["checked"], result["misjoined"] or 0, result["verdict"]
    row.lost_share, row.blind_tasks = lost_share(run), joined.gates["blind"].get("tasks", {})
    if scenario.proto == "udp":  # a datagram called dropped was looked for in the log too
        row.checked += int(((names == "dropped") & joined.packets["is_data"] & (numbers >= 0)).sum())
    if seen is not None:
        truth = numbers if scenario.proto == "udp" else joined.packets["seq"].astype(np.int64)
        row.witness = judge(joined, run.perf.events, seen, truth)
    row.failures += list(held_against(row, result))
    row.failures += labels_against(scenario, joined, log, calls_of_packets(joined, log, numbers))
    return row


def held_against(row: Row, result: dict[str, Any]) -> list[str]:
    """Return what is wrong with a run, whatever was recorded of it."""
    scm, counters = result["scm_minus_pcap_ns"], result["counters_agree"]
    wrong = {
        f"{row.misjoined} mis-joined": row.misjoined > 0,
        f"witness: {row.witness}": any(row.witness.get(name, 0) for name in ("links_wrong", "copies_wrong")),
        "byte sums differ": not result["byte_sums_equal"] and not row.hidden and not row.flagged,
        f"counters: {counters}": counters is not None and not counters["ok"],
        f"SCM_TIMESTAMPNS: {scm}": scm is not None and scm["equal"] != scm["n"],
    }
    return [reason for reason, holds in wrong.items() if holds]


def labels_against(scenario: Scenario, joined: Joined, log: np.ndarray, call: np.ndarray) -> list[str]:
    """Return what is wrong with how the readers are said to have read, and to have slept before, by their own log."""
    packets = joined.packets
    told = np.asarray(READER_KINDS)[packets["reader_kind"][packets["trusted"]]]
    other = "syscall" if scenario.reader == "io_uring" else "io_uring"
    found = [f"{int((told == other).sum())} of {len(told)} read by {other}"] if (told == other).any() else []
    right = "io_uring" if scenario.reader == "io_uring" else "syscall"
    if (told == right).mean() < LABELLED:
        found.append(f"{int((told == right).sum())} of {len(told)} said to be read by {right}")
    if scenario.reader in BLOCKING and scenario.size < MSS:
        # A blocking reader sleeps inside the call that returned the packet that woke it.
        own = packets["attribution"] == ATTRIBUTIONS.index("own_wake")
        rows = np.flatnonzero(own & packets["trusted"] & (call >= 0) & (packets["sleep_time"] != NAT))
        asleep, truth = packets["sleep_time"][rows], log[call[rows]]
        outside = int(((asleep < truth["t0"]) | (asleep > truth["t1"])).sum())
        found += [f"{outside} of {len(rows)} slept outside their call"] if outside else []
    return found


def lost_share(run: Run) -> float:
    """Return which share of the events perf could not deliver."""
    lost = int(run.perf.meta.get("lost", 0) or sum(run.perf.lost["count"].tolist()))
    delivered = sum(columns.n for columns in run.perf.events.values())
    return lost / (lost + delivered) if lost else 0.0
