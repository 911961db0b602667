"""Boots one of Debian's kernels in QEMU on this machine's own root file system and runs a command in it.

QEMU emulates the CPUs (TCG): times measured in a guest mean nothing, what the kernel *does* is real. ``tests/vm/fetch`` fills the
cache. The guest has the ports that a person would cable together, an igb with four queues and a virtio-net peer, on a hub that
no host network is part of.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("RXLAB_VM_CACHE", Path.home() / ".cache" / "rxlab-vm"))
PREFIX = "kernel-"
BOOT_SECONDS = 200


class GuestError(Exception):
    """A guest that did not boot, or did not end in time."""


@dataclass(frozen=True)
class Finished:
    """What a guest left behind.

    Attributes
    ----------
    status : int
        Exit status of the command.
    output : str
        What it printed.
    folder : Path
        Its folder, with the files that it wrote.
    seconds : float
        From starting QEMU to its end, on the host.
    """

    status: int
    output: str
    folder: Path
    seconds: float


def obstacle() -> str | None:
    """Return why no guest can be started here, or None."""
    if os.geteuid() != 0:
        return "not root: the guest shares this machine's root file system"
    if not list(CACHE.glob("ready-*")):
        return f"nothing in {CACHE}: run tests/vm/fetch"
    return None if shutil.which("script") else "no 'script' command (bsdutils): virtme-ng wants a terminal"


def kernel(series: str) -> str:
    """Return the version of the kernel of `series` (``6.12``) that the cache holds."""
    found = [path.name.removeprefix(PREFIX) for path in CACHE.glob(f"{PREFIX}{series}.*")]
    if not found:
        raise GuestError(f"no kernel {series} in {CACHE}: run tests/vm/fetch")
    return sorted(found)[-1]


@contextmanager
def run_in_guest(
    argv: Sequence[str],
    *,
    series: str = "6.12",
    cpus: int = 4,
    seconds: float = 60,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Finished]:
    """Boot, run a command, and give its folder; the folder is gone after the block.

    Parameters
    ----------
    argv : sequence of str
        ``{folder}`` stands for the folder both sides share, ``{python}`` for an interpreter that can record.
    series : str
        Kernel, e.g. ``"6.1"``.
    seconds : float
        For the command; booting has :data:`BOOT_SECONDS` of its own.
    """
    (CACHE / "work").mkdir(exist_ok=True)
    # Not below /tmp, /var/tmp or /run: the guest has its own.
    folder = Path(tempfile.mkdtemp(prefix="guest-", dir=CACHE / "work"))
    try:
        (folder / "now").write_text(f"{time.time():.0f}\n")
        words = {"{folder}": str(folder), "{python}": str(CACHE / "venv/bin/python")}
        inner = [words.get(word, word) for word in argv]
        variables = [f"{key}={value}" for key, value in {"PYTHONPATH": str(REPO), **(environment or {})}.items()]
        init = [str(REPO / "tests/vm/guest_init"), str(CACHE), str(folder), "env", *variables, *inner]
        script = folder / "script"
        script.write_text(shlex.join(init) + "\n")
        yield _run(virtme(kernel(series), cpus, script), folder, seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def virtme(version: str, cpus: int, script: Path) -> list[str]:
    """Return the command line that boots `version` and runs `script` by bash."""
    image = CACHE / f"{PREFIX}{version}" / "boot" / f"vmlinuz-{version}"
    qemu = CACHE / "qemu"
    argv = [
        "virtme-run",
        "--kimg",
        str(image),
        "--mods",
        "auto",
        "--rw",
        "--force-9p",
        "--disable-microvm",
        "--disable-kvm",
    ]
    argv += ["--no-virtme-ng-init", "--busybox", str(qemu / "bin/busybox")]
    argv += ["--qemu-bin", str(qemu / "usr/bin/qemu-system-x86_64"), "--cpus", str(cpus), "--memory", "2G"]
    argv += ["--show-boot-console", "--script-sh", f"bash {shlex.quote(str(script))}", "--qemu-opts"]
    for part in ("qemu", "seabios", "../lib/ipxe/qemu"):
        argv += ["-L", str(qemu / "usr/share" / part)]
    for port, (device, mac) in enumerate((("igb", "52:54:00:77:00:02"), ("virtio-net-pci", "52:54:00:77:00:01"))):
        argv += ["-netdev", f"hubport,id=port{port},hubid=0"]
        argv += ["-device", f"{device},netdev=port{port},mac={mac},romfile="]
    return argv


def _run(argv: list[str], folder: Path, seconds: float) -> Finished:
    libraries = ":".join(str(CACHE / "qemu" / lib / "x86_64-linux-gnu") for lib in ("usr/lib", "lib"))
    path = os.pathsep.join([str(CACHE / "bin"), str(CACHE / "venv/bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "LD_LIBRARY_PATH": libraries, "TERM": "dumb"}
    started = time.monotonic()
    # virtme-ng wants a terminal, which `script` makes; `timeout` is for the case that this process is killed.
    with (folder / "console").open("wb") as console:
        process = subprocess.Popen(
            ["timeout", "--kill-after=5", str(BOOT_SECONDS + seconds + 10), "nice", "-n", "19", "script", "-qec", shlex.join(argv), "/dev/null"],
            stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(BOOT_SECONDS + seconds)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest did not end within {BOOT_SECONDS + seconds} s: {_tail(folder)}") from None
        finally:
            _stop(process)
    if not (folder / "status").exists():
        raise GuestError(f"the guest's command did not end: {_tail(folder)}")
    output = (folder / "output").read_text(errors="replace")
    return Finished(int((folder / "status").read_text()), output, folder, time.monotonic() - started)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End `script` and the QEMU below it, which has a session of its own, so found by descent."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"qemu-system" in words.split(b"\0")[0] and _shares(int(path.parent.name), process.pid):
            os.kill(int(path.parent.name), signal.SIGKILL)
    if process.poll() is None:
        process.kill()
        process.wait()


def _shares(pid: int, ancestor: int) -> bool:
    """Return whether `pid` descends from `ancestor`."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def _tail(folder: Path) -> str:
    texts = [
        path.read_text(errors="replace")[-1500:] for name in ("output", "console") if (path := folder / name).exists()
    ]
    return "\n".join(texts)
