"""What happens when the owner of a journal is dead: its watchdog undoes it, or the next run, or ``rxlab restore``."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

from rxlab.host.access import HostAccess
from rxlab.host.journalfile import (
    SUFFIX,
    Record,
    boot_id,
    default_journal_dir,
    named,
    noting,
    open_journal,
    read_records,
)
from rxlab.host.undo import (
    AccessCache,
    RestoreReport,
    process_start,
    remove_instances,
    remove_namespaces,
    restore_change,
    stop_processes,
)

WATCHDOG_LOG = "watchdog.log"


def restore(journal_dir: Path | None = None) -> RestoreReport:
    """Undo what runs that are dead left behind; the work of ``rxlab restore``.

    Runs that are alive are left alone, journals of an earlier boot are dropped (their settings went with the boot).

    Returns
    -------
    RestoreReport
        ``.lines()`` for people, ``.ok`` False when something could not be put back.
    """
    folder = Path(journal_dir) if journal_dir is not None else default_journal_dir()
    report = RestoreReport()
    if not folder.is_dir():
        report.messages.append("nothing to restore")
        return report
    for path in sorted(folder.glob("*" + SUFFIX)):
        deadline = time.monotonic() + 10
        while True:
            with open_journal(path) as (records, is_free):
                if is_free:
                    report.add(undo(records, path))
                    break
                if owner := living_owner(records):
                    report.messages.append(f"{path.name}: process {owner} is running, left alone")
                    break
                if time.monotonic() > deadline:
                    report.failed.append(f"{path}: its owner is dead but its lock is held")
                    break
            time.sleep(0.05)  # the watchdog is at it
    log = folder / WATCHDOG_LOG
    if log.exists():
        report.messages += log.read_text().splitlines()
        log.unlink()
    if not report.lines():
        report.messages.append("nothing to restore")
    return report


def living_owner(records: list[Record]) -> int | None:
    """Return the process that a journal belongs to, None where it is dead or the host was started anew since."""
    if not records or records[0]["boot_id"] != boot_id():
        return None
    return int(records[0]["pid"]) if process_start(records[0]["pid"]) == records[0]["start"] else None


def journal_owners(folder: Path) -> dict[str, int | None]:
    """Return the living owner of each journal, by file name; nothing is locked, so whoever undoes one is not disturbed."""
    owners: dict[str, int | None] = {}
    for path in sorted(folder.glob("*" + SUFFIX)):
        try:
            journal = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            owners[path.name] = living_owner(read_records(journal))
        finally:
            os.close(journal)
    return owners


def undo(records: list[Record], path: Path) -> RestoreReport:
    """Undo one journal whose owner is dead, and delete it when all is back. Its lock is held by the caller."""
    report = RestoreReport()
    if not records or any(record["kind"] == "closed" for record in records):
        path.unlink(missing_ok=True)
        return report
    header = records[0]
    if header["boot_id"] != boot_id():
        report.messages.append(f"{path.name}: from before the last boot, dropped")
        path.unlink(missing_ok=True)
        return report
    root, namespaces = Path(header["root"]), named(records, "namespace")
    done = {record["change"] for record in records if record["kind"] == "restored"}
    got = {record["change"]: record["got"] for record in records if record["kind"] in ("applied", "restoring")}
    access_of = AccessCache(lambda netns: HostAccess(netns, root))
    for record in reversed(records):
        if record["kind"] == "change" and record["change"] not in done:
            # Settings inside the testbed's namespaces go with them.
            kept = [fields for fields in record["settings"] if fields["netns"] not in namespaces]
            note = noting(path, record["change"])
            restore_change({"settings": kept}, got.get(record["change"]), access_of, report, note=note)
    access_of.close()
    processes = [(record["pid"], record["start"]) for record in records if record["kind"] == "process"]
    for _ in range(2):  # a command of the dead owner may have made a namespace while the first round ran
        report.processes += stop_processes(processes, header["id"], namespaces)
        remove_namespaces(namespaces, named(records, "link"), report)
    remove_instances(named(records, "instance"), root, report)
    if report.ok:
        path.unlink(missing_ok=True)
    return report


def watch(path: Path, parent: int, journal: int) -> None:
    """Wait until the parent says "done" or dies; in the second case undo its journal.

    Parameters
    ----------
    journal : int
        The journal's open file, shared with the parent and with it the lock.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    process = os.pidfd_open(parent) if os.getppid() == parent else None
    print("ready", flush=True)
    poll = select.poll()
    poll.register(sys.stdin, select.POLLIN)
    if process is not None:
        poll.register(process, select.POLLIN)
    while process is not None:
        events = dict(poll.poll())
        if sys.stdin.fileno() in events:
            if os.read(sys.stdin.fileno(), 16):
                return
            poll.unregister(sys.stdin)  # closed without a word: only the parent's death counts
        if process in events:
            break
    report = undo(read_records(journal), path)
    lines = [f"{path.name}: {line}" for line in (*report.foreign, *report.failed)]
    if lines:
        with open(path.with_name(WATCHDOG_LOG), "a") as log:
            log.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["watchdog"] and len(sys.argv) == 5:
        watch(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
