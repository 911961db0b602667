"""The run directory while it is made: a place for one run, space for its end, and its owner."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rxlab.errors import CaptureError, RxlabError, StoppedError
from rxlab.record.recording import DEFAULT_MIN_FREE
from rxlab.record.workload import COMMAND_LOG
from rxlab.rundir import (
    APP_LOG,
    CLIENT_LOG,
    CLOCK_JSON,
    COUNTERS_JSON,
    FUNCTIONS_LOG,
    HOST_JSON,
    PCAP,
    PERF_DATA,
    PYPERF_JSON,
    RUN_JSON,
    list_runs,
    read_json,
)

RESERVE = ".reserve"
RESERVE_BYTES = 1 << 20
RECORDINGS = (PERF_DATA, PCAP, FUNCTIONS_LOG, PYPERF_JSON, APP_LOG, CLIENT_LOG)


def check_space(out: Path, needed: int, keep: int = DEFAULT_MIN_FREE) -> None:
    """Refuse to begin where the disk has no room for `needed` bytes beside the `keep` that stay free."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed + keep:
        raise CaptureError(
            "the disk has no room for this",
            where=str(out),
            found=f"{free / 1e6:,.0f} MB free",
            expected=f"about {needed / 1e6:,.0f} MB, and {keep / 1e6:,.0f} MB that stay free",
            do=f"Free {(needed + keep - free) / 1e6:,.0f} MB, take another disk, or record less (--messages, --duration, --reps).",
        )


@contextmanager
def unused_removed(folder: Path) -> Iterator[None]:
    """Remove the folders that the block made on the way to this one and left empty, if it ends in an error."""
    missing = [place for place in (folder.absolute(), *folder.absolute().parents) if not place.exists()]
    try:
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):  # not made, or not empty
                place.rmdir()
        raise


def make_folder(out: Path) -> Path:
    """Make the run directory, for its owner only; refuse one that holds a run, but clear one that recorded nothing."""
    if (out / RUN_JSON).exists():
        if not recorded_nothing(out):
            raise CaptureError("there is a run here already", where=str(out), do="Choose another -o, or remove it.")
        leave_nothing(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        out.chmod(0o700)
        return out.resolve()
    except OSError as error:
        raise CaptureError("cannot make the run directory", where=str(out), found=str(error.strerror)) from None


def recorded_nothing(out: Path) -> bool:
    """Tell whether a run failed before any recording or log was written."""
    try:
        status = read_json(out / RUN_JSON).get("status")
    except (OSError, RxlabError):
        return False
    return status == "failed" and not any((out / name).exists() for name in RECORDINGS)


def stopped(out: Path, go_on: str) -> StoppedError:
    """Return the one line about a recording that Ctrl-C ended: what is kept, where, and what can be done with it.

    Parameters
    ----------
    out : Path
        A run directory, or a folder of runs.
    go_on : str
        How the command that recorded there is gone on with.
    """
    runs = [] if not out.is_dir() or recorded_nothing(out) else list(list_runs(out))
    if len(runs) == 1 and runs[0].path == out:
        is_traced = runs[0].has(PERF_DATA)
        do = f"'rxlab analyze {out}' takes it as far as it goes." if is_traced else f"'rxlab report {out}' tells of it."
        return StoppedError(
            "interrupted, the run is kept", where=str(out), found=f"a {runs[0].run['status']} run", do=do
        )
    n_whole = sum(run.run.get("status") == "complete" for run in runs)
    if not n_whole:
        return StoppedError("interrupted before a run was complete", where=str(out), do=f"To go on, {go_on}.")
    return StoppedError(
        "interrupted, the runs are kept",
        where=str(out),
        found=f"{n_whole} complete run{'s' if n_whole > 1 else ''}",
        do=f"'rxlab report {out}' tells of them; to go on, {go_on}.",
    )


def leave_nothing(out: Path) -> None:
    """Remove every file that a capture makes: there was no traffic, and the error said why."""
    for name in (*RECORDINGS, RUN_JSON, HOST_JSON, CLOCK_JSON, COUNTERS_JSON, COMMAND_LOG, RESERVE):
        (out / name).unlink(missing_ok=True)


def reserve_space(out: Path) -> None:
    """Set aside the space the final JSON files need, so that a full disk can still be recorded as one."""
    descriptor = os.open(out / RESERVE, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
    except OSError as error:
        raise CaptureError("no space for a run", where=str(out), found=str(error.strerror)) from None
    finally:
        os.close(descriptor)


def release_space(out: Path) -> None:
    """Give back the reserved space."""
    (out / RESERVE).unlink(missing_ok=True)


def give_to_invoker(folder: Path) -> None:
    """Hand the run to the user behind sudo, so that a Jupyter kernel of theirs can read what it had captured."""
    if not folder.is_dir():
        return
    uid, gid = os.environ.get("SUDO_UID", ""), os.environ.get("SUDO_GID", "")
    if os.geteuid() != 0 or not uid.isdigit() or not gid.isdigit():
        return
    for path in (folder, *folder.iterdir()):
        os.chown(path, int(uid), int(gid), follow_symlinks=False)


def command_line() -> list[str]:
    """Return the command that recorded, as somebody would type it again: without this machine's path to rxlab."""
    program = Path(sys.argv[0])
    name = "rxlab" if program.parent.name == "rxlab" or program.name == "rxlab" else program.name
    return [name, *sys.argv[1:]]
