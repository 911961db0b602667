"""Boots one of Debian's kernels in QEMU on this machine's own root file system and runs a command in it.

QEMU emulates the CPUs (TCG): times measured in a guest mean nothing, what the kernel *does* is real. ``tests/vm/fetch`` fills the
cache. The guest has the ports that a person would cable together, an igb with four queues and a virtio-net peer, on a hub that
no host network is part of.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import shutil
import signal
import subprocess
import sys
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
    return None if list(CACHE.glob("ready-*")) else f"nothing in {CACHE}: run tests/vm/fetch"


def kernel(series: str) -> str:
    """Return the version of the kernel of `series` (``6.12``) that the cache holds."""
    found = [path.parent.name.removeprefix(PREFIX) for path in CACHE.glob(f"{PREFIX}{series}.*/ramdisk")]
    if not found:
        raise GuestError(f"no kernel {series} in {CACHE}: run tests/vm/fetch")
    return sorted(found)[-1]


@contextmanager
def run_scenario(name: str, *, series: str = "6.12", seconds: float = 600) -> Iterator[Finished]:
    """Run a script of tests/vm/scenarios with the folder as its argument; its failure is an error with what it printed."""
    script = Path(__file__).with_name("scenarios") / name
    with run_in_guest(
        [sys.executable if name.endswith(".py") else "bash", str(script), "{folder}"], series=series, seconds=seconds
    ) as done:
        if done.status != 0:
            raise GuestError(f"scenario {name} ended with status {done.status}: {done.output[-3000:]}")
        yield done


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
        ``{folder}`` stands for the folder both sides share, the only place where what the guest writes stays; ``{python}`` for
        this interpreter.
    series : str
        Kernel, e.g. ``"6.1"``.
    seconds : float
        For the command; booting has :data:`BOOT_SECONDS` of its own.
    """
    (CACHE / "work").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="guest-", dir=CACHE / "work"))
    try:
        (folder / "now").write_text(f"{time.time():.0f}\n")
        inner = [word.replace("{folder}", str(folder)).replace("{python}", sys.executable) for word in argv]
        given = {
            "GUEST_CACHE": CACHE,
            "GUEST_PYTHON": sys.executable,
            "GUEST_SCENARIOS": REPO / "tests/vm/scenarios",
            "PYTHONPATH": REPO,
            **(environment or {}),
        }
        variables = [f"{key}={value}" for key, value in given.items()]
        (folder / "command").write_text(shlex.join(["env", *variables, *inner]) + "\n")
        try:
            done = _run(qemu(kernel(series), cpus, folder), folder, seconds)
        except GuestError:
            # Once more when it did not boot; never when the command has begun, whose outcome is what a test judges.
            if (folder / "booted").exists():
                raise
            done = _run(qemu(kernel(series), cpus, folder), folder, seconds)
        yield done
    finally:
        # RXLAB_VM_KEEP=1: to look at what failed.
        if os.environ.get("RXLAB_VM_KEEP") != "1":
            shutil.rmtree(folder, ignore_errors=True)


def tsc_khz() -> int:
    """Return the rate of this machine's time stamp counter, which is the emulated one's too.

    The guest's kernel measures it while its CPUs wait for this machine's: on a busy one it was off by a factor of five.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("0f31 48c1e220 4809d0 c3"))  # rdtsc; shl rdx, 32; or rax, rdx; ret
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))

    def once() -> tuple[int, int]:
        # The narrowest of many: in between this process may have waited.
        readings = [(time.monotonic_ns(), read(), time.monotonic_ns()) for _ in range(100)]
        before, ticks, after = min(readings, key=lambda reading: reading[2] - reading[0])
        return (before + after) // 2, ticks

    (start, first), _, (end, last) = once(), time.sleep(0.2), once()
    return round((last - first) * 1e6 / (end - start))


def qemu(version: str, cpus: int, folder: Path) -> list[str]:
    """Return the command line that boots `version` and runs the command kept in `folder`."""
    image, root = CACHE / f"{PREFIX}{version}", CACHE / "qemu"
    argv = [str(root / "usr/bin/qemu-system-x86_64"), "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]
    argv += ["-smp", str(cpus), "-m", "2G", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
    for part in ("qemu", "seabios", "../lib/ipxe/qemu"):
        argv += ["-L", str(root / "usr/share" / part)]
    argv += ["-kernel", str(image / "boot" / f"vmlinuz-{version}"), "-initrd", str(image / "ramdisk")]
    for tag, path, mode in (("root", Path("/"), ",readonly=on"), ("folder", folder, "")):
        argv += ["-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap{mode}"]
        argv += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    for port, (device, mac) in enumerate((("igb", "52:54:00:77:00:02"), ("virtio-net-pci", "52:54:00:77:00:01"))):
        argv += ["-netdev", f"hubport,id=port{port},hubid=0"]
        argv += ["-device", f"{device},netdev=port{port},mac={mac},romfile="]
    # Mitigations cost an emulated CPU a flushed TLB per system call; expedited RCU spares perf seconds per event it opens.
    words = [
        "console=ttyS0",
        "panic=-1",
        "loglevel=4",
        "mitigations=off",
        "nokaslr",
        "rcupdate.rcu_expedited=1",
    ]
    words += [f"tsc_early_khz={tsc_khz()}", "tsc=reliable"]
    words += [f"rxlab.folder={folder}", f"rxlab.init={REPO / 'tests/vm/guest_init'}"]
    return [*argv, "-append", " ".join(words)]


def _run(argv: list[str], folder: Path, seconds: float) -> Finished:
    libraries = ":".join(str(CACHE / "qemu" / lib / "x86_64-linux-gnu") for lib in ("usr/lib", "lib"))
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
    started = time.monotonic()
    # `timeout` is for the case that this process is killed.
    limit = ["timeout", "--kill-after=5", str(BOOT_SECONDS + seconds + 10), "nice", "-n", "5"]
    with (folder / "console").open("wb") as console:
        process = subprocess.Popen(
            [*limit, *argv],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(BOOT_SECONDS + seconds)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest did not end within {BOOT_SECONDS + seconds} s: {_tail(folder)}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not (folder / "status").exists():
        raise GuestError(f"the guest's command did not end: {_tail(folder)}")
    output = (folder / "output").read_text(errors="replace")
    return Finished(int((folder / "status").read_text()), output, folder, time.monotonic() - started)


def _tail(folder: Path) -> str:
    texts = [
        path.read_text(errors="replace")[-1500:] for name in ("output", "console") if (path := folder / name).exists()
    ]
    return "\n".join(texts)
