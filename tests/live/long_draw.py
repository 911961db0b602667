"""The long draw: every scenario in every RPS state with at least 20,000 checked packets, summed up as one table.

    sudo .venv/bin/python tests/live/long_draw.py OUT [--packets N] [--seconds S] [--only TEXT] [--pages N]

Recordings go to OUT, their verdicts to OUT/rows.jsonl; a second call goes on where the first one stopped. Recordings that no
judge holds anything against are removed once judged. ``--seconds`` ends recording after that long (0: only judge). ``--pages 1``
makes perf's ring buffers so small that it loses events: then no run may be trusted, and hardly a packet still claimed be wrong.
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

from judging import judged
from scenarios import SCENARIOS, Scenario, record, witness_of

from rxlab.errors import RxlabError
from rxlab.host.journal import apply
from rxlab.record.perfrecord import DEFAULT_PAGES

ENOUGH = 20_000
SPARE = 1.06  # a few packets of each run are not shown by perf
MAX_REPETITIONS = 4
COMPLETE = 0.9995  # of what perf showed; a run below it is kept to be looked at
PENDING, ROWS = "pending.jsonl", "rows.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_line(path: Path, content: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(content, default=str) + "\n")


def wanted(folder: Path, only: str, enough: int, states: list[str]) -> Iterator[tuple[Scenario, str, int]]:
    """Yield what still has to be recorded: scenario, state, repetition."""
    rows, recorded = read_lines(folder / ROWS), read_lines(folder / PENDING)
    for scenario in SCENARIOS:
        for state in [state for state in scenario.states if not states or state in states]:
            key = (scenario.name, state)
            checked = sum(row["checked"] for row in rows if (row["scenario"], row["state"]) == key)
            n_recorded = sum((entry["scenario"], entry["state"]) == key for entry in recorded)
            n_judged = sum((row["scenario"], row["state"]) == key for row in rows)
            if only in scenario.name and checked < enough and n_recorded == n_judged < MAX_REPETITIONS:
                yield scenario, state, n_recorded


def record_all(folder: Path, options: argparse.Namespace) -> None:
    """Record what is wanted until time is up."""
    deadline = time.monotonic() + options.seconds
    with apply(allow_system_changes=True) as journal:
        for scenario, state, repetition in list(wanted(folder, options.only, options.packets, options.state)):
            if time.monotonic() > deadline:
                return
            out = folder / f"{''.join(c if c.isalnum() else '-' for c in scenario.name)}-{state}-{repetition}"
            shutil.rmtree(out, ignore_errors=True)
            try:
                run = record(scenario, state, out, int(options.packets * SPARE), journal, pages=options.pages)
            except RxlabError as error:
                print(f"{out.name}: {error}", file=sys.stderr, flush=True)
                continue
            entry = {"scenario": scenario.name, "state": state, "path": out, "problems": run.run["problems"]}
            append_line(folder / PENDING, entry)


def judge_all(folder: Path) -> None:
    """Judge what was recorded and not judged yet."""
    known = {row["path"] for row in read_lines(folder / ROWS)}
    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    for entry in read_lines(folder / PENDING):
        if entry["path"] in known:
            continue
        row = judged(by_name[entry["scenario"]], entry["state"], Path(entry["path"]))
        row.failures += entry["problems"]
        append_line(folder / ROWS, asdict(row))
        if row.failures or row.complete < COMPLETE * (row.packets - row.hidden):
            print(f"kept {row.path}: {row.failures}, {row.verdict}, {row.statuses}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(row.path)
            witness_of(row.path).unlink(missing_ok=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows summed up by scenario and state, as Markdown."""
    lines = [
        "| scenario | RPS | data packets | checked | mis-joined | complete | not shown | flagged | events lost | verdicts | judges against |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {scenario.name: index for index, scenario in enumerate(SCENARIOS)}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packets", type=int, default=ENOUGH, help="checked packets per scenario and state")
    parser.add_argument("--seconds", type=float, default=1e9, help="end recording after that long")
    parser.add_argument("--only", default="", help="scenarios whose name holds this text")
    parser.add_argument("--state", action="append", default=[], help="only this RPS state")
    parser.add_argument("--pages", type=int, default=DEFAULT_PAGES, help="perf's ring buffer pages per CPU")
    parser.add_argument("--no-judge", action="store_true", help="record only")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.seconds > 0:
        record_all(options.out, options)
    if not options.no_judge:
        judge_all(options.out)
    rows = read_lines(options.out / ROWS)
    (options.out / "table.md").write_text(table(rows) + "\n")
    print(table(rows))
    return 1 if any(row["misjoined"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
