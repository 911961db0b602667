"""Where the host's files and ioctls are reached: under a root directory, inside a network namespace.

``/sys/class/net`` and ``/proc/sys/net`` show the network namespace of the process that mounted or opened them. A namespace is
entered by one *thread* of this process, not by a helper process: a write done in a system call of the process itself is over
when the process is dead, so a watchdog that sees the death can restore without a late write overtaking it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from rxlab.errors import HostSettingError
from rxlab.host.ethtool import Ethtool, NoEthtool

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

NETNS_DIR = Path("/run/netns")

# include/uapi/linux/sched.h, mount.h; umount2(2)
CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_REC, MS_SLAVE, MNT_DETACH = 1 << 14, 1 << 19, 2


def netns_path(netns: str) -> Path:
    """Return the file of a network namespace given as a name (``ip netns``) or as a path."""
    return Path(netns) if "/" in netns else NETNS_DIR / netns


class HostAccess:
    """Reads and writes of one host, or of one network namespace of it.

    Parameters
    ----------
    netns : str, optional
        Name or path of a network namespace; None is the one this process runs in.
    root : Path
        Directory that stands for ``/``; a test gives a made-up tree.
    ethtool : Ethtool, optional
        What answers ethtool calls; a test gives a made-up device.

    Raises
    ------
    HostSettingError
        The namespace does not exist or may not be entered.
    """

    def __init__(self, netns: str | None = None, root: Path = Path("/"), ethtool: Ethtool | None = None) -> None:
        self.netns, self.root = netns, Path(root)
        self.ethtool = ethtool if ethtool is not None else Ethtool() if self.is_real else NoEthtool()
        self._thread: ThreadPoolExecutor | None = None
        self._held: dict[str, list[int]] = {}
        # On a made-up tree a namespace is only a name.
        if netns is not None and self.is_real:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"netns-{netns}")
            try:
                self._thread.submit(_enter, netns_path(netns)).result()
            except OSError as error:
                self._thread.shutdown()
                raise HostSettingError(
                    "network namespace cannot be entered",
                    where=str(netns_path(netns)),
                    found=error.strerror,
                    do="List them with 'ip netns'; entering one needs root.",
                ) from None

    @property
    def is_real(self) -> bool:
        """Whether this is the running host and not a made-up tree."""
        return self.root == Path("/")

    def call(self, function: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        """Call a function in the namespace; sockets it opens and processes it starts belong there."""
        if self._thread is None:
            return function(*args, **kwargs)
        return self._thread.submit(function, *args, **kwargs).result()

    def path(self, name: str) -> Path:
        """Return the path of ``sys/...`` or ``proc/...`` under the root."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str:
        """Return a file's text without the newline at its end; OSError when it cannot be read."""
        return self.call(self.path(name).read_text).rstrip("\n")

    def try_read(self, name: str) -> str | None:
        """Return a file's text, or None where this kernel, driver or user has no such file."""
        try:
            return self.read(name)
        except OSError:
            return None

    def write(self, name: str, text: str) -> None:
        """Write a file in one write(2), as sysfs and procfs want it; OSError carries the kernel's answer."""
        self.call(_write_once, self.path(name), text)

    def read_bytes(self, name: str, size: int) -> bytes:
        """Return the first bytes of a device file."""
        descriptor = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(descriptor, size)
        finally:
            os.close(descriptor)

    def hold(self, name: str, content: bytes) -> None:
        """Write to a device file and keep it open: the kernel takes the wish back when it is closed, by a death too."""
        descriptor = os.open(self.path(name), os.O_WRONLY | os.O_CLOEXEC)
        self._held.setdefault(name, []).append(descriptor)
        os.write(descriptor, content)

    def let_go(self, name: str) -> None:
        """Close what :meth:`hold` opened last; nothing if there is nothing."""
        if self._held.get(name):
            os.close(self._held[name].pop())

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a process of this host; a made-up one has none."""
        if not self.is_real:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        os.kill(pid, number)

    def set_task_cpus(self, tid: int, cpus: Iterable[int]) -> None:
        """Pin a task of this host; a made-up one has none."""
        if not self.is_real:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        os.sched_setaffinity(tid, cpus)

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        return self.call(self.path(name).exists)

    def list(self, name: str) -> list[str]:
        """Return the names in a directory, sorted; none where there is no such directory."""
        try:
            return sorted(self.call(os.listdir, self.path(name)))
        except OSError:
            return []

    def link_name(self, name: str) -> str | None:
        """Return the last part of where a symbolic link leads, None where there is none."""
        try:
            return Path(self.call(os.readlink, self.path(name))).name
        except OSError:
            return None

    def close(self) -> None:
        """Leave the namespace, which can go only when no thread is inside, and let go of what is held."""
        for name in self._held:
            while self._held[name]:
                self.let_go(name)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def __enter__(self) -> HostAccess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _write_once(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode() + b"\n")
    finally:
        os.close(descriptor)


def _enter(netns: Path) -> None:
    """Move the calling thread into a network namespace, with a /sys of its own that shows it."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int, name: str) -> None:
        if result != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")

    descriptor = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check(libc.setns(descriptor, CLONE_NEWNET), "setns")
    finally:
        os.close(descriptor)
    check(libc.unshare(CLONE_NEWNS), "unshare")
    # Without this the mount below would show up in every other mount namespace.
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_SLAVE), None), "mount /")
    libc.umount2(b"/sys", MNT_DETACH)
    check(libc.mount(b"sysfs", b"/sys", b"sysfs", ctypes.c_ulong(0), None), "mount /sys")
