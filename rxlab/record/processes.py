"""The processes of a workload: wait for what they print and where they listen, end them with their children."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from rxlab.errors import CaptureError

READY_TIMEOUT = 20.0


def wait_listening(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a TCP or UDP socket in the namespace of `process` is bound to `port`."""
    deadline = time.monotonic() + READY_TIMEOUT
    wanted = f":{port:04X}"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
            try:
                lines = Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()
            except OSError:
                continue
            rows = [line.split() for line in lines[1:]]
            if any(row[1].endswith(wanted) and row[3] == state for row in rows):
                return
        time.sleep(0.01)
    raise CaptureError(
        "the workload's server does not listen",
        where=f"port {port}",
        found=f"exit status {process.returncode}" if process.poll() is not None else "no listening socket",
    )


def read_line(process: subprocess.Popen[bytes], timeout: float) -> bytes:
    """Read one line of a process's unbuffered standard output; what came so far when it ends or takes too long."""
    assert process.stdout is not None
    line, deadline = b"", time.monotonic() + timeout
    while not line.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
        if select.select([process.stdout], [], [], left)[0]:
            character = os.read(process.stdout.fileno(), 1)
            if not character:
                break
            line += character
    return line


def last_line(path: Path) -> str:
    """Return the last line of a log, for an error message."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1].strip() if lines else ""


def open_private(path: Path) -> IO[bytes]:
    """Open a file for writing that only its owner can read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def close_quietly(stream: IO[bytes] | None) -> None:
    """Close a pipe whose other end may be gone."""
    if stream is not None:
        with suppress(OSError):
            stream.close()


def kill_group(process: subprocess.Popen[bytes], signum: int) -> None:
    """Signal a process that was started in a session of its own, with its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def kill_after(process: subprocess.Popen[bytes], timeout: float) -> None:
    """Wait for a process that was told to end, and kill it when it does not."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        kill_group(process, signal.SIGKILL)
        process.wait()
