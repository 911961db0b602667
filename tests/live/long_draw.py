"""The long draw: every scenario in every RPS state with at least 20,000 checked packets, summed up as one table.

    sudo .venv/bin/python tests/live/long_draw.py OUT [--seconds S] [--only TEXT] [--state STATE] [--packets N]
    sudo .venv/bin/python tests/live/long_draw.py OUT --lossy

The first takes a quarter of an hour on two quiet cores (a hundred runs, 21 minutes in recording and 1 in judging where other work
kept both cores busy), the second two minutes. Each recording is judged before the next one is made (a judge beside it would take
a core from the traffic), its row goes to OUT/rows.jsonl, and it is removed if no judge holds anything against it and it is complete. What brought too few checked packets is recorded again, as often and as long as it
needs. A second call goes on where the first one stopped; ``--seconds`` ends it after that long.

``--lossy``: perf's ring buffers are so small that it loses events. Then no run may be trusted, and of the packets still trusted
hardly one be wrong; drawn until 300,000 of them were checked.

Ends with status 1 where something falls short, and says what.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from judging import Row, judged
from scenarios import SCENARIOS, Scenario, record, witness_of

from rxlab.errors import RxlabError
from rxlab.host.journal import Transaction, apply
from rxlab.record.perfrecord import DEFAULT_PAGES

ENOUGH = 20_000
SPARE = 1.06  # a few packets of each run are not shown by perf
MAX_REPETITIONS = 4
MAX_MORE = 6  # a repetition asks for at most so many times the packets wanted
COMPLETE = 0.9995  # of what perf showed; a run below it is kept to be looked at
HIDDEN = 0.005  # frames that perf may not have shown

LOSSY = ("TCP ping-pong v4", "UDP ping-pong v4", "recv", "TCP bulk, MTU segments", "epoll level, 8 connections")
LOSSY_PAGES = 1
LOSSY_PACKETS = 60_000
LOSSY_ENOUGH = 300_000
LOSSY_WRONG = 1e-5
ROWS = "rows.jsonl"

Rows = list[dict[str, Any]]


def read_rows(folder: Path) -> Rows:
    """Return what was judged so far."""
    path = folder / ROWS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rows_of(rows: Rows, scenario: Scenario, state: str) -> Rows:
    return [row for row in rows if (row["scenario"], row["state"]) == (scenario.name, state)]


def draw_all(folder: Path, options: argparse.Namespace) -> None:
    """Record and judge what is wanted until there is enough of it, or time is up."""
    deadline = time.monotonic() + options.seconds
    steps = lossy_steps if options.lossy else clean_steps
    with apply(allow_system_changes=True) as journal:
        for scenario, state, packets in steps(folder, options):
            if time.monotonic() > deadline:
                return
            draw_one(folder, scenario, state, packets, journal, LOSSY_PAGES if options.lossy else DEFAULT_PAGES)


def clean_steps(folder: Path, options: argparse.Namespace) -> Iterator[tuple[Scenario, str, int]]:
    """Yield scenario, state and how many packets to record, until each has enough."""
    for scenario in SCENARIOS:
        if options.only and not any(text in scenario.name for text in options.only):
            continue
        for state in scenario.states:
            if options.state and state not in options.state:
                continue
            for _ in range(MAX_REPETITIONS):
                rows = rows_of(read_rows(folder), scenario, state)
                lacking = options.packets - sum(row["checked"] for row in rows)
                if lacking <= 0 or len(rows) >= MAX_REPETITIONS:
                    break
                # How much of what was asked for came and could be checked, so far.
                share = sum(row["checked"] for row in rows) / max(sum(row["asked"] for row in rows), 1)
                more = MAX_MORE if rows and share * MAX_MORE < 1 else 1 / share if rows else 1
                yield scenario, state, int(lacking * SPARE * more) + 100


def lossy_steps(folder: Path, options: argparse.Namespace) -> Iterator[tuple[Scenario, str, int]]:
    """Yield scenarios in turn until enough packets are trusted although events were lost."""
    while True:
        for scenario in SCENARIOS:
            for state in scenario.states if scenario.name in LOSSY else ():
                if sum(row["checked"] for row in read_rows(folder)) >= LOSSY_ENOUGH:
                    return
                yield scenario, state, LOSSY_PACKETS


def draw_one(folder: Path, scenario: Scenario, state: str, packets: int, journal: Transaction, pages: int) -> None:
    """Record one run, judge it, and keep its row."""
    number = len(rows_of(read_rows(folder), scenario, state))
    out = folder / f"{''.join(c if c.isalnum() else '-' for c in scenario.name)}-{state}-{number}"
    shutil.rmtree(out, ignore_errors=True)
    begun = time.monotonic()
    try:
        run = record(scenario, state, out, packets, journal, pages=pages)
        recorded = time.monotonic()
        row = judged(scenario, state, out)
        row.failures += run.run["problems"]
    except RxlabError as error:
        recorded = time.monotonic()
        row = Row(scenario.name, state, out, failures=[f"not recorded: {error}"])
    found = asdict(row)
    times = {"record_seconds": round(recorded - begun, 1), "judge_seconds": round(time.monotonic() - recorded, 1)}
    with (folder / ROWS).open("a") as stream:
        stream.write(json.dumps(found | times | {"asked": packets, "pages": pages}, default=str) + "\n")
    shown = found["packets"] - found["hidden"]
    print(f"{out.name}: {found['checked']:,} checked, {found['misjoined']} mis-joined, {times}", flush=True)
    if (
        pages != DEFAULT_PAGES
        and not found["misjoined"]
        or not found["failures"]
        and found["complete"] >= COMPLETE * shown
    ):
        shutil.rmtree(out, ignore_errors=True)
        witness_of(out).unlink(missing_ok=True)
    else:
        print(f"kept {out}: {found['failures']}, {found['verdict']}, {found['statuses']}", file=sys.stderr, flush=True)


def table(rows: Rows) -> str:
    """Return the rows summed up by scenario and state, as Markdown."""
    lines = [
        "| scenario | RPS | data packets | checked | mis-joined | complete | not shown | flagged | events lost | verdicts | judges against |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {scenario.name: index for index, scenario in enumerate(SCENARIOS)}
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["scenario"], row["state"]), []).append(row)
    groups = dict(sorted(groups.items(), key=lambda item: (order.get(item[0][0], -1), item[0][1])))
    for (name, state), group in [*groups.items(), (("all", ""), rows)]:
        total = {
            key: sum(row[key] for row in group)
            for key in ("packets", "checked", "misjoined", "complete", "hidden", "flagged", "frames", "excluded")
        }
        watched = sum(row["witness"].get(key, 0) for row in group for key in ("links_checked", "copies_checked"))
        wrong = sum(row["witness"].get(key, 0) for row in group for key in ("links_wrong", "copies_wrong"))
        lost = sum(row["lost_share"] for row in group) / max(len(group), 1)
        verdicts = ", ".join(f"{n} {word}" for word, n in Counter(row["verdict"] for row in group).items())
        against = "; ".join(sorted({reason for row in group for reason in row["failures"]})) if name != "all" else ""
        shown = max(total["packets"] - total["hidden"], 1)
        lines.append(
            f"| {name} | {state} | {total['packets']:,} | {total['checked']:,}"
            + (f" (bpftrace {wrong} of {watched:,} wrong)" if watched else "")
            + f" | {total['misjoined']} | {total['complete'] / shown:.5f} | {total['excluded'] / max(total['frames'], 1):.3%}"
            f" | {total['flagged']} | {lost:.1%} | {verdicts} | {against[:120]} |"
        )
    return "\n".join(lines)


def shortfalls(rows: Rows, options: argparse.Namespace) -> list[str]:
    """Return what of the issue's numbers the rows do not show."""
    wrong = sum(row["misjoined"] for row in rows)
    if options.lossy:
        lossy = [row for row in rows if row["lost_share"] > 0]
        checked, wrong = (sum(row[key] for row in lossy) for key in ("checked", "misjoined"))
        told = {
            f"{checked:,} trusted packets of {LOSSY_ENOUGH:,}": checked < LOSSY_ENOUGH,
            f"{wrong} of {checked:,} trusted packets wrong": wrong > LOSSY_WRONG * checked,
            "a run that lost events is called trusted": any(row["verdict"] == "trusted" for row in lossy),
        }
        return [reason for reason, holds in told.items() if holds]
    short = [f"{wrong} mis-joined"] if wrong else []
    short += [f"{row['path']}: {'; '.join(row['failures'])}" for row in rows if row["failures"]]
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(f"{row['scenario']}, {row['state']}", []).append(row)
    for name, group in groups.items():
        total = {
            key: sum(row[key] for row in group) for key in ("checked", "complete", "packets", "hidden", "contested")
        }
        complete = total["complete"] / max(total["packets"] - total["hidden"], 1)
        if total["checked"] < options.packets:
            short.append(f"{name}: {total['checked']:,} checked")
        if complete < COMPLETE:
            missing = total["packets"] - total["hidden"] - total["complete"]
            short.append(f"{name}: {complete:.5f} complete; readers contest {total['contested']} of {missing} missing")
        excluded = sum(row["excluded"] for row in group) / max(sum(row["frames"] for row in group), 1)
        if excluded > HIDDEN:
            short.append(f"{name}: {excluded:.2%} not shown by perf")
    return short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packets", type=int, default=ENOUGH, help="checked packets per scenario and state")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no recording after that long")
    parser.add_argument("--only", action="append", default=[], help="scenarios whose name holds this text")
    parser.add_argument("--state", action="append", default=[], help="only this RPS state")
    parser.add_argument("--lossy", action="store_true", help="with ring buffers too small, until enough is trusted")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    draw_all(options.out, options)
    rows = read_rows(options.out)
    (options.out / "table.md").write_text(table(rows) + "\n")
    short = shortfalls(rows, options)
    print(table(rows), *short, sep="\n")
    print(f"{time.monotonic() - begun:.0f} s, {len(rows)} runs, {len(short)} shortfalls")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
