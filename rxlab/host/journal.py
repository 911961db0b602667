"""Changing settings so that they are put back whatever happens: journal, watchdog, restore.

A transaction writes what it is about to touch to a journal file and fsyncs it *before* the first write. The end of the ``with``
block restores; if this process dies first, a watchdog process does; if that dies too, the next transaction or ``rxlab restore``.

The journal is one file per transaction of JSON lines, only appended to. Its lock (flock) is shared with the watchdog, so a
journal whose lock is free belongs to nobody and may be undone, and one whose lock is held is never touched. Records:
``header``, ``claim`` (what it reserves: "host" or "testbed NAME"), ``change`` (snapshot), ``applied`` (values read back),
``restoring`` (what somebody else has changed), ``restored``, ``namespace``, ``link``, ``instance`` (of tracefs), ``process``,
``closed``.
"""

from __future__ import annotations

import errno
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rxlab.errors import HostSettingError
from rxlab.host.access import HostAccess, netns_path
from rxlab.host.functiontrace import tracefs_root
from rxlab.host.guard import check_allowed
from rxlab.host.journalfile import (
    SUFFIX,
    append_record,
    boot_id,
    create_journal,
    default_journal_dir,
    folder_lock,
    make_folder,
    name_journal,
    noting,
    open_journal,
)
from rxlab.host.kinds import CHANNELS, KINDS
from rxlab.host.recovery import undo
from rxlab.host.settings import Setting, collateral, parse_settings
from rxlab.host.undo import (
    TAG,
    AccessCache,
    RestoreReport,
    interrupt_later,
    process_start,
    remove_instances,
    remove_namespaces,
    restore_change,
    stop_processes,
)

RESTORE_COMMAND = "Run 'rxlab restore'."


class Transaction:
    """An open journal with its watchdog; :func:`apply` makes one.

    Attributes
    ----------
    id : str
    asked, got : dict
        Values by label of the changes in force: wanted, and read back. They differ only with ``inexact="record"``.
    report : RestoreReport
        What restoring did, filled as changes end.
    say : callable
        Told, before it is written, what takes a link down; prints to standard error unless set otherwise.
    """

    def __init__(self, folder: Path, *, testbed: str | None, open_access: Callable[[str | None], HostAccess]) -> None:
        self.id = secrets.token_hex(8)
        self.asked: dict[str, str] = {}
        self.got: dict[str, str] = {}
        self.report = RestoreReport()
        self.allow_system_changes = self.yes_this_nic = False
        self.say: Callable[[str], None] = lambda text: print(f"rxlab: {text}", file=sys.stderr, flush=True)
        self._folder, self._testbed, self._access_of = folder, testbed, AccessCache(open_access)
        self._namespaces: list[str] = []
        self._links: list[str] = []
        self._instances: list[str] = []
        self._processes: list[tuple[int, int]] = []
        self._children: list[subprocess.Popen[Any]] = []
        self._n_changes, self._claims = 0, set[str]()
        self._in_force: list[Setting] = []
        self._said: set[str] = set()
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._root = self._access_of(None).root
        make_folder(folder)
        self._path = folder / (self.id + SUFFIX)
        self._file = create_journal(self._path)
        try:
            owner = {"pid": os.getpid(), "start": process_start(os.getpid()), "command": sys.argv}
            self._append({"kind": "header", "id": self.id, "boot_id": boot_id(), "root": str(self._root), **owner})
            self._start_watchdog()
            with folder_lock(folder):
                name_journal(self._file, self._path)
                if testbed is not None:
                    self._claim(f"testbed {testbed}")
        except BaseException:
            self._drop()
            raise

    # -- settings

    @contextmanager
    def change(self, settings: Iterable[Setting], *, inexact: str = "error") -> Iterator[Transaction]:
        """Set these settings inside the ``with`` block and put the exact snapshot back after it.

        Parameters
        ----------
        settings : iterable of Setting
            As :func:`rxlab.host.settings.parse_settings` returns them.
        inexact : {"error", "record"}
            What to do when the host took another value than the one written.

        Raises
        ------
        HostSettingError
            Not allowed here, in use by another run, refused or rounded by the host, or not restored.
        """
        chosen = sorted(settings, key=lambda setting: setting.rank)
        if not chosen:
            yield self
            return
        foreign = [setting for setting in chosen if setting.netns is None or setting.netns not in self._namespaces]
        check_allowed(foreign, self.allow_system_changes, self.yes_this_nic, self._access_of(None))
        if foreign and "host" not in self._claims:
            with folder_lock(self._folder):
                self._claim("host")
        record = self._snapshot(chosen)
        self._append(record)
        got: dict[str, str] | None = None
        outer = dict(self.asked), dict(self.got), self._in_force
        try:
            self._announce(foreign)
            self._write(chosen)
            got = self._read_back(record, exact=inexact == "error")
            self._append({"kind": "applied", "change": record["change"], "got": got})
            self._in_force = [*self._in_force, *chosen]
            yield self
        finally:
            self.asked, self.got, self._in_force = outer
            self._restore(record, got)

    def drift(self) -> dict[str, tuple[str, str | None]]:
        """Return ``{label: (value read back, value now)}`` of settings in force that somebody else has changed since."""
        found = {}
        for setting in self._in_force:
            try:
                now: str | None = setting.canonical(setting.read(self._access_of(setting.netns)))
            except HostSettingError:
                now = None
            if now != self.got.get(setting.label):
                found[setting.label] = (self.got[setting.label], now)
        return found

    def _announce(self, foreign: list[Setting]) -> None:
        """Name what takes the link of a real interface down, once each, before it is written."""
        dropping = [setting for setting in foreign if setting.key in KINDS and KINDS[setting.key].drops_link]
        for iface in dict.fromkeys(setting.iface for setting in dropping):
            labels = [setting.label for setting in dropping if setting.iface == iface]
            labels = [label for label in labels if label not in self._said]
            self._said.update(labels)
            if labels:
                self.say(f"the link of {iface} may go down for a moment: {', '.join(labels)} (and again to restore)")

    def _write(self, chosen: list[Setting]) -> None:
        """Write in order. What is refused because of another setting (an RSS table over more channels) is tried after it."""
        waiting, refused = chosen, dict[str, HostSettingError]()
        while waiting:
            before, refused = refused, {}
            for setting in waiting:
                access, raw = self._access_of(setting.netns), setting.encode(setting.wanted or "")
                if setting.has(access):
                    continue  # rings of the size they have would still cost the link
                if before:
                    setting.release(access)
                try:
                    setting.write(access, raw)
                except HostSettingError as error:
                    if error.found != os.strerror(errno.EINVAL):
                        raise
                    refused[setting.id] = error
            if refused.keys() == before.keys() and refused:
                raise next(iter(refused.values()))
            lowest = min((setting.rank for setting in chosen if setting.id in refused), default=len(KINDS))
            waiting = [setting for setting in chosen if setting.rank > lowest or setting.id in refused]

    def _snapshot(self, chosen: list[Setting]) -> dict[str, Any]:
        self._n_changes += 1
        remembered = [*chosen, *collateral(chosen, self._access_of)]
        fields = []
        for setting in remembered:
            try:
                before: str | None = setting.read(self._access_of(setting.netns))
            except HostSettingError:
                # A queue or a thread that the same change is about to create.
                if not any(other.rank == CHANNELS or other.key == "threaded" for other in chosen):
                    raise
                before = None
            fields.append({**setting.to_json(), "before": before})
        return {"kind": "change", "change": self._n_changes, "settings": fields}

    def _read_back(self, record: dict[str, Any], *, exact: bool) -> dict[str, str]:
        """Return what the host shows after the writes, by id, of all remembered places."""
        got = {}
        for fields in record["settings"]:
            setting = Setting.from_json(fields)
            access = self._access_of(setting.netns)
            try:
                value = setting.canonical(setting.read(access))
            except HostSettingError:
                if setting.wanted is None:
                    continue  # a queue that the change removed
                raise
            got[setting.id] = value
            if setting.wanted is None:
                continue
            if exact and not (value == setting.wanted and setting.is_in_effect(access)):
                raise HostSettingError(
                    "the host took another value",
                    where=setting.label,
                    found=value if value != setting.wanted else f"{value} without effect",
                    expected=setting.wanted,
                    do="Ask for a value it takes, or accept what it makes of it (inexact='record').",
                )
            self.asked[setting.label], self.got[setting.label] = setting.wanted, value
        return got

    def _restore(self, record: dict[str, Any], got: dict[str, str] | None) -> None:
        with interrupt_later():
            report = RestoreReport()
            restore_change(record, got, self._access_of, report, note=noting(self._path, record["change"]))
            self.report.add(report)
            if report.ok:
                self._append({"kind": "restored", "change": record["change"]})
                return
        raise HostSettingError("not everything could be restored", found="; ".join(report.failed), do=RESTORE_COMMAND)

    # -- what a testbed makes

    def register_namespace(self, name: str) -> None:
        """Remember a network namespace, *before* it is made; settings inside it need no permission.

        Raises
        ------
        HostSettingError
            There is one of that name, which is then somebody else's.
        """
        if netns_path(name).exists():
            raise HostSettingError("network namespace exists already", where=name, do="Choose another testbed name.")
        self._namespaces.append(name)
        self._append({"kind": "namespace", "name": name})

    def register_link(self, name: str) -> None:
        """Remember a link in this network namespace, *before* it is made."""
        if self._access_of(None).exists(f"sys/class/net/{name}"):
            raise HostSettingError("interface exists already", where=name, do="Choose another testbed name.")
        self._links.append(name)
        self._append({"kind": "link", "name": name})

    def register_instance(self, name: str) -> None:
        """Remember an instance of tracefs, *before* it is made."""
        folder = tracefs_root(self._root)
        if folder is not None and (folder / "instances" / name).exists():
            raise HostSettingError("tracefs instance exists already", where=name, do="Record again: names are random.")
        self._instances.append(name)
        self._append({"kind": "instance", "name": name})

    def register_process(self, pid: int) -> None:
        """Remember a helper process, to be stopped when the transaction ends or its owner dies."""
        start = process_start(pid)
        if start is not None:
            self._processes.append((pid, start))
            self._append({"kind": "process", "pid": pid, "start": start})

    def environment(self) -> dict[str, str]:
        """Return the environment helpers are to be started with: it marks them and what they start as ours."""
        return {**os.environ, TAG: self.id}

    def start_process(self, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a helper (``subprocess.Popen`` options) that does not outlive the transaction, killed or not."""
        options["env"] = {**(options.get("env") or os.environ), TAG: self.id}
        process = subprocess.Popen(argv, **options)
        self._children.append(process)
        self.register_process(process.pid)
        return process

    def leave_namespaces(self) -> None:
        """Let go of namespaces the caller is about to remove itself: their links stay while a thread is inside."""
        self._access_of.leave_namespaces()

    # -- end

    def close(self) -> None:
        """Stop helpers, remove namespaces, drop the journal and dismiss the watchdog."""
        with interrupt_later():
            self._access_of.close()
            report = RestoreReport()
            report.processes = stop_processes(self._processes, None, self._namespaces)
            for child in self._children:
                child.poll()
            remove_namespaces(self._namespaces, self._links, report)
            remove_instances(self._instances, self._root, report)
            self.report.add(report)
            if self.report.ok:
                with suppress(HostSettingError):  # a full disk: the file goes anyway
                    self._append({"kind": "closed"})
                self._path.unlink(missing_ok=True)
            self._dismiss_watchdog()
            os.close(self._file)
        if report.failed:
            raise HostSettingError("the testbed is not gone", found="; ".join(report.failed), do=RESTORE_COMMAND)

    # -- journal file and watchdog

    def _append(self, record: dict[str, Any]) -> None:
        append_record(self._file, record)

    def _claim(self, what: str) -> None:
        """Reserve the host's settings or a testbed; the folder's lock is held."""
        for path in sorted(self._folder.glob("*" + SUFFIX)):
            if path == self._path:
                continue
            with open_journal(path) as (records, is_free):
                claims = {record["what"] for record in records if record["kind"] == "claim"}
                if is_free:
                    report = undo(records, path)
                    self.report.add(report)
                    if what in claims and not report.ok:
                        raise HostSettingError(
                            "an earlier run could not be restored", where=str(path), found="; ".join(report.failed)
                        )
                elif what in claims:
                    raise HostSettingError(
                        f"in use by another run ({what})",
                        where=str(path),
                        found=f"process {records[0]['pid']}: {' '.join(records[0]['command'])}",
                        do="Wait for it to end.",
                    )
        self._append({"kind": "claim", "what": what})
        self._claims.add(what)

    def _start_watchdog(self) -> None:
        package = Path(__file__).parents[2]
        path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
        self._watchdog = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "rxlab.host.recovery",
                "watchdog",
                str(self._path),
                str(os.getpid()),
                str(self._file),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._file,),
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._watchdog.stdout is not None
        if self._watchdog.stdout.readline() != b"ready\n":
            raise HostSettingError("the watchdog did not start", where=str(self._path), do="Run 'rxlab doctor'.")

    def _dismiss_watchdog(self) -> None:
        if self._watchdog is None:
            return
        try:
            self._watchdog.communicate(b"done\n", timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._watchdog.kill()
            self._watchdog.wait()

    def _drop(self) -> None:
        self._path.unlink(missing_ok=True)
        self._dismiss_watchdog()
        os.close(self._file)


@contextmanager
def apply(
    settings: Iterable[Setting] | Mapping[str, object] = (),
    *,
    iface: str | None = None,
    netns: str | None = None,
    allow_system_changes: bool = False,
    yes_this_nic: bool = False,
    inexact: str = "error",
    testbed: str | None = None,
    journal_dir: Path | None = None,
    open_access: Callable[[str | None], HostAccess] = HostAccess,
) -> Iterator[Transaction]:
    """Change host settings inside a ``with`` block; afterwards, or when this process dies, the host is as before.

    Parameters
    ----------
    settings : list of Setting, or mapping
        ``{"rps_cpus": "0,1"}`` is parsed for `iface` and `netns`.
    allow_system_changes : bool
        Permission to change anything outside the testbed's own namespaces.
    yes_this_nic : bool
        Permission to touch the interface of the default route or of the current ssh session.
    inexact : {"error", "record"}
        What to do when the host rounds or ignores a value.
    testbed : str, optional
        Name to reserve; two runs cannot use one testbed at the same time.
    journal_dir : Path, optional
        By default :func:`default_journal_dir`.
    open_access : callable
        How a network namespace is reached; tests give a made-up host.

    Yields
    ------
    Transaction
        For further changes (``change``) and for what a testbed makes (``register_namespace``, ``start_process``).
    """
    folder = Path(journal_dir) if journal_dir is not None else default_journal_dir()
    if isinstance(settings, Mapping):
        with open_access(netns) as access:
            settings = parse_settings(settings, iface, netns, access=access)
    transaction = Transaction(folder, testbed=testbed, open_access=open_access)
    transaction.allow_system_changes, transaction.yes_this_nic = allow_system_changes, yes_this_nic
    try:
        with transaction.change(settings, inexact=inexact):
            yield transaction
    finally:
        transaction.close()
