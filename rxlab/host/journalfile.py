"""The journal file: JSON lines, only appended to, with a lock that says whether somebody still answers for it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rxlab.errors import HostSettingError

JOURNAL_DIR = Path("/var/lib/rxlab")
SUFFIX = ".journal"

Record = dict[str, Any]


def default_journal_dir() -> Path:
    """Return where journals are: /var/lib/rxlab for root, the user's state directory for others."""
    if os.geteuid() == 0:
        return JOURNAL_DIR
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "rxlab"


def create_journal(path: Path) -> int:
    """Create a journal that has no name yet, lock it, and return its descriptor: it goes with the last process that has it open.

    Where a file system has no files without a name (9p, NFS) it is called ``.new``.
    """
    try:
        journal = os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            journal = os.open(path.with_suffix(".new"), flags, 0o600)
        except OSError as error:
            raise _no_journal(path.parent, error) from None
    fcntl.flock(journal, fcntl.LOCK_EX)
    return journal


def name_journal(journal: int, path: Path) -> None:
    """Give a journal its name, once there is a watchdog to take it away again."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if path.with_suffix(".new").exists():
            os.rename(path.with_suffix(".new"), path)
        else:
            # open(2), O_TMPFILE; with a folder given, Python calls linkat(2), which follows the link.
            os.link(f"/proc/self/fd/{journal}", path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
        os.fsync(folder)
    finally:
        os.close(folder)


def append_record(journal: int, record: Record) -> None:
    """Write one record and wait until it is on the disk; what it announces may be done only after that."""
    line = json.dumps(record).encode() + b"\n"
    size = os.fstat(journal).st_size
    try:
        if os.write(journal, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(journal)
    except OSError as error:
        os.ftruncate(journal, size)
        raise HostSettingError(
            "journal cannot be written", where=f"descriptor {journal}", found=error.strerror
        ) from None


def noting(path: Path, change: int) -> Callable[[dict[str, str]], None]:
    """Return what notes that a change is being restored; a disk that is full does not keep it from that."""

    def note(foreign: dict[str, str]) -> None:
        with suppress(OSError, HostSettingError):
            journal = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            try:
                os.ftruncate(journal, len(_complete(journal)))
                append_record(journal, {"kind": "restoring", "change": change, "got": foreign})
            finally:
                os.close(journal)

    return note


def read_records(journal: int) -> list[Record]:
    """Return the records of an open journal; a last line cut short belongs to an action that never began."""
    return [json.loads(line) for line in _complete(journal).splitlines()]


def _complete(journal: int) -> bytes:
    """Return an open journal without a last line cut short."""
    text = os.pread(journal, os.fstat(journal).st_size, 0)
    return text[: text.rfind(b"\n") + 1]


def named(records: list[Record], kind: str) -> list[str]:
    """Return the names in all records of a kind."""
    return [record["name"] for record in records if record["kind"] == kind]


@contextmanager
def open_journal(path: Path) -> Iterator[tuple[list[Record], bool]]:
    """Open a journal file: its records, and whether nobody holds it (then this block holds it)."""
    try:
        journal = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield [], True
        return
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except BlockingIOError:
            is_free = False
        yield read_records(journal), is_free
    finally:
        os.close(journal)


def make_folder(folder: Path) -> None:
    """Make the folder of the journals; a host on which that cannot be done is not changed."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise _no_journal(folder, error) from None


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock while journals are named and compared."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _no_journal(folder, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _no_journal(folder: Path, error: OSError) -> HostSettingError:
    return HostSettingError(
        "no journal can be written, so nothing may be changed", where=str(folder), found=error.strerror
    )


def boot_id() -> str:
    """Return the kernel's name of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
