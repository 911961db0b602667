"""The run directory while it is made: a place for one run, space for its end, and its owner."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rxlab.errors import CaptureError, RxlabError
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
    read_json,
)

RESERVE = ".reserve"
RESERVE_BYTES = 1 << 20
RECORDINGS = (PERF_DATA, PCAP, FUNCTIONS_LOG, PYPERF_JSON, APP_LOG, CLIENT_LOG)


def make_folder(out: Path) -> Path:
    """Make the run directory, for its owner only; refuse one that holds a run, but clear one that recorded nothing."""
    if (out / RUN_JSON).exists():
        if not recorded_nothing(out):
            raise CaptureError("there is a run here already", where=str(out), do="Choose another -o, or remove it.")
        for name in (RUN_JSON, HOST_JSON, CLOCK_JSON, COUNTERS_JSON, COMMAND_LOG, RESERVE):
            (out / name).unlink(missing_ok=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        out.chmod(0o700)
        return out.resolve()
    except OSError as error:
        raise CaptureError("cannot make the run directory", where=str(out), found=str(error.strerror)) from None


def recorded_nothing(out: Path) -> bool:
    """Tell whether a run failed before any traffic: :func:`drop_recordings` has left no recording and no log of it."""
    try:
        status = read_json(out / RUN_JSON).get("status")
    except (OSError, RxlabError):
        return False
    return status == "failed" and not any((out / name).exists() for name in RECORDINGS)


def drop_recordings(out: Path) -> None:
    """Remove what recorders and logs wrote before there was any traffic."""
    for name in RECORDINGS:
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
